"""Words that make docstrings and comments hard to read are counted, and their number only ever falls."""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "flexkv"
MOST = {"what": 26, "who": 2, "tell": 5, "Of": 2}
"""Occurrences in docstrings and comments: "what"; "who", "whom", "whoever" and "nobody"; "tell", "tells" and "told";
docstrings that begin with "Of". They only ever shrink."""


def texts(path: Path) -> list[str]:
    """Docstrings, also of constants, and comments."""
    source = path.read_text()
    found = [
        statement.value.value
        for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for statement in node.body if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [token.string for token in tokens if token.type == tokenize.COMMENT]


def counts() -> Counter[str]:
    found: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        for text in texts(path):
            words = Counter(re.findall(r"[a-z']+", text.lower()))
            found["what"] += words["what"]
            found["who"] += sum(words[word] for word in ("who", "whom", "whoever", "nobody"))
            found["tell"] += sum(words[word] for word in ("tell", "tells", "told"))
            found["Of"] += text.strip().startswith("Of ")
    return found


def test_hard_words_become_fewer() -> None:
    found = counts()
    assert {word: found[word] for word in MOST if found[word] > MOST[word]} == {}
