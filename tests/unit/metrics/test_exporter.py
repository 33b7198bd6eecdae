"""What Prometheus is told, read as it reads it."""

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from flexkv.metrics.catalog import NOT_TOLD, entry_of
from flexkv.metrics.exporter import Metrics
from flexkv.response import KVResponseStatus as Status
from flexkv.storage.ssd_directory import DATA_NAME
from flexkv.tiering import make_ssd_store
from tests.harness import TOKENS, local, mapping, tokens_of, until
from tests.ssd_stage import stage

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
        text = scrape(manager.metrics)
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
        metrics = manager.metrics
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
        assert manager.metrics is not None
        assert manager.metrics.port is None
        assert "py_metrics_port to a port that is free" in caplog.text
        tensors.fill(range(2), 1)
        before = tensors.read(range(2))
        manager.wait(manager.put_async(tokens_of(2), mapping(range(2))))
        tensors.zero()
        manager.wait(manager.get_async(tokens_of(2), mapping(range(2))))
        assert tensors.read(range(2)) == before
    first.close()


def test_tiers_namespaces_and_faults_of_the_disk_are_told(tmp_path: Path) -> None:
    settings = {"namespaces": {"tenant": {"limit": 0.5}}, "ssd_cache_dir": str(tmp_path / "ssd"), **ON}
    with stage(tmp_path, make_store=make_ssd_store, **settings) as made:
        manager = made.manager
        until(lambda: "ssd_written_blocks" in manager.stats())
        made.put(6, 1)
        made.flood()
        data = tmp_path / "ssd" / DATA_NAME
        data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
        task = made.start_get(6, 1)
        assert manager.wait(task)[task].status is Status.FAILED
        manager.lookup(made.keys(6, 1), count=True)
        stats, text = manager.stats(), scrape(manager.metrics)
        assert {name for name in stats if entry_of(name) is None} == NOT_TOLD
    documented = (Path(__file__).parents[3] / "docs/monitoring.md").read_text()
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"| `{name}` | {family.type} |" in documented
        assert family.documentation in documented
    assert value(text, "transferred_blocks_total", kind="DISK2H") == 0
    assert value(text, "transfer_seconds_count", kind="DISK2H", status="failed") == 1
    assert value(text, "ssd_faulty_blocks_total", fault="checksum_mismatches") == 6
    assert value(text, "requests_total", outcome="miss", reason="failed") == 1
    assert value(text, "evicted_blocks_total", tier="host") == stats["evicted_blocks"] > 0
    assert value(text, "namespace_blocks", tier="ssd", namespace="tenant") == 0
    assert value(text, "slots", tier="ssd") == stats["ssd_slots"]
