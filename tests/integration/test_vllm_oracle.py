"""A real vLLM with FlexKV, all caches far too small, loads that fail at random: each answer is that of a plain vLLM,
and each block in the index has the content that the plain vLLM computes for the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.integration.kv_records import TOLERANCE
from tests.integration.test_vllm import ENVIRONMENT, ROOT
from tests.integration.vllm_session import RESULT

pytestmark = pytest.mark.vllm

MODES = [f"{loads}-{scheduling}" for loads in ("always", "auto", "never") for scheduling in ("sync", "async")]
NIGHTLY = int(os.environ.get("ORACLE_VLLM_REQUESTS", "504"))
MAKE = """
import sys
from pathlib import Path
from tests.integration.vllm_session import make_adapter, make_model
make_model(Path(sys.argv[1]) / "model")
for number in (1, 2):
    make_adapter(Path(sys.argv[1]) / f"lora{number}", number)
"""


def start(*arguments: str) -> str:
    """In a process of its own; with one thread, because the model is too small for more."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=process_environment(**ENVIRONMENT, OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def session(mode: str, **options: Any) -> dict[str, Any]:
    output = start("-m", "tests.integration.oracle_session", json.dumps({"mode": mode, **options}))
    [line] = [line for line in output.splitlines() if line.startswith(RESULT)]
    result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    print(mode, result)
    return result


def expect_right(mode: str, result: dict[str, Any]) -> None:
    assert result["wrong_answers"] == []
    assert result["complete"] > 0.8 * result["requests"]
    assert result["loaded"]["wrong_blocks"] == 0
    index = result["index"]
    assert (index["wrong"], index["known"]) == (0, index["indexed"])     # no block of the index is left out
    assert index["compared"] >= 0.9 * index["known"]                     # loading some may evict others
    assert result["largest"] <= TOLERANCE
    assert result["tracked"] == 0
    assert not any(result["leaks"].values())
    if mode != "auto-sync":                                              # there it depends on what runs beside
        assert (result["layerwise_loads"] > 0) == (mode == "always-sync")


def options_of(directory: Path, modes: list[str], count: int, share: float) -> dict[str, Any]:
    return {"directory": str(directory), "modes": modes, "count": count, "ssd_gb": 0.02, "share": share}


def run_oracle(directory: Path, modes: list[str], count: int, share: float) -> list[dict[str, Any]]:
    start("-c", MAKE, str(directory))
    options = options_of(directory, modes, count, share)
    right = session("plain", **options)
    assert right["changed"] > 0.8 * right["corrupted"] > 0               # answers depend on every block
    assert right["largest_repeated"] <= TOLERANCE
    assert right["smallest_difference"] > 1000 * TOLERANCE               # another block's content is far away
    results = []
    for mode in modes:
        results.append(session(mode, **options))
        expect_right(mode, results[-1])
    return results


def test_answers_and_blocks_are_those_of_a_plain_engine(tmp_path: Path) -> None:
    results = run_oracle(tmp_path, ["always-sync", "never-async"], 14, 0.3)
    assert sum(result["failed_loads"] for result in results) > 0


@pytest.mark.nightly
def test_answers_and_blocks_of_all_modes_over_a_night(tmp_path: Path) -> None:
    count = -(-NIGHTLY // len(MODES))
    results = run_oracle(tmp_path, MODES, count, 0.05)
    faulty = session("always-sync", **options_of(tmp_path, MODES, count, 0.3), faulty=True)
    assert faulty["index"]["wrong"] + len(faulty["wrong_answers"]) > 0       # the oracle sees it
    assert sum(result["preemptions"] > 0 for result in results) > len(results) // 2
    assert all(result["ssd_store_blocks_read"] > 0 for result in results)
    assert sum(result["failed_loads"] for result in results) > 0
