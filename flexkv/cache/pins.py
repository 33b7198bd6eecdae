"""Prefixes that users have pinned: their blocks stay until they are unpinned, or the cache is reset."""


import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.quotas import Quotas
from flexkv.errors import PinError
from flexkv.protocol.requests import Pin

_MAX_PINS = 256
"""So that a list of them fits one message of the controller's socket."""

_MAX_NAME_BYTES = 128


class Pins:
    """Pinned prefixes of one index. The caller locks.

    A pinned block keeps its slots on every tier, and does not expire. All pinned blocks may come to lie in host memory,
    so it is of that that they can have a share, wherever they are now.

    Parameters
    ----------
    quotas : Quotas
        Pins cannot hold what is guaranteed to others, nor more than the namespace may have.
    max_share : float
        Of the host tier.
    """

    def __init__(self, quotas: Quotas, max_share: float) -> None:
        self._quotas = quotas
        self._max_share = max_share
        self._pins: dict[str, tuple[NDArray[np.uint64], int]] = {}       # keys and group
        self.blocks = [0] * len(quotas)
        """Pinned blocks of each group; those that several pins share count once."""

    def add(self, tree: RadixTree, keys: NDArray[np.uint64], name: str, group: int, capacity: int) -> Pin:
        """Pin blocks ((n, 2) uint64, from the first of a sequence) that are in the index.

        Raises
        ------
        PinError
            Nothing has changed.
        """
        if not isinstance(name, str) or not (name.isprintable() and len(name.encode()) <= _MAX_NAME_BYTES):
            raise PinError(f"{ascii(name)[:_MAX_NAME_BYTES]} is no name: give up to {_MAX_NAME_BYTES} printable bytes")
        name = name or (keys[-1].tobytes().hex() if len(keys) else "")
        if len(keys) == 0:
            raise PinError("no block of this prefix is cached: send it to the engine first, as a prompt")
        if name in self._pins:
            raise PinError(f"{name!r} is pinned already: unpin it first, or give another name")
        if len(self._pins) >= _MAX_PINS:
            raise PinError(f"{_MAX_PINS} prefixes are pinned, which is all that can be: unpin one first")
        pinned = self.blocks.copy()
        pinned[group] += tree.unheld(keys)
        if (total := sum(pinned)) > (most := int(self._max_share * capacity)):
            raise PinError(f"{total} blocks would be pinned, and max_pinned_share allows {most}: unpin something first")
        if not self._quotas.may_pin(pinned, capacity):
            raise PinError(
                f"{pinned[group]} blocks of this namespace would be pinned: more than its limit, or than others' "
                "guarantees leave; unpin something, or change the setting namespaces"
            )
        try:
            tree.hold(keys)
        except MemoryError as error:               # CapacityError is one
            raise PinError(f"the index has no room to pin {len(keys)} blocks: {error}") from error
        self._pins[name], self.blocks = (keys, group), pinned
        return Pin(name, len(keys))

    def remove(self, tree: RadixTree, name: str) -> Pin:
        """Unpin.

        Raises
        ------
        PinError
            Nothing is pinned by that name.
        """
        if not isinstance(name, str) or name not in self._pins:
            raise PinError(f"nothing is pinned as {str(name)[:_MAX_NAME_BYTES]!r}; flexkv pins lists what is")
        keys, group = self._pins.pop(name)
        self.blocks[group] -= tree.let_go(keys)
        return Pin(name, len(keys))

    def clear(self, tree: RadixTree) -> None:
        """Unpin all."""
        for name in list(self._pins):
            self.remove(tree, name)

    def list(self) -> "list[Pin]":
        """All of them, oldest first."""
        return [Pin(name, len(keys)) for name, (keys, _) in self._pins.items()]
