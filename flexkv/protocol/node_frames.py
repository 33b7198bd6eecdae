"""Authenticated frames on a TCP connection between two nodes.

Each frame has a tag that is made with a key of the connection, so only a process that knows the secret can send one.
The bytes are not encrypted."""

import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time

from flexkv.errors import NodeLinkError
from flexkv.protocol.nodes import MAX_PAYLOAD_BYTES, FrameKind

_MAGIC = b"FKVNODE1"
"""Name and version of the protocol."""

_NONCE_BYTES = 32
PROOF_BYTES = 32
CHALLENGE_BYTES = len(_MAGIC) + _NONCE_BYTES
REPLY_BYTES = CHALLENGE_BYTES + PROOF_BYTES

_HEADER = struct.Struct("<II16s")
"""Kind, bytes of the payload, tag."""

_COUNT = struct.Struct("<Q")
_READ_BYTES = 1 << 18


class Greeting:
    """Mutual authentication by a shared secret. The controller sends a challenge, the storage host a reply with its
    proof and its own challenge, and the controller its proof. The controller calls ``challenge``, ``answer_to`` and
    ``keys``, in this order; the storage host ``reply_to``, ``check`` and ``keys``.

    Parameters
    ----------
    secret : str
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces = b""

    def challenge(self) -> bytes:
        """The controller's first message, of CHALLENGE_BYTES."""
        return _MAGIC + self._nonce

    def reply_to(self, challenge: bytes) -> bytes:
        """The storage host's message, of REPLY_BYTES; NodeLinkError if the challenge is of another protocol."""
        self._nonces = _nonce_of(challenge) + self._nonce
        return _MAGIC + self._nonce + self._proof(b"storage host")

    def answer_to(self, reply: bytes) -> bytes:
        """The controller's proof, of PROOF_BYTES; NodeLinkError if the reply does not show that its sender knows the
        secret."""
        self._nonces = self._nonce + _nonce_of(reply[:CHALLENGE_BYTES])
        if not hmac.compare_digest(reply[CHALLENGE_BYTES:], self._proof(b"storage host")):
            raise NodeLinkError("a storage host with another secret: set the same node_secret on all nodes")
        return self._proof(b"controller")

    def check(self, answer: bytes) -> None:
        """NodeLinkError if the answer does not show that the controller knows the secret."""
        if not hmac.compare_digest(answer, self._proof(b"controller")):
            raise NodeLinkError("the controller has another secret: set the same node_secret on all nodes")

    def keys(self) -> tuple[bytes, bytes]:
        """Keys of the frames to the storage host, and of those to the controller."""
        return self._proof(b"frames to the storage host"), self._proof(b"frames to the controller")

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._secret, role + self._nonces, "sha256")


def _nonce_of(message: bytes) -> bytes:
    if len(message) != CHALLENGE_BYTES or message[: len(_MAGIC)] != _MAGIC:
        raise NodeLinkError("the other end is no FlexKV of this version: use the same version on all nodes")
    return message[len(_MAGIC) :]


class Frames:
    """Sends and receives frames on a non-blocking TCP connection. One thread at a time may receive; any may send.

    Parameters
    ----------
    connection : socket
        Owned by this object.
    sending_key, receiving_key : bytes

    Attributes
    ----------
    heard : float
        Monotonic time of the last bytes that have arrived.
    """

    def __init__(self, connection: socket.socket, sending_key: bytes, receiving_key: bytes) -> None:
        self.connection = connection
        self._sending_key, self._receiving_key = sending_key, receiving_key
        self._sending = threading.Lock()
        self._unsent = bytearray()                   # under the lock
        self._received = bytearray()
        self._num_sent = self._num_received = 0
        self.heard = time.monotonic()

    def push(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Send a frame, now or with a later ``flush``. Neither waits nor raises: bytes without room are kept, and the
        caller bounds them by ``unsent_bytes``. ``payload``: at most MAX_PAYLOAD_BYTES."""
        with self._sending:
            tag = _tag(self._sending_key, self._num_sent, kind, payload)
            self._num_sent += 1
            self._unsent += _HEADER.pack(kind, len(payload), tag)
            self._unsent += payload
            self._flush()

    def flush(self) -> bool:
        """Send the bytes that wait; True if none is left."""
        with self._sending:
            self._flush()
            return not self._unsent

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:                              # it has ended: nothing can be sent any more
            self._unsent.clear()

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait for room in the socket."""
        return len(self._unsent)

    def has_ended(self) -> bool:
        """Whether the other end has closed the connection, and all that it sent was received."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def has_news(self) -> bool:
        """Whether bytes have arrived that were not received yet."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def receive(self) -> tuple[FrameKind, bytes] | None:
        """The next frame; None: none is complete yet, or the connection has ended (``has_ended``).

        Raises
        ------
        NodeLinkError
            A frame is invalid; the connection must be closed.
        """
        while (frame := self._take()) is None:
            try:
                data = self.connection.recv(_READ_BYTES)
            except OSError:                          # nothing more, or the end
                return None
            if not data:
                return None
            self.heard = time.monotonic()
            self._received += data
        return frame

    def _take(self) -> tuple[FrameKind, bytes] | None:
        if len(self._received) < _HEADER.size:
            return None
        number, size, tag = _HEADER.unpack_from(self._received)
        if size > MAX_PAYLOAD_BYTES or number not in FrameKind.__members__.values():
            raise NodeLinkError(f"a frame of kind {number} and {size} bytes")
        end = _HEADER.size + size
        if len(self._received) < end:
            return None
        payload = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        if not hmac.compare_digest(tag, _tag(self._receiving_key, self._num_received, number, payload)):
            raise NodeLinkError("a frame that its sender has not tagged with the key of the connection")
        self._num_received += 1
        return FrameKind(number), payload

    def close(self) -> None:
        """Close the connection. Can be called again."""
        self.connection.close()


def _tag(key: bytes, count: int, kind: int, payload: bytes) -> bytes:
    digest = hashlib.blake2b(_HEADER.pack(kind, len(payload), b""), digest_size=16, key=key, salt=_COUNT.pack(count))
    digest.update(payload)
    return digest.digest()
