"""Keys of a prompt, beside one SHA-256 of as many bytes by OpenSSL, and beside vLLM's own block hashes."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from flexkv._core.index.block_keys import HAS_SHA_INSTRUCTIONS, chain_seed, hash_blocks
from flexkv.tools.bench.report import Line, line_of, measure

NUM_TOKENS = 32_768
TOKENS_PER_BLOCK = 16
LONG_PROMPT = 100_000
MESSAGE_BYTES = 128                    # hashed bytes of a block: header, tokens, chain value, padding


def _vllm_block_hashes(tokens: Sequence[int]) -> list[bytes] | None:
    """Chained ``sha256_cbor`` hashes as vLLM's prefix cache computes them; None if vLLM is not installed."""
    try:
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash
    except ImportError:
        return None
    init_none_hash(sha256_cbor)
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - TOKENS_PER_BLOCK + 1, TOKENS_PER_BLOCK):
        block = tokens[start : start + TOKENS_PER_BLOCK]
        hashes.append(hash_block_tokens(sha256_cbor, hashes[-1] if hashes else None, block, None))
    return hashes


def run(n: int = 2000, with_vllm: bool = True) -> Iterator[Line]:
    """Measure 2,048 chained keys (32,768 int64 tokens, 16 a block), and the keys of a prompt of 100,000 tokens."""
    tokens = np.random.default_rng(0).integers(0, 128_000, NUM_TOKENS)
    seed = chain_seed(b"bench")
    keys = hash_blocks(tokens, TOKENS_PER_BLOCK, seed)
    if keys.shape != (2048, 2) or len(np.unique(keys[:, 0])) != 2048:
        raise AssertionError("the keys are wrong")
    if (keys != hash_blocks(tokens, TOKENS_PER_BLOCK, seed, portable=True)).any():
        raise AssertionError("the portable code computes different keys")
    message = np.random.default_rng(1).bytes(MESSAGE_BYTES * len(keys))
    bare = float(np.median(measure(lambda: hashlib.sha256(message).digest(), n)))
    took = measure(lambda: hash_blocks(tokens, TOKENS_PER_BLOCK, seed), n)
    yield line_of("hash", "32,768 int64 tokens, 16 a block", took, bare)
    if HAS_SHA_INSTRUCTIONS:
        portable = measure(lambda: hash_blocks(tokens, TOKENS_PER_BLOCK, seed, portable=True), max(1, n // 10))
        yield line_of("hash", "the same, less the SHA instructions", portable, bare)
    prompt = np.random.default_rng(2).integers(0, 128_000, LONG_PROMPT)
    yield line_of("hash", "100,000 int64 tokens", measure(lambda: hash_blocks(prompt, TOKENS_PER_BLOCK, seed), n // 2))
    numbers = tokens.tolist()                          # vLLM keeps the tokens of a request as a list
    if with_vllm and (hashes := _vllm_block_hashes(numbers)) is not None:
        if len(set(hashes)) != len(keys):
            raise AssertionError("the hashes of vLLM are wrong")
        theirs = measure(lambda: _vllm_block_hashes(numbers), max(1, n // 100))
        yield line_of("hash", "the same 32,768 tokens by vLLM's sha256_cbor", theirs, float(np.median(took)))
