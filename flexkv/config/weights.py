"""Identity of weights on disk: a digest that changes with the weights, computed without reading all of them."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flexkv.errors import IdentityError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_CONFIGURATION = (".json", ".py")
_NOT_VALUES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json",
})
"""Files that influence prompts, but not the KV of given tokens."""

_ADAPTER = re.compile(r"adapter_model\..+|adapter_config\.json|new_embeddings\..+")

MAX_FILES = 10_000
"""Maximum number of files in a model's directory. A directory with more is not a model, and takes seconds to list."""

MAX_HEADER_BYTES = 100 << 20
"""Maximum size of a safetensors header, as in the format's own library."""

NUM_SAMPLES = 1024
"""Number of samples of a model's tensors. Reading them takes 10 ms from memory, and less than a second from disk."""

_SAMPLE_BYTES = 64
_EDGE_BYTES = 64 << 10
"""Bytes read at either end of a weight file."""

_CONFIG_BYTES = 64 << 20
"""Bytes read of a configuration file, at most."""


@dataclass(frozen=True, slots=True)
class WeightsIdentity:
    """The identity of a set of files.

    Attributes
    ----------
    digest : str
        Hexadecimal; preceded by the commit and a colon if the files are a snapshot of the Hugging Face hub.
    changed_ns : int
        Time of the last change of a file, in ns since 1970 by the file system's clock; 0 if all files are named by
        their content.
    """

    digest: str
    changed_ns: int


def weights_id(path: str | os.PathLike[str]) -> str:
    """Identity of a model's weights and configuration files, for ``ModelConfig.weights_id``.

    Parameters
    ----------
    path : str or path
        A model's directory, or one weight file (such as GGUF; its other parts are found by their names).

    Returns
    -------
    str
        A digest of names, sizes, modification times, headers and samples of the weight files, and of the content of
        the configuration files; preceded by the commit if the directory is a snapshot of the Hugging Face hub. In a
        snapshot, the names of the blobs replace the modification times, so that the identity is equal on all machines.

    Raises
    ------
    IdentityError
        There are no weights, or they cannot be read.
    """
    return model_identity(path).digest


def model_identity(path: str | os.PathLike[str]) -> WeightsIdentity:
    """Identity as ``weights_id``, with the time of the last change."""
    path = Path(path)
    if path.is_file():
        part = re.sub(r"-\d+-of-\d+$", "", path.stem)
        files = [path, *(other for other in path.parent.glob(f"*{path.suffix}")
                         if other != path and re.fullmatch(re.escape(part) + r"-\d+-of-\d+", other.stem))]
        return _identity(path.parent, sorted(files))
    return _identity(path, _files(path, _is_part_of_model))


def adapter_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that contain a LoRA's values. IdentityError if there are none."""
    return list(_files(Path(path), lambda name: _ADAPTER.fullmatch(name) is not None, depth=0))


def adapter_identity(path: str | os.PathLike[str]) -> WeightsIdentity:
    """Identity of a LoRA's directory, as ``model_identity``."""
    return _identity(Path(path), adapter_files(path))


def _is_part_of_model(name: str) -> bool:
    return name.endswith(_WEIGHTS) or (name.endswith(_CONFIGURATION) and name not in _NOT_VALUES)


def _files(root: Path, wanted: Callable[[str], bool], depth: int = 3) -> list[Path]:
    """Files below a directory, sorted by name. Hidden folders and ``original``, which loaders skip, are left out."""
    found: list[Path] = []
    seen = 0
    try:
        for folder, folders, names in os.walk(root, followlinks=False):
            level = len(Path(folder).relative_to(root).parts)
            keep = [name for name in folders if not name.startswith(".") and name != "original"]
            folders[:] = sorted(keep) if level < depth else []
            seen += len(names)
            if seen > MAX_FILES:
                raise IdentityError(f"{root} has more than {MAX_FILES} files: it is not a model's directory")
            found += [Path(folder, name) for name in names if wanted(name)]
    except OSError as error:
        raise IdentityError(f"{root} cannot be read: {error}") from error
    if not any(path.name.endswith(_WEIGHTS) for path in found):
        raise IdentityError(f"{root} has no weight files ({', '.join(_WEIGHTS)})")
    return sorted(found)


def _identity(root: Path, files: list[Path]) -> WeightsIdentity:
    digest = hashlib.sha256()
    changed_ns = 0
    weights = [path for path in files if path.name.endswith(_WEIGHTS)]
    samples = -(-NUM_SAMPLES // max(1, len(weights)))
    try:
        for path in files:
            blob = _hub_blob(path)
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):                 # opening a pipe would wait for its other end
                raise IdentityError(f"{path} is not a file")
            if not blob:
                changed_ns = max(changed_ns, status.st_ctime_ns, status.st_mtime_ns)
            parts = [str(path.relative_to(root)), str(status.st_size), blob or str(status.st_mtime_ns)]
            for part in parts:
                _add(digest, part.encode(errors="surrogateescape"))
            with path.open("rb") as file:
                if path in weights:
                    _add_weights(digest, file, status.st_size, samples)
                else:
                    _add(digest, file.read(_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise IdentityError(f"the weights in {root} cannot be read: {error}") from error
    commit = _hub_commit(root)
    return WeightsIdentity(f"{commit}:{digest.hexdigest()}" if commit else digest.hexdigest(), changed_ns)


def _add(digest: "hashlib._Hash", part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _add_weights(digest: "hashlib._Hash", file: BinaryIO, size: int, samples: int) -> None:
    """Add header, both ends and samples of a weight file. The end of a .bin file (zip) contains the checksums of its
    tensors."""
    header = _safetensors_header(file, size)
    if header is None:
        positions: Iterator[int] = (size * i // samples for i in range(samples))
        _add(digest, file.read(_EDGE_BYTES))
    else:
        _add(digest, header)
        positions = _middles(header, samples)
    for position in positions:
        file.seek(position)
        _add(digest, file.read(_SAMPLE_BYTES))
    file.seek(max(0, size - _EDGE_BYTES))
    _add(digest, file.read(_EDGE_BYTES))


def _safetensors_header(file: BinaryIO, size: int) -> bytes | None:
    """The header of a safetensors file; None: the file has another format. Leaves the file at its start."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if 2 <= length <= min(size - 8, MAX_HEADER_BYTES) else b""
    file.seek(0)
    return header if header[:1] == b"{" else None


def _middles(header: bytes, samples: int) -> Iterator[int]:
    """Positions in the middle of tensors, spread over all of them."""
    try:
        entries = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        offsets = sorted((int(start), int(stop)) for start, stop in entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    for i in range(min(samples, len(offsets))):
        start, stop = offsets[len(offsets) * i // min(samples, len(offsets))]
        yield 8 + len(header) + (start + stop) // 2


def _hub_blob(path: Path) -> str:
    """Name of the blob if the file is a link into the blobs of a Hugging Face cache; else empty."""
    if not path.is_symlink():
        return ""
    target = path.resolve()
    is_blob = target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name)
    return target.name if is_blob else ""


def _hub_commit(root: Path) -> str:
    """Commit of a snapshot in a Hugging Face cache (``models--ORG--NAME/snapshots/COMMIT``); else empty."""
    is_snapshot = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    return root.name if is_snapshot and re.fullmatch(r"[0-9a-f]{40}", root.name) else ""
