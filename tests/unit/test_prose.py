"""Words that make docstrings and comments hard to read are counted, and their number only ever falls."""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted((ROOT / "flexkv").rglob("*.py"))
CYTHON = sorted(path for pattern in ("*.pyx", "*.pxd", "*.pyi") for path in (ROOT / "flexkv").rglob(pattern))
C = sorted([*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc").glob("*.h")])
MOST = {
    "Python": {"what": 6, "who": 0, "tell": 0, "Of": 0},
    "Cython": {"what": 0, "who": 0, "tell": 0, "Of": 0},
    "C": {"what": 0, "who": 0, "tell": 0, "Of": 0},
}
"""Occurrences in docstrings and comments: "what"; "who", "whom", "whoever" and "nobody"; "tell", "tells" and "told";
docstrings and comments that begin with "Of". They only ever shrink."""


def _of_python(path: Path) -> list[str]:
    """Docstrings, also of constants, and comments."""
    source = path.read_text()
    found = [
        statement.value.value
        for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for statement in node.body if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]


def _of_cython(path: Path) -> list[str]:
    """Docstrings and comments."""
    source = path.read_text()
    return re.findall(r'"""(.*?)"""', source, re.DOTALL) + re.findall(r"(?:^|\s)# (.*)", source)


def _of_c(path: Path) -> list[str]:
    """Comments."""
    return re.findall(r"/\*[\s*]*(.*?)\*/", path.read_text(), re.DOTALL)


def _counts(texts: Iterable[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in texts:
        words = Counter(re.findall(r"[a-z']+", text.lower()))
        found["what"] += words["what"]
        found["who"] += sum(words[word] for word in ("who", "whom", "whoever", "nobody"))
        found["tell"] += sum(words[word] for word in ("tell", "tells", "told"))
        found["Of"] += text.strip().startswith("Of ")
    return found


@pytest.mark.parametrize(
    ("language", "paths", "texts"), [("Python", PYTHON, _of_python), ("Cython", CYTHON, _of_cython), ("C", C, _of_c)],
    ids=["Python", "Cython", "C"],
)
def test_hard_words_become_fewer(language: str, paths: list[Path], texts: Callable[[Path], list[str]]) -> None:
    assert paths
    found = _counts(text for path in paths for text in texts(path))
    assert {word: found[word] for word, most in MOST[language].items() if found[word] > most} == {}
