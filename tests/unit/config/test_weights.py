"""The identity of weights: any change of them changes it, and nothing else does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexkv.config import weights
from flexkv.config.weights import adapter_identity, model_identity, weights_id
from flexkv.errors import IdentityError

TIME_NS = 1_700_000_000_000_000_000


def safetensors(path: Path, tensors: dict[str, bytes], pad: int = 0) -> None:
    """The format of huggingface/safetensors: length of the header, header, data."""
    entries, offset = {}, 0
    for name, data in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    header = json.dumps(entries).encode() + b" " * pad
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(tensors.values()))


def model(root: Path, seed: int = 0) -> Path:
    """Two shards with 40 tensors of 10 kB, an index, a configuration and a tokenizer; all of the same time."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for shard in range(2):
        tensors = {f"layer.{i}": rng.bytes(10_000) for i in range(shard, 40, 2)}
        safetensors(root / f"model-0000{shard + 1}-of-00002.safetensors", tensors)
    (root / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (root / "config.json").write_text('{"rope_theta": 10000.0}')
    (root / "tokenizer.json").write_text("{}")
    (root / "README.md").write_text("a model")
    same_time(root)
    return root


def same_time(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, ns=(TIME_NS, TIME_NS))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content) and None


def in_tensor(root: Path) -> None:
    """Other values in the middle of one tensor; name, size, header and time as they were."""
    path = root / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    middle = 8 + int.from_bytes(data[:8], "little") + 3 * 10_000 + 5_000
    data[middle : middle + 8] = b"fine-tun"
    path.write_bytes(data)


def other_header(root: Path) -> None:
    """Two tensors change their names; sizes and bytes stay."""
    path = root / "model-00001-of-00002.safetensors"
    data = path.read_bytes().replace(b'"layer.0"', b'"layer.X"').replace(b'"layer.2"', b'"layer.0"')
    path.write_bytes(data.replace(b'"layer.X"', b'"layer.2"'))


CHANGES = {
    "values": in_tensor,
    "header": other_header,
    "time": lambda root: os.utime(root / "model-00001-of-00002.safetensors", ns=(TIME_NS, TIME_NS + 1)),
    "size": lambda root: safetensors(root / "model-00001-of-00002.safetensors", {"layer.0": b"x" * 99}),
    "a shard less": lambda root: (root / "model-00002-of-00002.safetensors").unlink(),
    "a name": lambda root: (root / "model-00002-of-00002.safetensors").rename(root / "model-00003.safetensors"),
    "configuration": write("config.json", b'{"rope_theta": 20000.0}'),
    "index": write("model.safetensors.index.json", b'{"weight_map": {"x"}}'),
    "quantization": write("quantize_config.json", b'{"bits": 4}'),
    "code": write("modeling_custom.py", b"class Model: pass"),
    "a part in a folder": lambda root: model(root / "text_encoder") and None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_the_weights_is_another_identity(name: str, tmp_path: Path) -> None:
    root = model(tmp_path / "m")
    before = weights_id(root)
    assert weights_id(root) == before
    CHANGES[name](root)
    if name != "time":
        same_time(root)
    assert weights_id(root) != before


def test_what_changes_no_kv_is_the_same_identity(tmp_path: Path) -> None:
    root = model(tmp_path / "m")
    before = weights_id(root)
    for name in ("tokenizer.json", "README.md", "chat_template.json", ".cache/x.json", "original/consolidated.pth"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("other")
    assert weights_id(root) == before
    (tmp_path / "link").symlink_to(root)
    assert weights_id(tmp_path / "link") == before
    shutil.copytree(root, tmp_path / "elsewhere")           # keeps times
    assert weights_id(str(tmp_path / "elsewhere")) == before


def test_two_models_of_the_same_shape_are_different(tmp_path: Path) -> None:
    assert weights_id(model(tmp_path / "a", 1)) != weights_id(model(tmp_path / "b", 2))


@pytest.mark.parametrize("suffix", ["bin", "pt", "gguf"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    data = bytearray(np.random.default_rng(0).bytes(1 << 20))
    identities = set()
    for position in (None, 0, len(data) - 1):               # a byte of the header, and of the zip's list of checksums
        if position is not None:
            data[position] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(TIME_NS, TIME_NS))
        identities.add(weights_id(path if suffix == "gguf" else tmp_path))
    assert len(identities) == 3


def test_a_gguf_file_has_its_other_parts_and_no_other_file(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    other = tmp_path / "other-00001-of-00002.gguf"
    for path in (*parts, other):
        path.write_bytes(b"GGUF" * 1000)
    same_time(tmp_path)
    before = weights_id(parts[0])
    other.write_bytes(b"FUGG" * 1000)
    assert weights_id(parts[0]) == before
    parts[1].write_bytes(b"FUGG" * 1000)
    same_time(tmp_path)
    assert weights_id(parts[0]) != before


def hub(cache: Path, commit: str, seed: int = 0) -> Path:
    """A snapshot as huggingface_hub keeps it: links into blobs, which are named by their content."""
    files = model(cache / f"files-{commit}", seed)
    snapshot = cache / "models--org--name/snapshots" / commit
    snapshot.mkdir(parents=True)
    blobs = cache / "models--org--name/blobs"
    blobs.mkdir(exist_ok=True)
    for path in sorted(files.iterdir()):
        blob = blobs / f"{hash((path.name, seed)) & ((1 << 160) - 1):040x}"
        if not blob.exists():
            shutil.move(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_snapshots_of_the_hub(tmp_path: Path) -> None:
    first = hub(tmp_path, "a" * 40)
    before = weights_id(first)
    assert before.startswith("a" * 40 + ":")
    assert model_identity(first).changed_ns == 0
    for blob in (tmp_path / "models--org--name/blobs").iterdir():
        os.utime(blob, ns=(TIME_NS + 5, TIME_NS + 5))       # downloaded at another time, on another machine
    assert weights_id(first) == before
    assert weights_id(hub(tmp_path, "b" * 40)) != before    # another commit
    path = first / "model-00002-of-00002.safetensors"
    shutil.copy2(path, path.with_suffix(".tmp"))            # written over by hand: a file, and no link
    path.with_suffix(".tmp").replace(path)
    replaced = model_identity(first)
    assert replaced.digest != before
    assert replaced.changed_ns > 0


def test_weights_written_through_a_link_of_a_snapshot(tmp_path: Path) -> None:
    snapshot = hub(tmp_path, "a" * 40)
    before = weights_id(snapshot)
    in_tensor(snapshot)                                     # into the blob
    assert weights_id(snapshot) != before


def test_what_is_no_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "missing", "org/name"):
        with pytest.raises(IdentityError):
            weights_id(path)
    root = model(tmp_path / "m")
    monkeypatch.setattr(weights, "MAX_FILES", 3)
    with pytest.raises(IdentityError, match="more than 3 files"):
        weights_id(root)


def test_broken_headers_are_no_error(tmp_path: Path) -> None:
    identities = set()
    for content in (b"", b"\xff" * 7, b"\xff" * 100, (5).to_bytes(8, "little") + b"{nope", b"\0" * 20,
                    (20).to_bytes(8, "little") + b'{"a": {"data": [1]}}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        same_time(tmp_path)
        identities.add(weights_id(tmp_path))
    assert len(identities) == 6


def test_weights_are_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        header = json.dumps({f"t{i}": {"data_offsets": [i << 30, (i + 1) << 30]} for i in range(200)}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(200 << 30)                            # 200 GiB, of which nothing is on disk
    assert weights_id(tmp_path)


def test_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(IdentityError):
        adapter_identity(tmp_path)
    safetensors(tmp_path / "adapter_model.safetensors", {"a": b"x" * 100})
    (tmp_path / "README.md").write_text("an adapter")
    (tmp_path / "optimizer.pt").write_bytes(b"not read by engines")
    same_time(tmp_path)
    identities = {adapter_identity(tmp_path).digest}
    (tmp_path / "optimizer.pt").write_bytes(b"other")
    assert {adapter_identity(tmp_path).digest} == identities
    (tmp_path / "adapter_config.json").write_text('{"r": 16}')
    identities.add(adapter_identity(tmp_path).digest)
    safetensors(tmp_path / "adapter_model.safetensors", {"a": b"y" * 100})
    same_time(tmp_path)
    identities.add(adapter_identity(tmp_path).digest)
    assert len(identities) == 3
