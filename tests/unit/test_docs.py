"""Every Python and shell block of the documents runs as printed, and prints the output in the document.

Before a block may stand, as a comment of Markdown:

- ``<!-- not run: REASON -->``: it is not run here;
- ``<!-- vllm -->``: it needs a running vLLM, and ``tests/integration/test_docs.py`` runs it;
- ``<!-- with manager -->``: Python that uses ``manager``, a KVManager, and ``token_ids``, a prompt that is cached.

A shell block finds ``flexkv`` and a ``vllm`` that only checks its arguments and settings, and in its directory the
files TRACE, flexkv.trace, prompt.json and flexkv.yaml. A ``text`` block after a block is its output, where ``...`` is
any text. Blocks of ``yaml`` are files of settings; those of ``promql`` name metrics that exist.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexkv.config import load_config, settings
from flexkv.config.sources import process_environment
from tests.unit.tools.replay.traces import SEQUENCES, mooncake, write

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "yaml", "promql"}


@dataclass(frozen=True)
class Block:
    """A fenced block, its language, the comment before it, and the ``text`` block after it."""

    page: Path
    line: int
    language: str
    code: str
    mark: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    fence = re.compile(r"(?:<!-- ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.M | re.S)
    found = []
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(page, line, match[2], match[3], match[1] or "", match[4]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(language: str, *marks: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.mark in marks]


def test_every_block_has_a_language_and_a_known_mark() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, block
        assert block.mark in ("", "vllm", "with manager") or re.fullmatch(r"not run: \w.{5,}", block.mark), block


def test_blocks_are_found() -> None:
    assert len(named("python", "", "with manager")) >= 2
    assert len(named("bash", "")) >= 8


_MANAGER = """
import tempfile
import numpy as np
from flexkv import CacheConfig, KVManager, KVTPClient, ModelConfig
_socket = tempfile.mkdtemp() + "/s"
manager = KVManager(ModelConfig(), CacheConfig(tokens_per_block=4, num_cpu_blocks=16), gpu_register_port=_socket)
manager.start()
_client = KVTPClient(_socket)
_client.register_tensors([np.zeros((8, 4, 8), dtype=np.float16)])
manager.wait_ready()
token_ids = np.arange(12)
for _namespace in (None, ["gold"]):
    manager.wait(manager.put_async(token_ids, token_ids, namespace=_namespace))
"""

_VLLM = """#!{python}
import json, os, sys
from flexkv.config import load_config, settings
settings.memory_limit = lambda: 1 << 40              # examples are for larger machines than the one of the tests
assert sys.argv[1] == "serve" and len(sys.argv) > 2, sys.argv
options = dict(zip(sys.argv[3:], [*sys.argv[4:], ""]))       # of an option without a value, the next option
transfer = json.loads(options["--kv-transfer-config"])
assert transfer["kv_role"] == "kv_both" and transfer["kv_load_failure_policy"] == "recompute", transfer
assert transfer["kv_connector"] == "FlexKVConnectorV1" or (
    transfer["kv_connector"], transfer["kv_connector_module_path"]
) == ("FlexKVConnector", "flexkv.integration.vllm.connector"), transfer
config = load_config(env={{name: value for name, value in os.environ.items() if name.startswith("FLEXKV_")}},
                     **transfer.get("kv_connector_extra_config", {{}}))
if config.cache.ssd_bytes:
    assert int(options["--shutdown-timeout"]) >= 30, "with SSD a stop needs time"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that blocks name, and a ``vllm`` before any other."""
    for name in ("TRACE", "flexkv.trace"):
        write(tmp_path / name, mooncake(SEQUENCES * 5))
    (tmp_path / "prompt.json").write_text("[1, 2, 3, 4]")
    (tmp_path / "flexkv.yaml").write_text("cpu_cache_gb: 0.5\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, code in {"vllm": _VLLM.format(python=sys.executable),
                       "flexkv": f'#!/bin/sh\nexec {sys.executable} -m flexkv.cli "$@"\n'}.items():
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run(command: list[str], directory: Path) -> str:
    env = process_environment(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


def check_output(block: Block, output: str) -> None:
    if block.output is not None:
        pattern = ".*?".join(re.escape(part) for part in block.output.rstrip("\n").split("..."))
        assert re.fullmatch(pattern, output.rstrip("\n"), re.S), output


@pytest.mark.parametrize("block", named("python", "", "with manager"), ids=str)
def test_python(block: Block, directory: Path) -> None:
    code = _MANAGER + block.code if block.mark else block.code
    check_output(block, run([sys.executable, "-W", "error", "-c", code], directory))


@pytest.mark.parametrize("block", named("bash", ""), ids=str)
def test_shell(block: Block, directory: Path) -> None:
    check_output(block, run(["bash", "-euo", "pipefail", "-c", block.code], directory))


@pytest.mark.parametrize("block", named("yaml", ""), ids=str)
def test_settings(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "memory_limit", lambda: 1 << 40)
    path = tmp_path / "flexkv.yaml"
    path.write_text(block.code)
    load_config(str(path), env={})


@pytest.mark.parametrize("block", named("promql", ""), ids=str)
def test_queries_name_metrics(block: Block) -> None:
    families = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/monitoring.md").read_text(), re.M))
    names = re.findall(r"flexkv_\w+", block.code)
    assert names
    for name in names:
        assert {name, name.removesuffix("_bucket"), name.removesuffix("_count")} & families, name


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            if target.startswith("http"):
                continue
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs, f"{page.name}: {target}"
