"""Reading an explanation out of what the teacher sampled."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data.offsets import encode_with_ends, token_ends
from data.render import Renderer


@dataclass(frozen=True)
class Explanation:
    """An explanation as it was sampled.

    Attributes:
        text: Everything before the closing tag (all of it where the tag is missing).
        ids: The sampled tokens that lie wholly within `text`.
        ends: Where each of these tokens ends in `text`, in characters.
        closed: Whether the closing tag was written.
    """

    text: str
    ids: list[int]
    ends: list[int]
    closed: bool

    @property
    def tail(self) -> str:
        """What of `text` no token of `ids` holds: its last signs, where they share a token with the closing tag."""
        return self.text[self.ends[-1] if self.ends else 0 :]


def written_explanation(renderer: Renderer, text: str, closed: bool) -> Explanation:
    """An explanation from anywhere, in the tokens that the renderer's model would read."""
    return Explanation(text, *encode_with_ends(renderer.tokenizer, text), closed)


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
    text, ends = token_ends(tokenizer, ids)
    cut = text.find(closing_tag)
    closed = cut >= 0
    if closed:
        text = text[:cut]
    # A token that runs into the tag is no part of the explanation; the text it holds of it stays in `text`.
    count = sum(1 for end in ends if end <= len(text)) if closed else len(ids)
    return Explanation(text, ids[:count], ends[:count], closed)
