"""A model whose KV is a hash: each token's KV depends on all tokens before it, read from the pages, layer by layer.

Wrong KV anywhere before a token changes the KV of that token in the next layer, and the answer. The right content of a
page is a function of the tokens, so that any block can be compared, bit by bit, with what computing would have written.
"""

from typing import Any

import numpy as np
import torch

BLOCK = 16
LAYERS = 3
CHANNELS = 4
VOCABULARY = (3, 500)

U32 = np.uint32
_ODD = (2 * np.arange(CHANNELS) + 1).astype(U32)


def mix(*parts: Any) -> np.ndarray:
    x = np.zeros_like(np.asarray(parts[0], dtype=U32))
    for part in parts:
        x = (x ^ np.asarray(part, dtype=U32)) * U32(2654435761)
        x ^= x >> U32(15)
        x = x * U32(2246822519)
        x ^= x >> U32(13)
    return x


def kv_of(hidden: np.ndarray, positions: np.ndarray, layer: int) -> np.ndarray:
    """(n, CHANNELS) uint32: KV of tokens."""
    x = mix(hidden, positions, np.full_like(hidden, layer))
    return (x[:, None] * _ODD + _ODD).astype(U32)


def weight(kv: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(n,) uint32: what each token adds to the context of those behind it."""
    return ((kv * (_ODD + U32(2))).sum(axis=1, dtype=U32) * (2 * positions + 1).astype(U32)).astype(U32)


def embed(tokens: np.ndarray, lora: int) -> np.ndarray:
    return mix(tokens.astype(U32), np.full(len(tokens), lora, dtype=U32))


def sample(hidden: int) -> int:
    low, high = VOCABULARY
    return low + int(hidden) % (high - low)


class Chunk:
    """Tokens of one request in one step; ``layer`` is called for each layer in turn."""

    def __init__(self, pages: np.ndarray, start: int, tokens: np.ndarray, lora: int) -> None:
        self.pages, self.start = pages, start
        self.positions = np.arange(start, start + len(tokens)).astype(U32)
        self.hidden = embed(tokens, lora)

    def layer(self, cache: torch.Tensor, layer: int) -> None:
        """``cache``: (pages, 1, BLOCK, CHANNELS) int32."""
        view = cache.numpy().view(U32)[:, 0]
        kv = kv_of(self.hidden, self.positions, layer)
        where = self.pages[self.positions // BLOCK]
        view[where, self.positions % BLOCK] = kv
        before = view[self.pages[: -(-self.start // BLOCK)]].reshape(-1, CHANNELS)[: self.start]
        past = weight(before, np.arange(self.start).astype(U32)).sum(dtype=U32)
        context = past + np.cumsum(weight(kv, self.positions), dtype=U32)
        self.hidden = mix(self.hidden, context)


def blank(num_pages: int) -> list[torch.Tensor]:
    return [torch.full((num_pages, 1, BLOCK, CHANNELS), -1, dtype=torch.int32) for _ in range(LAYERS)]


def compute(tokens: list[int], lora: int = 0) -> tuple[list[torch.Tensor], np.ndarray]:
    """KV of a sequence in pages 0, 1, ..., and what is sampled after each token."""
    num_pages = -(-len(tokens) // BLOCK)
    caches = blank(num_pages)
    chunk = Chunk(np.arange(num_pages), 0, np.array(tokens), lora)
    for layer, cache in enumerate(caches):
        chunk.layer(cache, layer)
    return caches, chunk.hidden


def answer(prompt: list[int], count: int, lora: int = 0) -> list[int]:
    """Greedy answer of ``count`` tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sample(compute(tokens, lora)[1][-1]))
    return tokens[len(prompt) :]
