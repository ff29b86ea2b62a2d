"""Sample completions, with transformers or vLLM, and store them."""
