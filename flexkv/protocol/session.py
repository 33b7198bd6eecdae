"""The protocol between an engine and the daemon.

An engine connects to the daemon's Unix socket and sends HELLO; the answer is WELCOME, or a refusal. Both are
``FLEXKVS1``, followed by a JSON object. WELCOME carries three descriptors: the memory of two rings
(``flexkv._core.record_rings``), and their eventfds. The connection stays open: its end is the end of the session.

Requests and replies are records of the rings; each begins with a packed head, and arrays follow it. The engine numbers
its requests, from the number that WELCOME gives and without repetition. The number of a request that makes a task is
the task's id. So an engine that gets no reply in time can still cancel the task, and the ids of all sessions of a
daemon differ.

LOOKUP, MATCH_GET, MATCH_PUT, PUT, PREFETCH and CALL have one reply: MATCHED, ANSWER or ERROR. The others have none.
Each task that was launched has a RESULT when it has settled, and perhaps an earlier one.
"""

import enum
import json
import struct
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import RegistrationError

_MAGIC = b"FLEXKVS1"

MAX_MESSAGE_BYTES = 16384
"""Size of the largest HELLO or WELCOME."""

RING_BYTES = 4 << 20
"""Data bytes of each ring. A record has at most half of it: a sequence of 64,000 blocks."""

NUM_FDS = 3
"""Descriptors of a WELCOME: memory of the rings, eventfd of requests, eventfd of replies."""

MAX_TEXT_BYTES = 1000
"""Size of the longest reason or error, in bytes of UTF-8; a longer one is cut."""

MAX_NAME_BYTES = 256
MAX_RANKS = 1024
MAX_TOKENS_PER_BLOCK = 1 << 20


class Note(enum.IntEnum):
    """Numbers that the daemon publishes beside the replies."""

    READY = 0
    """1 while every rank of the engine is registered, so that KV can be loaded and saved."""
    PULSE = 1
    """Changes at least once a second while the daemon works."""


class Request(enum.IntEnum):
    """Kinds of records that an engine sends."""

    LOOKUP = 1
    MATCH_GET = 2
    MATCH_PUT = 3
    LAUNCH = 4
    GET = 5
    PUT = 6
    PREFETCH = 7
    ACCEPT = 8
    CANCEL = 9
    RECORD = 10
    CALL = 11
    """A JSON object with a command, and perhaps keys."""


class Reply(enum.IntEnum):
    """Kinds of records that the daemon sends."""

    MATCHED = 1
    ANSWER = 2
    """A JSON value."""
    ERROR = 3
    """A JSON object: class and text of a FlexKVError."""
    RESULT = 4


BLOCKS = struct.Struct("<QQIIIIII")
"""Head of LOOKUP, MATCH_GET, MATCH_PUT, GET, PUT, PREFETCH and RECORD: number of the request; fence, or number of
tokens; start block; tenant; flags; number of keys, of pages, of loads. Then keys (n, 2) uint64, loads (k,) uint64 and
pages (m,) int32."""

LAUNCH = struct.Struct("<QQIIII")
"""Number of the request, fence, counter, flags, number of tasks, number of pages in all. Then tasks (k,) uint64, number
of pages of each (k,) uint32, pages (m,) int32."""

ACCEPT = struct.Struct("<Qq")
"""Task, and position from which on blocks are dropped; -1: none."""

CALL = struct.Struct("<QII")
"""Number of the request, bytes of JSON, number of keys. Then the JSON object, and keys (n, 2) uint64."""

MATCHED = struct.Struct("<QdIIIBBH")
"""Number of the request, time since the eviction in seconds (nan: unknown), ready blocks, blocks to fetch, number of
positions, reason (MissReason), 1 if there is a task, 0. Then positions (m,) int32."""

RESULT = struct.Struct("<QIBBH")
"""Task, number of blocks in the mask, status (its position in KVResponseStatus), 1 if the task has settled, bytes of
the reason. Then the mask, one bit for each block of the sequence from its first (numpy.packbits), and the reason."""

ANSWER = struct.Struct("<Q")
"""Number of the request. Then JSON."""


class Flag(enum.IntFlag):
    """Flags of a request."""

    COUNT = 1
    HOST_ONLY = 2
    LAYERWISE = 4
    PROVISIONAL = 8
    MUST_ANSWER = 16


@dataclass(frozen=True)
class Hello:
    """Description of an engine, its first message.

    Attributes
    ----------
    domain : str
        Identity of everything that must be equal for KV to be comparable (``flexkv.config.domain``).
    tokens_per_block : int
    ranks : int
        Number of its ranks.
    dp_client_id : int
        Its data-parallel rank, as its ranks name it.
    register_port : str
        Path of the socket at which the daemon must listen for the ranks.
    name : str
        Its name, for the log and for metrics.
    model : str
        The model, for metrics.
    first_task : int
        Its task ids must be larger.
    """

    domain: str
    tokens_per_block: int
    ranks: int
    dp_client_id: int
    register_port: str
    name: str
    model: str
    first_task: int

    def pack(self) -> bytes:
        return _packed(asdict(self))

    @classmethod
    def unpack(cls, message: bytes) -> "Hello":
        """Parse a HELLO; RegistrationError if the message is none, or a field of it is out of range."""
        content = _parsed(message, "HELLO")
        texts = {"domain": MAX_MESSAGE_BYTES, "register_port": 128, "name": MAX_NAME_BYTES, "model": MAX_NAME_BYTES}
        numbers = {
            "tokens_per_block": (1, MAX_TOKENS_PER_BLOCK), "ranks": (1, MAX_RANKS), "dp_client_id": (0, 65535),
            "first_task": (0, (1 << 62) - 1),
        }
        if content.keys() != texts.keys() | numbers.keys():
            raise RegistrationError("HELLO of an engine has other fields than those of this version: use the same "
                                    "version of FlexKV in all processes")
        for key, limit in texts.items():
            value = content[key]
            if not isinstance(value, str) or len(value.encode(errors="surrogatepass")) > limit:
                raise RegistrationError(f"{key} of an engine is no text of at most {limit} bytes")
            if value.encode(errors="ignore").decode() != value:
                raise RegistrationError(f"{key} of an engine has characters without a form in UTF-8")
        if not content["register_port"].startswith("/") or "\0" in content["register_port"]:
            raise RegistrationError("register_port of an engine is no absolute path")
        for key, (low, high) in numbers.items():
            _check_number(key, content[key], low, high)
        return cls(**content)


@dataclass(frozen=True)
class Welcome:
    """The answer to a HELLO: the data that an engine needs to use the rings.

    Attributes
    ----------
    ring_bytes : int
        Data bytes of each ring.
    first_task : int
        The engine's first request has this number.
    """

    ring_bytes: int
    first_task: int

    def pack(self) -> bytes:
        return _packed(asdict(self))

    @classmethod
    def unpack(cls, message: bytes) -> "Welcome":
        """Parse a WELCOME; RegistrationError if the message is a refusal, with its reason, or no WELCOME."""
        content = _parsed(message, "WELCOME")
        if content.keys() == {"error"}:
            raise RegistrationError(str(content["error"]))
        if content.keys() != {"ring_bytes", "first_task"}:
            raise RegistrationError("the answer is no WELCOME of this version: use the same version of FlexKV in all "
                                    "processes")
        _check_number("ring_bytes", content["ring_bytes"], 4096, 1 << 30)
        _check_number("first_task", content["first_task"], 1, (1 << 62) - 1)
        return cls(**content)


def pack_refusal(reason: str) -> bytes:
    """The message that refuses an engine."""
    return _packed({"error": cut(reason)})


def cut(text: str) -> str:
    """A text of at most MAX_TEXT_BYTES bytes of UTF-8."""
    return text.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore")


def _packed(content: dict[str, Any]) -> bytes:
    return _MAGIC + json.dumps(content).encode()


def _parsed(message: bytes, name: str) -> dict[str, Any]:
    content = None
    if message[:8] == _MAGIC:
        try:
            content = json.loads(message[8:])
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise RegistrationError(f"the message is no {name} of this version: use the same version of FlexKV in all "
                                "processes")
    return content


def _check_number(key: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise RegistrationError(f"{key} of an engine is {str(value)[:100]}: it must be a whole number from {low} to "
                                f"{high}")


# ---- records ------------------------------------------------------------------------------------------------------


def split(content: bytes, offset: int, *counts: tuple[int, type[np.generic]]) -> list[NDArray[Any]]:
    """The arrays of a record from ``offset`` to its end, aligned and not to be modified; ``counts``: number of elements
    of each, and type. RegistrationError if the record has another length."""
    arrays = []
    for count, dtype in counts:
        size = count * np.dtype(dtype).itemsize
        if size > len(content) - offset:
            raise RegistrationError("a record of a session is shorter than its head says")
        array = np.frombuffer(content, dtype, count, offset)
        arrays.append(array if array.flags.aligned else array.copy())      # after a text of any length
        offset += size
    if offset != len(content):
        raise RegistrationError("a record of a session is longer than its head says")
    return arrays


def head_of(layout: struct.Struct, content: bytes) -> tuple[Any, ...]:
    """The fields of a record's head; RegistrationError if the record is too short."""
    if len(content) < layout.size:
        raise RegistrationError("a record of a session is shorter than its head")
    return layout.unpack_from(content)


@dataclass(slots=True)
class BlocksRequest:
    """A request about blocks of a sequence.

    Attributes
    ----------
    number : int
    keys : (n, 2) uint64
    start : int
        First block.
    tenant : int
    flags : int
        Of ``Flag``.
    value : int
        Fence of GET and PUT, number of tokens of the others.
    pages : (m,) int32
    loads : (k,) uint64
    """

    number: int
    keys: NDArray[np.uint64]
    start: int = 0
    tenant: int = 0
    flags: int = 0
    value: int = 0
    pages: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    loads: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def parts(self) -> tuple[Any, ...]:
        """The parts of the record."""
        head = BLOCKS.pack(
            self.number, self.value, self.start, self.tenant, self.flags, len(self.keys), len(self.pages),
            len(self.loads),
        )
        return head, np.ascontiguousarray(self.keys), self.loads, np.ascontiguousarray(self.pages)

    @classmethod
    def unpack(cls, content: bytes) -> "BlocksRequest":
        """Parse a record; RegistrationError if its length is not that of its arrays."""
        number, value, start, tenant, flags, num_keys, num_pages, num_loads = head_of(BLOCKS, content)
        keys, loads, pages = split(
            content, BLOCKS.size, (2 * num_keys, np.uint64), (num_loads, np.uint64), (num_pages, np.int32)
        )
        return cls(number, keys.reshape(-1, 2), start, tenant, flags, value, pages, loads)


@dataclass(slots=True)
class LaunchRequest:
    """A launch of tasks. ``pages``: (m,) int32 of each of ``task_ids``; ``flags``: of ``Flag``."""

    number: int
    task_ids: list[int]
    pages: list[NDArray[np.int32]]
    fence: int = 0
    counter: int = 0
    flags: int = 0

    def parts(self) -> tuple[Any, ...]:
        """The parts of the record."""
        sizes = np.array([len(pages) for pages in self.pages], dtype=np.uint32)
        head = LAUNCH.pack(self.number, self.fence, self.counter, self.flags, len(sizes), int(sizes.sum()))
        together = np.concatenate(self.pages) if self.pages else np.zeros(0, dtype=np.int32)
        return head, np.array(self.task_ids, dtype=np.uint64), sizes, together

    @classmethod
    def unpack(cls, content: bytes) -> "LaunchRequest":
        """Parse a record; RegistrationError if its length is not that of its arrays."""
        number, fence, counter, flags, num_tasks, num_pages = head_of(LAUNCH, content)
        tasks, sizes, pages = split(
            content, LAUNCH.size, (num_tasks, np.uint64), (num_tasks, np.uint32), (num_pages, np.int32)
        )
        stops = list(accumulate(sizes.tolist(), initial=0))
        if num_pages != stops[-1]:
            raise RegistrationError("a launch has other pages than its tasks")
        parts = [pages[start:stop] for start, stop in pairwise(stops)]
        return cls(number, tasks.tolist(), parts, fence, counter, flags)


def pack_call(number: int, command: dict[str, Any], keys: NDArray[np.uint64] | None = None) -> tuple[Any, ...]:
    """The parts of a CALL. ``keys``: (n, 2) uint64."""
    content = json.dumps(command).encode()
    rest = b"" if keys is None else np.ascontiguousarray(keys)
    return CALL.pack(number, len(content), 0 if keys is None else len(keys)), content, rest


def unpack_call(content: bytes) -> tuple[int, dict[str, Any], NDArray[np.uint64]]:
    """Number, JSON object and keys ((n, 2) uint64) of a CALL; RegistrationError if the record is none."""
    number, num_bytes, num_keys = head_of(CALL, content)
    text, keys = split(content, CALL.size, (num_bytes, np.uint8), (2 * num_keys, np.uint64))
    try:
        command = json.loads(text.tobytes())
    except (ValueError, RecursionError):
        command = None
    if not isinstance(command, dict):
        raise RegistrationError("a command of a session is no JSON object")
    return number, command, keys.reshape(-1, 2)


def unpack_answer(content: bytes) -> tuple[int, Any]:
    """Number and JSON value of an ANSWER or ERROR; RegistrationError if the record is none."""
    [number] = head_of(ANSWER, content)
    try:
        return number, json.loads(content[ANSWER.size :])
    except (ValueError, RecursionError):
        raise RegistrationError("an answer of a session is no JSON") from None


def pack_result(
    task_id: int, status: int, is_settled: bool, mask: NDArray[np.bool_] | None, reason: str
) -> tuple[bytes, bytes, bytes]:
    """The parts of a RESULT. ``mask``: (n,) bool, blocks of the sequence that were moved; None: there is none."""
    text = cut(reason).encode()
    count = 0 if mask is None else len(mask)
    head = RESULT.pack(task_id, count, status, is_settled, len(text))
    return head, b"" if mask is None else np.packbits(mask).tobytes(), text


def unpack_result(content: bytes) -> tuple[int, int, bool, NDArray[np.bool_], str]:
    """Task, status, whether it has settled, mask ((n,) bool) and reason of a RESULT; RegistrationError if the record is
    none."""
    task_id, count, status, is_settled, size = head_of(RESULT, content)
    bits, text = split(content, RESULT.size, (-(-count // 8), np.uint8), (size, np.uint8))
    mask = np.unpackbits(bits, count=count).astype(np.bool_)
    return task_id, status, bool(is_settled), mask, text.tobytes().decode(errors="replace")
