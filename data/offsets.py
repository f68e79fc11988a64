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
    for i in range(len(ids)):
        decoded = tokenizer.decode(ids[window : i + 1], skip_special_tokens=False)
        if not decoded.endswith("\ufffd") or i == len(ids) - 1:
            text += decoded[len(shown) :]
            # Keep one token of context: start the next window at this token.
            window, shown = i, tokenizer.decode(ids[i : i + 1], skip_special_tokens=False)
            if shown.startswith("\ufffd"):  # the last bytes of a character: decode on from a fresh token
                window, shown = i + 1, ""
        ends.append(len(text))
    return text, ends
