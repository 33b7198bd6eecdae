"""Tests are found by the name of the module: each module has a test file at its own place, is imported by a test, or is
listed here with the tests that cover it through another module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests/unit"

COVERED_BY = {
    "_core/arena": "tests/property/test_radix.py",
    "at_fork": "tests/fault/test_children.py",
    "cache/direct": "tests/unit/rank/test_gds_worker.py",
    "cache/eviction/": "tests/property/test_policies.py",
    "cache/promotions": "tests/property/test_tiers.py",
    "cache/puts": "tests/property/test_planner.py",
    "cache/sources": "tests/property/test_tiers.py",
    "cache/write_backs": "tests/property/test_tiers.py",
    "cli/pin": "tests/unit/cli/test_main.py",
    "cli/service": "tests/unit/cli/test_serve.py",
    "config/field": "tests/unit/config/test_config.py",
    "config/paths": "tests/unit/config/test_config.py",
    "controller/engine_blocks": "tests/unit/controller/test_blocks.py",
    "controller/keys": "tests/unit/controller/test_controller.py",
    "controller/requests": "tests/fuzz/test_sockets.py",
    "controller/shared_cache": "tests/unit/controller/test_ready_line.py",
    "controller/tasks/graphs": "tests/property/test_tasks.py",
    "controller/tasks/loads": "tests/property/test_tasks.py",
    "controller/tasks/task_log": "tests/unit/controller/tasks/test_reasons.py",
    "integration/vllm/boundary": "tests/integration/test_paged_cases.py",
    "cli/node": "tests/fault/test_nodes.py",
    "integration/vllm/data_parallel": "tests/unit/integration/vllm/test_vllm_v1_adapter.py",
    "protocol/numbers": "tests/unit/controller/tasks/test_arguments.py",
    "rank/agent_in_use": "tests/fault/test_daemon.py",
    "rank/fences": "tests/unit/test_kvmanager.py",
    "server/client_tasks": "tests/unit/server/test_engine_client.py",
    "server/session": "tests/fault/test_daemon.py",
    "server/session_link": "tests/fault/test_daemon.py",
    "storage/ssd/": "tests/unit/storage/ssd/test_store.py",
    "tools/bench/": "tests/bench/test_control_plane.py",
    "tools/demo/": "tests/unit/tools/demo/test_command.py",
    "tools/replay/": "tests/unit/tools/replay/test_command.py",
    "transfer/executors/node_link": "tests/unit/controller/test_nodes.py",
    "transfer/executors/store": "tests/fault/test_ssd_requests.py",
    "transfer/runner": "tests/unit/transfer/test_scheduler.py",
}
"""Modules, or folders with a slash at the end, whose tests have another name and do not import them directly."""

OTHER_SUBJECTS = {
    "_core/index/test_made_keys.py", "cache/test_adaptive.py", "cache/test_index_full.py", "config/test_config.py",
    "controller/tasks/test_states.py", "controller/test_ready_line.py", "rank/test_bounded_close.py",
    "storage/test_store_contract.py", "test_docs.py", "test_house.py", "test_kvmanager_ssd.py", "test_mirrors.py",
    "test_names.py", "test_prose.py", "test_wait_ready.py", "transfer/test_cuda.py", "transfer/test_cuda_deadline.py",
    "transfer/test_cuda_pinning.py",
}
"""Test files whose subject is not one module; their docstrings name it."""

MODULES = sorted(
    path.relative_to(ROOT / "flexkv").with_suffix("").as_posix()
    for pattern in ("*.py", "*.pyx") for path in (ROOT / "flexkv").rglob(pattern) if not path.name.startswith("__")
)
TEXTS = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_mirrors.py"]


def _has_test(module: str) -> bool:
    """Whether a test file has the module's place and name, or a test imports the module."""
    folder, _, name = module.rpartition("/")
    if (UNIT / folder / f"test_{name}.py").exists():
        return True
    dotted, package = (re.escape(".".join(["flexkv", *part.split("/")]).rstrip(".")) for part in (module, folder))
    imported = re.compile(rf"\b{dotted}\b|from {package} import [^\n]*\b{name}\b")
    return any(imported.search(text) for text in TEXTS)


def _entries(module: str) -> list[str]:
    return [entry for entry in COVERED_BY if module == entry or (entry[-1] == "/" and module.startswith(entry))]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_tests_that_can_be_found(module: str) -> None:
    assert _has_test(module) or len(_entries(module)) == 1


def test_the_list_has_no_entry_too_many() -> None:
    listed = {entry for module in MODULES if not _has_test(module) for entry in _entries(module)}
    assert listed == set(COVERED_BY)
    assert [path for path in COVERED_BY.values() if not (ROOT / path).exists()] == []


def test_every_unit_test_is_at_the_place_of_its_module() -> None:
    places = {path.relative_to(UNIT) for path in UNIT.rglob("test_*.py")}
    others = {place.as_posix() for place in places
              if (place.parent / place.stem.removeprefix("test_")).as_posix() not in MODULES
              and not (ROOT / "flexkv" / place.parent / place.stem.removeprefix("test_")).is_dir()}
    assert others == OTHER_SUBJECTS
