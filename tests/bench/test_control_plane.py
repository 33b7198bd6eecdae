"""The benches of ``flexkv bench`` as a pytest-benchmark suite, to compare two commits; small, and asserts no time."""

import importlib.util
import itertools

import numpy as np
import pytest

from flexkv._core.index.block_keys import chain_seed, hash_blocks
from flexkv.tools.bench import api, daemon, evict, hash, insert, match, memory, ranks, recover
from flexkv.tools.bench.filled_tree import NEW, SEQUENCE, SHARED, FilledTree

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def filled() -> FilledTree:
    return FilledTree(200_000)


@pytest.mark.parametrize("portable", [False, True])
def test_hash(benchmark, portable: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, 128_000, hash.NUM_TOKENS)
    keys = benchmark(hash_blocks, tokens, hash.TOKENS_PER_BLOCK, chain_seed(b"bench"), portable=portable)
    assert keys.shape == (2048, 2)


def test_hash_of_vllm_is_measured_in_the_same_run() -> None:
    cases = [line.case for line in hash.run(2)]
    assert any("vLLM" in case for case in cases) == (importlib.util.find_spec("vllm") is not None)


@pytest.mark.parametrize("known", [True, False])
def test_match(benchmark, filled: FilledTree, known: bool) -> None:
    sequences = itertools.cycle(filled.sequences if known else [filled.new_sequence() for _ in range(100)])
    found = benchmark(lambda: filled.tree.match(next(sequences)))
    assert found.num_ready == (SEQUENCE if known else SHARED)


def test_insert(benchmark, filled: FilledTree) -> None:
    def setup() -> tuple[tuple, dict]:
        filled.evict_oldest(NEW)
        keys = filled.new_sequence()
        filled.now += 1
        return (keys, filled.slots_for(keys), 0, filled.now), {}

    def insert_and_finish(keys, slots, tier, now) -> None:
        filled.tree.insert(keys, slots, tier, now)
        filled.tree.set_ready(keys, slots, tier)

    benchmark.pedantic(insert_and_finish, setup=setup, rounds=100)
    filled.tree.check_integrity()


@pytest.mark.parametrize(
    "lines",
    [lambda: hash.run(5, with_vllm=False), lambda: match.run(20_000, 5), lambda: insert.run(20_000, 5),
     lambda: memory.run(20_000), lambda: evict.run(20_000, 20), lambda: recover.run(20_000, 2), lambda: api.run(20)],
    ids=["hash", "match", "insert", "memory", "evict", "recover", "api"],
)
def test_the_command_measures(lines) -> None:
    for line in lines():
        assert line.value > 0 or "less" in line.case or "growth" in line.case
        assert line.unit in ("us", "bytes/block")


def test_ranks() -> None:
    cases = [line.case for line in ranks.run(20, [(1, 1), (2, 2)]) if line.unit == "us"]
    assert cases == ["get of 1 block, 1 rank", "get of 1 block, 2 ranks on 2 nodes"]


def test_daemon() -> None:
    cases = [line.case for line in daemon.run(50, 0.3, [2])]
    assert len(cases) == 3
