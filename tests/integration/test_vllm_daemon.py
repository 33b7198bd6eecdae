"""Real vLLM engines on the CPU that share the daemon's cache; daemon and engines are killed under load."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.fault.test_daemon import DaemonProcess
from tests.integration.test_vllm import ENVIRONMENT, ROOT
from tests.integration.vllm_session import RESULT, make_model
from tests.support.harness import until

pytestmark = pytest.mark.vllm

STAGE = {"seed": 1, "count": 6, "length": 600, "tokens": 8}
LIMIT_S = 240.0


class Vllm:
    """A vLLM in a process of its own."""

    def __init__(
        self, model: str, daemon: Path | None, log: Path, *, cores: str = "", settings: dict[str, Any] | None = None,
        **llm: Any,
    ) -> None:
        if daemon is not None:
            settings = {"server_recv_port": str(daemon), "server_launch_mode": "external", "audit": False}
        options = {"block_size": 32, "gpu_blocks": 100, "flexkv": settings is not None, "settings": settings or {},
                   "model": model, "llm": llm}
        command = [sys.executable, "-m", "tests.integration.vllm_engine_process", json.dumps(options)]
        bind = {"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {}
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=process_environment(**ENVIRONMENT, **bind), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr, text=True,
            )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith(RESULT):
                    return json.loads(line.removeprefix(RESULT))
        finally:
            timer.cancel()
        raise AssertionError(self._log.read_text()[-6000:])

    def ask(self, **stage: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(stage) + "\n")
        self.process.stdin.flush()

    def run(self, **stage: Any) -> dict[str, Any]:
        self.ask(**stage)
        result: dict[str, Any] = self.answer()
        assert result["leaked_pages"] == 0
        return result

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, model: str, daemon: DaemonProcess | None, log: Path, **options: Any) -> Vllm:
    vllm = Vllm(model, daemon.path if daemon is not None else None, log, **options)
    stack.callback(vllm.close)
    return vllm


def daemon_for(stack: ExitStack, path: Path) -> DaemonProcess:
    daemon = DaemonProcess(path, 400)
    stack.callback(lambda: daemon.process.poll() is None and daemon.stop(signal.SIGKILL))
    return daemon


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Answers without FlexKV."""
    vllm = Vllm(model, None, tmp_path_factory.mktemp("plain") / "log")
    try:
        assert vllm.answer() == "ready"
        answers: list[Any] = vllm.run(**STAGE)["answers"]
        return answers
    finally:
        vllm.close()


def test_two_engines_share_what_either_has_computed(
    tmp_path: Path, stack: ExitStack, model: str, plain: list[Any]
) -> None:
    """Also when the daemon, or an engine, is killed while requests run."""
    daemon = daemon_for(stack, tmp_path / "server")
    engines = [start(stack, model, daemon, tmp_path / f"log{number}") for number in range(2)]
    assert [engine.answer() for engine in engines] == ["ready"] * 2
    first, second = engines
    assert first.run(**STAGE)["answers"] == plain
    warm = second.run(**STAGE)
    assert warm["answers"] == plain
    assert warm["hit_tokens"] > 3 * 500
    for turn in range(2):                                  # killed under load, and restarted
        for engine in engines:
            engine.ask(**STAGE)
        daemon.stop(signal.SIGKILL)
        if turn:
            daemon.start()
        for engine in engines:
            result = engine.answer()
            assert result["answers"] == plain
            assert result["leaked_pages"] == 0
        if not turn:
            daemon.start()
    for engine in engines:
        engine.ask(wait_ready=True)
        assert engine.answer() == "ready"
    assert first.run(**STAGE)["answers"] == plain          # sharing comes back
    warm = second.run(**STAGE)
    assert warm["answers"] == plain
    assert warm["hit_tokens"] > 3 * 500
    first.ask(**STAGE)
    first.process.kill()
    warm = second.run(**STAGE)
    assert warm["answers"] == plain
    assert warm["hit_tokens"] > 3 * 500


@pytest.mark.nightly
@pytest.mark.parametrize(("heads", "llm"), [
    (2, {"tensor_parallel_size": 2}),
    (1, {"tensor_parallel_size": 2}),
    (2, {"pipeline_parallel_size": 2, "enforce_eager": False,
         "compilation_config": {"mode": 1, "backend": "eager"}}),
], ids=["tensor parallel", "equal KV on both ranks", "pipeline parallel"])
def test_engines_with_two_ranks_share(tmp_path: Path, stack: ExitStack, heads: int, llm: dict[str, Any]) -> None:
    """An engine loads what one before it has computed; the daemon keeps it in between."""
    model = make_model(tmp_path / "model", heads)
    daemon = daemon_for(stack, tmp_path / "server")
    plain = start(stack, model, None, tmp_path / "plain", cores="0|1", **llm)
    assert plain.answer() == "ready"
    answers = plain.run(**STAGE)["answers"]
    plain.close()
    hits = []
    for number in range(2):
        vllm = start(stack, model, daemon, tmp_path / f"log{number}", cores="0|1", **llm)
        assert vllm.answer() == "ready"
        result = vllm.run(**STAGE)
        assert result["answers"] == answers
        hits.append(result["hit_tokens"])
        vllm.close()
    assert hits[1] > hits[0] + 2 * 500


def _post(port: int, rank: int, prompt: list[int]) -> list[int]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True,
            "return_token_ids": True, "detokenize": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found


def _hits(port: int) -> dict[str, float]:
    """Tokens that each data-parallel rank has loaded."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {engine: float(value) for engine, value in re.findall(
        r'vllm:external_prefix_cache_hits_total\{engine="(\d+)"[^}]*\} ([\d.e+]+)', text)}


@pytest.mark.nightly
@pytest.mark.parametrize("setting", ["found", "embedded"])
def test_data_parallel_ranks_share(tmp_path: Path, stack: ExitStack, model: str, setting: str) -> None:
    """With a daemon at the default socket, which they find, and with one that the first rank starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "XDG_RUNTIME_DIR": str(tmp_path),
                 "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if setting == "embedded":
        variables.update(FLEXKV_SERVER_CLIENT_MODE="1", FLEXKV_NUM_CPU_BLOCKS="400")
    else:
        (tmp_path / "flexkv").mkdir(mode=0o700)
        daemon_for(stack, tmp_path / "flexkv" / "server.sock")
        until(lambda: (tmp_path / "flexkv" / "server.sock").exists(), 20.0)
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m",
        "--port", str(port), "--data-parallel-size", "2", "--enforce-eager", "--max-model-len", "1024",
        "--block-size", "32", "--skip-tokenizer-init", "--dtype", "float32", "--kv-transfer-config",
        json.dumps({"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both",
                    "kv_load_failure_policy": "recompute"}),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=process_environment(**variables), stdout=log, stderr=log,
                                  start_new_session=True)
    stack.callback(lambda: (os.killpg(server.pid, signal.SIGKILL), server.wait(20)))

    def is_up() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()[-6000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            return False
        return True

    until(is_up, 400.0)
    seeds = iter(range(1000))

    def is_shared() -> bool:
        """Not at once: the server may answer before its ranks have registered."""
        prompts = [[3 + (7 * seed + token * token) % 500 for token in range(640)] for seed in islice(seeds, 3)]
        cold = [_post(port, 0, prompt) for prompt in prompts]
        before = _hits(port)
        assert [_post(port, 1, prompt) for prompt in prompts] == cold
        return _hits(port)["1"] - before.get("1", 0.0) >= 3 * 600

    until(is_shared, 60.0)
