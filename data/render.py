"""Texts and token ids of one model: its chat template, its tokenizer, its end of turn."""

import logging
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.formats import Part, TagFormat, student_parts, teacher_parts
from data.offsets import encode_within, token_ends
from trainers.errors import ConfigError, Fault

logger = logging.getLogger(__name__)

_THINK = "<think>"  # of reasoning models, whatever the tags of a format are
_MARK = "ASSISTANT TURN"
# For templates that ask for the date of today: a text, and its reward, would be another one each day. It is the one
# that Llama 3's templates write where they have no clock.
_TODAY = datetime(2024, 7, 26)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, the span `[start, end)` of each part, and which tokens the model itself writes."""

    ids: list[int]
    spans: dict[str, tuple[int, int]]
    sampled: list[bool]

    def cut(self, count: int) -> "Encoded":
        """Without its first `count` tokens, if that is more than none; what stood there only has an empty span."""
        if count <= 0:
            return self
        spans = {name: (max(0, start - count), max(0, end - count)) for name, (start, end) in self.spans.items()}
        return Encoded(self.ids[count:], spans, self.sampled[count:])


class Renderer:
    """Renders and encodes for one model. Teacher and student each have their own.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        tags: Tags and system prompts.
        template_kwargs: Extra variables for the chat template.
        key: The option that named the model, for messages.
        end_ids: Further tokens that end what the model generates, beside the tokenizer's EOS.

    Raises:
        ConfigError: If there is no chat template, or the model generates and would not stop at the template's end of
            turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tags: TagFormat,
        template_kwargs: dict[str, Any] | None,
        key: str,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        self.tokenizer, self.tags = tokenizer, tags
        self.template_kwargs = _fixed_date(tokenizer) | (template_kwargs or {})
        self.end_ids = tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None))
        template_key = "student_chat_template" if key == "student_model" else "chat_template"
        if not tokenizer.chat_template:
            cause = "its tokenizer has no chat template (a base model?)"
            remedy = f"take the Instruct version of the model, or give a template: {template_key}=<file.jinja>"
            raise ConfigError(Fault(key, tokenizer.name_or_path, cause, remedy))
        self.padding_ids = self.encode_text(tags.padding)
        try:
            self.turn_end = self._find_turn_end(key)
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            remedy = f"correct the template ({template_key}=<file.jinja>) or the variables it is given"
            cause = f"it cannot be rendered: {error}"
            raise ConfigError(Fault(template_key, tokenizer.name_or_path, cause, remedy)) from error

    def _head(self, system_prompt: str, question: str) -> str:
        """Render up to where the assistant's turn begins."""
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
        head = self._apply(messages, add_generation_prompt=True)
        # Templates of reasoning models (R1-Distill, QwQ, Qwen3-Thinking) open a thought. Where there is one, the layout
        # opens it, in the tags of the format; what comes first in the teacher's turn, the solution, is none.
        begun = head.rstrip()
        return next((begun.removesuffix(tag) for tag in (self.tags.thought[0], _THINK) if begun.endswith(tag)), head)

    def _apply(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        render = partial(self.tokenizer.apply_chat_template, tokenize=False, **kwargs, **self.template_kwargs)
        system, user, *rest = messages
        try:
            text = render(messages)
        except TemplateError:
            text = ""
        if text and system["content"].strip() in text:
            return text
        # Some templates refuse a system role (Gemma, early Mistral) or pass over it: it comes before the question.
        return render([{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest])

    def _find_turn_end(self, key: str) -> str:
        """Return the text of the token that ends an assistant's turn in the template."""
        turn = {"role": "assistant", "content": _MARK}
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, turn]
        tail = self._apply(messages).rpartition(_MARK)[2].lstrip()
        ids = self.encode_text(tail)
        if ids and ids[0] in self.end_ids:
            return self.tokenizer.decode(ids[:1])
        if key == "student_model":  # it reads, it never generates: what the template writes is right
            return self.tokenizer.decode(ids[:1]) if ids else ""
        eos = self.tokenizer.eos_token
        cause = (
            f"the chat template ends a turn with {tail!r}, but the model stops at {eos!r}: completions would never end"
        )
        remedy = f"eos_token={self.tokenizer.decode(ids[:1])!r}" if ids else "a chat_template that ends turns"
        raise ConfigError(Fault("eos_token", eos, f"{key}: {cause}", remedy))

    def teacher(self, question: str, solution: str, explanation: str = "") -> list[Part]:
        head = self._head(self.tags.teacher_system_prompt, question)
        return teacher_parts(head, self.tags, solution, explanation, self.turn_end)

    def student(self, question: str, explanation: str, solution: str) -> list[Part]:
        head = self._head(self.tags.student_system_prompt, question)
        return student_parts(head, self.tags, explanation, solution, self.turn_end)

    def teacher_prompt(self, question: str, solution: str) -> str:
        """What the teacher is given: everything up to where its explanation begins."""
        return "".join(part.text for part in self.teacher(question, solution) if not part.sampled)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a `teacher_prompt`; the padding at its end is tokens of its own, as in `encode`."""
        return self._encode_start(prompt.removesuffix(self.tags.padding)) + self.padding_ids

    def padded(self, ends: list[int]) -> list[int]:
        """Where the tokens of padding and explanation end, from where those of the explanation end in it."""
        _, first = token_ends(self.tokenizer, self.padding_ids)
        return first + [len(self.tags.padding) + end for end in ends]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a piece of text that others stand before."""
        return encode_within(self.tokenizer, text)

    def _encode_start(self, text: str) -> list[int]:
        """Token ids of what a text begins with; templates bring their own BOS, so none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode(self, parts: list[Part], given_ids: dict[str, list[int]] | None = None) -> Encoded:
        """Concatenate the parts' token ids.

        Args:
            parts: The text.
            given_ids: Ids to use for a part in place of encoding its text, e.g. the ids that were sampled.
        """
        ids: list[int] = []
        spans, sampled = {}, []
        for part in parts:
            part_ids = (given_ids or {}).get(part.name)
            if part_ids is None:
                part_ids = self.encode_text(part.text) if ids else self._encode_start(part.text)
            spans[part.name] = (len(ids), len(ids) + len(part_ids))
            ids += part_ids
            sampled += [part.sampled] * len(part_ids)
        return Encoded(ids, spans, sampled)


def _fixed_date(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What stands for today in a chat template that asks for the date."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return {}
    logger.info(
        "the chat template of %s writes the date: it is %s in every text", tokenizer.name_or_path, f"{_TODAY:%d %b %Y}"
    )
    return {"strftime_now": _TODAY.strftime}
