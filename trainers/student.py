"""Frozen models: log-probabilities of parts of texts, for a whole batch; and the student, which is one."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from data.render import Encoded, Renderer


@dataclass(frozen=True)
class StudentScore:
    """What the student makes of one explanation; all tensors fp32 on the CPU.

    Attributes:
        explanation_logprobs: `[explanation tokens]`, at the student's temperature.
        solution_logprobs: `[solution tokens]`, at the student's temperature.
        solves: Whether greedy decoding after the explanation writes the solution and then closes it.
    """

    explanation_logprobs: Tensor
    solution_logprobs: Tensor
    solves: bool


class FrozenModel:
    """Log-probabilities of chosen tokens under a model that is not trained.

    Args:
        model: The model, on the CPU.
        device: Where to compute.
        temperature: The log-probabilities are those of logits / temperature.
        tokens_per_pass: Padded tokens in one forward pass.
        offload: Keep the weights in host memory and move them to `device` only while scoring.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device, temperature: float, tokens_per_pass: int, offload: bool
    ) -> None:
        self.device, self.tokens_per_pass = device, tokens_per_pass
        self.offload = offload and device.type != "cpu"
        self.model = model.eval().requires_grad_(False)
        # TRL's fused head projects only the labelled positions, in tiles: full logits are never held. `is_top1` tells
        # whether greedy decoding would have written the label.
        add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=True, outputs=("log_probs", "is_top1"))
        if not self.offload:
            self.model.to(device)

    @torch.no_grad()
    def score(self, texts: list[Encoded], parts: list[list[tuple[int, int]]]) -> list[tuple[Tensor, Tensor]]:
        """Score a batch of texts in as few passes as fit.

        Args:
            texts: Token ids.
            parts: For each text, the spans `[start, end)` to score; a span cannot start at the first token.

        Returns:
            For each text the log-probability of each token and whether it is the likeliest, `[tokens]` each, fp32 and
            bool on the CPU; 0 and False outside the spans.
        """
        if self.offload:
            self.model.to(self.device)
        scores: list[tuple[Tensor, Tensor] | None] = [None] * len(texts)
        for batch in self._batches(texts):
            results = self._score_batch([texts[i] for i in batch], [parts[i] for i in batch])
            for index, score in zip(batch, results, strict=True):
                scores[index] = score
        if self.offload:
            self.model.to("cpu")
        return scores

    def _batches(self, texts: list[Encoded]) -> list[list[int]]:
        """Group texts of like length, so that little of a pass is padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids), reverse=True)
        batches: list[list[int]] = []
        for i in order:
            if batches and len(texts[batches[-1][0]].ids) * (len(batches[-1]) + 1) <= self.tokens_per_pass:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _score_batch(self, texts: list[Encoded], parts: list[list[tuple[int, int]]]) -> list[tuple[Tensor, Tensor]]:
        length = max(len(t.ids) for t in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, (text, spans) in enumerate(zip(texts, parts, strict=True)):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            for start, end in spans:
                assert start > 0 or start == end, "the first token has no log-probability"
                labels[row, start:end] = ids[row, start:end]
        ids, mask, labels = ids.to(self.device), mask.to(self.device), labels.to(self.device)
        outputs = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        # Position t of the outputs tells of token t + 1.
        logprobs = torch.nn.functional.pad(outputs.log_probs.float().cpu(), (1, 0))
        is_top1 = torch.nn.functional.pad(outputs.is_top1.bool().cpu(), (1, 0))
        return [(logprobs[row, : len(t.ids)], is_top1[row, : len(t.ids)]) for row, t in enumerate(texts)]


class Student:
    """The frozen student: what it makes of explanations.

    Args:
        frozen: The model.
        renderer: The student's own template and tokenizer.
        max_tokens: Longest text it can read.
    """

    def __init__(self, frozen: FrozenModel, renderer: Renderer, max_tokens: int) -> None:
        self.frozen, self.renderer, self.max_tokens = frozen, renderer, max_tokens

    def why_not(self, text: Encoded) -> str | None:
        """Why a text cannot be scored; None where it can."""
        if len(text.ids) > self.max_tokens:
            return f"longer than the {self.max_tokens} tokens that the student can read"
        start, end = text.spans["solution"]
        return "the solution has no tokens" if start == end else None

    def score(self, texts: list[Encoded]) -> list[StudentScore]:
        """Score texts with the parts of `data.formats.student_parts`."""
        scores = []
        spans = [self._scored_spans(text) for text in texts]
        for (explanation, solution, closing), (logprobs, is_top1) in zip(
            spans, self.frozen.score(texts, spans), strict=True
        ):
            scores.append(
                StudentScore(
                    explanation_logprobs=logprobs[slice(*explanation)],
                    solution_logprobs=logprobs[slice(*solution)],
                    solves=bool(is_top1[solution[0] : closing[1]].all()),
                )
            )
        return scores

    @staticmethod
    def _scored_spans(text: Encoded) -> list[tuple[int, int]]:
        """Explanation, solution, and the first token after it: without that, 12 would pass where 127 is written."""
        closing = text.spans["end"][0]
        return [text.spans["explanation"], text.spans["solution"], (closing, closing + 1)]
