"""The command, from files to figures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flexkv.cache.eviction import POLICIES
from flexkv.cli.main import main
from flexkv.metrics.request_trace import TraceRecorder
from tests.property.model_tree import keys_of

from .traces import BLOCK, mooncake, write

# Two prompts in turn, and now and then others that are asked once.
SEQUENCES = [(1, 2, 3, 4), (5, 6, 7, 8), (1, 2, 3, 4), (10, 11, 12, 13), (5, 6, 7, 8), (1, 2, 3, 4)]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(write(tmp_path / "small.jsonl", mooncake(SEQUENCES)))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert main(["replay", "--jobs", "1", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_one_line_for_each_policy_and_capacity(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, trace, "--capacity-tokens", f"{BLOCK * 8 + 1},{BLOCK * 12}", "--policy", "lru")
    same = {"trace": "small.jsonl", "requests": 6, "blocks": 24}
    assert lines == [
        {**same, "policy": "lru", "capacity_tokens": 33, "hit_rate": round(4 / 24, 6)},
        {**same, "policy": "opt", "capacity_tokens": 33, "hit_rate": 0.5},
        {**same, "policy": "lru", "capacity_tokens": 48, "hit_rate": 0.5},
        {**same, "policy": "opt", "capacity_tokens": 48, "hit_rate": 0.5},
        {**same, "policy": "unbounded", "capacity_tokens": 48, "hit_rate": 0.5},
    ]


def test_lines_are_the_same_with_more_jobs(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = trace, trace, "--policy", "all", "--capacity-tokens", "32,48"
    assert run(capsys, *args, "--jobs", "3") == run(capsys, *args)


def test_the_references_alone(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, trace, "--capacity-tokens", "32", "--policy", "opt")
    assert [line["policy"] for line in lines] == ["opt", "unbounded"]


def test_all_policies_and_several_traces(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, trace, trace, "--capacity-tokens", "32", "--policy", "all")
    assert [line["policy"] for line in lines] == [*POLICIES, "opt", "unbounded"] * 2


def test_sizes_of_both_tiers_from_a_model(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    gib = 1 << 30
    slot = 4096                                      # of a block of 4 tokens, 1000 bytes each
    lines = run(capsys, trace, "--host-gb", str(8 * slot / gib), "--ssd-gb", str(16 * slot / gib), "--policy", "lru",
                "--kv-bytes-per-token", "1000", "--prefill-tokens-per-s", "10", "--ssd-admission", "all")
    tiered, opt, unbounded = lines
    assert (tiered["capacity_tokens"], tiered["ssd_capacity_tokens"]) == (32, 64)
    assert tiered["hit_rate"] == opt["hit_rate"] == unbounded["hit_rate"] == 0.5
    assert tiered["host_hit_rate"] < 0.5
    assert tiered["ssd_written_bytes"] == 12 * slot
    assert tiered["ssd_drive_writes_per_day"] == pytest.approx(12 / 16 * 86_400 / 5, abs=1e-3)
    assert tiered["prefill_seconds_saved"] == 12 * BLOCK / 10
    assert "ssd_written_bytes" not in opt
    lines = run(capsys, trace, "--host-gb", "16", "--model", "Llama-3.1-8B")
    assert lines[0]["capacity_tokens"] == 131_072
    assert "ssd_capacity_tokens" not in lines[0]


def test_the_table_has_the_columns_that_apply(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--capacity-tokens", "32,48", "--jobs", "1"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["trace", "policy", "tokens", "hit", "rate"]
    assert ["small.jsonl", "opt", "32", "0.5000"] in [row.split() for row in rows]
    assert main(["replay", trace, "--host-gb", "0.1", "--ssd-gb", "1", "--model", "qwen3-8b", "--jobs", "1"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "drive writes/day" in head
    assert len({len(row) for row in rows[:1]} | {len(head)}) == 1


def test_the_curves(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, trace, "--policy", "lru", "--plot", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    capacities = [line["capacity_tokens"] for line in lines if line["policy"] == "lru"]
    assert capacities == [BLOCK, 3 * BLOCK, 6 * BLOCK, 12 * BLOCK]      # eight, where there are so many
    assert main(["replay", trace, "--jobs", "1", "--plot", str(tmp_path / "no" / "curve.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_no_curves_without_matplotlib(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["replay", trace, "--plot", str(tmp_path / "curve.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'flexkv[replay]'" in err


WRONG = {
    "--policy nothing": "must be all, or of",
    "--capacity-tokens 3": "at least a block of 4 tokens",
    "--host-gb 1e-9 --model qwen3-8b": "a block of this trace takes",
    "--model nothing": "is not one of",
    "--capacity-tokens 0": "usage",
    "--jobs 0": "usage",
    "--capacity-tokens 1,x": "invalid list of whole numbers",
    "--host-gb -1 --model qwen3-8b": "usage",
    "--host-gb 1": "needs --model",
    "--ssd-gb 1": "needs --host-gb",
    "--host-gb 1 --capacity-tokens 100": "one of them",
    "--host-gb 1 --model qwen3-8b --plot x.png": "several capacities",
}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_are_named(trace: str, args: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["replay", trace, *args.split()])
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    assert WRONG[args] in capsys.readouterr().err


def test_a_bad_trace_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").write_text("nothing\n")
    assert main(["replay", str(tmp_path / "t")]) == 1
    assert "line 1 is not a JSON object; supported are" in capsys.readouterr().err


def test_a_trace_that_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = TraceRecorder(tmp_path / "recorded", BLOCK, 1 << 20)
    for sequence in SEQUENCES:
        recorder.record(keys_of(sequence))
    recorder.close()
    lines = run(capsys, str(tmp_path / "recorded"), "--policy", "lru", "--capacity-tokens", "48")
    assert [line["hit_rate"] for line in lines] == [0.5] * 3
    assert (lines[0]["requests"], lines[0]["blocks"]) == (6, 24)


def test_an_error_comes_before_the_table(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_text('{"hash_ids": [1]}\n{')
    for arguments in (
        [str(tmp_path / "bad")], ["/nope"], [trace, "/nope"], [trace, "--capacity-tokens", "1"],
        [trace, "--plot", "/nope/x.png"], [trace, "--plot", str(tmp_path)], [trace, "--plot", "/proc/x.png"],
        [trace, "--plot", str(tmp_path / "x.tokens")],
    ):
        assert main(["replay", "--jobs", "1", *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


def test_sizes_may_have_a_unit(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, trace, "--capacity-tokens", "1k,1Ki,1_024,2M", "--policy", "lru")
    assert [line["capacity_tokens"] for line in lines if line["policy"] == "lru"] == [1000, 1024, 1024, 2_000_000]
    for text in ("1G5", "0", "k", "1 M B", "9" * 5000):
        with pytest.raises(SystemExit):
            main(["replay", trace, "--capacity-tokens", text])
        assert "invalid list of whole numbers value" in capsys.readouterr().err


def test_a_recorded_trace_keeps_its_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = TraceRecorder(tmp_path / "t", 16, 1 << 20)
    recorder.record(keys_of((1, 2, 3)))
    recorder.close()
    assert run(capsys, str(tmp_path / "t"), "--block-tokens", "16")[-1]["blocks"] == 3
    assert main(["replay", str(tmp_path / "t"), "--block-tokens", "32"]) == 1
    assert "was recorded in blocks of 16 tokens" in capsys.readouterr().err
