"""Keys, against the reference implementation in the package xxhash."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flexkv._core.hashing import SequenceHasher, chain_seed, hash_blocks

SEED = chain_seed(b"domain", ("salt",))


def reference(tokens: np.ndarray, tokens_per_block: int, extras: dict[int, bytes] | None = None) -> list[int]:
    keys, previous = [], SEED
    for i in range(len(tokens) // tokens_per_block):
        block = tokens[i * tokens_per_block : (i + 1) * tokens_per_block].astype("<u4").tobytes()
        extra = (extras or {}).get(i)
        digest = b"" if extra is None else xxhash.xxh3_128_intdigest(extra).to_bytes(16, "little")
        inner = xxhash.xxh3_128_intdigest(block + digest).to_bytes(16, "little")
        keys.append(xxhash.xxh3_128_intdigest(previous + inner))
        previous = keys[-1].to_bytes(16, "little")
    return keys


def as_ints(keys: np.ndarray) -> list[int]:
    return [int(low) | int(high) << 64 for low, high in keys]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=100), st.integers(1, 40), st.booleans())
def test_keys_are_chained_xxh3(tokens: list[int], tokens_per_block: int, with_extras: bool) -> None:
    array = np.array(tokens, dtype=np.int64)
    extras = {0: b"image", 2: b""} if with_extras else None
    assert as_ints(hash_blocks(array, tokens_per_block, SEED, extras)) == reference(array, tokens_per_block, extras)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=40), max_size=8), st.integers(1, 20))
def test_growing_sequence_has_the_keys_of_the_whole(pieces: list[list[int]], tokens_per_block: int) -> None:
    extras = {1: b"x", 3: b"y"}
    hasher = SequenceHasher(SEED, tokens_per_block)
    for i, piece in enumerate(pieces):
        before = hasher.keys.copy()
        hasher.extend(np.array(piece, dtype=np.int64), extras if i == 0 else None)
        assert (hasher.keys[: len(before)] == before).all()
    whole = np.array([token for piece in pieces for token in piece], dtype=np.int64)
    expected = hash_blocks(whole, tokens_per_block, SEED, extras if pieces else None)
    assert (hasher.keys == expected).all()
    assert hasher.num_tokens == len(whole)


def test_int32_and_int64_tokens_give_the_same_keys() -> None:
    tokens = np.arange(100)
    assert (hash_blocks(tokens.astype(np.int32), 8, SEED) == hash_blocks(tokens, 8, SEED)).all()
    assert (hash_blocks(tokens.tolist(), 8, SEED) == hash_blocks(tokens, 8, SEED)).all()


def test_domain_namespace_secret_and_extras_separate() -> None:
    tokens = np.arange(8)
    seeds = [chain_seed(b"a"), chain_seed(b"b"), chain_seed(b"a", ("x",)), chain_seed(b"a", ("x", "y")),
             chain_seed(b"a", ("xy",)), chain_seed(b"a", secret=b"s")]
    keys = {hash_blocks(tokens, 8, seed).tobytes() for seed in seeds}
    keys.add(hash_blocks(tokens, 8, seeds[0], secret=b"s").tobytes())
    keys.add(hash_blocks(tokens, 8, seeds[0], extras={0: b""}).tobytes())
    keys.add(hash_blocks(tokens, 8, seeds[0], extras={0: b"image"}).tobytes())
    assert len(keys) == 9


@pytest.mark.parametrize("bad", [-1, 2**32, 2**40])
def test_a_token_out_of_range_is_named(bad: int) -> None:
    tokens = np.arange(32)
    tokens[19] = bad
    with pytest.raises(ValueError, match=f"token 19 is {bad}"):
        hash_blocks(tokens, 16, SEED)
    hasher = SequenceHasher(SEED, 16)
    with pytest.raises(ValueError, match="token 19"):
        hasher.extend(tokens)
    assert hasher.num_tokens == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="float64"):
        hash_blocks(np.zeros(8), 4, SEED)
    with pytest.raises(ValueError, match="2 dimensions"):
        hash_blocks(np.zeros((2, 2), dtype=np.int64), 4, SEED)
    with pytest.raises(ValueError, match="tokens_per_block"):
        hash_blocks(np.arange(4), 0, SEED)
    with pytest.raises(ValueError, match="seed"):
        hash_blocks(np.arange(4), 2, b"short")
    hasher = SequenceHasher(SEED, 4)
    hasher.extend(np.arange(8))
    with pytest.raises(ValueError, match="block 1"):
        hasher.extend(np.arange(4), {1: b"late"})
