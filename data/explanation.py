"""Reading an explanation out of what the teacher sampled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from data.offsets import count_within, encode_with_ends, text_of, token_ends
from data.render import Renderer


@dataclass(frozen=True)
class Explanation:
    """An explanation as it was sampled.

    Attributes:
        text: Everything before the closing tag (all of it where the tag is missing).
        ids: The sampled tokens that lie wholly within `text`.
        closed: Whether the closing tag was written.
        tail: What of `text` no token of `ids` holds: its last signs, where they share a token with the closing tag.
        find_ends: What `ends` is found by.
    """

    text: str
    ids: list[int]
    closed: bool
    tail: str
    find_ends: Callable[[], list[int]] = field(repr=False, compare=False)

    @cached_property
    def ends(self) -> list[int]:
        """Where each token of `ids` ends in `text`, in characters: found where it is asked for, token by token."""
        return self.find_ends()


def written_explanation(renderer: Renderer, text: str, closed: bool) -> Explanation:
    """An explanation from anywhere, in the tokens that the renderer's model would read."""
    ids, ends = encode_with_ends(renderer.tokenizer, text)
    return Explanation(text, ids, closed, text[ends[-1] if ends else 0 :], lambda: ends)


def sampled_explanation(renderer: Renderer, completion_ids: list[int]) -> Explanation:
    """Cut a completion that the renderer's model has sampled at its closing tag; padding may follow it."""
    tokenizer = renderer.tokenizer
    end_ids = {*renderer.end_ids, tokenizer.pad_token_id}
    return read_explanation(tokenizer, completion_ids, renderer.tags.explanation[1], end_ids)


def read_explanation(
    tokenizer: PreTrainedTokenizerBase, completion_ids: list[int], closing_tag: str, end_ids: set[int]
) -> Explanation:
    """Cut a completion at its closing tag.

    Args:
        completion_ids: Sampled tokens, with or without the end of turn.
        closing_tag: The tag that closes an explanation.
        end_ids: Tokens that end a turn; they and what follows are no part of the explanation.
    """
    ids = completion_ids
    for i, token in enumerate(ids):
        if token in end_ids:
            ids = ids[:i]
            break
    whole = text_of(tokenizer, ids)
    ends = None
    if whole is None:
        whole, ends = token_ends(tokenizer, ids)
    text, tag, _ = whole.partition(closing_tag)
    count, end = len(ids), len(whole)
    if tag:
        # A token that runs into the tag is no part of the explanation; the text it holds of it stays in `text`.
        count, end = count_within(tokenizer, ids, len(text), ends)
    return Explanation(
        text, ids[:count], bool(tag), text[end:], lambda: (ends or token_ends(tokenizer, ids)[1])[:count]
    )
