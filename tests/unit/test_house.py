"""The house rules, read off the source tree: layers, one reader of the environment, nothing unused or too long."""

import ast
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import Cython.Build
import pytest
import setuptools

from flexkv.config.tiers import LOWER_TIERS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flexkv"

LAYERS = [
    {"errors", "at_exit", "at_fork"},
    {"config", "_core"},
    {"protocol"},
    {"storage", "rank"},
    {"cache", "transfer"},
    {"metrics"},
    {"controller"},
    {"server"},
    {"kvmanager", "transfer_manager"},
    {"tools", "integration", "common"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What nobody in the package imports, because it is for others.
ENTRY_POINTS = {
    "flexkv.cli.__main__", "flexkv.common.config", "flexkv.common.memory_handle", "flexkv.common.request",
    "flexkv.common.storage", "flexkv.server.client", "flexkv.transfer_manager",
    "flexkv.integration.vllm.vllm_v1_adapter", "flexkv.integration.vllm.connector",
}

# Functions and classes that nothing in the package names, and their callers.
CALLED_FROM_OUTSIDE = {
    "vLLM": {"FlexKVConnector", "FlexKVConnectorV1Impl", "get_block_ids_with_load_errors", "get_kv_connector_stats",
             "save_kv_layer", "start_load_kv", "take_events"},
    "adapters of upstream": {"build_layerwise_eventfd_socket_path", "get_async", "is_connected", "register_to_server",
                             "set_slot_mapping"},
    "users": {"task_match", "failed_pages"},
    "the standard library": {"handle_error", "log_message", "repr_int"},
    "stores that are written later": {"NullStore"},
}

BUDGETS = {".py": 400, ".pyx": 600, ".c": 800, ".h": 800}
FUNCTION_LINES = 60
TOO_LONG: dict[str, int] = {}          # "file" -> lines; only ever shrinks
LONG_FUNCTIONS: dict[str, int] = {}    # "file:function" -> lines; only ever shrinks

SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
NATIVE = sorted((PACKAGE / "_core").rglob("*.pyx"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    text = path.read_text()
    if path.suffix != ".py":
        found = re.findall(r"^(?:from (flexkv[\w.]*) c?import|import (flexkv[\w.]*))", text, re.M)
        return {a or b for a, b in found}
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"flexkv[.\w]+", str(node.value)):
            names.add(str(node.value))
    return {name for name in names if name.split(".")[0] == "flexkv"}


def layer(name: str) -> int | None:
    parts = name.split(".")
    return LEVEL.get(parts[1]) if len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES + NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    mine = layer(module_name(path))
    assert mine is not None, f"{path} is in no layer: add its folder to LAYERS"
    for name in imports(path):
        theirs = layer(name)
        same = name.split(".")[1:2] == module_name(path).split(".")[1:2]
        assert theirs is None or theirs < mine or same, f"{module_name(path)} imports {name}, which is not below it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rank_is_apart_and_tools_are_beside(path: Path) -> None:
    """A rank runs in another process than the controller; the product does not need the tools for developers."""
    mine = module_name(path).split(".")[1:2]
    for name in imports(path):
        theirs = name.split(".")[1:2]
        assert mine != ["rank"] or theirs not in (["cache"], ["storage"], ["transfer"], ["controller"]), name
        assert theirs != ["tools"] or mine in (["tools"], ["cli"]), name


BEHIND_THE_INTERFACE = {f"flexkv.controller.{name}" for name in ("controller", "space", "requests", "tasks.table")}
"""``flexkv.controller.blocks`` is the interface; ``flexkv.server.connect`` makes its implementation."""


def test_adapters_call_the_interface_of_the_controller() -> None:
    for path in [PACKAGE / "kvmanager.py", *(PACKAGE / "integration").rglob("*.py")]:
        assert not imports(path) & BEHIND_THE_INTERFACE, path


def test_every_folder_says_what_belongs_there() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert (ast.get_docstring(ast.parse(path.read_text())) or "").endswith("."), path


def test_the_architecture_page_has_the_layers() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    known = {name for names in LAYERS for name in names}
    assert [set(re.findall(r"`(\w+)`", text)) & known for _, text in rows] == LAYERS
    assert [int(number) for number, _ in rows] == list(range(1, len(LAYERS) + 1))


def test_parts_on_the_architecture_page_and_its_picture_exist() -> None:
    page, picture = ((ROOT / "docs" / name).read_text() for name in ("architecture.md", "architecture.svg"))
    classes = {name for path in SOURCES for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)}
    parts = re.findall(r"^\| `([\w/.]+)` ([\w, ]*?) ?\|", page, re.MULTILINE)
    assert len(parts) > 15
    for path, names in parts:
        assert any((folder / path).exists() for folder in (PACKAGE, ROOT)), path
        assert {name for name in re.split(r"[, ]+", names) if name[:1].isupper()} <= classes, (path, names)
    assert set(re.findall(r">([A-Z][a-z]+[A-Z]\w*)<", picture)) <= classes


def test_every_folder_of_the_package_has_a_layer() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"__init__"} <= set(LEVEL)


def test_every_enumerator_of_native_code_is_an_int() -> None:
    """Else GCC 13 gives its whole enumeration an unsigned type, as C23 says, and ``node > ROOT`` holds for node -1."""
    for path in [*NATIVE, *(PACKAGE / "_core").rglob("*.pxd")]:
        for body in re.findall(r"^(?:cdef|ctypedef) enum.*:\n((?:[ \t]+.*\n|\n)+)", path.read_text(), re.MULTILINE):
            for value in re.findall(r"= *(-?(?:0x[0-9a-fA-F]+|[0-9]+))", body):
                assert -(1 << 31) <= int(value, 0) < 1 << 31, (path, value)


def test_only_the_config_reads_the_environment() -> None:
    for path in SOURCES + NATIVE:
        if re.search(r"\benviron\b|\bgetenv\b", path.read_text()):
            assert path.parent == PACKAGE / "config", f"{path} reads the environment"


def test_no_module_is_unused() -> None:
    used = set().union(*(imports(path) for path in SOURCES + NATIVE))
    used |= {path.partition(":")[0] for path in LOWER_TIERS.values()}
    modules = {module_name(path) for path in SOURCES + NATIVE if path.name != "__init__.py"}
    run_by_path = {name for name in modules if name.endswith(".session")}
    assert modules - used - ENTRY_POINTS - run_by_path == set()


def test_no_function_is_unused() -> None:
    texts = [re.sub(r'""".*?"""', "", path.read_text(), flags=re.S) for path in SOURCES + NATIVE]
    times = Counter(name for text in texts for name in re.findall(r"\b[A-Za-z_]\w*", text))
    outside = set().union(*CALLED_FROM_OUTSIDE.values())
    defined = {
        node.name for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__")
    }
    assert {name for name in defined if times[name] == 1} - outside == set()
    assert outside <= defined


def test_files_stay_short() -> None:
    files = [path for folder in ("flexkv", "csrc", "tests") for path in (ROOT / folder).rglob("*")]
    too_long = {}
    for path in files:
        is_generated = path.suffix == ".c" and path.with_suffix(".pyx").exists()
        if path.suffix in BUDGETS and not is_generated:
            lines = len(path.read_text().splitlines())
            if lines > BUDGETS[path.suffix]:
                too_long[str(path.relative_to(ROOT))] = lines
    allowed = {name: lines for name, lines in TOO_LONG.items() if lines}
    assert {name: lines for name, lines in too_long.items() if lines > allowed.get(name, 0)} == {}
    assert set(allowed) <= set(too_long), "take what is short enough by now out of TOO_LONG"


def test_functions_stay_short() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long.keys() == LONG_FUNCTIONS.keys()


def test_every_extension_has_a_stub_and_is_built() -> None:
    table = (ROOT / "setup.py").read_text()
    for path in NATIVE + sorted((ROOT / "tests").rglob("*.pyx")):
        assert path.with_suffix(".pyi").exists(), f"{path} has no .pyi"
        assert f'"{module_name(path).removeprefix("flexkv._core.")}"' in table, f"{path} is not in setup.py"


def test_the_product_is_built_from_no_file_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {name: extensions_of_setup(monkeypatch, name) for name in ("", "1")}
    assert not [name for name, sources in built[""].items() if any("tests" in source for source in (name, *sources))]
    assert built["1"].keys() - built[""].keys() == {"tests.native.faulty_io_queue"}


def extensions_of_setup(monkeypatch: pytest.MonkeyPatch, build_tests: str) -> dict[str, list[str]]:
    """Sources of each extension that ``setup.py`` would build."""
    found: list[setuptools.Extension] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLEXKV_BUILD_TESTS", build_tests)
    monkeypatch.setattr(Cython.Build, "cythonize", lambda extensions, **_: extensions)
    monkeypatch.setattr(setuptools, "setup", lambda ext_modules: found.extend(ext_modules))
    runpy.run_path("setup.py")
    return {extension.name: [*extension.sources, *extension.depends] for extension in found}


def test_names_say_what_is_inside() -> None:
    for path in PACKAGE.rglob("*"):
        assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "common2", "manager2"), path


def test_upstream_paths_are_thin() -> None:
    for path in (PACKAGE / "common").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 20, path


def test_import_is_light() -> None:
    code = "import sys, flexkv; sys.exit(any(name in sys.modules for name in ('torch', 'cuda', 'numpy')))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_upstream_names_are_there() -> None:
    from flexkv import KVManager, KVTPClient
    from flexkv.common.config import CacheConfig, ModelConfig
    from flexkv.common.memory_handle import TensorSharedHandle
    from flexkv.common.request import KVResponse, KVResponseStatus
    from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType

    assert {status.name for status in KVResponseStatus} == {
        "SUCCESS", "NOTFOUND", "UNREADY", "TIMEOUT", "CANCELLED", "FAILED"
    }
    for name in ("start", "is_ready", "shutdown", "reset", "get_match", "put_match", "get_async", "put_async",
                 "prefetch_async", "launch", "wait", "try_wait", "cancel"):
        assert callable(getattr(KVManager, name))
    assert all((KVTPClient, CacheConfig, ModelConfig, TensorSharedHandle, KVResponse, KVCacheLayout, KVCacheLayoutType))
