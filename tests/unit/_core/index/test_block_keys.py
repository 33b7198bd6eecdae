"""Block keys, against the definition in docs/design/0017-keys.md written with ``hashlib`` and ``hmac``."""

import hashlib
import hmac
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flexkv._core.index.block_keys import HAS_SHA_INSTRUCTIONS, SequenceHasher, chain_seed, hash_blocks

SEED = chain_seed(b"domain", ("salt",))

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)
XXH3_COLLISION = (
    [14086, 35946, 116985, 95125, 33323, 119855, 97748, 11216, 112150, 2879, 41612, 85328, 43313, 65186, 66952, 30269],
    [47964, 96052, 83107, 35019, 76905, 18421, 54166, 112650, 112150, 2879, 41612, 85328, 43313, 65186, 66952, 30269],
)
"""Two blocks of valid token ids whose XXH3-128 digests are equal, made in 14 seconds: with the sums of the words of
each 16 bytes fixed, one half of the digest stays as it is and the other is a sum over two independent quarters of the
block, so lists of 2^22 quarters join on 22 bits and then on 42."""

PIECE = st.lists(st.integers(0, 2**31 - 1), max_size=40)
EXTRAS = st.dictionaries(st.integers(0, 12), st.binary(max_size=100), max_size=5)


def reference_seed(domain: bytes, namespace: Sequence[str] = (), secret: bytes = b"") -> bytes:
    parts = [domain, *(name.encode() for name in namespace)]
    message = b"FlexKV:S" + struct.pack("<Q", len(parts))
    for part in parts:
        message += struct.pack("<Q", len(part)) + part
    return hmac.new(secret, message, hashlib.sha256).digest()


def reference(
    tokens: Sequence[int], tokens_per_block: int, seed: bytes = SEED, extras: dict[int, bytes] | None = None
) -> bytes:
    """All keys, one behind the other."""
    value, keys = seed, b""
    for i in range(len(tokens) // tokens_per_block):
        block = tokens[i * tokens_per_block : (i + 1) * tokens_per_block]
        extra = (extras or {}).get(i)
        message = b"FlexKV:B" + struct.pack("<II", tokens_per_block, extra is not None)
        message += b"".join(struct.pack("<I", token) for token in block)
        if extra is not None:
            message += hashlib.sha256(b"FlexKV:X" + extra).digest()
        value = hashlib.sha256(message + value).digest()
        keys += value[:16]
    return keys


@given(TOKENS, st.integers(1, 70), EXTRAS, st.booleans())
def test_keys_are_the_defined_digests(tokens: list[int], size: int, extras: dict[int, bytes], portable: bool) -> None:
    keys = hash_blocks(np.array(tokens, dtype=np.int64), size, SEED, extras, portable)
    assert keys.shape == (len(tokens) // size, 2)
    assert keys.dtype == np.uint64
    assert keys.tobytes() == reference(tokens, size, extras=extras)


@given(st.binary(max_size=80), st.lists(st.text(max_size=20), max_size=4), st.binary(max_size=100))
def test_the_seed_is_the_defined_digest(domain: bytes, namespace: list[str], secret: bytes) -> None:
    assert chain_seed(domain, namespace, secret) == reference_seed(domain, namespace, secret)


def test_keys_that_were_once_written_to_a_disk_stay_valid() -> None:
    """A change of these values makes all KV on disks and on other nodes useless: raise ``LAYOUT_VERSION`` with it."""
    seed = chain_seed(b"domain", ("lora", "x"), b"secret")
    assert chain_seed(b"").hex() == "773650af2046b9a25ab44a1221a6467938e24d2c153afbccb058816fc31872e8"
    assert seed.hex() == "cb05a4ae711462cf5cd11d40745f9b83a015d38988f2dbc813d9ace49191e991"
    assert [key.tobytes().hex() for key in hash_blocks(np.arange(32), 16, seed)] == [
        "6d4d25062b47f01183bfc4503f43ba68", "361f24ea1e6191ea3042a8279260b8f3",
    ]
    assert [key.tobytes().hex() for key in hash_blocks(np.arange(5), 2, seed, {1: b"image"})] == [
        "bed9eda80df1645a1c019ce8059180a0", "0693b189afb6e2511dcfa5744e8874e3",
    ]


@pytest.mark.parametrize("size", [*range(1, 36), 64, 128, 1000])
@pytest.mark.parametrize("with_extras", [False, True])
def test_the_portable_code_and_the_instructions_agree(size: int, with_extras: bool) -> None:
    tokens = np.random.default_rng(size).integers(0, 2**32, 7 * size + size // 2)
    extras = {0: b"", 1: b"image", 2: b"x" * 1000, 5: b"y"} if with_extras else None
    expected = reference(tokens.tolist(), size, extras=extras)
    assert hash_blocks(tokens, size, SEED, extras, portable=True).tobytes() == expected
    assert hash_blocks(tokens, size, SEED, extras).tobytes() == expected


def test_the_instructions_are_used_where_the_processor_has_them() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert (" sha_ni" in flags or " sha2" in flags) == HAS_SHA_INSTRUCTIONS


@given(st.lists(st.tuples(PIECE, st.sampled_from(["i4", "i8", "u4"])), max_size=8), st.integers(1, 20))
def test_a_growing_sequence_has_the_keys_of_the_whole(pieces: list[tuple[list[int], str]], size: int) -> None:
    hasher = SequenceHasher(SEED, size)
    whole: list[int] = []
    for piece, dtype in pieces:
        before = hasher.keys.copy()
        whole += piece
        assert hasher.extend(np.array(piece, dtype=dtype)) == len(whole) // size
        assert (hasher.keys[: len(before)] == before).all()
        assert hasher.keys.tobytes() == reference(whole, size)
        assert hasher.num_tokens == len(whole)


@given(st.lists(st.integers(0, 30), max_size=10), EXTRAS)
def test_extras_count_if_they_come_before_the_key(lengths: list[int], extras: dict[int, bytes]) -> None:
    hasher, size, whole, given_later = SequenceHasher(SEED, 4), 4, 0, dict(extras)
    for length in lengths:                             # each with the last tokens that it can come with, or far ahead
        due = {i: given_later.pop(i) for i in list(given_later) if i < (whole + length) // size or i % 3 == 0}
        hasher.extend(np.arange(whole, whole + length), due)
        whole += length
    assert hasher.keys.tobytes() == reference(range(whole), size, extras=extras)


def test_later_extras_of_the_unfinished_block_replace_earlier() -> None:
    hasher = SequenceHasher(SEED, 4)
    hasher.extend(np.arange(6), {1: b"first"})
    hasher.extend(np.arange(6, 8), {1: b"second"})
    assert hasher.keys.tobytes() == reference(range(8), 4, extras={1: b"second"})


def test_every_type_of_tokens_gives_the_same_keys() -> None:
    tokens = np.arange(100)
    for same in (tokens, tokens.astype(np.int32), tokens.astype(np.uint32), tokens.tolist(), np.repeat(tokens, 2)[::2]):
        assert hash_blocks(same, 16, SEED).tobytes() == reference(range(100), 16)
    for dtype in ("i4", "i8"):                         # in a buffer where they begin at an odd address
        unaligned = np.frombuffer(b"x" + tokens.astype(dtype).tobytes(), dtype=np.uint8)[1:].view(dtype)
        assert not unaligned.flags.aligned
        assert hash_blocks(unaligned, 16, SEED).tobytes() == reference(range(100), 16)
    high = np.array([2**32 - 1] * 16)
    assert (hash_blocks(high, 16, SEED) == hash_blocks(high.astype(np.uint32), 16, SEED)).all()


def test_a_key_depends_on_every_token_before_it() -> None:
    tokens = np.arange(64)
    keys = hash_blocks(tokens, 16, SEED)
    for at in range(64):
        changed = tokens.copy()
        changed[at] += 1
        same = (hash_blocks(changed, 16, SEED) == keys).all(axis=1)
        assert same.tolist() == [i < at // 16 for i in range(4)]


def all_different(values: Sequence[bytes]) -> bool:
    return len(set(values)) == len(values)


def test_parts_of_a_namespace_cannot_be_moved_into_each_other() -> None:
    names = ["", "a", "b", "ab", "\0", "a\0", "\0a", "\1", "\1\0\0\0\0\0\0\0a"]
    namespaces = [space for length in range(4) for space in itertools.product(names, repeat=length)]
    assert all_different([chain_seed(b"d", space) for space in namespaces])
    assert all_different([
        chain_seed(b"ab"), chain_seed(b"a", ("b",)), chain_seed(b"", ("ab",)), chain_seed(b"", ("a", "b")),
        chain_seed(b"", (), b"ab"), chain_seed(b"b", (), b"a"), chain_seed(b"a", (), b"b"),
    ])


def test_extras_tokens_and_block_sizes_cannot_be_moved_into_each_other() -> None:
    tokens = np.arange(16)
    digest = hashlib.sha256(b"FlexKV:X" + b"image").digest()
    as_tokens = np.frombuffer(digest, dtype=np.uint32)
    keys = [
        hash_blocks(tokens[:8], 8, SEED),
        hash_blocks(tokens[:8], 8, SEED, {0: b""}),
        hash_blocks(tokens[:8], 8, SEED, {0: b"image"}),
        hash_blocks(tokens[:8], 8, SEED, {0: digest}),
        hash_blocks(np.concatenate([tokens[:8].astype(np.uint32), as_tokens]), 16, SEED),
        hash_blocks(tokens[:8], 8, digest),                      # the digest as the chain value before
        hash_blocks(tokens[:4], 4, SEED), hash_blocks(tokens[:2], 2, SEED), hash_blocks(tokens[:1], 1, SEED),
        hash_blocks(tokens[:8], 8, SEED, {0: b"FlexKV:X"}),
    ]
    assert all_different([key.tobytes() for key in keys])


def test_the_chain_continues_from_the_whole_digest() -> None:
    """A collision of two 128-bit keys does not spread to the blocks after them: the chain keeps 256 bits."""
    tokens = np.arange(32)
    first = hash_blocks(tokens[:16], 16, SEED).tobytes()
    block = b"FlexKV:B" + struct.pack("<II16I", 16, 0, *range(16))
    value = hashlib.sha256(block + SEED).digest()
    assert value[:16] == first
    second = hash_blocks(tokens, 16, SEED)[1].tobytes()
    assert hash_blocks(tokens[16:], 16, value).tobytes() == second
    for other in (value[:16] + bytes(16), value[:31] + bytes([value[31] ^ 1])):
        assert hash_blocks(tokens[16:], 16, other).tobytes() != second


def test_blocks_that_collide_under_a_fast_hash_have_different_keys() -> None:
    one, other = (np.array(block) for block in XXH3_COLLISION)
    assert xxhash.xxh3_128_digest(one.astype("<u4")) == xxhash.xxh3_128_digest(other.astype("<u4"))
    prefix, suffix = np.arange(32), np.arange(16)
    for before in ([], prefix):
        sequences = [np.concatenate([before, block, suffix]).astype(np.int64) for block in (one, other)]
        keys, other_keys = (hash_blocks(tokens, 16, SEED) for tokens in sequences)
        same = (keys == other_keys).any(axis=1)
        assert same.tolist() == [True] * (len(before) // 16) + [False, False]


@pytest.mark.parametrize("bad", [-1, -(2**31), 2**32, 2**40, -(2**63)])
@pytest.mark.parametrize("portable", [False, True])
def test_a_token_out_of_range_is_named(bad: int, portable: bool) -> None:
    tokens = np.arange(32)
    tokens[19] = bad
    with pytest.raises(ValueError, match=f"token 19 is {bad}"):
        hash_blocks(tokens, 16, SEED, portable=portable)
    hasher = SequenceHasher(SEED, 16)
    with pytest.raises(ValueError, match="token 19"):
        hasher.extend(tokens, {0: b"x"})
    assert hasher.num_tokens == 0
    hasher.extend(np.arange(32))
    assert hasher.keys.tobytes() == reference(range(32), 16)


def test_a_negative_int32_token_is_named() -> None:
    with pytest.raises(ValueError, match="token 3 is -7"):
        hash_blocks(np.array([0, 1, 2, -7], dtype=np.int32), 4, SEED)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="float64"):
        hash_blocks(np.zeros(8), 4, SEED)
    with pytest.raises(ValueError, match="2 dimensions"):
        hash_blocks(np.zeros((2, 2), dtype=np.int64), 4, SEED)
    for size in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"tokens_per_block is {size}"):
            hash_blocks(np.arange(4), size, SEED)
    for seed in (b"short", SEED[:16], SEED + b"x"):
        with pytest.raises(ValueError, match="seed"):
            hash_blocks(np.arange(4), 2, seed)
        with pytest.raises(ValueError, match="seed"):
            SequenceHasher(seed, 2)
    for namespace in ("tenant", b"tenant"):
        with pytest.raises(TypeError, match="give a sequence of strings"):
            chain_seed(b"d", namespace)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="namespace contains 5"):
        chain_seed(b"d", ("a", 5))  # type: ignore[arg-type]


def test_bad_extras_are_named_and_change_nothing() -> None:
    hasher = SequenceHasher(SEED, 4)
    hasher.extend(np.arange(8))
    with pytest.raises(ValueError, match="block 1, which has its key"):
        hasher.extend(np.arange(4), {2: b"fine", 1: b"late"})
    for extras, message in (({-1: b"x"}, "block -1"), ({2: 5}, "block 2 are int"), ({2: "text"}, "block 2 are str")):
        with pytest.raises((ValueError, TypeError), match=message):
            hasher.extend(np.arange(4), extras)
        with pytest.raises((ValueError, TypeError), match=message):
            hash_blocks(np.arange(16), 4, SEED, extras)
    assert hasher.num_tokens == 8
    hasher.extend(np.arange(8, 12))
    assert hasher.keys.tobytes() == reference(range(12), 4)


def test_a_salt_that_is_no_valid_unicode_is_a_namespace_like_any_other() -> None:
    """JSON can carry half of a surrogate pair, and a client chooses its cache salt."""
    assert all_different([chain_seed(b"d", ("\ud800",)), chain_seed(b"d", ("\ud801",)), chain_seed(b"d", ("?",))])
