"""Regions: the gathered bytes must be the elements of the tensors, for any layout in memory."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import RegistrationError
from flexkv.rank.regions import TensorSpec, layer_spans, regions_from_tensors
from flexkv.rank.tensors import tensor_spec

L, B, H, N, C = 3, 5, 2, 4, 6
LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def layers_in(layout: str) -> list[torch.Tensor]:
    """vLLM 0.32: one storage permuted as ``layout`` says, a logical [B, H, N, C] view of it for each layer."""
    sizes = dict(zip("LBHNC", (L, B, H, N, C), strict=True))
    flat = torch.arange(L * B * H * N * C, dtype=torch.int32).reshape([sizes[d] for d in "LBHNC"])
    memory = flat.permute(["LBHNC".index(d) for d in layout]).contiguous()
    logical = memory.permute([layout.index(d) for d in "LBHNC"])
    return list(logical.unbind(0))


def gather(specs: list[TensorSpec], page: int) -> bytes:
    regions, num_pages, segment_bytes = regions_from_tensors(specs)
    assert page < num_pages
    segment = bytearray(segment_bytes)
    for base, stride, size, offset in regions.tolist():
        segment[offset : offset + size] = ctypes.string_at(base + page * stride, size)
    return bytes(segment)


def logical_bytes(tensors: list[torch.Tensor], page_dim: int, page: int) -> bytes:
    return b"".join(tensor.select(page_dim, page).contiguous().numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_layouts(layout: str) -> None:
    tensors = layers_in(layout)
    for page in range(B):
        assert gather([tensor_spec(t) for t in tensors], page) == logical_bytes(tensors, 0, page)


def test_the_slot_does_not_depend_on_the_layout_in_memory() -> None:
    layers = [layers_in(layout) for layout in LAYOUTS]
    gathered = {gather([tensor_spec(t) for t in tensors], 3) for tensors in layers}
    assert len(gathered) == 1


@pytest.mark.parametrize(
    ("shape", "page_dim"),
    [((B, 2, N, H, C), 0), ((2, B, N, H, C), 1), ((B, N, C), 0), ((B, L, 2, H * N * C), 0)],
)
def test_other_layouts(shape: tuple[int, ...], page_dim: int) -> None:
    tensors = [torch.randint(0, 1000, shape, dtype=torch.int16) for _ in range(L)]
    for page in range(B):
        specs = [tensor_spec(t, page_dim) for t in tensors]
        assert gather(specs, page) == logical_bytes(tensors, page_dim, page)


def test_token_major_k_and_v_lists() -> None:
    tensors = [torch.randint(0, 1000, (B * N + 3, H, C), dtype=torch.int16) for _ in range(2 * L)]
    for page in range(B):
        expected = b"".join(t[page * N : (page + 1) * N].contiguous().numpy().tobytes() for t in tensors)
        assert gather([tensor_spec(t, tokens_per_page=N) for t in tensors], page) == expected


def test_a_block_of_all_layers_in_one_piece_is_one_chunk() -> None:
    regions, _, _ = regions_from_tensors([tensor_spec(t) for t in layers_in("BLHNC")])
    assert len(regions) == 1
    regions, _, _ = regions_from_tensors([tensor_spec(t) for t in layers_in("LBHNC")])
    assert len(regions) == L


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4), st.integers(0, 3),
       st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_any_strides(order: list[int], shape: list[int], page_dim: int, gaps: list[int]) -> None:
    strides, step = [0] * 4, 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim] + gaps[dim]
    if page_dim != order[0] and shape[page_dim] > 1 and any(shape[d] > 1 for d in order[: order.index(page_dim)]):
        return                                         # pages interleave: refused, see below
    memory = torch.randint(0, 1000, (step + 8,), dtype=torch.int32)
    tensor = memory.as_strided(shape, strides)
    for page in range(shape[page_dim]):
        assert gather([tensor_spec(tensor, page_dim)], page) == logical_bytes([tensor], page_dim, page)


def test_what_cannot_be_registered_is_refused() -> None:
    page = torch.zeros(4, 8)
    cases = [
        [],
        [tensor_spec(page), tensor_spec(torch.zeros(5, 8))],
        [tensor_spec(page.expand(4, 8)[:1].expand(3, 8))],
        [TensorSpec(page.data_ptr(), (4, 8), (8,), 4)],
        [TensorSpec(page.data_ptr(), (4, 8), (8, 1), 4, page_dim=2)],
        [TensorSpec(0, (4, 8), (8, 1), 4)],
        [TensorSpec(page.data_ptr(), (4, 8), (4, 1), 4)],
        [tensor_spec(page, tokens_per_page=5)],
    ]
    for specs in cases:
        with pytest.raises(RegistrationError):
            regions_from_tensors(specs)


@pytest.mark.parametrize(("layers", "groups"), [(1, 8), (3, 8), (16, 8), (61, 8), (5, 2)])
def test_spans_cover_all_regions_in_order(layers: int, groups: int) -> None:
    arrays = [torch.zeros((6, 2 + layer % 3, 40), dtype=torch.uint8) for layer in range(layers)]
    regions, _, total = regions_from_tensors([tensor_spec(a) for a in arrays])
    spans, span_of = layer_spans(regions, [a[0].nbytes for a in arrays], groups)
    assert (spans[0]["first"], spans[0]["num_regions"], spans[0]["bytes"]) == (0, len(regions), total)
    parts = spans[1:] if len(spans) > 1 else spans
    assert len(parts) <= groups
    assert [int(s["first"]) for s in parts[1:]] == np.cumsum(parts["num_regions"])[:-1].tolist()
    assert parts["bytes"].sum() == total
    for layer, span in enumerate(span_of):
        end = sum(a[0].nbytes for a in arrays[: layer + 1])
        assert spans[span]["slot_offset"] + spans[span]["bytes"] >= end
    assert span_of == sorted(span_of)


def test_layers_in_one_region_are_one_span() -> None:
    pool = torch.zeros((6, 4, 40), dtype=torch.uint8)
    specs = [tensor_spec(pool[:, layer]) for layer in range(4)]
    regions, _, _ = regions_from_tensors(specs)
    spans, span_of = layer_spans(regions, [40] * 4, 8)
    assert (len(spans), span_of) == (1, [0] * 4)
