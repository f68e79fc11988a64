"""What the teacher and the student read and write: tags, system prompts, and the order of the parts.

A text is a list of `Part`s. Token ids are the concatenation of the parts' ids, so the span of each part is known by
construction and never searched for. The layouts follow "Reinforcement Learning Teachers" (arXiv 2506.08388).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class TagFormat:
    """The tags around each part, the padding after an opening tag, and the system prompts."""

    explanation: tuple[str, str]
    thought: tuple[str, str]
    solution: tuple[str, str]
    teacher_system_prompt: str
    student_system_prompt: str
    padding: str = "\n\n"

    @property
    def every_tag(self) -> tuple[str, ...]:
        return (*self.explanation, *self.thought, *self.solution)

    def with_prompts(self, teacher: str | None, student: str | None) -> "TagFormat":
        """Return the format with the system prompts that are given."""
        return replace(
            self,
            teacher_system_prompt=self.teacher_system_prompt if teacher is None else teacher,
            student_system_prompt=self.student_system_prompt if student is None else student,
        )


TAG_FORMATS = {
    "stratos": TagFormat(
        explanation=("<|begin_of_explanation|>", "<|end_of_explanation|>"),
        thought=("<|begin_of_thought|>", "<|end_of_thought|>"),
        solution=("<|begin_of_solution|>", "<|end_of_solution|>"),
        teacher_system_prompt=(
            "You teach. You are given a question together with its solution, and you write the explanation from "
            "which a student who has only the question would find that solution. Work through the question step by "
            "step: say what is asked, which idea helps and why, carry out every step with its intermediate results, "
            "and check them. Every step must follow from what was said before, as if the solution were not yet known; "
            "never appeal to the given solution. Put the explanation between <|begin_of_explanation|> and "
            "<|end_of_explanation|>."
        ),
        student_system_prompt=(
            "You solve questions by thinking first. Think step by step between <|begin_of_thought|> and "
            "<|end_of_thought|>: analyse the question, try out ideas, carry out each step with its intermediate "
            "results, check them, and correct yourself where needed. Then give the final solution, with the steps "
            "that lead to it, between <|begin_of_solution|> and <|end_of_solution|>."
        ),
    ),
    "r1": TagFormat(
        explanation=("<explanation>", "</explanation>"),
        thought=("<think>", "</think>"),
        solution=("<answer>", "</answer>"),
        teacher_system_prompt=(
            "You teach. You are given a question together with its answer, and you write the explanation from which a "
            "student who has only the question would find that answer. Work through the question step by step, so that "
            "every step follows from what was said before, as if the answer were not yet known. Put the explanation "
            "between <explanation> and </explanation>."
        ),
        student_system_prompt=(
            "You solve questions by thinking first. Think step by step between <think> and </think>, then give the "
            "answer between <answer> and </answer>."
        ),
    ),
}


class Part(NamedTuple):
    """A piece of text with a name; `sampled` parts are written by the model, the others are given to it."""

    name: str
    text: str
    sampled: bool


def teacher_parts(prompt_head: str, tags: TagFormat, solution: str, explanation: str, turn_end: str) -> list[Part]:
    """Lay out what the teacher reads and writes.

    Args:
        prompt_head: System prompt and question in the chat template, up to where the assistant begins.
        solution: The solution it is shown.
        explanation: The explanation; what the model is trained to write.
        turn_end: The text of the token that ends a turn.
    """
    given = f"{tags.solution[0]}{solution}{tags.solution[1]}\n\n{tags.explanation[0]}"
    return [
        Part("prompt", prompt_head + given, False),
        Part("padding", tags.padding, False),
        Part("explanation", explanation, True),
        Part("end", tags.explanation[1] + turn_end, True),
    ]


def student_parts(prompt_head: str, tags: TagFormat, explanation: str, solution: str, turn_end: str) -> list[Part]:
    """Lay out what the student writes after reading the question: the explanation as its thought, then the solution."""
    return [
        Part("prompt", prompt_head, False),
        Part("open", tags.thought[0], True),
        Part("padding", tags.padding, True),
        Part("explanation", explanation, True),
        Part("between", f"{tags.thought[1]}\n\n{tags.solution[0]}", True),
        Part("solution", solution, True),
        Part("end", tags.solution[1] + turn_end, True),
    ]
