"""Real vLLM on the CPU, with the stock connector: it reads back the bytes that it wrote, with any events in between."""

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.integration.vllm_session import RESULT

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def run(**options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integration.vllm_session", json.dumps(options)]
    two_ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in options.get("llm", {}) else {}
    done = subprocess.run(
        command, cwd=ROOT, env=process_environment(**ENVIRONMENT, **two_ranks), capture_output=True, text=True,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(lines) == 1, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix(RESULT))
    return result


def stage(seed: int, **more: Any) -> dict[str, Any]:
    return {"seed": seed, "count": 6, "length": 600, "tokens": 8, **more}


@cache
def answers_without_flexkv(text: str) -> list[Any]:
    stages = json.loads(text)
    result = run(flexkv=False, block_size=32, gpu_blocks=200, passes=stages)
    return [one["answers"] for one in result["passes"]]


def expect_clean(report: dict[str, Any]) -> None:
    assert report["checked_blocks"] > 0
    assert report["wrong_bytes"] == 0
    assert report["unknown_blocks"] == 0
    assert report["tracked"] == 0
    assert report["outstanding"] == 0
    assert report["leaked_pages"] == 0
    assert report["lost_slots"] == report["lost_ssd_slots"] == 0
    if "ssd_slots" not in report:                           # else a block of the index may be on either tier
        assert report["free_slots"] + report["indexed_blocks"] == report["num_slots"]


PRESSURE = [
    stage(3, count=12, tokens=40), stage(4, count=12, tokens=40), stage(3, count=12, tokens=40, abort_after=4),
    stage(4, count=12, tokens=40, abort_after=15), stage(3, count=12, tokens=40), stage(5, one_by_one=True),
    stage(3, count=4, tokens=40, one_by_one=True), stage(3, count=4, tokens=40, one_by_one=True),
]
STAGES = [stage(1, one_by_one=True), stage(2, one_by_one=True), stage(1, one_by_one=True), stage(2)]


@pytest.mark.parametrize(("block_size", "chunked"), [
    (32, True), (128, False), pytest.param(32, False, marks=pytest.mark.nightly),
    pytest.param(128, True, marks=pytest.mark.nightly),
])
def test_reads_back_what_it_wrote(block_size: int, chunked: bool) -> None:
    result = run(
        block_size=block_size, chunked=chunked, batched_tokens=256 if chunked else 1024,
        gpu_blocks=1024 // block_size + 2,
        passes=copy.deepcopy(STAGES),
    )
    expect_clean(result["report"])
    assert result["report"]["hit_tokens"] > 3 * 500
    cold, _, warm, _ = [one["answers"] for one in result["passes"]]
    assert warm == cold
    assert [one["answers"] for one in result["passes"]] == answers_without_flexkv(json.dumps(STAGES))


@pytest.mark.parametrize("mode", ["always", "never"])
def test_reads_back_what_it_wrote_layer_by_layer(mode: str) -> None:
    result = run(
        block_size=32, batched_tokens=256, gpu_blocks=34, settings={"layerwise_loads": mode},
        passes=copy.deepcopy(STAGES),
    )
    expect_clean(result["report"])
    assert result["report"]["hit_tokens"] > 3 * 500
    assert (result["report"]["layerwise_loads"] > 3) == (mode == "always")
    assert [one["answers"] for one in result["passes"]] == answers_without_flexkv(json.dumps(STAGES))


@pytest.mark.parametrize("mode", ["always", "never"])
def test_loads_that_fail_make_no_answer_wrong(mode: str) -> None:
    """Neither of their own request, nor of those that load what was computed instead."""
    result = run(
        block_size=32, batched_tokens=256, gpu_blocks=34, settings={"layerwise_loads": mode}, fail_loads=0.3,
        passes=copy.deepcopy(STAGES * 2),
    )
    expect_clean(result["report"])
    assert result["report"]["failed_loads"] > 3
    assert [one["answers"] for one in result["passes"]] == answers_without_flexkv(json.dumps(STAGES)) * 2


def expect_pressure(report: dict[str, Any]) -> None:
    assert report["evicted_blocks"] > 60
    assert report["preemptions"] > 0


def expect_answers_under_pressure(result: dict[str, Any]) -> None:
    """Equal to those without FlexKV, but of the requests that were aborted."""
    expected = answers_without_flexkv(
        json.dumps([{k: v for k, v in s.items() if k != "abort_after"} for s in PRESSURE])
    )
    for got, want in zip(result["passes"], expected, strict=True):
        for mine, theirs in zip(got["answers"], want, strict=True):
            assert mine is None or mine == theirs or len(mine) < 40


def run_under_pressure(stages: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return run(
        block_size=32, gpu_blocks=44, max_seqs=8, batched_tokens=256, settings={"num_cpu_blocks": 60, **settings},
        passes=copy.deepcopy(stages),
    )


def test_pressure_preemption_and_aborts() -> None:
    """A host tier and an engine cache that are both far too small, and requests that go away."""
    result = run_under_pressure(PRESSURE)
    expect_clean(result["report"])
    expect_pressure(result["report"])
    expect_answers_under_pressure(result)


def ssd(directory: Path, **more: Any) -> dict[str, Any]:
    return {"ssd_cache_gb": 0.1, "ssd_cache_dir": str(directory), **more}


@pytest.mark.parametrize(
    ("admission", "host_blocks", "order", "connector"),
    [
        ("all", 40, (0, 1, 0, 1), {}),
        ("second_touch", 100, (0, 0, 1, 0), {
            "module": "flexkv.integration.vllm.connector", "connector": "FlexKVConnector"
        }),
    ],
)
def test_reads_back_from_ssd_what_left_host_memory(
    tmp_path: Path, admission: str, host_blocks: int, order: tuple[int, ...], connector: dict[str, str]
) -> None:
    settings = ssd(tmp_path / "ssd", ssd_admission=admission, num_cpu_blocks=host_blocks, load_policy="always")
    result = run(
        block_size=32, batched_tokens=256, gpu_blocks=34, settings=settings,
        passes=[copy.deepcopy(STAGES[i]) for i in order], **connector,
    )
    report = result["report"]
    expect_clean(report)
    assert report["ssd_store_blocks_read"] > 40
    assert report["evicted_blocks"] > 0
    cold, *_, last = [one["cached"] for one in result["passes"]]
    assert last > cold + 1500
    expected = answers_without_flexkv(json.dumps(STAGES))
    assert [one["answers"] for one in result["passes"]] == [expected[i] for i in order]


def test_pressure_on_both_tiers_and_an_ssd_directory_that_is_deleted(tmp_path: Path) -> None:
    stages = copy.deepcopy(PRESSURE)
    stages[5]["delete"] = str(tmp_path / "ssd")
    result = run_under_pressure(stages, **ssd(tmp_path / "ssd", ssd_admission="all"))
    expect_clean(result["report"])
    expect_pressure(result["report"])
    assert result["report"]["ssd_store_blocks_read"] > 0
    expect_answers_under_pressure(result)


def test_salts_separate_and_reset_forgets() -> None:
    stages = [
        stage(6, one_by_one=True, salt="a"),
        stage(6, one_by_one=True, salt="b", reset_prefix_cache=True),
        stage(6, one_by_one=True, salt="a", reset_prefix_cache=True),
        stage(6, one_by_one=True, salt="a", reset_prefix_cache=True, reset_connector=True),
    ]
    result = run(
        module="flexkv.integration.vllm.connector", connector="FlexKVConnector", block_size=32, gpu_blocks=200,
        settings={"save_mode": "at_finish"}, passes=stages,
    )
    expect_clean(result["report"])
    first, other_salt, same_salt, after_reset = [one["cached"] for one in result["passes"]]
    assert other_salt == first              # only what the prompts share among themselves
    assert same_salt > first + 1500
    assert after_reset == first
    answers = [one["answers"] for one in result["passes"]]
    assert answers[0] == answers[1] == answers[2] == answers[3]


NAMESPACES = {"salt:calm": {"guaranteed": 0.5, "ttl_s": 1000}, "salt:flood": {"limit": 0.9}}


@pytest.mark.parametrize("namespaces", [NAMESPACES, None])
def test_a_flood_of_one_salt_leaves_the_other_what_is_guaranteed(namespaces: dict[str, Any] | None) -> None:
    calm = stage(1, count=3, length=300, one_by_one=True, salt="calm")
    stages = [
        calm, stage(2, count=12, salt="flood"), {**calm, "reset_prefix_cache": True},
        {**calm, "reset_prefix_cache": True, "later_s": 2000.0}, {**calm, "reset_prefix_cache": True},
    ]
    result = run(
        block_size=32, batched_tokens=256, gpu_blocks=200, settings={"num_cpu_blocks": 60, "namespaces": namespaces},
        passes=stages,
    )
    report = result["report"]
    expect_clean(report)
    assert report["evicted_blocks"] > 60
    first, _, after_flood, _, again = result["passes"]
    assert [one["answers"] == first["answers"] for one in result["passes"]] == [True, False, True, True, True]
    assert again["cached"] > first["cached"] + 500              # what was computed again is here again
    if namespaces is None:
        assert after_flood["cached"] == first["cached"]         # only what the prompts share among themselves
        return
    assert after_flood["cached"] == again["cached"]
    assert result["passes"][3]["cached"] == first["cached"]     # nothing that has expired
    assert report["miss_expired"] + report["partial_expired"] == 3
    assert report["namespace_salt:calm_blocks"] <= 30
    assert report["full_hits"] > 0
