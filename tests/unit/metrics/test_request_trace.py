"""The recorder: it records the requests, in bounded space, and the trace survives the end of the process."""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.config import CacheConfig
from flexkv.errors import TraceError
from flexkv.metrics import request_trace as trace_module
from flexkv.metrics.request_trace import NullRecorder, TraceRecorder, make_recorder, read_recorded
from flexkv.tools.replay.reader import read_trace
from tests.property.model_tree import Prefix, keys_of
from tests.support.harness import until

MIB = 1 << 20
SEQUENCES: list[Prefix] = [(1, 2, 3), (1, 2, 4), (1, 5), (), (6, 7, 8, 9), (6,), (1, 2, 3, 10, 11)]


def record(path: Path, sequences: Sequence[Prefix]) -> bytes:
    recorder = TraceRecorder(path, 16, MIB)
    for sequence in sequences:
        recorder.record(keys_of(sequence))
    recorder.close()
    recorder.close()
    return path.read_bytes()


def halves(sequences: Sequence[Prefix]) -> list[list[int]]:
    return [keys_of(sequence)[:, 0].tolist() for sequence in sequences]


def recorded(content: bytes) -> list[list[int]]:
    found = read_recorded(content)
    assert found is not None
    assert found.block_tokens == 16
    assert found.seconds == sorted(found.seconds)
    return [sequence.tolist() for sequence in found.sequences]


@settings(max_examples=50, deadline=None)
@given(sequences=st.lists(st.sampled_from(SEQUENCES), max_size=20), bits=st.sampled_from([0, 1, 3, 10]))
def test_round_trip_however_little_is_remembered(
    sequences: list[Prefix], bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "_REMEMBERED_BITS", bits)
        content = record(tmp_path_factory.mktemp("trace") / "t", sequences)
    assert recorded(content) == halves(sequences)


def test_what_was_seen_before_costs_a_record_only(tmp_path: Path) -> None:
    long = tuple(range(250))
    once, ten = (len(record(tmp_path / f"{n}", [long] * n)) for n in (1, 10))
    assert once > 8 * 250
    assert ten - once == 9 * 32


def test_replay_reads_it(tmp_path: Path) -> None:
    record(tmp_path / "t", SEQUENCES)
    trace = read_trace(tmp_path / "t")
    assert (trace.block_tokens, trace.num_requests, trace.is_timed) == (16, len(SEQUENCES), True)
    assert trace.keys[:, 0].tolist() == [key for sequence in halves(SEQUENCES) for key in sequence]
    assert trace.num_distinct == 11


def test_it_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "t", 16, MIB)
    try:
        for count in (1, 2):
            recorder.record(keys_of(SEQUENCES[0]))
            until(lambda count=count: read_trace(tmp_path / "t").num_requests == count)
    finally:
        recorder.close()


def test_wherever_it_is_cut_the_records_before_are_read(tmp_path: Path) -> None:
    content = record(tmp_path / "t", SEQUENCES)
    lengths = [0]
    for size in range(32, len(content) + 1):
        found = recorded(content[:size])
        assert found == halves(SEQUENCES)[: len(found)]
        assert lengths[-1] <= len(found) <= lengths[-1] + 1
        lengths.append(len(found))
    assert lengths[-1] == len(SEQUENCES)
    assert all(read_recorded(content[:size]) is None for size in range(32))


def test_a_damaged_record_ends_the_trace(tmp_path: Path) -> None:
    content = record(tmp_path / "t", SEQUENCES)
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]
        found = read_recorded(damaged)
        assert (found is None) == (at < 32)
        if found is not None:
            assert [sequence.tolist() for sequence in found.sequences] == halves(SEQUENCES)[: len(found.sequences)]
            assert len(found.sequences) < len(SEQUENCES)


CHILD = """
import sys
import numpy as np
from pathlib import Path
from flexkv.metrics import request_trace as trace
trace._FLUSH_S = 1e-4
recorder = trace.TraceRecorder(Path(sys.argv[1]), 16, 64 << 20)
for number in range(1 << 40):
    keys = np.repeat(np.arange(1 + number * 100, 101 + number * 100, dtype=np.uint64)[:, None], 2, axis=1)
    recorder.record(keys)
"""


def test_a_kill_costs_the_last_records_only(tmp_path: Path) -> None:
    path = tmp_path / "t"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)])
    try:
        until(lambda: path.exists() and path.stat().st_size > 2 * MIB, 20)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = read_recorded(path.read_bytes())
    assert found is not None
    assert path.stat().st_size - 32 - 832 < len(found.sequences) * 832 <= path.stat().st_size - 32
    firsts = [int(sequence[0]) for sequence in found.sequences]
    assert all((first - 1) % 100 == 0 for first in firsts)
    assert firsts == sorted(set(firsts))
    assert all((np.diff(sequence) == 1).all() and len(sequence) == 100 for sequence in found.sequences)


def test_the_file_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = TraceRecorder(tmp_path / "t", 16, MIB)
    with caplog.at_level(logging.WARNING, "flexkv.metrics"):
        for number in range(200):
            recorder.record(np.full((1000, 2), 1 + number, dtype=np.uint64))
        recorder.close()
    assert MIB - 8100 < (tmp_path / "t").stat().st_size <= MIB
    assert [entry.message for entry in caplog.records] == [
        f"recording in {tmp_path / 't'} has ended: it has reached trace_max_mb (1 MiB)"
    ]
    assert 100 < len(recorded((tmp_path / "t").read_bytes())) < 200
    recorder.record(keys_of(SEQUENCES[0]))                         # of no effect


def test_requests_that_come_too_fast_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_module, "_FLUSH_S", 3600.0)
    monkeypatch.setattr(trace_module, "_QUEUED_KEYS", 7)
    recorder = TraceRecorder(tmp_path / "t", 16, MIB)
    for sequence in [SEQUENCES[0], SEQUENCES[1], SEQUENCES[2], (6,)]:
        recorder.record(keys_of(sequence))
    assert recorder.dropped_requests == 1
    recorder.close()
    assert "lacks 1 requests" in caplog.text
    assert recorded((tmp_path / "t").read_bytes()) == halves([SEQUENCES[0], SEQUENCES[1], (6,)])


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = TraceRecorder(tmp_path / "t", 16, MIB)
    recorder._file.close()
    with open("/dev/full", "wb", buffering=0) as recorder._file:
        recorder.record(keys_of(SEQUENCES[0]))
        recorder.record(keys_of(SEQUENCES[1]))
        recorder.close()
    assert caplog.text.count("cannot be written: No space left on device") == 1
    assert recorded((tmp_path / "t").read_bytes()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    for number in (1, 2):
        recorder = make_recorder(CacheConfig(num_cpu_blocks=1, trace_path=str(tmp_path / "t")))
        recorder.record(keys_of(SEQUENCES[number]))
        recorder.close()
        assert recorded((tmp_path / f"t.{number}").read_bytes()) == halves([SEQUENCES[number]])
        assert (tmp_path / f"t.{number}").stat().st_mode & 0o077 == 0
    assert (tmp_path / "t").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="set trace_path to another file"):
        make_recorder(CacheConfig(num_cpu_blocks=1, trace_path=str(tmp_path / "no" / "t")))


def test_off_is_nothing(tmp_path: Path) -> None:
    recorder = make_recorder(CacheConfig(num_cpu_blocks=1))
    assert isinstance(recorder, NullRecorder)
    recorder.record(keys_of(SEQUENCES[0]))
    recorder.close()
