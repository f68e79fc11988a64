"""What trains, generates and scores.

transformers and peft import torchao wherever it is installed. It then tells of GPU kernels that this torch cannot load,
and torch of how torchao registers its enumerations: of neither does anything here depend. The filters are set before
any module of this package can import them.
"""

import logging

NOT_TOLD = {"torchao": "Failed to load ", "torch.utils._pytree": "is an Enum subclass"}


def _is_told(record: logging.LogRecord) -> bool:
    return NOT_TOLD[record.name] not in record.getMessage()


for _name in NOT_TOLD:
    logging.getLogger(_name).addFilter(_is_told)
