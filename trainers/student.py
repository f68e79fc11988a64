"""The frozen student: what it makes of explanations."""

from dataclasses import dataclass

from torch import Tensor

from data.render import Encoded, Renderer
from trainers.scoring.frozen import FrozenModel


@dataclass(frozen=True)
class StudentScore:
    """What the student makes of one explanation; all tensors fp32 on the CPU.

    Attributes:
        explanation_logprobs: `[padding and explanation tokens]`, at the student's temperature.
        solution_logprobs: `[solution tokens]`, at the student's temperature.
        solves: Whether greedy decoding after the explanation writes the solution and then closes it.
    """

    explanation_logprobs: Tensor
    solution_logprobs: Tensor
    solves: bool


def explained_span(text: Encoded) -> tuple[int, int]:
    """All that stands between the opening tag and the closing one: the padding and the explanation."""
    return text.spans["padding"][0], text.spans["explanation"][1]


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
        # Embeddings have rows that no token uses, a larger model's more of them; one may be sampled all the same.
        rows = self.frozen.backbone.config.get_text_config().vocab_size
        if (unknown := max(text.ids)) >= rows:
            return f"token {unknown} was sampled, and the student's embedding has {rows} rows"
        start, end = text.spans["solution"]
        return "the solution has no tokens" if start == end else None

    def score(self, texts: list[Encoded]) -> list[StudentScore]:
        """Score texts with the parts of `data.formats.student_parts`."""
        explanations = [explained_span(text) for text in texts]
        solutions = [text.spans["solution"] for text in texts]
        # With the first token after the solution: without it, 12 would pass where 127 is written.
        ends = [text.spans["end"][0] for text in texts]
        closed = [[span, (end, end + 1)] for span, end in zip(solutions, ends, strict=True)]
        scores = self.frozen.score(texts, [[span] for span in explanations], closed)
        return [
            StudentScore(
                explanation_logprobs=logprobs[slice(*explanation)],
                solution_logprobs=logprobs[slice(*solution)],
                solves=bool(is_top1[solution[0] : closing[1]].all()),
            )
            for (logprobs, is_top1), explanation, (solution, closing) in zip(scores, explanations, closed, strict=True)
        ]
