"""Exceptions of FlexKV. Each message names the fault, and the remedy if there is one."""

import reprlib


class _Short(reprlib.Repr):
    """Makes representations of bounded length for any value: a message must neither fail nor fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 300
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 4

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 512 else f"<whole number of {value.bit_length()} bits>"


def short(value: object) -> str:
    """A representation of a value for a message: of bounded length, for any value."""
    return _SHORT.repr(value)


def _clipped(text: str, limit: int = 1200) -> str:
    """Shorten a text that may quote a name of any length, such as a key of a damaged file."""
    return text if len(text) <= limit else f"{text[:limit - 100]}...{text[-90:]}"


_SHORT = _Short()


class FlexKVError(Exception):
    """Base of all errors of this package."""


class ConfigError(FlexKVError, ValueError):
    """A setting is unknown, of a wrong type, or out of range.

    Parameters
    ----------
    key : str
        The setting, by the name that the user gave.
    value : object
        The value that was given.
    allowed : str
        The allowed values, or the remedy.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{_clipped(key, 300)} = {short(value)}: {_clipped(allowed)}")
        self.key = key
        self.value = value
        self.allowed = allowed

    @classmethod
    def about(cls, key: str, text: str) -> "ConfigError":
        """An error about a setting or a place that has no single value: ``KEY: TEXT``."""
        error = cls(key, None, text)
        error.args = (f"{_clipped(key, 300)}: {_clipped(text)}",)
        return error

    def given_by(self, source: str) -> "ConfigError":
        """The same error, with the place where the value was given."""
        error = type(self)(self.key, self.value, self.allowed)
        error.args = (f"{self} ({source})",)
        return error


class IdentityError(FlexKVError, ValueError):
    """The identity of weights cannot be determined, so their KV must not be shared."""


class RegistrationError(FlexKVError, ValueError):
    """Tensors, or the layout that describes them, cannot be registered."""


class OtherLayoutError(RegistrationError):
    """The layout of a block differs from that of the host pool, which other engines use."""


class NotReadyError(FlexKVError, TimeoutError):
    """KV cannot be loaded or saved yet: a rank has not registered its tensors."""


class PinError(FlexKVError, ValueError):
    """A prefix cannot be pinned or unpinned; nothing has changed."""


class SlotMappingError(FlexKVError, ValueError):
    """A slot mapping does not name whole, aligned pages."""


class ArgumentError(FlexKVError, ValueError):
    """An argument of a call is of a wrong type, shape or range; the call has changed nothing."""


class TaskError(FlexKVError, KeyError):
    """A task is not known, or was launched or ended already; the call has changed nothing."""

    __str__ = Exception.__str__            # KeyError shows its message in quotes


class CapacityError(FlexKVError, MemoryError):
    """A fixed capacity is exhausted, or memory cannot be allocated."""


class TransferError(FlexKVError, RuntimeError):
    """Blocks could not be moved."""


class CudaUnavailableError(FlexKVError, RuntimeError):
    """KV is on a GPU, and this process cannot use CUDA."""


class CudaError(TransferError):
    """A call of the CUDA driver or of NVRTC failed.

    Parameters
    ----------
    function, name, text : str
        The function, and the driver's name and text of the error.
    """

    def __init__(self, function: str, name: str, text: str) -> None:
        super().__init__(f"{function} failed with {name}: {text}")
        self.function = function
        self.name = name


class GdsUnavailableError(FlexKVError, RuntimeError):
    """Blocks cannot be moved directly between SSD and GPU on this machine."""


class AgentLostError(TransferError):
    """The process at the other end of a ring has ended."""


class RingCorruptedError(TransferError):
    """A shared-memory ring holds a record that its writer cannot have written."""


class NodeLinkError(RingCorruptedError):
    """The other end of a connection between two nodes does not know the secret, or sent an invalid message."""


class StorageError(FlexKVError, RuntimeError):
    """A directory of the SSD tier cannot be used."""


class DirectoryInUseError(StorageError):
    """Another process uses a directory of the SSD tier.

    Parameters
    ----------
    directory : str
    owner : str
        Process and host of the owner, from the lock file.
    """

    def __init__(self, directory: str, owner: str) -> None:
        super().__init__(f"{directory} is in use by {owner}: stop that process, or set ssd_cache_dir to another one")
        self.directory = directory
        self.owner = owner


class TraceError(FlexKVError, ValueError):
    """A trace of requests cannot be read or written.

    Parameters
    ----------
    path : str
    line : int
        From 1; 0: the error concerns no single line.
    text : str
        The fault.
    """

    def __init__(self, path: str, line: int, text: str) -> None:
        super().__init__(f"{path}, line {line} {text}" if line else f"{path} {text}")
        self.path = path
        self.line = line


class InvariantError(FlexKVError, AssertionError):
    """An invariant does not hold: a defect of FlexKV, or of a caller that broke a contract."""
