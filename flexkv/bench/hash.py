"""Keys of a prompt, against XXH3-128 of the same bytes in the same pieces from a bare C loop."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexkv._core.hashing import chain_seed, hash_blocks
from flexkv.bench.report import Line, line_of, measure

NUM_TOKENS = 32_768
TOKENS_PER_BLOCK = 16

_C_LOOP = """
#define XXH_INLINE_ALL
#include <xxhash.h>
void hash_pieces(const char *data, long pieces, long size, XXH128_hash_t *out)
{
    for (long i = 0; i < pieces; i++)
        out[i] = XXH3_128bits(data + i * size, (size_t)size);
}
"""


def bare_loop_us(tokens: np.ndarray, n: int) -> float | None:
    """p50 of the C loop in microseconds; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "loop.c"), Path(directory, "loop.so")
        source.write_text(_C_LOOP)
        built = subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library, source], capture_output=True)
        if built.returncode != 0:
            return None
        loop = ctypes.CDLL(str(library)).hash_pieces
    pieces = len(tokens) // TOKENS_PER_BLOCK
    out = np.empty((pieces, 2), dtype=np.uint64)
    arguments = (
        ctypes.c_void_p(tokens.ctypes.data), ctypes.c_long(pieces), ctypes.c_long(8 * TOKENS_PER_BLOCK),
        ctypes.c_void_p(out.ctypes.data),
    )
    return float(np.median(measure(lambda: loop(*arguments), n)))


def run(n: int = 2000) -> Iterator[Line]:
    """32,768 int64 tokens, 16 a block: 2,048 chained keys."""
    tokens = np.random.default_rng(0).integers(0, 128_000, NUM_TOKENS)
    seed = chain_seed(b"bench")
    keys = hash_blocks(tokens, TOKENS_PER_BLOCK, seed)
    if keys.shape != (2048, 2) or len(np.unique(keys[:, 0])) != 2048:
        raise AssertionError("the keys are wrong")
    took = measure(lambda: hash_blocks(tokens, TOKENS_PER_BLOCK, seed), n)
    yield line_of("hash", "32,768 int64 tokens, 16 a block", took, bare_loop_us(tokens, n))
