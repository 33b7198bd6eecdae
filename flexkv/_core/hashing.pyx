# cython: wraparound=True
"""Keys of blocks: XXH3-128, chained, so that a key names a block and its whole prefix.

``key[i] = H(key[i-1] | H(tokens of block i | digest of its extras))``, H being XXH3-128, tokens as 32-bit little-endian
numbers whatever type they came in, ``key[-1]`` the seed of the domain and namespace. Keys do not depend on the
process, the machine's hash seed, or the time. The loop is in csrc/key_chain.h.
xxhash is specified in https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
"""
import numpy as np

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from flexkv._core.xxhash cimport (
    XXH3_SECRET_DEFAULT_SIZE,
    XXH128_hash_t,
    XXH3_128bits,
    XXH3_128bits_withSecret,
    XXH3_generateSecret,
)

cdef extern from "key_chain.h" nogil:
    long flexkv_key_chain(const void *tokens, int token_bytes, int is_signed, long num_blocks, long tokens_per_block,
                          const void *seed, const uint8_t *const *extras, const void *secret, size_t secret_bytes,
                          uint64_t *keys, uint8_t *scratch)

cdef enum:
    KEY_BYTES = 16


cdef class Secret:
    """XXH3 secret made from a deployment's secret; empty: none."""
    cdef uint8_t data[XXH3_SECRET_DEFAULT_SIZE]
    cdef bint used

    def __cinit__(self, bytes secret not None):
        self.used = len(secret) > 0
        if self.used and XXH3_generateSecret(self.data, sizeof(self.data), <const char *>secret, len(secret)) != 0:
            raise ValueError("this libxxhash cannot make a secret")

    cdef XXH128_hash_t hash(self, const void *data, size_t length) noexcept nogil:
        if self.used:
            return XXH3_128bits_withSecret(data, length, self.data, sizeof(self.data))
        return XXH3_128bits(data, length)

    cdef bytes digest(self, bytes data):
        cdef XXH128_hash_t result = self.hash(<const char *>data, len(data))
        return (<char *>&result)[:KEY_BYTES]


def chain_seed(bytes domain not None, namespace=(), bytes secret not None=b""):
    """The key before the first block: 16 bytes that stand for domain and namespace.

    Parameters
    ----------
    domain : bytes
        Identity of what makes KV comparable (see ``flexkv.config.domain``).
    namespace : sequence of str
        LoRA, cache salt, tenant.
    secret : bytes
        Of the deployment; without it, keys cannot be computed by others.
    """
    parts = [domain, *(name.encode() for name in namespace)]
    return Secret(secret).digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


cdef frozenset TOKEN_DTYPES = frozenset([np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint32)])
cdef object UINT8 = np.dtype(np.uint8)


cdef object as_tokens(tokens):
    array = np.ascontiguousarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens have {array.ndim} dimensions; give one")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype not in TOKEN_DTYPES:
        raise TypeError(f"tokens are {array.dtype}; give int32 or int64")
    return array


cdef object hash_from(tokens, Py_ssize_t tokens_per_block, bytes previous, dict digests, Secret secret):
    cdef Py_ssize_t num_blocks = len(tokens) // tokens_per_block, bad = -1
    keys_array = np.empty((num_blocks, 2), dtype=np.uint64)
    if num_blocks == 0:
        return keys_array
    cdef uint64_t[:, ::1] keys = keys_array
    cdef const uint8_t *seed = <const uint8_t *><const char *>previous
    cdef uint8_t *scratch = <uint8_t *>malloc(KEY_BYTES + 4 * tokens_per_block)
    cdef const uint8_t **table = NULL
    cdef const uint8_t[::1] data = tokens.view(UINT8)
    cdef int token_bytes = tokens.dtype.itemsize, is_signed = tokens.dtype.kind == "i"
    cdef const uint8_t *mixed = secret.data if secret.used else NULL
    if digests:
        table = <const uint8_t **>malloc(num_blocks * sizeof(void *))
    try:
        if scratch == NULL or (digests and table == NULL):
            raise MemoryError("no memory to hash tokens")
        for i in range(num_blocks if digests else 0):
            table[i] = <const uint8_t *><const char *>(<bytes>digests[i]) if i in digests else NULL
        with nogil:
            bad = flexkv_key_chain(&data[0], token_bytes, is_signed, num_blocks, tokens_per_block, seed, table, mixed,
                                   XXH3_SECRET_DEFAULT_SIZE, &keys[0, 0], scratch)
    finally:
        free(scratch)
        free(table)
    if bad >= 0:
        wrong = tokens[bad * tokens_per_block : (bad + 1) * tokens_per_block].astype(np.int64)
        bad = bad * tokens_per_block + int(np.flatnonzero((wrong < 0) | (wrong >> 32 != 0))[0])
        raise ValueError(f"token {bad} is {tokens[bad]}: not in 0 to 2**32 - 1")
    return keys_array


cdef int check_arguments(Py_ssize_t tokens_per_block, bytes seed) except -1:
    if tokens_per_block < 1:
        raise ValueError(f"tokens_per_block is {tokens_per_block}; it must be at least 1")
    if len(seed) != KEY_BYTES:
        raise ValueError(f"the seed has {len(seed)} bytes; take it from chain_seed")
    return 0


def hash_blocks(tokens, Py_ssize_t tokens_per_block, bytes seed not None, extras=None, bytes secret not None=b""):
    """Keys of all full blocks of a sequence.

    Parameters
    ----------
    tokens : (num_tokens,) int32, int64 or uint32
        The same keys for either type.
    tokens_per_block : int
    seed : bytes
        From ``chain_seed``.
    extras : mapping from block index to bytes, optional
        What else the block depends on, such as multimodal content.
    secret : bytes

    Returns
    -------
    (num_tokens // tokens_per_block, 2) uint64
        Low and high half of each key.

    Raises
    ------
    ValueError, TypeError
        Tokens out of 0 to 2**32 - 1, of another type, or not one-dimensional.
    """
    check_arguments(tokens_per_block, seed)
    cdef Secret mixed = Secret(secret)
    digests = {int(i): mixed.digest(bytes(extra)) for i, extra in extras.items()} if extras else {}
    return hash_from(as_tokens(tokens), tokens_per_block, seed, digests, mixed)


cdef class SequenceHasher:
    """Keys of a sequence that grows: ``extend`` hashes what is new only.

    Parameters
    ----------
    seed, tokens_per_block, secret
        As ``hash_blocks``.
    """
    cdef readonly Py_ssize_t tokens_per_block
    cdef readonly Py_ssize_t num_blocks
    cdef bytes last
    cdef Secret secret
    cdef object rest           # tokens after the last full block
    cdef object buffer         # (capacity, 2) keys
    cdef dict digests

    def __init__(self, bytes seed not None, Py_ssize_t tokens_per_block, bytes secret not None=b""):
        check_arguments(tokens_per_block, seed)
        self.tokens_per_block = tokens_per_block
        self.num_blocks = 0
        self.last = seed
        self.secret = Secret(secret)
        self.rest = np.empty(0, dtype=np.int64)
        self.buffer = np.empty((16, 2), dtype=np.uint64)
        self.digests = {}

    def extend(self, tokens, extras=None):
        """Append ``tokens``; ``extras`` maps block indices of the sequence, not hashed yet, to bytes.

        Returns
        -------
        int
            Full blocks of the sequence so far. After an error nothing was appended.
        """
        new = as_tokens(tokens)
        if len(self.rest):
            new = np.concatenate([self.rest, new.astype(np.int64, copy=False)])
        digests = dict(self.digests)
        for i, extra in (extras or {}).items():
            if i < self.num_blocks:
                raise ValueError(f"extras for block {i}, which has its key already")
            digests[int(i)] = self.secret.digest(bytes(extra))
        relative = {i - self.num_blocks: digest for i, digest in digests.items()}
        keys = hash_from(new, self.tokens_per_block, self.last, relative, self.secret)
        total = self.num_blocks + len(keys)
        if total > len(self.buffer):
            buffer = np.empty((max(total, 2 * len(self.buffer)), 2), dtype=np.uint64)
            buffer[: self.num_blocks] = self.buffer[: self.num_blocks]
            self.buffer = buffer
        self.buffer[self.num_blocks : total] = keys
        self.num_blocks = total
        if len(keys):
            self.last = keys[-1].tobytes()
        self.rest = new[len(keys) * self.tokens_per_block :].astype(np.int64)
        self.digests = {i: digest for i, digest in digests.items() if i >= total}
        return total

    @property
    def num_tokens(self):
        """Tokens so far, those of the unfinished block included."""
        return self.num_blocks * self.tokens_per_block + len(self.rest)

    @property
    def keys(self):
        """(num_blocks, 2) uint64; a view that stays as it is when the sequence grows."""
        return self.buffer[: self.num_blocks]
