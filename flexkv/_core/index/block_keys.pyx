# cython: wraparound=True
"""Block keys: a chain of SHA-256 digests, so that a key identifies a block and its whole prefix.

The chain value of a block is the SHA-256 of its tokens, of the digest of its extras, and of the chain value before;
``chain_seed`` makes the first chain value from domain and namespace. A key is the first 16 bytes of a chain value. The
chain itself continues from all 32 bytes. Keys are the same in every process and on every machine.

csrc/key_chain.h defines the message that is hashed; docs/design/0017-keys.md gives the reasons and the threat model.
"""
import hashlib
import hmac

import numpy as np

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

cdef extern from "key_chain.h" nogil:
    ctypedef void flexkv_sha256_fn(const uint8_t *blocks, size_t num_blocks, uint8_t *digest)

    void flexkv_sha256_portable(const uint8_t *blocks, size_t num_blocks, uint8_t *digest)
    flexkv_sha256_fn *flexkv_sha256_by_instructions()
    size_t flexkv_key_message_bytes(long tokens_per_block, int has_extra)
    long flexkv_key_chain(flexkv_sha256_fn *sha256, const void *tokens, int token_bytes, int is_signed,
                          long num_blocks, long tokens_per_block, uint8_t *value, const uint8_t *const *extras,
                          uint64_t *keys, uint8_t *scratch)

cdef enum:
    VALUE_BYTES = 32               # of a chain value

cdef flexkv_sha256_fn *ACCELERATED = flexkv_sha256_by_instructions()

HAS_SHA_INSTRUCTIONS = ACCELERATED != NULL
"""Whether this processor has instructions for SHA-256. Without them hashing takes seven times as long."""


def chain_seed(bytes domain not None, namespace=(), bytes secret not None=b""):
    """Return the chain value before the first block: 32 bytes that stand for domain, namespace and secret.

    HMAC-SHA-256 under ``secret`` of "FlexKV:S", the number of parts, and each part behind its length (8 bytes each,
    little-endian): first ``domain``, then each element of ``namespace`` in UTF-8.

    Parameters
    ----------
    domain : bytes
        Identity of everything that makes KV comparable (see ``flexkv.config.domain``).
    namespace : sequence of str
        LoRA, cache salt, tenant. ``("a", "b")`` and ``("ab",)`` are different namespaces.
    secret : bytes
        Secret of the deployment; keys cannot be computed without it. Empty: no secret.

    Raises
    ------
    TypeError
        ``namespace`` is a string, or contains something else than strings.
    """
    if isinstance(namespace, (str, bytes)):
        raise TypeError(f"namespace is {namespace!r}; give a sequence of strings, such as [{namespace!r}]")
    parts = [domain]
    for name in namespace:
        if not isinstance(name, str):
            raise TypeError(f"namespace contains {name!r}; give strings only")
        parts.append(name.encode("utf-8", "surrogatepass"))
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.digest(secret, b"FlexKV:S" + len(parts).to_bytes(8, "little") + message, "sha256")


cdef frozenset TOKEN_DTYPES = frozenset([np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint32)])
cdef object UINT8 = np.dtype(np.uint8)


cdef object as_tokens(tokens):
    array = np.ascontiguousarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens have {array.ndim} dimensions; give one")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype not in TOKEN_DTYPES:
        raise TypeError(f"tokens are {array.dtype}; give int32, int64 or uint32")
    return array if array.flags.aligned else array.copy()


cdef dict extras_digests(extras, Py_ssize_t first_block):
    """SHA-256 of "FlexKV:X" and the extras of each block; ``first_block`` is the first block without a key."""
    digests = {}
    for block, extra in (extras or {}).items():
        if block < 0:
            raise ValueError(f"extras for block {block}; the first block is 0")
        if block < first_block:
            raise ValueError(f"extras for block {block}, which has its key already; give them with its tokens")
        if not isinstance(extra, (bytes, bytearray, memoryview)):
            raise TypeError(f"the extras of block {block} are {type(extra).__name__}; give bytes")
        digests[int(block)] = hashlib.sha256(b"FlexKV:X" + bytes(extra)).digest()
    return digests


cdef object hash_from(tokens, Py_ssize_t tokens_per_block, uint8_t *value, dict digests, bint portable):
    """Keys of the full blocks of ``tokens``; ``value`` (32 bytes) becomes the last chain value, except after errors."""
    cdef Py_ssize_t num_blocks = len(tokens) // tokens_per_block, bad = -1
    keys_array = np.empty((num_blocks, 2), dtype=np.uint64)
    if num_blocks == 0:
        return keys_array
    cdef flexkv_sha256_fn *sha256 = ACCELERATED
    if sha256 == NULL or portable:
        sha256 = flexkv_sha256_portable
    cdef uint64_t[:, ::1] keys = keys_array
    cdef uint8_t *scratch = <uint8_t *>malloc(
        flexkv_key_message_bytes(tokens_per_block, 0) + flexkv_key_message_bytes(tokens_per_block, 1)
    )
    cdef const uint8_t **table = NULL
    cdef const uint8_t[::1] data = tokens.view(UINT8)
    cdef int token_bytes = tokens.dtype.itemsize, is_signed = tokens.dtype.kind == "i"
    if digests:
        table = <const uint8_t **>malloc(num_blocks * sizeof(void *))
    try:
        if scratch == NULL or (digests and table == NULL):
            raise MemoryError("no memory to hash tokens")
        for i in range(num_blocks if digests else 0):
            table[i] = <const uint8_t *><const char *>(<bytes>digests[i]) if i in digests else NULL
        with nogil:
            bad = flexkv_key_chain(sha256, &data[0], token_bytes, is_signed, num_blocks, tokens_per_block, value,
                                   table, &keys[0, 0], scratch)
    finally:
        free(scratch)
        free(table)
    if bad >= 0:
        wrong = tokens[bad * tokens_per_block : (bad + 1) * tokens_per_block].astype(np.int64)
        bad = bad * tokens_per_block + int(np.flatnonzero((wrong < 0) | (wrong >> 32 != 0))[0])
        raise ValueError(f"token {bad} is {tokens[bad]}: not in 0 to 2**32 - 1")
    return keys_array


cdef int check_arguments(Py_ssize_t tokens_per_block, bytes seed) except -1:
    if not 1 <= tokens_per_block < 1 << 31:
        raise ValueError(f"tokens_per_block is {tokens_per_block}; allowed: 1 to 2**31 - 1")
    if len(seed) != VALUE_BYTES:
        raise ValueError(f"the seed has {len(seed)} bytes; take it from chain_seed, which returns {VALUE_BYTES}")
    return 0


def hash_blocks(tokens, Py_ssize_t tokens_per_block, bytes seed not None, extras=None, bint portable=False):
    """Return the keys of all full blocks of a sequence.

    Parameters
    ----------
    tokens : (num_tokens,) int32, int64 or uint32
        All types give the same keys.
    tokens_per_block : int
    seed : bytes
        From ``chain_seed``.
    extras : mapping from block index to bytes, optional
        Other content that the KV of a block depends on, such as images. No extras and empty extras give different
        keys.
    portable : bool
        Use portable C in place of the processor's SHA instructions. The keys are the same.

    Returns
    -------
    (num_tokens // tokens_per_block, 2) uint64
        Low and high half of each key: bytes 0 to 8 and 8 to 16 of the digest, as little-endian numbers.

    Raises
    ------
    ValueError, TypeError
        Tokens out of 0 to 2**32 - 1, of another type, or not one-dimensional; extras of a negative block, or not
        bytes.
    """
    check_arguments(tokens_per_block, seed)
    cdef uint8_t value[VALUE_BYTES]
    value[:] = <const uint8_t *><const char *>seed
    return hash_from(as_tokens(tokens), tokens_per_block, value, extras_digests(extras, 0), portable)


cdef class SequenceHasher:
    """Hashes a sequence that grows: ``extend`` hashes new tokens only.

    Parameters
    ----------
    seed, tokens_per_block
        As ``hash_blocks``.
    """
    cdef readonly Py_ssize_t tokens_per_block
    cdef readonly Py_ssize_t num_blocks
    cdef uint8_t value[VALUE_BYTES]            # the chain value of the last full block
    cdef object rest           # tokens after the last full block
    cdef object buffer         # (capacity, 2) keys
    cdef dict digests

    def __init__(self, bytes seed not None, Py_ssize_t tokens_per_block):
        check_arguments(tokens_per_block, seed)
        self.tokens_per_block = tokens_per_block
        self.num_blocks = 0
        self.value[:] = <const uint8_t *><const char *>seed
        self.rest = np.empty(0, dtype=np.int64)
        self.buffer = np.empty((16, 2), dtype=np.uint64)
        self.digests = {}

    def extend(self, tokens, extras=None):
        """Append ``tokens``; ``extras`` maps indices of blocks that have no key yet to bytes.

        Returns
        -------
        int
            Number of full blocks of the sequence. An error leaves the sequence unchanged.
        """
        new = as_tokens(tokens)
        if len(self.rest):
            new = np.concatenate([self.rest, new.astype(np.int64, copy=False)])
        digests = {**self.digests, **extras_digests(extras, self.num_blocks)}
        relative = {i - self.num_blocks: digest for i, digest in digests.items()}
        keys = hash_from(new, self.tokens_per_block, self.value, relative, False)
        total = self.num_blocks + len(keys)
        if total > len(self.buffer):
            buffer = np.empty((max(total, 2 * len(self.buffer)), 2), dtype=np.uint64)
            buffer[: self.num_blocks] = self.buffer[: self.num_blocks]
            self.buffer = buffer
        self.buffer[self.num_blocks : total] = keys
        self.num_blocks = total
        self.rest = new[len(keys) * self.tokens_per_block :].astype(np.int64)
        self.digests = {i: digest for i, digest in digests.items() if i >= total}
        return total

    @property
    def num_tokens(self):
        """Number of tokens so far, with those of the unfinished block."""
        return self.num_blocks * self.tokens_per_block + len(self.rest)

    @property
    def keys(self):
        """(num_blocks, 2) uint64; a view that does not change when the sequence grows."""
        return self.buffer[: self.num_blocks]
