"""How a trained model is written: in files of which the host holds one at a time."""

import copyreg
from contextlib import nullcontext
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from trl import GRPOConfig, SFTConfig

from trainers.plan.host_memory import SHARD
from trainers.watch.phases import PhaseTimer


def _without_token(arguments: GRPOConfig | SFTConfig) -> tuple[Any, ...]:
    """What is pickled of arguments: transformers writes them beside the model, and push_to_hub uploads that file."""
    return copyreg.__newobj__, (type(arguments),), vars(arguments) | {"hub_token": None}


for kind in (GRPOConfig, SFTConfig):
    copyreg.pickle(kind, _without_token)


class OwnSaving:
    """Lets a transformers trainer write its model in shards, and no card of TRL's.

    safetensors copies every tensor of a file from the GPU to the host, and holds the copies until the file is written;
    in shards of 50 GB, as transformers writes them, that is the whole model.
    """

    timer: PhaseTimer

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL's tells of another use, and would take the place of a README.md that is there: see model_card.py."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        memory = self.timer.memory
        # Views of the engine's tensors are cloned on the device to be saved.
        noted = nullcontext() if memory is None else memory.between_steps("save")
        with self.timer.during("save"), noted:
            self._save_in_shards(output_dir, state_dict)

    def _save_in_shards(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):  # adapters are one small file
            super()._save(output_dir, state_dict)
            return
        model.save_pretrained = partial(model.save_pretrained, max_shard_size=SHARD)  # the trainer passes no size
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained
