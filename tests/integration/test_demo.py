"""The demo, small: real model, real tokenizer, real text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


def test_the_demo_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flexkv.cli", "demo", "--prompts", "2", "--tokens", "1024", "--output",
               str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    log = (tmp_path / "engine.log").read_text()[-3000:] if (tmp_path / "engine.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    result = json.loads(last.removeprefix("RESULT "))
    assert set(result) == {
        "prompts", "tokens", "ttft_cold_ms_p50", "ttft_warm_ms_p50", "ttft_restarted_ms_p50", "speedup",
        "speedup_restarted", "same_outputs", "hit_tokens", "hit_tokens_restarted", "wrong_bytes",
    }
    assert result["same_outputs"] is True
    assert result["wrong_bytes"] == 0
    assert result["hit_tokens"] == 2 * (1024 - 32)      # the last block of a prompt is computed
    assert result["hit_tokens_restarted"] >= 2 * (1024 - 32)
    assert not (tmp_path / "ssd").exists()
    assert (tmp_path / "demo.png").stat().st_size > 10_000
