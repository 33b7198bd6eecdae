"""``flexkv demo``: a real vLLM that reads its KV back instead of computing it."""
