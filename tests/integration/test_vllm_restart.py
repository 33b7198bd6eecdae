"""KV on SSD over restarts of a real vLLM: all of it is offered to the same engine, and none of it to another."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.integration.test_vllm import ENVIRONMENT, ROOT, run
from tests.integration.vllm_session import make_adapter

pytestmark = pytest.mark.vllm

MAKE = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tests.integration.vllm_session import make_model
make_model(Path(sys.argv[1]))
if sys.argv[2] != "0":                                  # the same shapes and configuration, trained further
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + float(sys.argv[2]))
    model.save_pretrained(sys.argv[1])
"""


def make(path: Path, more: float = 0.0) -> None:
    """In a process of its own: this one does not load torch's models."""
    command = [sys.executable, "-c", MAKE, str(path), str(more)]
    subprocess.run(command, cwd=ROOT, env=process_environment(**ENVIRONMENT), check=True, timeout=300)


PASSES = [{"seed": 3, "count": 1, "length": 500, "tokens": 12}]


def start(work: Path, **options: Any) -> tuple[list[list[int]], int]:
    """Start an engine on the SSD directory, ask one prompt, stop: the answer, and how many tokens were not computed."""
    settings = {
        "audit": False, "ssd_cache_gb": 0.5, "ssd_cache_dir": str(work / "ssd"), "ssd_admission": "all",
        "load_policy": "always",
    }
    options = {"model": str(work / "model"), "wait_ssd": options.get("flexkv", True), **options}
    result = run(block_size=32, gpu_blocks=100, settings=settings, report=False, passes=json.loads(json.dumps(PASSES)),
                 **options)
    [one] = result["passes"]
    return one["answers"], one["cached"]


def test_the_same_engine_finds_all(tmp_path: Path) -> None:
    make(tmp_path / "model")
    first, cached = start(tmp_path)
    assert cached == 0
    again, cached = start(tmp_path)
    assert (again, cached >= 320) == (first, True)


def overwrite_weights(work: Path) -> None:
    shutil.rmtree(work / "model")
    make(work / "model", 0.5)


ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CHANGES: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any]]] = {
    "rope": (None, {"llm": {"hf_overrides": {"rope_parameters": ROPE}}}),
    "norm epsilon": (None, {"llm": {"hf_overrides": {"rms_norm_eps": 0.5}}}),
    "maximum length": (None, {"max_len": 512 + 128}),
    "dtype": (None, {"llm": {"dtype": "bfloat16"}}),
    "tensor parallelism": (None, {"llm": {"tensor_parallel_size": 2}}),
    "weights": (overwrite_weights, {}),
}


@pytest.mark.nightly
def test_restart_oracle(tmp_path: Path) -> None:
    """Each engine answers as without FlexKV; nothing of another one is offered to it, and all of its own is."""
    make(tmp_path / "model")
    first, _ = start(tmp_path)
    for name, (change, options) in CHANGES.items():
        if change is not None:
            change(tmp_path)
        right, _ = start(tmp_path, flexkv=False, **options)
        got, cached = start(tmp_path, **options)
        assert (got, cached) == (right, 0), name
        got, cached = start(tmp_path, **options)
        assert (got, cached >= 320) == (right, True), name
        if change is None:                                  # the other engine's blocks may have been overwritten
            assert start(tmp_path)[0] == first, name


@pytest.mark.nightly
def test_restart_oracle_of_an_adapter(tmp_path: Path) -> None:
    make(tmp_path / "model")
    options = {"lora": str(tmp_path / "adapter"), "llm": {"enable_lora": True, "max_lora_rank": 8}}
    for seed in (1, 2):                                         # written over
        make_adapter(tmp_path / "adapter", seed)
        right, _ = start(tmp_path, flexkv=False, **options)
        assert start(tmp_path, **options) == (right, 0)
        got, cached = start(tmp_path, **options)
        assert (got, cached >= 320) == (right, True)
