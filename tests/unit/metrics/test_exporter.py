"""Exported metrics, parsed by the parser of Prometheus."""

import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.metrics.catalog import NOT_EXPORTED, Metric, entry_of
from flexkv.metrics.exporter import Metrics
from flexkv.storage.ssd.directory import DATA_NAME
from flexkv.storage.ssd.tier import SSD
from tests.support.harness import TOKENS, controller_of, local, mapping, tokens_of, until
from tests.support.ssd_stage import stage

ON = {"enable_metrics": True, "py_metrics_port": 0}


def scrape(metrics: Metrics | None) -> str:
    assert metrics is not None
    request = urllib.request.Request(
        f"http://127.0.0.1:{metrics.port}/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()


def value(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value for family in text_string_to_metric_families(text) for sample in family.samples
        if sample.name == f"flexkv_{name}" and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_a_load_and_its_save_are_told(tmp_path: Path) -> None:
    with local(tmp_path, cache=ON) as (manager, _, _tensors):
        manager.wait(manager.put_async(tokens_of(4), mapping(range(4))))
        task, mask = manager.get_match(tokens_of(6))
        assert mask.sum() == 4 * TOKENS
        manager.launch([task], [mapping(range(8, 12))])
        manager.wait(task)
        text = scrape(controller_of(manager).metrics)
        assert value(text, "transferred_blocks_total", kind="D2H", engine="0") == 4
        assert value(text, "transferred_blocks_total", kind="H2D") == 4
        assert value(text, "transfer_seconds_count", kind="H2D", status="done") == 1
        assert value(text, "queried_blocks_total") == 6
        assert value(text, "hit_blocks_total") == 4
        assert value(text, "requests_total", outcome="partial", reason="never_seen") == 1
        assert value(text, "requests_total", outcome="full") == 0
        assert value(text, "slots", tier="host") == manager.stats()["num_slots"]


def test_the_port_is_given_back(tmp_path: Path) -> None:
    with local(tmp_path, cache=ON) as (manager, _, _tensors):
        metrics = controller_of(manager).metrics
        assert metrics is not None
        assert metrics.port is not None
        port = metrics.port
    assert metrics.port is None
    again = Metrics(dict, {}, "127.0.0.1", port)
    again.start()
    assert again.port == port
    again.close()
    again.close()


def test_a_port_that_is_taken_is_told_and_kv_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Metrics(dict, {}, "127.0.0.1", 0)
    first.start()
    with local(tmp_path, cache={**ON, "py_metrics_port": first.port}) as (manager, _, tensors):
        assert controller_of(manager).metrics is not None
        assert controller_of(manager).metrics.port is None
        assert "py_metrics_port to a port that is free" in caplog.text
        tensors.fill(range(2), 1)
        before = tensors.read(range(2))
        manager.wait(manager.put_async(tokens_of(2), mapping(range(2))))
        tensors.zero()
        manager.wait(manager.get_async(tokens_of(2), mapping(range(2))))
        assert tensors.read(range(2)) == before
    first.close()


@pytest.mark.parametrize("host", ["nosuch.invalid", "metrics..example", ".example", "a" * 70, "a\0b", "::zz"])
def test_a_host_that_is_none_is_told_and_the_engine_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    metrics = Metrics(dict, {}, host, 0)
    metrics.start()
    assert metrics.port is None
    assert "set metrics_host to an address" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    metrics.close()


MULTIPROC = """
import os, shutil, sys
from pathlib import Path
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
os.mkdir(sys.argv[1])
from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import controller_of, local, mapping, tokens_of
from tests.unit.metrics.test_exporter import ON, scrape, value
with local(Path(sys.argv[2]), cache=ON) as (manager, _, tensors):
    if sys.argv[3] == "gone":
        shutil.rmtree(sys.argv[1])
    tensors.fill(range(4), 1)
    before = tensors.read(range(4))
    put = manager.put_async(tokens_of(4), mapping(range(4)))
    assert manager.wait(put)[put].status is Status.SUCCESS
    get = manager.get_async(tokens_of(4), mapping(range(8, 12)))
    assert manager.wait(get)[get].status is Status.SUCCESS
    assert tensors.read(range(8, 12)) == before
    text = scrape(controller_of(manager).metrics)
    for kind in ("D2H", "H2D"):
        assert value(text, "transferred_blocks_total", kind=kind) == 4
    if sys.argv[3] == "there":
        assert os.listdir(sys.argv[1]) == []
"""


@pytest.mark.parametrize("directory", ["gone", "there"])
def test_files_of_prometheus_client_have_no_effect(tmp_path: Path, directory: str) -> None:
    """Servers with several API processes set PROMETHEUS_MULTIPROC_DIR for their children."""
    arguments = [sys.executable, "-c", MULTIPROC, str(tmp_path / "values"), str(tmp_path), directory]
    root = Path(__file__).parents[3]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=root, check=False)
    assert done.returncode == 0, done.stderr


def test_a_metric_that_fails_breaks_no_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metrics, "transfer_ended", lambda *args: 1 // 0)
    with local(tmp_path, cache=ON) as (manager, _, _tensors):
        for seed in range(3):
            task = manager.put_async(tokens_of(2, seed), mapping(range(2)))
            assert manager.wait(task)[task].status is Status.SUCCESS


def test_buckets_count_what_took_at_most_so_long() -> None:
    metrics = Metrics(dict, {"engine": "0"}, "127.0.0.1", 0)
    for seconds in (0.0, 1e-4, 2e-4, 0.1, 0.11, 30.0, 31.0):
        metrics.transfer_ended("H2D", "done", 1, seconds)
    [family, blocks] = list(metrics.collect())
    found = {sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels}
    assert found["0.0001"] == 2
    assert found["0.0003"] == 3
    assert found["0.1"] == 4
    assert found["0.3"] == 5
    assert found["30.0"] == 6
    assert found["+Inf"] == 7
    assert [sample.value for sample in blocks.samples] == [7]
    assert next(sample.value for sample in family.samples if sample.name.endswith("_sum")) == pytest.approx(61.2103)


def test_tiers_namespaces_and_faults_of_the_disk_are_told(tmp_path: Path) -> None:
    settings = {"namespaces": {"tenant": {"limit": 0.5}}, "ssd_cache_dir": str(tmp_path / "ssd"), **ON}
    with stage(tmp_path, make_store=SSD.make_store, **settings) as made:
        manager = made.manager
        until(lambda: "ssd_written_blocks" in manager.stats())
        made.put(6, 1)
        made.flood()
        data = tmp_path / "ssd" / DATA_NAME
        data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
        task = made.start_get(6, 1)
        assert manager.wait(task)[task].status is Status.FAILED
        manager.blocks.lookup(made.keys(6, 1), count=True)
        stats, text = manager.stats(), scrape(controller_of(manager).metrics)
        assert {name for name in stats if entry_of(name) is None} == NOT_EXPORTED
    documented = (Path(__file__).parents[3] / "docs/monitoring.md").read_text()
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"| `{name}` | {family.type} |" in documented
        assert family.documentation in documented
    assert value(text, "transferred_blocks_total", kind="STORE2H") == 0
    assert value(text, "transfer_seconds_count", kind="STORE2H", status="failed") == 1
    assert value(text, "ssd_faulty_blocks_total", fault="checksum_mismatches") == 6
    assert value(text, "requests_total", outcome="miss", reason="failed") == 1
    assert value(text, "evicted_blocks_total", tier="host") == stats["evicted_blocks"] > 0
    assert value(text, "namespace_blocks", tier="ssd", namespace="tenant") == 0
    assert value(text, "slots", tier="ssd") == stats["ssd_slots"]


def test_out_of_descriptors_the_server_pauses() -> None:
    """The connection that waits keeps the listener readable, and cannot be accepted."""
    metrics = Metrics(dict, {"engine": "0"}, "127.0.0.1", 0)
    metrics.start()
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    with socket.socket() as client:
        client.settimeout(5.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many"):
                held.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(10_000))
            client.connect(("127.0.0.1", metrics.port))
            before = time.process_time()
            time.sleep(0.6)                              # what is measured: how busy the thread is meanwhile
            assert time.process_time() - before < 0.1
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
    metrics.close()


def test_a_start_after_the_close_serves_nothing() -> None:
    """As when a manager is shut down by one thread while another starts it."""
    metrics = Metrics(dict, {"engine": "0"}, "127.0.0.1", 0)
    metrics.close()
    metrics.start()
    assert metrics.port is None


def test_a_count_of_a_store_needs_no_entry_of_its_own() -> None:
    metric = Metric("ssd_store_retries", "Count of the store of tier ssd: store_retries")
    assert entry_of("ssd_store_retries") == (metric, {})
    assert entry_of("ssd_store_num_slots") is None
    assert entry_of("tape_store_retries") is None
