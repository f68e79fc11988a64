"""Log-probabilities of completions in rows that begin at their first token.

TRL pads prompts on the left, and tells the model so by a mask. Attention with a mask computes both halves of it, in
kernels that are slower than those of plain causal attention, and repeats keys and values for each head. Rows that begin
at their first token, padded behind, need none: no token looks at what comes after it. Positions count from 0 then, as
in the engine.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


def can_align(model: Any) -> bool:
    """Whether a model takes rows of any width; one that is compiled would be compiled for each."""
    return isinstance(model, PreTrainedModel | PeftModel)


def whole_row_outputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> tuple[Tensor, Tensor]:
    """TRL's fused output (`add_fused_lm_head`) for the completions of a batch.

    Args:
        input_ids, attention_mask: `[rows, tokens]`, prompts padded on the left, completions on the right.
        logits_to_keep: The last so many columns are the completions.

    Returns:
        Log-probabilities and entropies, `[rows, logits_to_keep]`, 0 where `attention_mask` is.
    """
    width = int(attention_mask.sum(dim=1).max())
    order = attention_mask.argsort(dim=1, descending=True, stable=True)[:, :width]  # columns, those of the row first
    ids = input_ids.gather(1, order)
    scored = (order >= input_ids.size(1) - logits_to_keep) & attention_mask.gather(1, order).bool()
    outputs = model(input_ids=ids, labels=ids.masked_fill(~scored, -100), fused_lm_head=True)
    # Where among the completions each token was that has a log-probability, all but the first.
    places = order[:, 1:] - (input_ids.size(1) - logits_to_keep)

    def put_back(values: Tensor) -> Tensor:
        at_completions = values.new_zeros(len(ids), logits_to_keep + 1)  # one column for what is none
        return at_completions.scatter(1, places.clamp(-1) + 1, values)[:, 1:]

    return put_back(outputs.log_probs), put_back(outputs.entropy)
