"""The blocks of docs/vllm.md that need a running vLLM, on a real server, which is then stopped as docs/ssd.md says."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from flexkv.cli.inspect import main as inspect
from flexkv.config import cache_directory, process_environment
from flexkv.tools.demo.model import prepare_model
from tests.support.harness import until
from tests.unit.test_docs import ROOT, blocks_of, check_output

pytestmark = pytest.mark.vllm

START_S, STOP_S = 400.0, 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: str, directory: Path, port: int, env: dict[str, str]) -> Iterator[Path]:
    """A server with its log; stopped by SIGTERM to its first process."""
    log = directory / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=directory, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.5)                                # a process of its own: there is nothing else to wait for
        yield log
        os.kill(process.pid, signal.SIGTERM)
        process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(100)
    except OSError:
        return False


def complete(port: int, prompt: str) -> None:
    body = json.dumps({"model": "smollm2", "prompt": prompt, "max_tokens": 2}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=200) as response:
        assert response.status == 200


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        found = re.search(rf"^{name}{{.*}} (\S+)$", response.read().decode(), re.M)
    assert found is not None
    return float(found[1])


def test_see_it_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_model(cache_directory() / "smollm2-135m")
    serve, ask = (block for block in blocks_of(ROOT / "docs/vllm.md") if block.mark == "vllm")
    ports = {"8000": str(free_port()), "8080": str(free_port())}
    code = {block: re.sub("8000|8080", lambda match: ports[match[0]], block.code) for block in (serve, ask)}
    env = process_environment(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), HF_HUB_OFFLINE="1",
        FLEXKV_PY_METRICS_PORT=ports["8080"], FLEXKV_LOG_LEVEL="DEBUG", FLEXKV_NUM_LOG_INTERVAL_REQUESTS="2",
        FLEXKV_SSD_CACHE_GB="2", FLEXKV_SSD_CACHE_DIR=str(tmp_path / "ssd"), FLEXKV_SSD_WRITE_MB_PER_S="0.1",
    )
    command = code[serve].replace("vllm serve", "exec vllm serve").replace("--port", "--shutdown-timeout 60 --port")
    command = re.sub(r"^(?=VLLM_)", "export ", command).replace("\\\n  exec", "\n  exec")
    with server(command, tmp_path, int(ports["8000"]), env) as log:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code[ask]], cwd=tmp_path, env=env, timeout=200,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
        check_output(ask, done.stdout)
        complete(int(ports["8000"]), "What waits for the disk is written at the stop. " * 120)
        until(lambda: metric(int(ports["8080"]), "flexkv_ssd_queued_blocks") >= 9, 30.0)      # ready in host memory
    lines = [line for line in log.read_text().splitlines() if "[flexkv." in line]
    said = "\n".join(lines)
    head = r"\(EngineCore pid=\d+\) (INFO|DEBUG|WARNING) \d\d-\d\d \d\d:\d\d:\d\d \[flexkv\.\w+:\d+\] "
    assert all(re.match(head.replace("EngineCore", r"\w+"), line) for line in lines), said
    assert re.search(
        head + r"ready: host 1 GiB \(364 blocks of 128 tokens, 2\.81 MiB each\); SSD 2 GiB \(\d+ blocks, 0 found\); "
        rf"1 rank; eviction adaptive; metrics at http://127\.0\.0\.1:{ports['8080']}/metrics; kv_both", said), said
    assert re.search(head + r"request \S+: 9 blocks wanted, 0 in vLLM's cache, 0 found, 0 loaded; block 0: never_seen",
                     said), said
    assert re.search(head + r"request \S+: 9 blocks wanted, 0 in vLLM's cache, 9 found, 9 loaded", said), said
    assert re.search(head + r"2 requests, 2402 prompt tokens, 1152 loaded", said), said
    assert not [line for line in lines if "WARNING" in line or "ERROR" in line], said
    assert not re.search(r'File "\S*/flexkv/', log.read_text())
    capsys.readouterr()
    assert inspect([str(tmp_path / "ssd")]) == 0
    found = re.search(r": (\d+) used, .*in use; closed cleanly", capsys.readouterr().out, re.S)
    assert found is not None
    assert int(found[1]) >= 18                              # of which the rate had left nine to the stop
