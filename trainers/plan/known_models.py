"""Configs of the models that presets and README_MONO_GPU.md name, so that a plan needs no download.

As in the `config.json` of each on the hub, reduced to what decides its size.
"""

from typing import Any


def qwen2_sizes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    """What a Qwen2Config is told."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def _qwen2(*sizes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", "max_position_embeddings": 32768} | qwen2_sizes(*sizes)


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(5120, 13824, 48, 40, 8, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": _qwen2(5120, 27648, 64, 40, 8, 152064, False),
    "bespokelabs/Bespoke-Stratos-7B": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
}
