"""A real vLLM whose two ranks are on two nodes, which are two process groups of this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.integration.test_vllm import ENVIRONMENT, ROOT
from tests.integration.test_vllm_daemon import STAGE, Vllm
from tests.integration.vllm_session import make_model
from tests.support.node_cluster import SECRET, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]


class SecondNode:
    """The headless vLLM of the second node, started as a user does."""

    def __init__(self, model: str, port: int, transfer: str, log: Path, runtime: Path) -> None:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--headless", "--skip-tokenizer-init",
            "--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1",
            "--master-port", str(port), "--distributed-executor-backend", "mp", "--block-size", "32",
            "--max-model-len", "1024", "--num-gpu-blocks-override", "100", "--max-num-seqs", "4",
            "--max-num-batched-tokens", "1024", "--enforce-eager", "--dtype", "float32",
        ]
        if transfer:
            command += ["--kv-transfer-config", transfer]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                env=process_environment(
                    **ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND="0|1", XDG_RUNTIME_DIR=str(runtime),
                    FLEXKV_NODE_SECRET=SECRET,
                ),
            )

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_two_nodes(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those without FlexKV, cold and from the cache, also after the storage host was killed."""
    model = make_model(tmp_path / "model")
    monkeypatch.setenv("FLEXKV_NODE_SECRET", SECRET)
    port, flexkv_port = free_port(), free_port()

    def llm(with_flexkv: bool, node_port: int) -> tuple[Vllm, SecondNode]:
        transfer = (
            '{"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both", "kv_load_failure_policy": "recompute", '
            f'"kv_connector_extra_config": {{"cpu_cache_gb": 0.25, "master_ports": "{flexkv_port}"}}}}'
        ) if with_flexkv else ""
        name = "flexkv" if with_flexkv else "plain"
        runtime = tmp_path / f"runtime-{name}"
        runtime.mkdir(mode=0o700)
        second = SecondNode(model, node_port, transfer, tmp_path / f"{name}-second", runtime)
        stack.callback(second.close)
        options: dict[str, Any] = {
            "tensor_parallel_size": 2, "nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1",
            "master_port": node_port, "distributed_executor_backend": "mp",
        }
        settings = {"audit": False, "master_ports": str(flexkv_port)} if with_flexkv else None
        first = Vllm(model, None, tmp_path / f"{name}-first", cores="0|1", settings=settings, **options)
        stack.callback(first.close)
        assert first.answer() == "ready"
        return first, second

    plain, second = llm(False, port)
    answers = plain.run(**STAGE)["answers"]
    plain.close()
    second.close()
    first, _ = llm(True, free_port())
    assert first.run(**STAGE)["answers"] == answers
    warm = first.run(**STAGE)
    assert warm["answers"] == answers
    assert warm["hit_tokens"] > 3 * 500
    [host] = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and _is_storage_host(pid)]
    first.ask(**STAGE)
    os.kill(int(host.name), signal.SIGKILL)
    result = first.answer()
    assert result["answers"] == answers
    assert result["leaked_pages"] == 0
    first.ask(wait_ready=True)                       # the worker of the second node has started another one
    assert first.answer() == "ready"
    assert first.run(**STAGE)["answers"] == answers
    warm = first.run(**STAGE)
    assert warm["answers"] == answers
    assert warm["hit_tokens"] > 3 * 500


def _is_storage_host(process: Path) -> bool:
    try:
        return b"\0node\0--parent" in (process / "cmdline").read_bytes()
    except OSError:
        return False
