"""A teacher behind an endpoint: prompt log-probs of a vLLM or SGLang server, top-k at T = 1."""
