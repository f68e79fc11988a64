"""What options may be: their rules, read without torch or vLLM."""
