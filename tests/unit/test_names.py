"""Modules, functions and files that docstrings, comments and documents name exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(path for folder in ("flexkv", "csrc", "tests") for path in (ROOT / folder).rglob("*")
                 if path.suffix in (".py", ".pyx", ".pxd", ".c", ".h", ".cu") and not (
                     path.suffix == ".c" and "_core" in path.parts))
FILES = {"trace", "yaml", "data", "table", "lock", "sock"}
"""Ends of names of files that begin with ``flexkv.``."""


def exists(dotted: str) -> bool:
    """Whether a dotted name is that of a module, or of an attribute in a module."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def quoted(text: str) -> set[str]:
    """Texts between backquotes, on one line."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_dotted_names_exist(path: Path) -> None:
    for name in quoted(path.read_text()):
        match = re.fullmatch(r"(flexkv(?:\.\w+)+)(?:\(.*\))?", name)
        if match and match[1].split(".")[1] not in FILES:
            assert exists(match[1]), f"{path.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_tree_exist(path: Path) -> None:
    for name in quoted(path.read_text()):
        if re.fullmatch(r"[\w./-]+(\.(py|pyx|pxd|c|h|cu|md)|/)", name) and not name.startswith(("/", "~", ".")):
            bases = (ROOT, ROOT / "flexkv", ROOT / "csrc", path.parent)
            assert any((base / name).exists() for base in bases), f"{path.relative_to(ROOT)} names {name}"
