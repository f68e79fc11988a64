"""Tokens of a piece of text that stands within a longer one, and where they lie in it, for any tokenizer."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_LEADS = ("\n", "|", "a")  # texts to put before a piece, the first that does not merge with it counts
_MOST_BYTES = 4  # of a character in UTF-8
_FEW = 16  # tokens that are decoded one by one


@lru_cache(maxsize=8)
def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a space before every text (SentencePiece's `add_dummy_prefix`: Llama 2, Mistral, Phi-3)."""
    first = tokenizer.convert_ids_to_tokens(_plain(tokenizer, "a")[:1])
    return bool(first) and isinstance(first[0], str) and first[0].startswith(("\u2581", "\u0120"))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _lead(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, list[int]]:
    """What to put before a text so that its own tokens come out as within a longer one: the lead and its ids; nothing
    for a tokenizer that adds no space."""
    if _adds_space(tokenizer):
        for lead in _LEADS:
            ids, both = _plain(tokenizer, lead), _plain(tokenizer, lead + text)
            if both[: len(ids)] == ids:
                return lead, ids
    return "", []


def encode_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that others stand before: without special tokens, and without the space that some tokenizers put
    before whatever they are given."""
    if not text:
        return []
    lead, ids = _lead(tokenizer, text)
    return _plain(tokenizer, lead + text)[len(ids) :]


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, list[int]]:
    """Decode ids that others stand before and return the text and, for each, the number of characters up to its end.

    A token that holds only the first bytes of a character ends before it, the last one after it. Tokens are decoded in
    short windows, since the text of a token can depend on the one before (a leading space), as streaming
    decoders do; the cost is linear in the number of tokens.
    """
    lead = _start(tokenizer)
    ids, text, ends = lead + ids, "", []
    known: dict[tuple[int, ...], str] = {}

    def decode(start: int, end: int) -> str:
        """Tokens come again and again, and pairs of them."""
        key = tuple(ids[start:end])
        if key not in known:
            known[key] = _decode(tokenizer, ids[start:end])
        return known[key]

    # First token of the window, first one whose text is not in `text` yet, and the text of those between.
    window, fresh, shown = 0, len(lead), decode(0, len(lead))
    for i in range(len(lead), len(ids)):
        decoded = decode(window, i + 1)
        if not decoded.endswith("\ufffd") or i == len(ids) - 1:
            settled = i + 1
        else:  # the last few may be bytes of a character to come, those before them are what they are
            settled = i + 2 - _MOST_BYTES
            while settled > fresh and not decoded.startswith(decode(window, settled)):
                settled -= 1
        if settled > fresh:
            text += decode(window, settled)[len(shown) :]
            # What was just added is the context of the next: a token, or all those that hold bytes of its characters.
            window, fresh = fresh, settled
            shown = decode(window, fresh)
        ends.append(len(text))
    return text, ends


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | None:
    """The text that `token_ends` gives, decoded at once; None where that may be another one.

    Bytes that never become a character are decoded by some according to what stands around them.
    """
    if not tokenizer.is_fast or tokenizer.clean_up_tokenization_spaces:
        return None
    lead = _start(tokenizer)
    text = _decode(tokenizer, lead + ids)[len(_decode(tokenizer, lead)) :]
    return None if "\ufffd" in text else text


def count_within(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], size: int, ends: list[int] | None
) -> tuple[int, int]:
    """How many of the tokens end within the first `size` characters of their text, and where the last of them ends.

    Args:
        size: Below the number of characters.
        ends: As `token_ends` tells; None where `text_of` gives a text: few tokens are then decoded one by one.
    """
    first = start = 0
    if ends is None:
        first, start, last = _narrowed(tokenizer, ids, size)
        ends = token_ends(tokenizer, ids[first:last])[1]
    within = [end for end in ends if start + end <= size]
    return first + len(within), start + (within[-1] if within else 0)


def _narrowed(tokenizer: PreTrainedTokenizerBase, ids: list[int], size: int) -> tuple[int, int, int]:
    """Halve the tokens until few are left around a place in the text: the first, where it begins, and behind the last.

    They are cut where a token's own text shows that no character goes on behind it.
    """
    first, start, last = 0, 0, len(ids)
    while last - first > _FEW:
        middle = (first + last) // 2
        while middle > first and _decode(tokenizer, ids[middle - 1 : middle]).endswith("\ufffd"):
            middle -= 1
        text = text_of(tokenizer, ids[first:middle]) if middle > first else None
        if text is None:
            break
        if start + len(text) <= size:
            first, start = middle, start + len(text)
        else:
            last = middle
    return first, start, last


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What to put before tokens: decoders may drop a space at the start."""
    return _plain(tokenizer, "a")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """What `encode_within` makes of a text, and where each token ends in it, as `token_ends` tells.

    What a tokenizer's normalizer makes of the text (é of e and an accent) counts as the characters that were given.
    """
    if not text:
        return [], []
    if not tokenizer.is_fast:
        ids = encode_within(tokenizer, text)
        return ids, token_ends(tokenizer, ids)[1]
    lead, lead_ids = _lead(tokenizer, text)
    encoded = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True)
    places = [(start - len(lead), end - len(lead)) for start, end in encoded["offset_mapping"][len(lead_ids) :]]
    if not places:  # a text of spaces, for a tokenizer that drops them
        return [], []
    ends: list[int] = []
    following = [start for start, _ in places[1:]] + [len(text)]
    for (_, end), start in zip(places, following, strict=True):
        # Tokens of one character's bytes all have that character's place, and one that begins before it ends where the
        # last whole character did.
        before = ends[-1] if ends else 0
        ends.append(max(before, end) if end <= start else before)
    ends[-1] = len(text)
    return encoded["input_ids"][len(lead_ids) :], ends
