"""Real vLLM engines on the CPU that share the daemon's cache; daemon and engines are killed under load."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import process_environment
from tests.fault.test_daemon import DaemonProcess
from tests.integration.test_vllm import ENVIRONMENT, ROOT
from tests.integration.vllm_session import RESULT, make_model

pytestmark = pytest.mark.vllm

STAGE = {"seed": 1, "count": 6, "length": 600, "tokens": 8}
LIMIT_S = 240.0


class Vllm:
    """A vLLM in a process of its own."""

    def __init__(self, model: str, daemon: Path | None, log: Path, *, cores: str = "", **llm: Any) -> None:
        settings = {} if daemon is None else {"server_recv_port": str(daemon), "server_launch_mode": "external",
                                              "audit": False}
        options = {"block_size": 32, "gpu_blocks": 100, "flexkv": daemon is not None, "settings": settings,
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
@pytest.mark.parametrize("llm", [
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}},
], ids=["tensor parallel", "pipeline parallel"])
def test_engines_with_two_ranks_share(tmp_path: Path, stack: ExitStack, model: str, llm: dict[str, Any]) -> None:
    """An engine loads what one before it has computed; the daemon keeps it in between."""
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
