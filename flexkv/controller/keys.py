"""Keys of an engine's blocks: chained digests of tokens, inside a domain and a namespace."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.index.block_keys import SequenceHasher, chain_seed, hash_blocks
from flexkv.config import changed_domain
from flexkv.controller.tasks.arguments import extras_of, namespace_of, tokens_of
from flexkv.errors import ArgumentError
from flexkv.protocol.numbers import integer_of

_MAX_SEEDS = 256
"""Chain seeds of namespaces that are remembered; to make one costs as much as all checks of a request."""


class Keys:
    """Makes the keys of one engine's blocks. Thread safe.

    Parameters
    ----------
    domain : bytes
        Identity of everything that must be equal for KV to be comparable.
    tokens_per_block : int
    secret : bytes
        Part of every key.
    """

    def __init__(self, domain: bytes, tokens_per_block: int, secret: bytes) -> None:
        self._domain = domain
        self._tokens_per_block = tokens_per_block
        self._secret = secret
        self._chain_seed = lru_cache(_MAX_SEEDS)(chain_seed)

    def change_domain(self) -> None:
        """From now on all keys are new, because the engine's weights were changed."""
        self._domain = changed_domain(self._domain)

    def hasher(self, namespace: Sequence[str] | None) -> SequenceHasher:
        """A hasher of growing sequences."""
        return SequenceHasher(self._seed(namespace), self._tokens_per_block)

    def keys(
        self, token_ids: ArrayLike, namespace: Sequence[str] | None, extras: Mapping[int, bytes] | None
    ) -> NDArray[np.uint64]:
        """(n, 2) uint64: keys of the whole blocks of a sequence; ArgumentError if an argument is wrong."""
        seed = self._seed(namespace)
        tokens, extras = tokens_of(token_ids), extras_of(extras)
        try:
            return hash_blocks(tokens, self._tokens_per_block, seed, extras=extras)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"token_ids: {error}") from error

    def length_of(self, num_tokens: object, keys: NDArray[np.uint64]) -> int:
        """Check a number of tokens, of which the whole blocks have these keys ((n, 2) uint64); else ArgumentError."""
        shortest = len(keys) * self._tokens_per_block
        return integer_of(num_tokens, "num_tokens", shortest, shortest + self._tokens_per_block - 1)

    def _seed(self, namespace: Sequence[str] | None) -> bytes:
        return self._chain_seed(self._domain, namespace_of(namespace), self._secret)
