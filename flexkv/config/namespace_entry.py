"""Entries of a namespace, which separate the KV of requests with the same tokens."""

from collections.abc import Iterable

from flexkv.config.weights import adapter_identity
from flexkv.errors import ArgumentError

KINDS = ("info", "salt", "lora")
"""Kinds of entries: a tenant or other plain name, a cache salt, a LoRA."""


class NamespaceEntry(str):
    """One entry of a namespace. Its text contains the kind and all fields, each preceded by its length, so that entries
    of other kinds or with other fields have other texts.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    name : str
        Owner of the quota, together with the kind.
    version : str
        Further distinction of KV, such as the version of a LoRA's weights.

    Raises
    ------
    ArgumentError
        The kind is unknown, or a field is not text.
    """

    __slots__ = ("kind", "name", "version")
    kind: str
    name: str
    version: str

    def __new__(cls, kind: str, name: str, version: str = "") -> "NamespaceEntry":
        """Compose the text."""
        if kind not in KINDS:
            raise ArgumentError(f"the kind of a namespace entry is {kind!r}: give one of {', '.join(KINDS)}")
        for field in (name, version):
            if not isinstance(field, str):
                raise ArgumentError(f"an entry of a namespace is {field!r}: give text")
        entry = super().__new__(cls, "".join(map(_prefixed, (kind, name, version))))
        entry.kind, entry.name, entry.version = kind, name, version
        return entry

    @property
    def owner(self) -> tuple[str, str]:
        """Kind and name: the owner of a quota."""
        return self.kind, self.name

    @classmethod
    def parse(cls, text: str) -> "NamespaceEntry":
        """The entry that a user means: ``salt:SALT``, ``lora:NAME=PATH``, ``info:NAME``, or a plain name (kind info).

        Raises
        ------
        ArgumentError, IdentityError
            A LoRA has no path, or its weights cannot be read.
        """
        kind, name = parse_owner(text)
        if kind != "lora":
            return cls(kind, name)
        name, equals, path = name.partition("=")
        if not equals:
            raise ArgumentError(f"{text}: give the path of the LoRA, as lora:NAME=PATH")
        return cls(kind, name, adapter_identity(path).digest)


def _prefixed(field: str) -> str:
    try:
        field.encode()
    except UnicodeEncodeError:                     # a lone surrogate: hexadecimal digits, and another mark
        field = field.encode(errors="surrogatepass").hex()
        return f"{len(field)}x{field}"
    return f"{len(field)}:{field}"


def parse_owner(text: str) -> tuple[str, str]:
    """Kind and name of an owner as a user writes it: ``KIND:NAME``, or a plain name of kind info."""
    kind, colon, name = text.partition(":")
    return (kind, name) if colon and kind in KINDS else ("info", text)


def namespace_entries(namespace: Iterable[str] | None) -> tuple[NamespaceEntry, ...]:
    """The entries of a namespace. A plain text becomes an entry of kind info."""
    return tuple(
        entry if isinstance(entry, NamespaceEntry) else NamespaceEntry("info", entry) for entry in namespace or ()
    )
