"""Answers to the requests of users (``flexkv.protocol.requests``)."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import ArrayLike

from flexkv.config.namespace_entry import NamespaceEntry
from flexkv.errors import FlexKVError, PinError
from flexkv.protocol.requests import PINS_PER_REPLY, Pin, parse_request, read_tokens

logger = logging.getLogger("flexkv.controller")


class Control:
    """Executes the requests of users. Thread safe if the callables are.

    Parameters
    ----------
    pin, unpin, pins : callable
        The methods of ``Blocks``.
    """

    def __init__(
        self,
        pin: Callable[[ArrayLike, Sequence[str] | None, str], Pin],
        unpin: Callable[[str], Pin],
        pins: Callable[[], Sequence[Pin]],
    ) -> None:
        self._pin = pin
        self._unpin = unpin
        self._pins = pins

    def answer(self, message: bytes, fds: Sequence[int]) -> bytes:
        """Execute a request (the bytes of its message, and the descriptors that came with it); returns the bytes of the
        reply, also for a refused or invalid request. Never raises. The caller keeps owning ``fds``."""
        try:
            pins = self._carry_out(parse_request(message), fds)
            page = sorted(pins, key=lambda pin: pin.name)[:PINS_PER_REPLY]
            entries = [[pin.name, pin.num_blocks] for pin in page]
            reply: dict[str, Any] = {"pins": entries, "more": len(page) < len(pins)}
        except (FlexKVError, ValueError) as error:
            reply = {"error": str(error)[:1000]}
        except Exception:
            logger.exception("a user's request failed")
            reply = {"error": "the controller failed at this request: see its log"}
        return json.dumps(reply, ensure_ascii=False).encode()

    def _carry_out(self, request: dict[str, Any], fds: Sequence[int]) -> Sequence[Pin]:
        match request:
            case {"command": "pins", **rest} if not rest:
                return self._pins()
            case {"command": "pins", "after": str(name), **rest} if not rest:
                return [pin for pin in self._pins() if pin.name > name]
            case {"command": "unpin", "name": str(name), **rest} if not rest:
                return [self._unpin(name)]
            case {
                "command": "pin", "name": str(name), "namespace": list(namespace), "num_tokens": int(count), **rest
            } if not rest and all(isinstance(entry, str) for entry in namespace):
                entries = [NamespaceEntry.parse(entry) for entry in namespace]
                return [self._pin(read_tokens(fds, count), entries, name)]
        raise PinError(f"{str(request)[:200]} is no request: its command or its fields are not those of this version")
