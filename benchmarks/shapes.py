"""Sizes of the models that the benchmarks make, as keyword arguments of transformers' Qwen2Config."""

from trainers.plan.known_models import qwen2_sizes

SHAPES = {
    "tiny": qwen2_sizes(64, 128, 2, 2, 1, 512, tied=True),
    "34m": qwen2_sizes(512, 2048, 8, 8, 2, 8192, tied=True),
    "50m": qwen2_sizes(512, 2048, 8, 8, 4, 16000),
    "0.16b": qwen2_sizes(768, 3072, 12, 12, 12, 32000),
    "0.48b": qwen2_sizes(1280, 3584, 20, 20, 4, 48000),
    # Of Qwen2.5:
    "0.5b": qwen2_sizes(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5b": qwen2_sizes(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7b": qwen2_sizes(3584, 18944, 28, 28, 4, 152064),
}
