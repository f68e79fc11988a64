"""Frozen models: log-probabilities of parts of texts, a whole batch at once. Student and reference are such.

A pass reads up to `tokens_per_pass` tokens. Inside a pass the texts go through each layer in micro-batches of like
length, and are projected onto the vocabulary only where a log-probability is asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from data.render import Encoded
from trainers.plan.model_shapes import longrope_limit
from trainers.plan.workload import MICRO_TOKENS, SCORE_TILE

Span = tuple[int, int]


class Backbone(Protocol):
    """A causal language model up to its last hidden state, and the head behind it."""

    config: Any
    device: torch.device

    @property
    def lm_head(self) -> nn.Module:
        """The output embedding; its weights are there while `run` yields."""

    def run(self, batches: list[Tensor]) -> Iterator[Tensor]:
        """Yield the last hidden states `[texts, tokens, hidden]` of each batch of ids `[texts, tokens]`, in order."""

    def blend(self, parameters: dict[str, Tensor], share: float) -> None:
        """Move each weight to `(1 - share)` of itself plus `share` of the parameter of its name."""


class ResidentBackbone:
    """A model whose weights stay on the device that computes.

    Args:
        model: The model, on `device`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device, self.config = model, device, model.config

    @property
    def lm_head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def run(self, batches: list[Tensor]) -> Iterator[Tensor]:
        for ids in batches:
            yield self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def blend(self, parameters: dict[str, Tensor], share: float) -> None:
        own = dict(self.model.named_parameters())
        for name, value in parameters.items():
            own[name].mul_(1 - share).add_(value.to(self.device), alpha=share)


class _Head:
    """What TRL's fused head needs of a model: a config, a head, and a backbone that hands on what it is given.

    Args:
        is_top1: Whether it is also told if greedy decoding would have written a label.
    """

    def __init__(self, backbone: Backbone, temperature: float, is_top1: bool) -> None:
        self.config, self._backbone, self.is_top1 = backbone.config, backbone, is_top1
        # TRL knows each family's scale and soft cap of the logits, and computes the log-probabilities of tiles of
        # logits in fp32.
        outputs = ("log_probs", "is_top1") if is_top1 else ("log_probs",)
        add_fused_lm_head(self, temperature=temperature, cast_lm_head_to_fp32=True, outputs=outputs)

    def forward(self) -> None:
        raise NotImplementedError("only the fused head is used")

    def base_model(self, hidden: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=hidden)

    def get_output_embeddings(self) -> nn.Module:
        return self._backbone.lm_head

    def log_probs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of `[positions, hidden]` states and `[positions]` labels; fp32 and, if asked for, bool, on the CPU."""
        logprobs, is_top1 = [], []
        step, width = SCORE_TILE[hidden.device.type]
        with _exact_on_tensor_cores(hidden), _tiles_of(width):
            for states, targets in zip(hidden.split(step), labels.split(step), strict=True):
                out = self.forward(
                    states[None], shift_labels=targets[None], fused_lm_head=True, output_router_logits=False
                )
                logprobs.append(out.log_probs[0].float().cpu())
                if self.is_top1:
                    is_top1.append(out.is_top1[0].bool().cpu())
        return torch.cat(logprobs), torch.cat(is_top1) if is_top1 else None


@contextmanager
def _tiles_of(width: int) -> Iterator[None]:
    """Let TRL's head compute so many vocabulary entries at once: a constant of its module, which it reads at each call.

    Nothing else asks TRL's head meanwhile: who scores ahead is waited for before the trainer computes.
    """
    before = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = width
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


@contextmanager
def _exact_on_tensor_cores(states: Tensor) -> Iterator[None]:
    """Let the head's fp32 products of 16-bit states and weights run as TF32.

    Its 10 bits of mantissa hold a bf16's 7 and an fp16's 10, so no factor is rounded; sums are fp32 either way. Without
    it a GPU computes such products apart from its tensor cores.
    """
    if states.device.type != "cuda" or states.dtype.itemsize != 2:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set in torch's new way, as by `tf32=true`: then these are TF32 anyway
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FrozenModel:
    """Log-probabilities of chosen tokens under a model that is not trained.

    Args:
        backbone: The model.
        temperature: The log-probabilities are those of logits / temperature.
        tokens_per_pass: Padded tokens read in one pass over the weights: between two layers the hidden states of so
            many are held. A longer text is a pass of its own.
    """

    def __init__(self, backbone: Backbone, temperature: float, tokens_per_pass: int) -> None:
        self.backbone, self.tokens_per_pass = backbone, tokens_per_pass
        self._apart = longrope_limit(backbone.config.get_text_config().to_dict())
        self._head, self._greedy_head = (_Head(backbone, temperature, is_top1) for is_top1 in (False, True))

    @torch.no_grad()
    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of `[positions]` labels after the last hidden states `[positions, hidden]`, while the head is there."""
        return self._head.log_probs(hidden, labels)[0]

    @torch.no_grad()
    def score(
        self, texts: list[Encoded], parts: list[list[Span]], greedy_parts: list[list[Span]] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Score a batch of texts in as few passes as fit.

        Args:
            texts: Token ids.
            parts: For each text, the spans `[start, end)` to score; a span cannot start at the first token.
            greedy_parts: For each text, more of them, of whose tokens is told too whether each is the likeliest.

        Returns:
            For each text the log-probability of each token and whether it is the likeliest, `[tokens]` each, fp32 and
            bool on the CPU; 0 and False outside the spans.
        """
        asked = [(self._head, parts)] + ([(self._greedy_head, greedy_parts)] if greedy_parts is not None else [])
        scores = [(torch.zeros(len(t.ids)), torch.zeros(len(t.ids), dtype=torch.bool)) for t in texts]
        micro = MICRO_TOKENS[self.backbone.device.type]
        for batches in passes([len(text.ids) for text in texts], self.tokens_per_pass, micro, self._apart):
            hidden_states = self.backbone.run([_padded([texts[i].ids for i in batch]) for batch in batches])
            for batch, hidden in zip(batches, hidden_states, strict=True):
                for head, spans in asked:
                    _score_batch(head, hidden, batch, texts, spans, scores)
        return scores


def _score_batch(
    head: _Head,
    hidden: Tensor,
    batch: list[int],
    texts: list[Encoded],
    parts: list[list[Span]],
    scores: list[tuple[Tensor, Tensor]],
) -> None:
    """Write into `scores` what the head tells of the spans of one micro-batch."""
    wanted = [_positions(parts[i]) for i in batch]
    rows = torch.tensor([row for row, positions in enumerate(wanted) for _ in positions], dtype=torch.long)
    positions = torch.tensor([p for positions in wanted for p in positions], dtype=torch.long)
    if not len(rows):
        return
    labels = torch.tensor([texts[i].ids[p] for i, ps in zip(batch, wanted, strict=True) for p in ps])
    # The state at position t - 1 tells of token t.
    states = hidden[rows.to(hidden.device), (positions - 1).to(hidden.device)]
    logprobs, is_top1 = head.log_probs(states, labels.to(hidden.device))
    counts = [len(positions) for positions in wanted]
    for i, ps, lp in zip(batch, wanted, logprobs.split(counts), strict=True):
        scores[i][0][ps] = lp
    if is_top1 is not None:
        for i, ps, top in zip(batch, wanted, is_top1.split(counts), strict=True):
            scores[i][1][ps] = top


def _positions(spans: list[Span]) -> list[int]:
    assert all(start > 0 or start == end for start, end in spans), "the first token has no log-probability"
    return sorted({position for start, end in spans for position in range(start, end)})


def _padded(rows: list[list[int]]) -> Tensor:
    """Pad on the right, `[texts, tokens]`: attention looks to the left, so no mask is needed for the real tokens."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def passes(
    lengths: list[int], tokens_per_pass: int, micro_tokens: int, apart: int | None = None
) -> list[list[list[int]]]:
    """Split texts into passes, and each pass into micro-batches of texts of like length.

    Args:
        lengths: Tokens of each text.
        tokens_per_pass: Most padded tokens of a pass.
        micro_tokens: Most padded tokens of a micro-batch.
        apart: Texts of more tokens than that share no micro-batch with others, whose numbers they would change (see
            `longrope_limit`).

    Returns:
        Passes of micro-batches of indices; together they hold each index once. Only a text that is longer than a limit
        exceeds it, alone.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i], reverse=True)
    limit = min(micro_tokens, tokens_per_pass)
    micro: list[list[int]] = []
    for i in order:
        longest = lengths[micro[-1][0]] if micro else 0
        is_of_their_kind = apart is None or (longest > apart) == (lengths[i] > apart)
        if micro and is_of_their_kind and longest * (len(micro[-1]) + 1) <= limit:
            micro[-1].append(i)
        else:
            micro.append([i])
    result: list[list[list[int]]] = []
    held = 0
    for batch in micro:
        tokens = lengths[batch[0]] * len(batch)
        if result and held + tokens <= tokens_per_pass:
            result[-1].append(batch)
            held += tokens
        else:
            result.append([batch])
            held = tokens
    return result
