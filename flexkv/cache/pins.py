"""Prefixes that users have pinned: their blocks stay cached until they are unpinned or the cache is reset."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.quotas import Quotas
from flexkv.errors import PinError
from flexkv.protocol.requests import Pin

_MAX_PINS = 256
"""Maximum number of pins. A list of all pins must fit one message of the controller's socket."""

_MAX_NAME_BYTES = 128
"""Maximum size of a pin's name in UTF-8, for the same reason."""


class Pins:
    """Pinned prefixes of one index. The caller must hold the engine's lock.

    A pinned block keeps its slots on every tier, and does not expire. Pins are limited to a share of host slots, even
    for blocks on SSD, because all of them may be loaded.

    Parameters
    ----------
    quotas : Quotas
        Pins of a namespace cannot exceed its limit, nor take the guaranteed share of another namespace.
    max_share : float
        Maximum share of the host slots for all pins.
    """

    def __init__(self, quotas: Quotas, max_share: float) -> None:
        self._quotas = quotas
        self._max_share = max_share
        self._pins: dict[str, tuple[NDArray[np.uint64], int]] = {}       # keys and tenant
        self.blocks = [0] * len(quotas)
        """Pinned blocks of each tenant. A block that several pins share counts once."""

    def add(self, tree: RadixTree, keys: NDArray[np.uint64], name: str, tenant: int, capacity: int) -> Pin:
        """Pin blocks of the index, by their keys ((n, 2) uint64, from the first block of a sequence).

        ``capacity``: host slots, of which ``max_share`` can be pinned. ``name``: if empty, the key of the
        last block in hexadecimal digits.

        Raises
        ------
        PinError
            The blocks cannot be pinned; nothing has changed.
        """
        if not isinstance(name, str) or not (name.isprintable() and len(name.encode()) <= _MAX_NAME_BYTES):
            raise PinError(f"{ascii(name)[:_MAX_NAME_BYTES]} is not a valid name: use up to {_MAX_NAME_BYTES} bytes of "
                           "printable characters")
        name = name or (keys[-1].tobytes().hex() if len(keys) else "")
        if len(keys) == 0:
            raise PinError("no block of this prefix is cached: send it to the engine first, as a prompt")
        if name in self._pins:
            raise PinError(f"{name!r} is pinned already: unpin it first, or give another name")
        if len(self._pins) >= _MAX_PINS:
            raise PinError(f"{_MAX_PINS} prefixes are pinned, the maximum: unpin one first")
        pinned = self.blocks.copy()
        pinned[tenant] += tree.num_unpinned(keys)
        if (total := sum(pinned)) > (most := int(self._max_share * capacity)):
            raise PinError(f"{total} blocks would be pinned, and max_pinned_share allows {most}: unpin something first")
        if not self._quotas.may_pin(pinned, capacity):
            raise PinError(
                f"{pinned[tenant]} blocks of this namespace would be pinned: they exceed its limit, or leave too "
                "little for the guarantees of other namespaces; unpin something, or change the setting namespaces"
            )
        try:
            tree.pin(keys)
        except MemoryError as error:               # CapacityError is one
            raise PinError(f"the index has no room to pin {len(keys)} blocks: {error}") from error
        self._pins[name], self.blocks = (keys, tenant), pinned
        return Pin(name, len(keys))

    def remove(self, tree: RadixTree, name: str) -> Pin:
        """Unpin the prefix of that name.

        Raises
        ------
        PinError
            No pin has that name.
        """
        if not isinstance(name, str) or name not in self._pins:
            raise PinError(f"nothing is pinned as {str(name)[:_MAX_NAME_BYTES]!r}; flexkv pins lists all pins")
        keys, tenant = self._pins.pop(name)
        self.blocks[tenant] -= tree.unpin(keys)
        return Pin(name, len(keys))

    def clear(self, tree: RadixTree) -> None:
        """Remove all pins."""
        for name in list(self._pins):
            self.remove(tree, name)

    def list(self) -> "list[Pin]":
        """All pins, oldest first."""
        return [Pin(name, len(keys)) for name, (keys, _) in self._pins.items()]
