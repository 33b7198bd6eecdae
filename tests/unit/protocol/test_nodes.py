"""Messages between nodes: a packed message parses to the same fields, and invalid bytes raise NodeLinkError."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import NodeLinkError
from flexkv.protocol.nodes import (
    MAX_BLOCKS,
    Join,
    NodeOp,
    Terms,
    pack_json,
    pack_number,
    pack_result,
    parse_join,
    parse_number,
    parse_result,
    parse_terms,
)
from flexkv.protocol.ring import OpKind

JOIN = Join("ab12", ((0, 8), (0, 9)), (64, 32), 48)


def op(count: int = 3, groups: int = 2) -> NodeOp:
    slots, pages = np.arange(count, dtype=np.int32), np.arange(groups * count, dtype=np.int32)
    return NodeOp(1 << 40, 7, 5, OpKind.H2D, 4, 1, 9, slots, pages.reshape(groups, -1))


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 2), (MAX_BLOCKS, 8)])
def test_an_op_comes_back(count: int, groups: int) -> None:
    sent = op(count, groups)
    got = NodeOp.unpack(sent.pack())
    assert (got.part_id, got.task_id, got.fence, got.kind, got.flags, got.counter, got.op_blocks) == (
        1 << 40, 7, 5, OpKind.H2D, 4, 1, 9
    )
    np.testing.assert_array_equal(got.slots, sent.slots)
    np.testing.assert_array_equal(got.pages, sent.pages)


def test_other_messages_come_back() -> None:
    assert parse_terms(pack_json(Terms(8, 1, "c", 1 << 62))) == Terms(8, 1, "c", 1 << 62)
    assert parse_join(pack_json(JOIN)) == JOIN
    assert parse_number(pack_number(1 << 63)) == 1 << 63
    part_id, ok = parse_result(pack_result(5, np.array([True, False])))
    assert (part_id, ok.tolist()) == (5, [True, False])


@pytest.mark.parametrize("change", [
    {"ranks": []}, {"ranks": [[0]]}, {"ranks": [[0, -1]]}, {"ranks": [[0, "1"]]}, {"ranks": [[True, 1]]}, {"ranks": 5},
    {"num_pages": []}, {"num_pages": [0]}, {"num_pages": [1.5]}, {"num_pages": [1] * 9}, {"incarnation": 5},
    {"more": 1}, {"num_slots": 0},
])
def test_an_invalid_join_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(NodeLinkError):
        parse_join(json.dumps({**json.loads(pack_json(JOIN)), **change}).encode())


@pytest.mark.parametrize("text", [
    b"", b"{}", b"[]", b"null", b"\xff", b'{"num_ranks": 0, "dp_client_id": 0, "controller": "", "first_task": 0}',
    b'{"num_ranks": 1, "dp_client_id": 0, "controller": 5, "first_task": 0}', b"[" * 90_000,
])
def test_invalid_terms_are_refused(text: bytes) -> None:
    with pytest.raises(NodeLinkError):
        parse_terms(text)


@given(st.binary(max_size=200))
def test_no_bytes_raise_another_error(data: bytes) -> None:
    for parse in (parse_terms, parse_join, parse_number, parse_result, NodeOp.unpack):
        try:
            parse(data)
        except NodeLinkError:
            continue


@given(st.data())
def test_no_change_of_an_op_raises_another_error(data: st.DataObject) -> None:
    raw = bytearray(op().pack())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = NodeOp.unpack(bytes(raw))
    except NodeLinkError:
        return
    assert got.slots.shape == (got.pages.shape[1],)
    assert 0 <= got.fence < 1 << 63
