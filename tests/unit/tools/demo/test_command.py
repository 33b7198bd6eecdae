"""The demo as a process, on a fake engine: files and processes that remain after each kind of end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

FAKE = Path(__file__).parent / "fake_session.py"
RUN = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)         # a shell may have started the tests with these ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from flexkv.cli import main as cli
from flexkv.tools.demo import child, command
command.SESSION = sys.argv[1:5]
command._check = lambda: None
child._TERMINATE_S, child.GRACE_S = 1.0, 0.5
sys.exit(cli.main(["demo", "--prompts", "2", "--tokens", "64", *sys.argv[5:]]))
"""
LIMIT_S = 30.0


class Demo:
    """A running demo, and the processes of its engine."""

    def __init__(self, process: "subprocess.Popen[str]", pids: Path) -> None:
        self.process = process
        self._pids = pids

    def wait_for(self, text: str) -> str:
        """Its output up to a line with ``text``."""
        output = ""
        assert self.process.stdout is not None
        while text not in output:
            assert select.select([self.process.stdout], [], [], LIMIT_S)[0], output
            line = self.process.stdout.readline()
            assert line, output
            output += line
        return output

    def engine(self) -> list[int]:
        return [int(word) for word in self._pids.read_text().split()] if self._pids.exists() else []

    def assert_nothing_runs(self) -> None:
        """Every process of the engine has ended, or ends now that no process is left to keep it."""
        deadline = time.monotonic() + LIMIT_S
        for pid in self.engine():
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                ended = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            finally:
                os.close(fd)
            assert ended, Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/wchan").read_text()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@contextmanager
def demo(tmp_path: Path, mode: str, *options: str) -> Iterator[Demo]:
    pids = tmp_path / "pids"
    command = [sys.executable, "-c", RUN, sys.executable, str(FAKE), mode, str(pids), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        start_new_session=True, cwd=tmp_path,
    ) as process:
        try:
            yield Demo(process, pids)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pid in Demo(process, pids).engine():
                with suppress(OSError):
                    if str(FAKE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)


def end(running: Demo) -> tuple[int, str, str]:
    out, err = running.process.communicate(timeout=LIMIT_S)
    return running.process.returncode, out, err


def test_the_demo_ends_well_and_keeps_what_it_did_not_make(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out"
    (output / "ssd").mkdir(parents=True)
    mine = [output / "ssd" / "my_thesis.txt", output / "engine.log", output / "demo.png", output / "flexkv-demo-mine"]
    for file in mine:
        file.write_text("precious")
    with demo(tmp_path, "good", "--model", str(model), "--output", str(output)) as running:
        status, out, err = end(running)
        running.assert_nothing_runs()
    assert (status, err) == (0, "")
    assert [file.read_text() for file in mine] == ["precious"] * 4
    made = {"engine.1.log", "demo.1.png"}
    assert {path.name for path in output.iterdir()} == made | {"ssd", *(file.name for file in mine[1:])}
    assert f"chart: {output / 'demo.1.png'}" in out
    assert (output / "demo.1.png").read_bytes().startswith(b"\x89PNG")
    assert "a line of vLLM" in (output / "engine.1.log").read_text()
    assert "prompt 2, warm: nothing was loaded: 2 blocks wanted; evicted 3 s ago" in out
    assert json.loads(out.splitlines()[-1].removeprefix("RESULT "))["hit_tokens"] == 64


def test_an_engine_that_fails_says_why(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out"
    with demo(tmp_path, "fail", "--model", str(model), "--output", str(output)) as running:
        status, _, err = end(running)
        running.assert_nothing_runs()
    assert status == 1
    assert "the engine ended with status 7" in err
    assert "\n    the reason of it all\n" in err
    assert "Traceback" not in err
    assert [path.name for path in output.iterdir()] == ["engine.log"]


@pytest.mark.parametrize("mode", ["hang", "hang,deaf"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_behind_by_a_signal(tmp_path: Path, model: Path, mode: str, number: signal.Signals) -> None:
    output = tmp_path / "out"
    with demo(tmp_path, mode, "--model", str(model), "--output", str(output)) as running:
        running.wait_for("vLLM is ready")
        assert len(running.engine()) == 3
        os.kill(running.process.pid, number)
        status, _, err = end(running)
        running.assert_nothing_runs()
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    left = {path.name for path in output.iterdir()}
    assert left == {"engine.log"} or number == signal.SIGKILL


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_nothing_is_left_behind_by_an_early_interrupt(tmp_path: Path, model: Path, delay: float) -> None:
    output = tmp_path / "out"
    with demo(tmp_path, "hang,deaf", "--model", str(model), "--output", str(output)) as running:
        running.wait_for("starting vLLM")
        time.sleep(delay)                            # not to wait for anything: the moment is what varies
        os.kill(running.process.pid, signal.SIGINT)
        os.kill(running.process.pid, signal.SIGTERM)  # of a user who does not wait
        status, _, _ = end(running)
        running.assert_nothing_runs()
    assert status in (130, 143)
    assert {path.name for path in output.iterdir()} == {"engine.log"}


def test_an_engine_that_leaves_its_core_behind_is_noticed(tmp_path: Path, model: Path) -> None:
    """The core has the pipe open: without its end the demo would wait for ever."""
    with demo(tmp_path, "orphan,deaf", "--model", str(model)) as running:
        status, _, err = end(running)
        running.assert_nothing_runs()
    assert status == 1
    assert "the engine ended with status 0" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "/proc/x"], "choose another --output"),
        (["--output", "/dev/null"], "/dev/null is not a folder"),
        (["--output", "/dev/null/x"], "choose another --output"),
        (["--model", "/nope"], "--model /nope is not the folder of a model"),
    ],
)
def test_bad_folders_are_one_line(tmp_path: Path, model: Path, options: list[str], message: str) -> None:
    with demo(tmp_path, "good", "--model", str(model), *options) as running:
        status, out, err = end(running)
        assert running.engine() == []
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexkv.errors import FlexKVError
    from flexkv.tools.demo import command

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(FlexKVError, match=r"vLLM is not installed: ./build.sh demo"):
        command.main(["--model", "/nope"])
