"""Sizes of the models that the benchmarks make, as keyword arguments of transformers' Qwen2Config."""

from typing import Any


def _qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": _qwen2(64, 128, 2, 2, 1, 512, tied=True),
    "34m": _qwen2(512, 2048, 8, 8, 2, 8192, tied=True),
    "50m": _qwen2(512, 2048, 8, 8, 4, 16000),
    "0.16b": _qwen2(768, 3072, 12, 12, 12, 32000),
    "0.5b": _qwen2(1280, 3584, 20, 20, 4, 48000),
    # Of Qwen2.5:
    "1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
}
