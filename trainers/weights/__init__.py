"""Where weights lie: views of vLLM's tensors, adapters, checkpoints."""
