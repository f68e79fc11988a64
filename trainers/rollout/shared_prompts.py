"""Log-probabilities of completions whose prompts are read once for all completions of a question.

GRPO puts several completions of one prompt into a batch, and a forward pass over whole rows computes the prompt again
for each. Here the tokens of a batch are one long row without padding, every prompt once (as in Prefix Grouper, arXiv
2506.05433); only within attention are they rows again, of plain causal attention, in which a prompt's queries, keys
and values stand before each of its completions. Gradients of all of them add up there. The model's layers know nothing
of it, so they may be computed again for the backward pass (gradient checkpointing). The numbers are the same, but for
dropout: what it drops of a prompt is then the same for all its completions. TRL's fused head sees the completions only,
also where it has no kernel that picks them out (on a CPU).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from trl.trainer.utils import split_tensor_dict

from trainers.attention import REPEATED_KEYS
from trainers.plan.model_shapes import can_share_prompts
from trainers.weights.adapters import base_model

KINDS = ("sdpa", "eager", REPEATED_KEYS)
OF_ROWS = "_of_rows"


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch stand in one row.

    Attributes:
        ids, positions: `[tokens]`, those that are read, and where in its own row each stands.
        own: `[completion tokens]`, where among them those are from which a completion's tokens are to be told; where
            there are none, one, so that there is something to differentiate.
        labels: `[completion tokens]`, the tokens to tell; -100 for that one.
        columns: `[completion tokens]`, their places in the rows' completions, `[rows * logits_to_keep]`.
        packed_at: `[rows * width]`, for each token of each row where among `ids` it is; for what is padding, 0.
        taken: `[tokens]`, where in `[rows * width]` each of `ids` was taken from.
        shared: `[prompt tokens]`, those of `ids` that rows of a prompt begin with.
        copies: `[prompt tokens, rows of a prompt]`, where in `[rows * width]` they are; -1 where there are fewer rows.
        rows: Number of rows.
    """

    ids: Tensor
    positions: Tensor
    own: Tensor
    labels: Tensor
    columns: Tensor
    packed_at: Tensor
    taken: Tensor
    shared: Tensor
    copies: Tensor
    rows: int

    @property
    def is_worthwhile(self) -> bool:
        """Whether fewer tokens are read than in rows that are padded to the longest."""
        return 0 < len(self.ids) < len(self.packed_at)


def lay_out(input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Layout:
    """One row of the tokens of a batch, each prompt's once.

    Args:
        input_ids, attention_mask: `[rows, tokens]`, prompts padded on the left, completions on the right.
        logits_to_keep: The last so many columns are the completions.
    """
    rows, device = len(input_ids), input_ids.device
    before = input_ids.size(1) - logits_to_keep
    prompts = attention_mask[:, :before].sum(1, keepdim=True)
    lengths = attention_mask.sum(1, keepdim=True)
    longest = int(lengths.max())
    order = attention_mask.argsort(dim=1, descending=True, stable=True)[:, :longest]  # columns, those of the row first
    tokens = input_ids.gather(1, order)
    width = longest - 1  # a row's last token tells of none
    position = torch.arange(width, device=device).expand(rows, width)
    # The prompt's last token is read for each completion.
    in_prompt, in_row = position < prompts - 1, position < lengths - 1

    _, prompt_of = torch.unique(torch.stack((input_ids, attention_mask))[:, :, :before], dim=1, return_inverse=True)
    row = torch.arange(rows, device=device)
    first = torch.full((rows,), rows, device=device).scatter_reduce(0, prompt_of, row, "amin")  # row of each prompt
    reader = first[prompt_of]
    is_read = in_row & (~in_prompt | (reader == row)[:, None])
    packed_at = is_read.flatten().cumsum(0).view(rows, width) - 1
    packed_at = torch.where(in_prompt, packed_at[reader], packed_at).masked_fill(~in_row, 0)

    taken = is_read.flatten().nonzero()[:, 0]
    own = (is_read & ~in_prompt).flatten()
    columns = order[:, 1:] - before + row[:, None] * logits_to_keep
    shared = in_prompt.flatten()[taken].nonzero()[:, 0]
    # Rows of each prompt: the n-th of a prompt in column n.
    earlier = (prompt_of[:, None] == prompt_of[None, :]).tril(-1).sum(1)
    rows_by_prompt = torch.full((rows, int(earlier.max()) + 1), -1, device=device)
    rows_by_prompt[prompt_of, earlier] = row
    sharing = rows_by_prompt[prompt_of[taken[shared] // width]]
    copies = torch.where(sharing < 0, -1, sharing * width + position.flatten()[taken[shared]][:, None])
    at, labels, columns = own[taken].nonzero()[:, 0], tokens[:, 1:].flatten()[own], columns.flatten()[own]
    if not len(at):  # as where mask_truncated_completions leaves none: what is told of no token still learns nothing
        at, columns = at.new_zeros(1), columns.new_zeros(1)
        labels = labels.new_full((1,), -100)
    return Layout(
        ids=tokens[:, :width].flatten()[taken],
        positions=position.flatten()[taken],
        own=at,
        labels=labels,
        columns=columns,
        packed_at=packed_at.flatten(),
        taken=taken,
        shared=shared,
        copies=copies,
        rows=rows,
    )


def prompts_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in micro-batches of the same size, those of one prompt one after the other.

    Args:
        batches: As TRL's trainer buffers them: tensors and lists of rows, numbers of the whole, and None.
    """
    prompts = torch.stack([torch.cat([batch[f"prompt_{kind}"] for batch in batches]) for kind in ("ids", "mask")])
    order = torch.unique(prompts, dim=1, return_inverse=True)[1].argsort(stable=True)

    def arranged(parts: list[Any]) -> Any:
        if isinstance(parts[0], list):
            return [[row for part in parts for row in part][i] for i in order.tolist()]
        if isinstance(parts[0], Tensor) and parts[0].dim():
            return torch.cat(parts)[order.to(parts[0].device)]
        return parts[0]

    return split_tensor_dict({key: arranged([batch[key] for batch in batches]) for key in batches[0]}, len(batches))


class _ToRows(torch.autograd.Function):
    """`[tokens, heads, head width]` to `[rows * width, heads, head width]`.

    Backward, copies of a prompt add up as torch sums: in fp32 and in one order. `index_select`'s own gradient would add
    one after the other, rounded, on a GPU in any order.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return values.index_select(0, layout.packed_at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout, copies = ctx.layout, ctx.layout.copies
        values = grad.index_select(0, layout.taken)
        if len(copies):
            each = grad.index_select(0, copies.clamp(0).flatten()).view(*copies.shape, *grad.shape[1:])
            each.masked_fill_((copies < 0)[:, :, None, None], 0)
            values[layout.shared] = each.sum(1)
        return values, None


def _in_rows(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The attention of that name, `[1, heads, tokens, width]` laid out in rows meanwhile; without a layout, itself.

    Returns:
        `[1, tokens, heads, width]`, and no scores.
    """
    own = sys.modules[type(module).__module__]  # as transformers has it: eager attention is each model's own
    attend: Callable = AttentionInterface().get(name) or own.eager_attention_forward
    if layout is None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    query, key, value = (
        _ToRows.apply(states[0].transpose(0, 1), layout).unflatten(0, (layout.rows, -1)).transpose(1, 2)
        for states in (query, key, value)
    )
    mask = attention_mask if attention_mask.numel() else None  # see _masks
    out, _ = attend(module, query, key, value, mask, *args, **kwargs)
    return out.flatten(0, 1).index_select(0, layout.taken)[None], None


for _name in KINDS:
    AttentionInterface.register(_name + OF_ROWS, partial(_in_rows, _name))
    AttentionMaskInterface.register(_name + OF_ROWS, AttentionMaskInterface()[_name])


def let_share(model: PreTrainedModel | PeftModel) -> None:
    """Have a model's attention know layouts, where `can_share_prompts` says that it is seen to work."""
    base = base_model(model)
    if can_share_prompts(base.config.to_dict()) and base.config._attn_implementation in KINDS:
        base.set_attn_implementation(base.config._attn_implementation + OF_ROWS)


def can_share(model: Any) -> bool:
    """Whether a model knows layouts (`let_share`), and is not in a wrapper (`torch.compile`)."""
    return isinstance(model, PreTrainedModel | PeftModel) and model.config._attn_implementation.endswith(OF_ROWS)


def _masks(model: PreTrainedModel, layout: Layout) -> Tensor | dict[str, Tensor]:
    """The masks of the rows, as the model makes them; an empty one where rows need none.

    Were the model given none, it would make one of `[tokens, tokens]`.
    """
    embeddings = model.get_input_embeddings().weight
    rows = embeddings.new_empty(layout.rows, len(layout.packed_at) // layout.rows, 0)
    masks = create_masks_for_generate(model.config, rows, attention_mask=None, past_key_values=None)
    empty = embeddings.new_empty(1, 1, 0, 0)
    if isinstance(masks, dict):
        return {kind: empty if mask is None else mask for kind, mask in masks.items()}
    return empty if masks is None else masks


def rows_of(model: PreTrainedModel | PeftModel, layout: Layout) -> dict[str, Any]:
    """What a model's forward is given to read these rows as one, `[1, tokens]`."""
    masks = _masks(base_model(model), layout)
    ids, positions = layout.ids[None], layout.positions[None]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": masks, "layout": layout}


@contextmanager
def _states_picked(backbone: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the head see the states of these tokens only."""

    def pick(module: nn.Module, args: tuple, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state.index_select(1, places)
        return outputs

    handle = backbone.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def shared_prompt_outputs(
    model: PreTrainedModel | PeftModel, layout: Layout, logits_to_keep: int
) -> tuple[Tensor, Tensor]:
    """TRL's fused output (`add_fused_lm_head`) for the completions of a batch.

    Returns:
        Log-probabilities and entropies, `[rows, logits_to_keep]`, 0 where nothing is told.
    """
    with _states_picked(base_model(model).base_model, layout.own):
        outputs = model(**rows_of(model, layout), shift_labels=layout.labels[None], fused_lm_head=True)

    def put_back(values: Tensor) -> Tensor:
        found = values.new_zeros(layout.rows * logits_to_keep)
        return found.scatter(0, layout.columns, values[0]).view(layout.rows, logits_to_keep)

    return put_back(outputs.log_probs), put_back(outputs.entropy)
