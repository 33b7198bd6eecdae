"""Reads traces: recorded by FlexKV, or JSON lines; plain, gzip or xz. The format is detected from the content."""

import gzip
import json
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.block_keys import chain_seed, hash_blocks
from flexkv.errors import TraceError, short
from flexkv.metrics.request_trace import MAGIC, read_recorded
from flexkv.tools.replay.trace import Trace, make_trace

SUPPORTED = (
    "supported are traces recorded by FlexKV (trace_path), and JSON lines with hash_ids (Mooncake, Alibaba Bailian, "
    "timed_trace of vllm bench serve) or prompt_token_ids"
)

MOONCAKE_BLOCK_TOKENS = 512
"""Block size of the traces published with Mooncake (FAST'25), used if it cannot be inferred from lengths."""

BAILIAN_BLOCK_TOKENS = 16
"""Block size of Alibaba's Qwen-Bailian traces, whose times are in seconds:
https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon"""

TOKENS_BLOCK_TOKENS = 16
"""Block size for a trace of tokens without a block size: the default of ``tokens_per_block``."""

MAX_BLOCK_TOKENS = 1 << 24
"""Maximum block size in a trace or from a user, in tokens."""

_MAX_LENGTH = 1 << 40
"""Maximum ``input_length``, in tokens."""

_MAX_TIME = 1e19
"""Maximum absolute value of a timestamp, in the trace's unit: nanoseconds since 1970 are below it."""

_MAX_LINE_BYTES = 256 << 20
"""Maximum length of a line in bytes: a prompt of 20 million tokens."""

_MARK = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which some editors and spreadsheets write at the start."""

_BLOCK_SIZES = [512, *(1 << i for i in range(14) if i != 9), *range(48, 4096, 16)]
"""Block sizes that are compared with the lengths of requests; the first of the best fits is chosen."""


def read_trace(path: Path, block_tokens: int | None = None) -> Trace:
    """Read a trace.

    Parameters
    ----------
    block_tokens : int, optional
        Default: the size in the trace or inferred from its lengths, else 512 (Mooncake) or 16 (Bailian, or token ids).

    Raises
    ------
    TraceError
        The file cannot be read or is not a trace. The error names the line.
    """
    try:
        with _opened(path) as file:
            head = file.read(len(MAGIC))
            file.seek(0)
            if head == MAGIC:
                return _recorded(path, file.read(), block_tokens)
            return _json_lines(path, file, block_tokens)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise TraceError(str(path), 0, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _opened(path: Path) -> BinaryIO:
    """Open the file; gzip and xz are decompressed."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):        # opening a directory raises a clear error below
        raise TraceError(str(path), 0, "is not an ordinary file, and it is read twice: write it to a file first")
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path))
    return cast(BinaryIO, lzma.open(path)) if head == b"\xfd7zXZ\0" else path.open("rb")


def _recorded(path: Path, content: bytes, block_tokens: int | None) -> Trace:
    recorded = read_recorded(content)
    if recorded is None or not 1 <= recorded.block_tokens <= MAX_BLOCK_TOKENS:
        raise TraceError(str(path), 0, "was recorded by another version of FlexKV, or its header is damaged")
    if block_tokens not in (None, recorded.block_tokens):
        raise TraceError(
            str(path), 0, f"was recorded in blocks of {recorded.block_tokens} tokens, and cannot be cut into blocks of "
            f"{block_tokens}: leave --block-tokens out",
        )
    return make_trace(path.name, recorded.block_tokens, recorded.seconds, recorded.sequences, are_keys=True)


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def _json_lines(path: Path, file: BinaryIO, block_tokens: int | None) -> Trace:
    times: list[float | None] = []
    lengths: list[int] = []
    sequences: list[NDArray[np.uint64]] = []
    size, kind, tick = block_tokens, "", 1e-3
    for number, line in _objects(path, file):
        if not kind:
            kind = _kind(path, number, line)
            is_bailian = "chat_id" in line
            tick = 1.0 if is_bailian else 1e-3
            size = size or _block_size(path, number, line) or (BAILIAN_BLOCK_TOKENS if is_bailian else None)
        times.append(_time(path, number, line, tick))
        values = _whole_numbers(path, number, line, kind)
        if kind == "prompt_token_ids":
            sequences.append(_keys_of_tokens(path, number, values, size or TOKENS_BLOCK_TOKENS))
        else:
            sequences.append(values.view(np.uint64))
        lengths.append(_length(path, number, line))
    if not kind:
        raise TraceError(str(path), 0, f"has no requests; {SUPPORTED}")
    untimed = sum(time is None for time in times)
    if 0 < untimed < len(times):
        raise TraceError(str(path), 0, f"has {untimed} of {len(times)} requests without timestamp: all or none")
    if size is None:
        size = TOKENS_BLOCK_TOKENS if kind == "prompt_token_ids" else _block_tokens_of(lengths, sequences)
    seconds = None if untimed else [time for time in times if time is not None]
    return make_trace(path.name, size, seconds, sequences, are_keys=kind == "prompt_token_ids")


def _objects(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the JSON objects of the lines, with line numbers from 1. Empty lines are skipped."""
    for number, text in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), 1):
        if len(text) > _MAX_LINE_BYTES:
            raise TraceError(str(path), number, f"is longer than {_MAX_LINE_BYTES >> 20} MiB")
        if number == 1:
            text = text.removeprefix(_MARK)
        if not text or text.isspace():
            continue
        if number == 1 and text.lstrip()[:1] != b"{":
            raise TraceError(str(path), 1, f"is not a JSON object; {SUPPORTED}")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            cut = "" if text.endswith(b"\n") else " (the file ends here: it may have been cut off)"
            raise TraceError(str(path), number, f"is not JSON: {why}{cut}") from error
        if not isinstance(line, dict):
            raise TraceError(str(path), number, "is not a JSON object")
        yield number, line


def _kind(path: Path, number: int, line: dict[str, Any]) -> str:
    """Name of the field that contains the blocks."""
    for kind in ("hash_ids", "prompt_token_ids"):
        if kind in line:
            return kind
    if {"prompt", "messages", "conversations", "text_input", "turns"} & line.keys():
        raise TraceError(
            str(path), number, "has text, and only the model's tokenizer knows its blocks: write its token ids as "
            f"prompt_token_ids; {SUPPORTED}",
        )
    raise TraceError(str(path), number, f"has neither hash_ids nor prompt_token_ids; {SUPPORTED}")


def _block_size(path: Path, number: int, line: dict[str, Any]) -> int | None:
    size = line.get("block_size")
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MAX_BLOCK_TOKENS):
        return size
    raise TraceError(
        str(path), number, f"block_size is {short(size)}; must be a whole number from 1 to {MAX_BLOCK_TOKENS}"
    )


def _time(path: Path, number: int, line: dict[str, Any], tick: float) -> float | None:
    """Time of the request in seconds; None: the line has no time."""
    time = line.get("timestamp")
    if time is None:
        return None
    # the comparison is false for NaN, and exact for whole numbers of any size
    if isinstance(time, bool) or not isinstance(time, int | float) or not -_MAX_TIME <= time <= _MAX_TIME:
        text = f"timestamp is {short(time)}; must be a number from {-_MAX_TIME:g} to {_MAX_TIME:g}"
        raise TraceError(str(path), number, text)
    return time * tick


def _length(path: Path, number: int, line: dict[str, Any]) -> int:
    """Number of tokens of the prompt; 0: the line has none."""
    length = line.get("input_length", 0)
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= _MAX_LENGTH:
        text = f"input_length is {short(length)}; must be a whole number from 0 to {_MAX_LENGTH}"
        raise TraceError(str(path), number, text)
    return length


def _whole_numbers(path: Path, number: int, line: dict[str, Any], kind: str) -> NDArray[np.int64]:
    values = line.get(kind)
    if isinstance(values, list) and not any(isinstance(value, bool) for value in values):
        try:
            array = np.array(values) if values else np.zeros(0, dtype=np.int64)
        except (ValueError, OverflowError):
            array = np.zeros(0)
        if array.ndim == 1 and array.dtype.kind in "iu":
            return array.astype(np.int64)
    raise TraceError(str(path), number, f"has no {kind} that are a list of whole numbers (of at most 64 bits)")


def _keys_of_tokens(path: Path, number: int, tokens: NDArray[np.int64], block_tokens: int) -> NDArray[np.uint64]:
    try:
        return hash_blocks(tokens, block_tokens, chain_seed(b"trace"))[:, 0]
    except ValueError as error:
        raise TraceError(str(path), number, f"has prompt_token_ids that cannot be hashed: {error}") from error


def _block_tokens_of(lengths: list[int], sequences: list[NDArray[np.uint64]]) -> int:
    """Infer the block size from the numbers of tokens and of blocks of the requests."""
    tokens = np.array(lengths)
    counts = np.array([len(sequence) for sequence in sequences])
    tokens, counts = tokens[counts > 0], counts[counts > 0]
    # most traces count a partial block, some do not
    fits = [2 * int((-(-tokens // n) == counts).sum()) + int((tokens // n == counts).sum()) for n in _BLOCK_SIZES]
    best = int(np.argmax(fits)) if len(tokens) else 0
    return _BLOCK_SIZES[best] if fits[best] else MOONCAKE_BLOCK_TOKENS
