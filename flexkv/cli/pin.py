"""The commands ``flexkv pin``, ``flexkv unpin`` and ``flexkv pins``."""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import PinError
from flexkv.protocol.requests import MAX_TOKENS, ask


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"flexkv {command}", description=description)
    parser.add_argument("--socket", required=True, help="path at which the ranks of the running engine register "
                                                        "(gpu_register_port)")
    return parser


def read_tokens(text: str) -> NDArray[np.uint32]:
    """Parse token ids that are separated by spaces, commas or line ends, with or without brackets.

    Raises
    ------
    PinError
        The text has no tokens or too many, or a word is not an integer from 0 to 2**32 - 1.
    """
    try:
        tokens = np.array([int(word) for word in text.strip().strip("[]").replace(",", " ").split()], dtype=np.int64)
    except (ValueError, OverflowError):
        raise PinError("the tokens must be whole numbers, such as [1, 15043, 3186]") from None
    if not 1 <= len(tokens) <= MAX_TOKENS or tokens.min() < 0 or tokens.max() >= 1 << 32:
        raise PinError(f"give 1 to {MAX_TOKENS} tokens, each from 0 to 2**32 - 1")
    return tokens.astype(np.uint32)


def pin(argv: list[str]) -> int:
    """Pin a prefix in a running engine's cache; returns the exit status."""
    parser = _parser("pin", "Keep the cached blocks of a prefix until they are unpinned or the cache is reset.")
    parser.add_argument("--tokens", required=True, help="file of token ids, as numbers; - : standard input")
    parser.add_argument(
        "--namespace", nargs="+", default=[], metavar="NAME",
        help="salt:SALT, lora:NAME=PATH (the LoRA's directory on the engine's machine), or a tenant's NAME",
    )
    parser.add_argument("--name", default="", help="name for flexkv unpin (default: a generated one)")
    args = parser.parse_args(argv)
    try:
        text = sys.stdin.read() if args.tokens == "-" else Path(args.tokens).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PinError(f"{args.tokens} cannot be read: {error}") from error
    tokens = read_tokens(text)
    request = {"command": "pin", "name": args.name, "namespace": args.namespace, "num_tokens": len(tokens)}
    for pinned in ask(args.socket, request, tokens):
        print(f"{pinned.name}: {pinned.num_blocks} blocks are pinned")
    return 0


def unpin(argv: list[str]) -> int:
    """Unpin a prefix; returns the exit status."""
    parser = _parser("unpin", "Release a pinned prefix: its blocks may be evicted again.")
    parser.add_argument("--name", required=True)
    args = parser.parse_args(argv)
    for pinned in ask(args.socket, {"command": "unpin", "name": args.name}):
        print(f"{pinned.name}: {pinned.num_blocks} blocks are unpinned")
    return 0


def pins(argv: list[str]) -> int:
    """List the pinned prefixes; returns the exit status."""
    args = _parser("pins", "List the pinned prefixes.").parse_args(argv)
    found = list(ask(args.socket, {"command": "pins"}))
    for pinned in found:
        print(f"{pinned.name}: {pinned.num_blocks} blocks")
    if not found:
        print("nothing is pinned")
    return 0
