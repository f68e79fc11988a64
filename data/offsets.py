"""Where tokens lie in their text, for any tokenizer."""

from transformers import PreTrainedTokenizerBase


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, list[int]]:
    """Decode ids and return the text and, for each token, the number of characters up to its end.

    A token that holds only the first bytes of a character ends before it, the last one after it. Tokens are decoded in
    short windows, since the text of a token can depend on the one before (a leading space), as streaming
    decoders do; the cost is linear in the number of tokens.
    """
    text, ends = "", []
    window, shown = 0, ""  # first token of the window, and the window's text that is in `text` already
    fresh = 0  # first token whose text is not
    for i in range(len(ids)):
        decoded = tokenizer.decode(ids[window : i + 1], skip_special_tokens=False)
        if not decoded.endswith("\ufffd") or i == len(ids) - 1:
            text += decoded[len(shown) :]
            # What was just added is the context of the next: a token, or all those that hold bytes of its characters.
            window, fresh = fresh, i + 1
            shown = tokenizer.decode(ids[window:fresh], skip_special_tokens=False)
        ends.append(len(text))
    return text, ends


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Encode a text, without special tokens, and return its ids and where each token ends in it, as `token_ends` does.

    What a tokenizer's normalizer makes of the text (é of e and an accent) counts as the characters that were given.
    """
    if not text:
        return [], []
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, token_ends(tokenizer, ids)[1]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets, ends = encoded["offset_mapping"], []
    following = [start for start, _ in offsets[1:]] + [len(text)]
    for (_, end), start in zip(offsets, following, strict=True):
        # Tokens of one character's bytes all have that character's place.
        ends.append(max(ends[-1] if ends else 0, min(end, start)))
    if ends:
        ends[-1] = len(text)
    return encoded["input_ids"], ends
