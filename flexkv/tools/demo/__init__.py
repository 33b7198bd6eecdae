"""``flexkv demo``: a real vLLM that loads its KV instead of computing it."""
