"""Traces of all formats, damaged in any way: they are read, or a TraceError of bounded length says why not."""

import gzip
import json
import lzma
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest

from flexkv.errors import TraceError
from flexkv.metrics.request_trace import _HEADER, _RECORD, MAGIC, _checked, read_recorded
from flexkv.tools.replay.reader import read_trace

from .budget import case, mutated, seeds

_MOONCAKE = [{"timestamp": i * 10, "input_length": 1000 + i, "hash_ids": [1, 2, 3 + i]} for i in range(4)]
_BAILIAN = [{"chat_id": i, "timestamp": 2.5 * i, "input_length": 40, "hash_ids": [i, 7]} for i in range(3)]
_TOKENS = [{"prompt_token_ids": list(range(20 + i)), "timestamp": i} for i in range(3)]
_SIZED = [{"timestamp": 1e3, "block_size": 16, "hash_ids": [-1, 2**63 - 1]}]
LINES = [
    "".join(json.dumps(line) + "\n" for line in lines).encode() for lines in (_MOONCAKE, _BAILIAN, _TOKENS, _SIZED)
]


def record(rng: Random) -> bytes:
    """A recorded trace with right checksums, and fields that its writer would not write."""
    odd = [0, 1, 2, 3, 16, 1 << 24, (1 << 32) - 1]
    content = _checked(_HEADER.pack(MAGIC, rng.choice([1, 1, 1, 2]), rng.choice([16, 16, *odd]), 1.7e9))
    for i in range(rng.randrange(5)):
        shared, base, count = (rng.choice([0, 0, 1, 2, *odd]) for _ in range(3))
        keys = rng.randbytes(8 * min(count, 4))
        seconds = rng.choice([float(i), -1.0, 1e300, float("nan"), float("inf")])
        count = len(keys) // 8 if rng.random() < 0.8 else count
        content += _checked(_RECORD.pack(shared, base, count, 0, seconds), keys)
    return content


def make(rng: Random) -> bytes:
    kind = rng.randrange(4)
    content = record(rng) if kind == 0 else rng.choice(LINES)
    content = mutated(rng, content) if rng.random() < 0.9 else content
    if rng.random() < 0.3:
        content = rng.choice([gzip.compress, lzma.compress])(content)
        content = mutated(rng, content) if rng.random() < 0.5 else content
    return content


def test_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    read = refused = 0
    for seed in seeds():
        with case(seed) as rng:
            path.write_bytes(make(rng))
            try:
                trace = read_trace(path, rng.choice([None, None, None, 16, 512]))
            except TraceError as error:
                text = str(error)
            else:
                text = ""
            if text:
                assert text.startswith(str(path))
                assert len(text) < 2000
                refused += 1
                continue
            read += 1
            assert trace.block_tokens >= 1
            assert len(trace.starts) == trace.num_requests + 1
            assert (np.diff(trace.starts) >= 0).all()
            assert trace.starts[0] == 0
            assert trace.starts[-1] == trace.num_blocks == len(trace.next_use)
            assert np.isfinite(trace.seconds).all()
            assert (np.diff(trace.seconds) > 0).all()
    assert read
    assert refused


def test_recorded_content_is_read_as_far_as_it_is_right() -> None:
    """With damage anywhere, all records before the damage are read, and nothing that was not written."""
    keys = [np.arange(i, i + 3, dtype=np.uint64) for i in range(8)]
    whole = _checked(_HEADER.pack(MAGIC, 1, 16, 0.0))
    ends = []
    for i, each in enumerate(keys):
        whole += _checked(_RECORD.pack(0, 0, 3, 0, float(i)), each.tobytes())
        ends.append(len(whole))
    for seed in seeds():
        with case(seed) as rng:
            damaged = bytearray(whole)
            at = rng.randrange(struct.calcsize("<8sII d Q"), len(whole))
            if rng.random() < 0.5:
                damaged[at] ^= 1 << rng.randrange(8)
            else:
                del damaged[at:]
            recorded = read_recorded(bytes(damaged))
            assert recorded is not None
            expected = sum(end <= at for end in ends)
            assert len(recorded.sequences) == expected
            assert all((mine == right).all() for mine, right in zip(recorded.sequences, keys, strict=False))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_impossible_times_end_a_recorded_trace(seconds: float) -> None:
    content = _checked(_HEADER.pack(MAGIC, 1, 16, 0.0))
    content += _checked(_RECORD.pack(0, 0, 0, 0, 1.0)) + _checked(_RECORD.pack(0, 0, 0, 0, seconds))
    recorded = read_recorded(content)
    assert recorded is not None
    assert recorded.seconds == [1.0]
