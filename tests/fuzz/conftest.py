"""Prints the seed of the round that a fuzzer was at."""

from collections.abc import Iterator

import pytest

from tests.fuzz.rounds import last_seed


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    yield
    print(f"FUZZ_SEED={last_seed[0]}")
