"""A program that forgets to close ends quietly, and loses nothing that was to be written."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_HEAD = """
import os, sys
import numpy as np
from flexkv import CacheConfig, KVManager, KVTPClient, ModelConfig
port, directory = sys.argv[1], sys.argv[2]
kv = [np.ones((8, 4, 8), dtype=np.float16) for _ in range(2)]
slots = np.arange(12)
"""


def run(code: str, tmp_path: Path, status: int = 0) -> str:
    """Run a program; it must write nothing to standard error."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_HEAD) + textwrap.dedent(code), str(tmp_path / "s"),
         str(tmp_path / "ssd")],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert (result.returncode, result.stderr) == (status, ""), result.stderr
    return result.stdout


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "manager.shutdown()"])
def test_neither_manager_nor_client_was_closed(end: str, tmp_path: Path) -> None:
    run(f"""
        manager = KVManager(ModelConfig(), CacheConfig(tokens_per_block=4, num_cpu_blocks=8), gpu_register_port=port)
        manager.start()
        client = KVTPClient(port)
        client.register_tensors(kv)
        manager.wait_ready(20)
        task, mask = manager.put_match(slots)
        manager.launch([task], [slots[mask]])
        print(manager.wait([task])[task].status.name)
        {end}
        """, tmp_path)
    assert not (tmp_path / "s").exists()


def test_a_client_whose_manager_never_came(tmp_path: Path) -> None:
    run("client = KVTPClient(port); client.register_tensors(kv)", tmp_path)


def test_a_manager_that_was_not_started(tmp_path: Path) -> None:
    run("manager = KVManager(ModelConfig(), CacheConfig(num_cpu_blocks=8), gpu_register_port=port)", tmp_path)


def test_a_forked_child_leaves_its_parents_manager_alone(tmp_path: Path) -> None:
    assert run("""
        cache = CacheConfig(tokens_per_block=4, num_cpu_blocks=8)
        with KVTPClient(port) as client, KVManager(ModelConfig(), cache, gpu_register_port=port) as manager:
            client.register_tensors(kv)
            manager.wait_ready(20)
            child = os.fork()
            if child == 0:
                import atexit
                atexit._run_exitfuncs()
                os._exit(0)
            os.waitpid(child, 0)
            task, mask = manager.put_match(slots)
            manager.launch([task], [slots[mask]])
            print(manager.wait([task])[task].status.name, os.path.exists(port))
        """, tmp_path) == "SUCCESS True\n"


def test_what_is_queued_for_ssd_is_written_when_nobody_shuts_down(tmp_path: Path) -> None:
    code = """
        cache = CacheConfig(tokens_per_block=4, num_cpu_blocks=8, ssd_cache_gb=0.01, ssd_cache_dir=directory,
                            ssd_admission="all", ssd_write_mb_per_s=0.001)
        manager = KVManager(ModelConfig(model_id="m"), cache, gpu_register_port=port)
        manager.start()
        client = KVTPClient(port)
        client.register_tensors(kv)
        manager.wait_ready(20)
        task, mask = {match}
        manager.launch([task], [slots[mask]])
        print(manager.wait([task])[task].status.name, mask.sum())
        """
    assert run(code.format(match="manager.put_match(slots)"), tmp_path) == "SUCCESS 12\n"
    wait = """
        import time
        while manager.stats().get("ssd_store_directories", 0) == 0 or not manager.get_match(slots)[1].all():
            time.sleep(0.01)
        """
    later = code.replace("task, mask = {match}", textwrap.indent(textwrap.dedent(wait), " " * 8) +
                         "\n        task, mask = manager.get_match(slots)")
    assert run(later, tmp_path) == "SUCCESS 12\n"
