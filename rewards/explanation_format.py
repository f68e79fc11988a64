"""Whether a completion has the form that was asked for: an explanation, its closing tag, the end of turn."""

from collections.abc import Iterable


def explanation_format(text: str, ended: bool, closing_tag: str, tags: Iterable[str]) -> float:
    """Return 1.0 for an explanation, its closing tag and the end of turn with nothing else, otherwise 0.0.

    Args:
        text: Everything before the end of turn.
        ended: Whether the end of turn was written, as the last token.
        closing_tag: The tag that closes an explanation.
        tags: Every tag of the tag format: an explanation has none of them inside.
    """
    explanation, closed, after = text.partition(closing_tag)
    inside = any(tag in explanation for tag in tags)
    return float(ended and closed == closing_tag and not after and bool(explanation.strip()) and not inside)
