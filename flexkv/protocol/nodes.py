"""Messages between a controller and the storage hosts of its other nodes."""

import enum
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import NodeLinkError
from flexkv.protocol.registration import MAX_LAYER_GROUPS
from flexkv.protocol.ring import OpKind

PING_S = 0.25
"""Interval of the controller's PINGs, in seconds."""

HOST_SILENCE_S, CONTROLLER_SILENCE_S = 2.0, 3.0
"""Time without a message after which storage host and controller close a connection, in seconds. The storage host comes
first: it has cancelled its copies when the controller gives up."""

_OP = struct.Struct("<QQQIIIIII")
"""Head of OP: part, task, fence; kind, flags, counter, blocks of the whole op, blocks (n), layer groups (g). Slots (n,)
and pages (g, n) follow, int32, little-endian."""

_RESULT = struct.Struct("<QI4x")
"""Head of RESULT: part, blocks (n). One byte for each block follows, 1 or 0."""

_NUMBER = struct.Struct("<Q")

MAX_PAYLOAD_BYTES = 1 << 21
"""Maximum payload of a frame, in bytes."""

MAX_BLOCKS = 1 << 15
"""Blocks of an OP at most: with the pages of all layer groups they fit a frame."""


class FrameKind(enum.IntEnum):
    """Kinds of frames. The controller sends TERMS, OP, CANCEL and PING; the storage host the others."""

    TERMS = 1
    """``Terms``, the first frame."""
    JOIN = 2
    """``Join``, once: ops may come from now on."""
    OP = 3
    """``NodeOp``: run it on all ranks of the node."""
    CANCEL = 4
    """Id of a part: start no further block of it. It has a RESULT nevertheless."""
    RESULT = 5
    """Id of a part, and whether each of its blocks was moved; its slots and pages are not accessed any more."""
    USABLE = 6
    """Number of leading slots that all ranks of the node have pinned."""
    PING = 7
    """Empty; to be answered with PONG."""
    PONG = 8
    """Empty."""


@dataclass(frozen=True)
class Terms:
    """What a storage host must know before its ranks register.

    Attributes
    ----------
    num_ranks : int
        Ranks on its node.
    dp_client_id : int
        The engine's data-parallel rank.
    controller : str
        Identity of the controller: the pool holds no content of another one.
    first_task : int
        The controller's task ids are larger.
    """

    num_ranks: int
    dp_client_id: int
    controller: str
    first_task: int


@dataclass(frozen=True)
class Join:
    """A storage host whose ranks have all registered, and whose earlier copies have all ended.

    Attributes
    ----------
    incarnation : str
        Identity of its host pool: the content of a pool with another identity is lost.
    ranks : tuple of (int, int)
        ``(pp_rank, rank)`` of its ranks, ascending.
    num_pages : tuple of int
        Pages in each layer group, of the rank that has the fewest.
    num_slots : int
        Slots of its pool, when that is populated.
    """

    incarnation: str
    ranks: tuple[tuple[int, int], ...]
    num_pages: tuple[int, ...]
    num_slots: int


@dataclass(frozen=True)
class NodeOp:
    """A part of an op, for all ranks of a node.

    Attributes
    ----------
    part_id, task_id, fence, flags, counter, op_blocks : int
        As in a record of a ring (csrc/agent.h); ``part_id``: its ``op_id``.
    kind : OpKind
        D2H or H2D.
    slots : (n,) int32
        Slots of the node's pool.
    pages : (num_groups, n) int32
        Page of each block in each layer group; -1: none. After ``unpack`` both are read-only views of the payload.
    """

    part_id: int
    task_id: int
    fence: int
    kind: OpKind
    flags: int
    counter: int
    op_blocks: int
    slots: NDArray[np.int32]
    pages: NDArray[np.int32]

    def pack(self) -> bytes:
        """Encode the payload of an OP."""
        head = _OP.pack(
            self.part_id, self.task_id, self.fence, self.kind, self.flags, self.counter, self.op_blocks,
            len(self.slots), len(self.pages),
        )
        return head + self.slots.tobytes() + self.pages.tobytes()

    @classmethod
    def unpack(cls, payload: bytes) -> "NodeOp":
        """Parse the payload of an OP; NodeLinkError if it is invalid."""
        if len(payload) < _OP.size:
            raise NodeLinkError(f"an OP of {len(payload)} bytes")
        part_id, task_id, fence, kind, flags, counter, op_blocks, count, groups = _OP.unpack_from(payload)
        if kind not in (OpKind.D2H, OpKind.H2D) or not 0 < count <= MAX_BLOCKS or not 0 < groups <= MAX_LAYER_GROUPS:
            raise NodeLinkError(f"an OP of kind {kind} on {count} blocks in {groups} layer groups")
        if len(payload) != _OP.size + 4 * count * (1 + groups) or fence >> 63 or counter >> 31:
            raise NodeLinkError(f"an OP on {count} blocks of {len(payload)} bytes, fence {fence}, counter {counter}")
        numbers = np.frombuffer(payload, dtype="<i4", offset=_OP.size)
        return cls(
            part_id, task_id, fence, OpKind(kind), flags, counter, op_blocks, numbers[:count],
            numbers[count:].reshape(groups, count),
        )


def pack_json(message: Terms | Join) -> bytes:
    """Encode the payload of TERMS or JOIN."""
    return json.dumps(asdict(message)).encode()


def parse_terms(payload: bytes) -> Terms:
    """Parse the payload of TERMS; NodeLinkError if it is invalid."""
    given = _parse_json(payload, Terms)
    if not isinstance(given["controller"], str):
        raise NodeLinkError("a controller that is no text")
    return Terms(
        _number(given["num_ranks"], 1, 1 << 16), _number(given["dp_client_id"], 0, (1 << 16) - 1),
        given["controller"][:64], _number(given["first_task"], 0, 1 << 63),
    )


def parse_join(payload: bytes) -> Join:
    """Parse the payload of JOIN; NodeLinkError if it is invalid."""
    given = _parse_json(payload, Join)
    incarnation, ranks, pages = given["incarnation"], given["ranks"], given["num_pages"]
    if not isinstance(incarnation, str) or not isinstance(ranks, list) or not isinstance(pages, list) or not ranks:
        raise NodeLinkError("a JOIN with fields of other types")
    if not 0 < len(pages) <= MAX_LAYER_GROUPS or any(not isinstance(pair, list) or len(pair) != 2 for pair in ranks):
        raise NodeLinkError("a JOIN with fields of other lengths")
    limit = (1 << 16) - 1
    pairs = tuple((_number(pp_rank, 0, limit), _number(rank, 0, limit)) for pp_rank, rank in ranks)
    return Join(
        incarnation[:64], pairs, tuple(_number(count, 1, 1 << 31) for count in pages),
        _number(given["num_slots"], 1, 1 << 31),
    )


def _parse_json(payload: bytes, kind: type) -> dict[str, Any]:
    try:
        given = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise NodeLinkError(f"{kind.__name__} is no JSON") from error
    if not isinstance(given, dict) or set(given) != set(kind.__annotations__):
        raise NodeLinkError(f"{kind.__name__} has other fields: use the same version of FlexKV on all nodes")
    return given


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise NodeLinkError(f"a number that must be from {low} to {high}, and is not")
    return value


def pack_result(part_id: int, ok: NDArray[np.bool_]) -> bytes:
    """Encode the payload of RESULT: whether each block of a part was moved."""
    return _RESULT.pack(part_id, len(ok)) + np.ascontiguousarray(ok, dtype=np.uint8).tobytes()


def parse_result(payload: bytes) -> tuple[int, NDArray[np.bool_]]:
    """Parse the payload of RESULT into the part's id and (n,) bool; NodeLinkError if it is invalid."""
    if len(payload) >= _RESULT.size:
        part_id, count = _RESULT.unpack_from(payload)
        if len(payload) == _RESULT.size + count:
            return part_id, np.frombuffer(payload, dtype=np.uint8, offset=_RESULT.size) == 1
    raise NodeLinkError(f"a RESULT of {len(payload)} bytes")


def pack_number(number: int) -> bytes:
    """Encode the payload of CANCEL (a part's id) or USABLE (a number of slots)."""
    return _NUMBER.pack(number)


def parse_number(payload: bytes) -> int:
    """Parse the payload of CANCEL or USABLE; NodeLinkError if it is invalid."""
    if len(payload) != _NUMBER.size:
        raise NodeLinkError(f"a number of {len(payload)} bytes")
    return int(_NUMBER.unpack(payload)[0])
