"""Every format that replay reads, and the errors for other formats."""

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.errors import TraceError
from flexkv.tools.replay.reader import read_trace

from .traces import BLOCK, mooncake, trace_of, write

SEQUENCES = [(1, 2, 3, 4, 5), (1, 2, 6, 7, 8), (9, 10, 11, 12, 13)]


@pytest.mark.parametrize("name", ["trace", "trace.txt", "trace.jsonl"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress, lzma.compress])
def test_mooncake_by_content_whatever_it_is_called(tmp_path: Path, name: str, packed: Any) -> None:
    plain = write(tmp_path / "plain", mooncake(SEQUENCES)).read_bytes()
    (tmp_path / name).write_bytes(packed(plain))
    trace, expected = read_trace(tmp_path / name), trace_of(SEQUENCES)
    assert (trace.name, trace.block_tokens, trace.num_requests, trace.is_timed) == (name, BLOCK, 3, True)
    assert (trace.keys == expected.keys).all()
    assert (trace.starts == expected.starts).all()
    assert trace.seconds.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [4, 16, 64, 512, 784])
def test_lengths_tell_the_size_of_a_block(tmp_path: Path, size: int) -> None:
    lines = mooncake([tuple(range(i, i + 200 + i)) for i in range(5)], size)
    lines[0]["input_length"] += 2
    assert read_trace(write(tmp_path / "t", lines)).block_tokens == size
    assert read_trace(tmp_path / "t", 32).block_tokens == 32


def test_without_lengths_a_block_has_512_tokens_unless_the_trace_says(tmp_path: Path) -> None:
    lines = [{"timestamp": 5, "hash_ids": [1, 2]}]
    assert read_trace(write(tmp_path / "t", lines)).block_tokens == 512
    assert read_trace(write(tmp_path / "t", [{**lines[0], "block_size": 128}])).block_tokens == 128


def test_bailian_has_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    lines = [{"chat_id": i, "timestamp": 2.5 * i, "input_length": 40, "hash_ids": [i, 7]} for i in range(2)]
    trace = read_trace(write(tmp_path / "t", lines))
    assert trace.block_tokens == 16
    assert trace.seconds.tolist() == [0, 2.5]


def test_token_ids_are_cut_into_whole_blocks(tmp_path: Path) -> None:
    tokens = list(range(40))
    lines = [{"prompt_token_ids": tokens}, {"prompt_token_ids": [*tokens[:20], 0]}, {"prompt_token_ids": [1]}]
    trace = read_trace(write(tmp_path / "t", lines))
    assert (trace.block_tokens, trace.is_timed) == (16, False)
    assert trace.starts.tolist() == [0, 2, 3, 3]
    assert (trace.keys[0] == trace.keys[2]).all()
    assert np.diff(read_trace(tmp_path / "t", 10).starts).tolist() == [4, 2, 0]


def test_large_ids_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text('{"hash_ids": [9223372036854775807, -1]}\n\n  \n{"hash_ids": [9223372036854775807]}\n')
    trace = read_trace(path)
    assert trace.starts.tolist() == [0, 2, 3]
    assert trace.num_distinct == 2


WRONG = {
    '{"timestamp": 1, "hash_ids": [1, 2': "line 2 is not JSON.*cut off",
    "[1]\n": "line 2 is not a JSON object",
    '{"timestamp": "soon", "hash_ids": [1]}\n': "line 2 timestamp is 'soon'",
    '{"timestamp": NaN, "hash_ids": [1]}\n': "line 2 timestamp is nan",
    '{"timestamp": 1, "hash_ids": [1, "a"]}\n': "line 2 has no hash_ids that are a list of whole numbers",
    '{"timestamp": 1, "hash_ids": [[1], [2, 3]]}\n': "line 2 has no hash_ids",
    '{"timestamp": 1, "hash_ids": [1.5]}\n': "line 2 has no hash_ids",
    '{"timestamp": 1, "hash_ids": [36893488147419103232]}\n': "line 2 has no hash_ids.*64 bits",
    '{"timestamp": 1, "hash_ids": 7}\n': "line 2 has no hash_ids",
    '{"timestamp": 1}\n': "line 2 has no hash_ids",
    '{"timestamp": 1, "hash_ids": [1], "input_length": -4}\n': "line 2 input_length is -4",
    '{"hash_ids": [1]}\n': "1 of 2 requests without timestamp",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t", mooncake([(1, 2)]))
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(TraceError, match=WRONG[line]) as caught:
        read_trace(path)
    assert caught.value.line in (0, 2)


OTHERS = {
    b"": "has no requests",
    b"\n\n": "has no requests",
    b"Timestamp,Model,Request tokens\n5,ChatGPT,472\n": "line 1 is not a JSON object; supported are",
    json.dumps([{"conversations": [{"from": "human", "value": "hi"}]}]).encode(): "line 1 is not a JSON object; supp",
    b'{"prompt": "hi"}\n': "line 1 has text.*prompt_token_ids",
    b'{"messages": []}\n': "line 1 has text",
    b'{"requests": []}\n': "line 1 has neither hash_ids nor prompt_token_ids; supported are",
    b'{"hash_ids": [1], "block_size": 0}\n': "block_size is 0",
    json.dumps({"prompt_token_ids": [-1] * 16}).encode(): "line 1 has prompt_token_ids that cannot be hashed",
    bytes(range(256)): "line 1 is not a JSON object",
    b"{\xff\xfe}\n": "line 1 is not JSON",
    gzip.compress(b'{"hash_ids": [1]}\n' * 1000)[:-20]: "cannot be read",
    lzma.compress(b'{"hash_ids": [1]}\n' * 1000)[:-20]: "cannot be read",
    b"\x1f\x8b" + b"\0" * 40: "cannot be read",
    b"FlexKVtr" + b"\0" * 40: "recorded by another version",
}


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path, number: int) -> None:
    content, words = list(OTHERS.items())[number]
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match=words):
        read_trace(tmp_path / "t")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(TraceError, match="directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize("packed", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("head", [b"", b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, packed: Any, head: bytes) -> None:
    plain = write(tmp_path / "plain", mooncake(SEQUENCES)).read_bytes()
    (tmp_path / "t").write_bytes(packed(b"\xef\xbb\xbf" + head + plain))
    assert (read_trace(tmp_path / "t").keys == read_trace(tmp_path / "plain").keys).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": ' + "9" * 400 + ', "hash_ids": [1]}', "timestamp is <whole number of 1329 bits>"),
        ('{"timestamp": -' + "9" * 30 + ', "hash_ids": [1]}', "timestamp is -9"),
        ('{"timestamp": 1e999, "hash_ids": [1]}', "timestamp is inf"),
        ('{"timestamp": NaN, "hash_ids": [1]}', "timestamp is nan"),
        ('{"timestamp": 1e308, "hash_ids": [1]}', r"timestamp is 1e\+308"),
        ('{"timestamp": ' + "9" * 5000 + ', "hash_ids": [1]}', "is not JSON: Exceeds the limit"),
        ('{"timestamp": 0, "hash_ids": ' + "[" * 100_000, "is not JSON: it is nested too deeply"),
        ('{"timestamp": 0, "x": ' + '{"x":' * 100_000, "is not JSON: it is nested too deeply"),
        ('{"timestamp": 0, "input_length": ' + "9" * 400 + ', "hash_ids": [1]}', "input_length is <whole number"),
        ('{"timestamp": 0, "input_length": 1.5, "hash_ids": [1]}', "input_length is 1.5"),
        ('{"timestamp": 0, "hash_ids": [' + "9" * 30 + "]}", "no hash_ids that are a list of whole numbers"),
        ('{"timestamp": 0, "hash_ids": [1, -1, 18446744073709551615]}', "no hash_ids that are a list"),
        ('{"timestamp": 0, "hash_ids": [1, true]}', "no hash_ids that are a list"),
        ('{"timestamp": 0, "hash_ids": [[1], [2, 3]]}', "no hash_ids that are a list"),
        ('{"timestamp": 0, "hash_ids": [1, null]}', "no hash_ids that are a list"),
        ('{"timestamp": 0, "hash_ids": [1]}\xff', "is not JSON"),
    ],
)
def test_odd_json_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    first = '{"timestamp": 0, "input_length": 1024, "hash_ids": [1, 2]}\n'
    (tmp_path / "t").write_bytes((first + line + "\n").encode("latin-1"))
    with pytest.raises(TraceError, match=f"t, line 2 .*{message}") as caught:
        read_trace(tmp_path / "t")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("size", ["0", "-1", "9" * 400, "16777217", '"16"', "1.0"])
def test_odd_sizes_of_blocks_are_named(tmp_path: Path, size: str) -> None:
    (tmp_path / "t").write_text('{"block_size": ' + size + ', "hash_ids": [1, 2]}\n')
    with pytest.raises(TraceError, match="line 1 block_size is "):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress])
def test_packed_traces_that_are_damaged(tmp_path: Path, packed: Any) -> None:
    whole = packed(write(tmp_path / "plain", mooncake(SEQUENCES * 50)).read_bytes())
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:7], whole[:20] + bytes(8) + whole[28:]):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(TraceError, match="t cannot be read: "):
            read_trace(tmp_path / "t")


def test_a_pipe_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t")                                # would wait for a writer
    with pytest.raises(TraceError, match="is not an ordinary file"):
        read_trace(tmp_path / "t")


def test_a_long_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv.tools.replay.reader._MAX_LINE_BYTES", 100)
    (tmp_path / "t").write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [' + "1," * 100 + "1]}\n")
    with pytest.raises(TraceError, match="line 2 is longer than"):
        read_trace(tmp_path / "t")
