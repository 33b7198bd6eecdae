"""KV that a plain engine has computed, by the tokens of its blocks, to compare others' pages with."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-4
"""Of the largest element of a layer. The same tokens in other batches differ in the last bits of float32."""


def block_names(tokens: Sequence[int], lora: int, block_size: int) -> list[str]:
    """A name for the content of each full block of a sequence: all tokens up to its end, and the adapter."""
    digest, names = hashlib.sha256(f"lora {lora}".encode()), []
    for stop in range(block_size, len(tokens) + 1, block_size):
        digest.update(np.array(tokens[stop - block_size : stop], dtype=np.int64).tobytes())
        names.append(digest.hexdigest())
    return names


class Pages:
    """An engine's KV cache, read through torch.

    Parameters
    ----------
    tensors : sequence of Tensor
        One for each layer.
    num_pages : int
        The dimension of this size, in each of them, counts pages.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_pages: int) -> None:
        self._tensors = [(tensor, list(tensor.shape).index(num_pages)) for tensor in tensors]
        assert all(list(tensor.shape).count(num_pages) == 1 for tensor in tensors)

    def read(self, page: int) -> np.ndarray:
        """(layers, elements) float32"""
        rows = [tensor.select(dim, page).to(torch.float32).reshape(-1) for tensor, dim in self._tensors]
        return torch.stack(rows).numpy()

    def copy(self, source: int, target: int) -> None:
        """The target has the source's content then."""
        for tensor, dim in self._tensors:
            tensor.select(dim, target).copy_(tensor.select(dim, source))


def difference(content: np.ndarray, right: np.ndarray) -> float:
    """The largest difference of an element, relative to the largest of its layer; NaN if one is not a number."""
    return float((np.abs(content - right).max(axis=1) / np.abs(right).max(axis=1)).max())


class RecordsWriter:
    """Collects blocks, and writes them to a directory."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._blocks: list[np.ndarray] = []
        self.largest = 0.0
        """Difference of blocks that were computed more than once."""

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def add(self, name: str, content: np.ndarray) -> None:
        if name in self._rows:
            self.largest = max(self.largest, difference(content, self._blocks[self._rows[name]]))
        else:
            self._rows[name] = len(self._blocks)
            self._blocks.append(content)

    def write(self, directory: Path) -> None:
        np.save(directory / "blocks.npy", np.stack(self._blocks))
        (directory / "blocks.json").write_text(json.dumps(self._rows))


class Records:
    """The blocks of a directory."""

    def __init__(self, directory: Path) -> None:
        self._rows: dict[str, int] = json.loads((directory / "blocks.json").read_text())
        self._blocks = np.load(directory / "blocks.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, name: str) -> np.ndarray | None:
        """(layers, elements) float32, or None."""
        row = self._rows.get(name)
        return None if row is None else self._blocks[row]

    def smallest_difference(self, num_pairs: int) -> float:
        """Of blocks of different names."""
        random = np.random.default_rng(0)
        pairs = random.integers(0, len(self._blocks), (num_pairs, 2))
        return min(difference(self._blocks[a], self._blocks[b]) for a, b in pairs if a != b)


class RecordsAudit:
    """Takes the place of a worker's ``PageAudit``, which knows only what was saved: compares with what a plain engine
    has computed.

    Attributes
    ----------
    name_of : dict of bytes to str
        Content that belongs under a key; to be filled before the key is used.
    """

    def __init__(self, pages: Pages, records: Records) -> None:
        self._pages, self._records = pages, records
        self.name_of: dict[bytes, str] = {}
        self.num_checked = self.num_wrong = self.num_wrong_saves = 0
        self.largest = 0.0
        self.smallest_wrong = float("inf")

    def is_right(self, key: bytes, page: int) -> bool:
        """Whether a page holds the KV that belongs under a key. A key that was not announced is wrong."""
        right = self._records.get(self.name_of.get(key, ""))
        if right is None:
            return False
        found = difference(self._pages.read(page), right)
        good = found <= TOLERANCE
        if good:
            self.largest = max(self.largest, found)
        else:
            self.smallest_wrong = min(self.smallest_wrong, found)
        return good

    def record(self, keys: Any, pages: Any) -> None:
        """Pages that are about to be saved, provisionally: they may be wrong."""
        for key, page in zip(keys, pages, strict=True):
            self.num_wrong_saves += not self.is_right(key.tobytes(), page)

    def compare(self, keys: Any, pages: Any, ok: Any) -> None:
        """Pages that were loaded, where ``ok``."""
        for key, page in zip(keys[ok], pages[ok], strict=True):
            self.num_checked += 1
            self.num_wrong += not self.is_right(key.tobytes(), page)

    def counts(self) -> dict[str, int]:
        return {"checked_blocks": self.num_checked, "wrong_blocks": self.num_wrong}
