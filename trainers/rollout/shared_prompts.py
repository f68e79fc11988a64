"""Log-probabilities of completions whose prompts are read once for all completions of a question.

GRPO puts several completions of one prompt into a batch, and a forward pass over whole rows reads the prompt again for
each. Here it is read once, and its keys and values serve every row that continues it; gradients of all of them flow
back through them (as in Prefix Grouper, arXiv 2506.05433). The numbers are the same, but for dropout: what it drops of
a prompt is then the same for all its completions. TRL's fused head sees the completions only, also where it has no
kernel that picks them out (on a CPU).
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from trainers.plan.model_shapes import can_share_prompts


def distinct_prompts(input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> tuple[Tensor, Tensor] | None:
    """Which rows of a batch continue the same prompt.

    Args:
        input_ids, attention_mask: `[rows, tokens]`, prompts padded on the left, completions on the right.
        logits_to_keep: The last so many columns are the completions.

    Returns:
        `[prompts]`: for each distinct prompt a row that has it; `[rows]`: the prompt of each row. None where sharing
        saves nothing.
    """
    length = input_ids.size(1) - logits_to_keep
    if length < 2:  # the last token of a prompt is read with each completion
        return None
    prompts = torch.stack((input_ids[:, :length], attention_mask[:, :length]), dim=2)
    distinct, of_row = torch.unique(prompts, dim=0, return_inverse=True)
    if len(distinct) == len(prompts):
        return None
    first = torch.full((len(distinct),), len(prompts), device=input_ids.device)
    rows = torch.arange(len(prompts), device=input_ids.device)
    return first.scatter_reduce(0, of_row, rows, "amin"), of_row


def can_share(model: Any) -> bool:
    """Whether it is seen to work: a model of `can_share_prompts`, whose layers hand on their keys and values.

    Those that are computed again for the backward pass do not; nor does a model in a wrapper (`torch.compile`).
    """
    if not isinstance(model, PreTrainedModel | PeftModel) or (model.training and model.is_gradient_checkpointing):
        return False
    return can_share_prompts(model.config.to_dict())


def shared_prompt_outputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, first: Tensor, of_row: Tensor
) -> tuple[Tensor, Tensor]:
    """TRL's fused output (`add_fused_lm_head`) for the completions of a batch.

    Args:
        first, of_row: What `distinct_prompts` returns.

    Returns:
        Log-probabilities and entropies, `[rows, logits_to_keep]`, 0 where `attention_mask` is.
    """
    read = input_ids.size(1) - logits_to_keep - 1
    cache = model(
        input_ids=input_ids[first, :read],
        attention_mask=attention_mask[first, :read],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    for layer in cache.layers:  # each row gets those of its prompt
        layer.keys, layer.values = layer.keys.index_select(0, of_row), layer.values.index_select(0, of_row)
    rest = input_ids[:, read:]
    labels = rest.masked_fill(attention_mask[:, read:] == 0, -100)
    outputs = model(
        input_ids=rest, attention_mask=attention_mask, past_key_values=cache, labels=labels, fused_lm_head=True
    )
    return outputs.log_probs[:, -logits_to_keep:], outputs.entropy[:, -logits_to_keep:]
