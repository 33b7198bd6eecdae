"""Independent check of loads: compares the bytes of loaded pages, read through torch, with the bytes saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64
from flexkv.rank.regions import TensorSpec

if TYPE_CHECKING:
    import torch


_RECORD = np.dtype([("key", np.uint64, 2), ("checksum", np.uint64)])


class PageAudit:
    """Keeps a checksum of each saved page under the key of its block. It reads the tensors by logical index, and shares
    no code with the copies that it checks.

    Parameters
    ----------
    tensors : sequence of Tensor
    specs : sequence of TensorSpec
        Description of each tensor, for its page dimension.
    path : Path, optional
        File that keeps the checksums for the next start. It is read at the start, and each new checksum is appended.
    """

    def __init__(
        self, tensors: "Sequence[torch.Tensor]", specs: Sequence[TensorSpec], path: Path | None = None
    ) -> None:
        self._tensors = list(zip(tensors, specs, strict=True))
        self._checksums: dict[bytes, int] = {}
        self._path = path
        if path is not None and path.exists():
            self._checksums = {r["key"].tobytes(): int(r["checksum"]) for r in np.fromfile(path, dtype=_RECORD)}
        self._checked_blocks = self._wrong_blocks = self._wrong_bytes = self._unknown_blocks = 0

    def _page(self, page: int) -> NDArray[np.uint8]:
        import torch

        rows = []
        for tensor, spec in self._tensors:
            parts = spec.tokens_per_page or 1
            view = tensor.narrow(spec.page_dim, page * parts, parts)
            rows.append(view.contiguous().view(torch.uint8).reshape(-1).cpu().numpy())
        return np.concatenate(rows)

    def record(self, keys: NDArray[np.uint64], pages: NDArray[np.int32]) -> None:
        """Record the checksums of pages that are about to be saved under ``keys``."""
        made = np.zeros(len(keys), dtype=_RECORD)
        for record, key, page in zip(made, keys, pages, strict=True):
            record["key"], record["checksum"] = key, xxh3_64(self._page(int(page)))
            self._checksums[key.tobytes()] = int(record["checksum"])
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                made.tofile(file)

    def compare(self, keys: NDArray[np.uint64], pages: NDArray[np.int32], ok: NDArray[np.bool_]) -> None:
        """Check pages that were loaded with the blocks ``keys``. Pages that are not ``ok`` are skipped."""
        for key, page, loaded in zip(keys, pages, ok, strict=True):
            if not loaded:
                continue
            expected = self._checksums.get(key.tobytes())
            content = self._page(int(page))
            if expected is None:
                self._unknown_blocks += 1
            elif xxh3_64(content) != expected:
                self._wrong_blocks += 1
                self._wrong_bytes += len(content)
            self._checked_blocks += 1

    def counts(self) -> dict[str, int]:
        """Counts of checked blocks; among them ``wrong_blocks`` (of ``wrong_bytes`` bytes) differ and
        ``unknown_blocks`` have no checksum."""
        return {
            "checked_blocks": self._checked_blocks,
            "wrong_blocks": self._wrong_blocks,
            "wrong_bytes": self._wrong_bytes,
            "unknown_blocks": self._unknown_blocks,
        }
