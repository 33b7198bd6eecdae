"""Which memory can be registered as KV, and that all kinds of it give the same bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv import KVManager, KVTPClient, tensor_spec
from flexkv.config import CacheConfig, ModelConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.rank.regions import TensorSpec

TOKENS, PAGES = 4, 8


def test_an_array_and_the_tensor_that_shares_its_memory_have_one_description() -> None:
    array = np.zeros((3, 2, 5, 4), dtype=np.float16)
    for view in (array, array.transpose(1, 0, 2, 3), array[:, :, 1:], array[:, 0]):
        tensor = torch.from_numpy(view)
        for page_dim in (0, 1):
            assert tensor_spec(view, page_dim) == tensor_spec(tensor, page_dim)
    assert tensor_spec(array, -2) == tensor_spec(array, 2)
    assert tensor_spec(array, tokens_per_page=3).tokens_per_page == 3


def _read_only() -> np.ndarray:
    array = np.zeros((3, 4))
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("tensor", "page_dim", "text"),
    [
        (_read_only(), 0, "writeable"),
        (np.zeros((3, 4), dtype=object), 0, "fixed size"),
        (np.zeros((3, 4), dtype="u1,i4")["f1"], 0, "strides"),
        ([[1, 2], [3, 4]], 0, "NumPy arrays or torch tensors"),
        (None, 0, "NumPy arrays or torch tensors"),
        (np.zeros((3, 4)), 2, "page_dim = 2"),
        (torch.zeros(3, 4), -3, "page_dim = -3"),
        (np.float64(1.0), 0, "NumPy arrays"),
        (np.zeros(()), 0, "page_dim = 0"),
        (torch.zeros(3, 4, device="meta"), 0, "on meta"),
    ],
)
def test_other_objects_are_refused_by_name(tensor: Any, page_dim: int, text: str) -> None:
    with pytest.raises(RegistrationError, match=text):
        tensor_spec(tensor, page_dim)


def _round_trip(tmp_path: Path, layers: list[Any], pages: np.ndarray, zero: Any, read: Any) -> None:
    """Save pages of KV, clear them, load them into other pages, compare."""
    port = f"ipc://{tmp_path}/s"
    tokens = np.arange(len(pages) * TOKENS)
    elsewhere = (np.array(pages) + 3) % PAGES
    before = read(pages)
    with (
        KVManager(ModelConfig(), CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=16), gpu_register_port=port)
        as manager,
        KVTPClient(port) as client,
    ):
        client.register_tensors(layers)
        layers.clear()                                   # the client keeps them
        manager.wait_ready(20)
        for save, where in ((True, pages), (False, elsewhere)):
            task, mask = (manager.put_match if save else manager.get_match)(tokens)
            assert mask.all()
            slots = (np.array(where)[:, None] * TOKENS + np.arange(TOKENS)).ravel()
            manager.launch([task], [slots])
            assert manager.wait([task])[task].status is Status.SUCCESS
            if save:
                zero()
    assert read(elsewhere) == before


def test_arrays_are_registered_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 1000, (PAGES, 2, TOKENS, 6), dtype=np.int16) for _ in range(3)]

    def zero() -> None:
        for array in arrays:
            array[:] = 0

    _round_trip(tmp_path, list(arrays), np.array([1, 5, 2]), zero,
                lambda pages: b"".join(array[pages].tobytes() for array in arrays))


def test_an_array_whose_pages_are_counted_by_its_second_dimension(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 1000, (2, PAGES, TOKENS, 6), dtype=np.int16)
    _round_trip(tmp_path, [tensor_spec(array, page_dim=1)], np.array([1, 5, 2]), lambda: array.fill(0),
                lambda pages: array[:, pages].tobytes())


def test_tensors_are_registered_as_they_are(tmp_path: Path) -> None:
    tensors = [torch.randint(0, 1000, (PAGES, 2, TOKENS, 6), dtype=torch.int16) for _ in range(2)]

    def zero() -> None:
        for tensor in tensors:
            tensor.zero_()

    _round_trip(tmp_path, list(tensors), np.array([0, 7, 4]), zero,
                lambda pages: b"".join(tensor[torch.from_numpy(np.array(pages))].numpy().tobytes()
                                       for tensor in tensors))


def test_a_description_is_public() -> None:
    assert isinstance(tensor_spec(np.zeros((2, 3))), TensorSpec)
