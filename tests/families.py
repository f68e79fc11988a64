"""Configs of tiny random models, one for each family."""

COMMON = {
    "vocab_size": 480,  # not a multiple of 64: vLLM pads the embedding
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
WINDOW = 8  # blocks of the KV cache that lie before it are given up while a completion is written
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
FAMILIES = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {},
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.0},  # low: it shows
    "gemma3_text": GEMMA,
}
# vLLM holds their weights in another layout than the trainer (GPT-2's linear layers the other way round, experts as
# its kernels want them).
LAID_OUT_OTHERWISE = {
    "gpt2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
}
