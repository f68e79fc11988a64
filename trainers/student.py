"""The frozen student: log-probabilities of explanation and solution for a whole batch."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from data.render import Encoded, Renderer

logger = logging.getLogger(__name__)


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


class Student:
    """Scores texts with a frozen model.

    Args:
        model: The student, on the CPU.
        renderer: The student's own template and tokenizer.
        device: Where to compute.
        temperature: The log-probabilities are those of logits / temperature.
        tokens_per_pass: Padded tokens in one forward pass.
        offload: Keep the weights in host memory and move them to `device` only while scoring.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        device: torch.device,
        temperature: float,
        tokens_per_pass: int,
        offload: bool,
    ) -> None:
        self.renderer, self.device, self.tokens_per_pass = renderer, device, tokens_per_pass
        self.offload = offload and device.type != "cpu"
        self.model = model.eval().requires_grad_(False)
        # TRL's fused head projects only the labelled positions, in tiles: full logits are never held. `is_top1` tells
        # whether greedy decoding would have written the label.
        add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=True, outputs=("log_probs", "is_top1"))
        if not self.offload:
            self.model.to(device)

    @torch.no_grad()
    def score(self, texts: list[Encoded]) -> list[StudentScore]:
        """Score a batch of texts (parts as in `data.formats.student_parts`) in as few passes as fit.

        Args:
            texts: Token ids with the spans `explanation`, `solution` and `end`.
        """
        if self.offload:
            self.model.to(self.device)
        scores: list[StudentScore | None] = [None] * len(texts)
        for batch in self._batches(texts):
            for index, score in zip(batch, self._score_batch([texts[i] for i in batch]), strict=True):
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

    def _score_batch(self, texts: list[Encoded]) -> list[StudentScore]:
        length = max(len(t.ids) for t in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            for start, end in self._scored_spans(text):
                labels[row, start:end] = ids[row, start:end]
        ids, mask, labels = ids.to(self.device), mask.to(self.device), labels.to(self.device)
        outputs = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        # Position t of the outputs tells of token t + 1.
        logprobs, is_top1 = outputs.log_probs.float().cpu(), outputs.is_top1.cpu()
        scores = []
        for row, text in enumerate(texts):
            explanation, solution, closing = self._scored_spans(text)
            scores.append(
                StudentScore(
                    explanation_logprobs=logprobs[row, explanation[0] - 1 : explanation[1] - 1],
                    solution_logprobs=logprobs[row, solution[0] - 1 : solution[1] - 1],
                    solves=bool(is_top1[row, solution[0] - 1 : closing[1] - 1].all()),
                )
            )
        return scores

    @staticmethod
    def _scored_spans(text: Encoded) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Explanation, solution, and the first token after it: without that, 12 would pass where 127 is written."""
        closing = text.spans["end"][0]
        return text.spans["explanation"], text.spans["solution"], (closing, closing + 1)
