"""Entries of namespaces: no two of them are the same text, and quotas belong to a kind and a name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv._core.index.block_keys import chain_seed
from flexkv.cache.quotas import Quotas
from flexkv.config.namespace_entry import KINDS, NamespaceEntry, namespace_entries, parse_owner
from flexkv.config.namespaces import Quota, read_quotas
from flexkv.errors import ArgumentError, ConfigError, IdentityError

FIELDS = st.text(alphabet=st.one_of(st.sampled_from(":0123456789xsaltinfo\x00/"), st.characters()), max_size=12)
Fields = tuple[str, str, str]
ENTRIES = st.tuples(st.sampled_from(KINDS), FIELDS, FIELDS)


@given(st.lists(ENTRIES, max_size=3), st.lists(ENTRIES, max_size=3))
def test_namespaces_are_equal_only_if_all_fields_are(first: list[Fields], second: list[Fields]) -> None:
    seeds = [chain_seed(b"domain", tuple(NamespaceEntry(*entry) for entry in entries)) for entries in (first, second)]
    assert (seeds[0] == seeds[1]) == (first == second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([NamespaceEntry("salt", "x")], ["salt", "x"]),
        ([NamespaceEntry("salt", "x")], [NamespaceEntry("salt", "x")[:]]),
        ([NamespaceEntry("lora", "sql", "1f")], ["lora", "sql", "1f"]),
        ([NamespaceEntry("lora", "sql"), NamespaceEntry("salt", "t")], [NamespaceEntry("lora", "sql"), "salt", "t"]),
        ([NamespaceEntry("salt", "acme")], [NamespaceEntry("info", "acme")]),
        ([NamespaceEntry("lora", "a", "b")], [NamespaceEntry("lora", "ab")]),
        ([NamespaceEntry("info", "\ud800")], [NamespaceEntry("info", "eda080")]),
        ([NamespaceEntry("info", "\ud800")], [NamespaceEntry("info", "6xeda080")]),
    ],
)
def test_a_name_that_a_client_chooses_equals_no_other_entry(first: list[str], second: list[str]) -> None:
    assert chain_seed(b"d", namespace_entries(first)) != chain_seed(b"d", namespace_entries(second))


def test_quotas_belong_to_a_kind_and_a_name() -> None:
    names = ["acme", "salt:gold", "lora:sql", "info:salt:x", "a:b"]
    quotas = Quotas({name: Quota() for name in names})
    assert quotas.names() == ["", *names]
    for namespace, tenant in (
        (["acme"], 1), ([NamespaceEntry("info", "acme")], 1), ([NamespaceEntry("salt", "acme")], 0),
        ([NamespaceEntry("lora", "acme", "1f")], 0), ([NamespaceEntry("salt", "gold")], 2), (["gold"], 0),
        (["salt:gold"], 0), ([NamespaceEntry("lora", "sql", "1f")], 3), ([NamespaceEntry("lora", "sql", "2e")], 3),
        ([NamespaceEntry("salt", "x")], 0), (["salt:x"], 4), (["a:b"], 5),
        ([NamespaceEntry("lora", "other"), NamespaceEntry("salt", "gold"), "acme"], 2), (None, 0), ([], 0),
    ):
        assert quotas.tenant(namespace) == tenant, namespace


def test_one_owner_has_one_quota() -> None:
    assert set(read_quotas({"salt:a": {}, "a": {}, "lora:a": {}})) == {"salt:a", "a", "lora:a"}
    with pytest.raises(ConfigError, match="the same as 'a'"):
        read_quotas({"a": {}, "info:a": {}})


def test_as_a_user_writes_them(tmp_path: Path) -> None:
    assert parse_owner("gold") == ("info", "gold")
    assert parse_owner("team:blue") == ("info", "team:blue")
    assert NamespaceEntry.parse("salt:a=b") == NamespaceEntry("salt", "a=b")
    (tmp_path / "adapter_model.bin").write_bytes(b"weights")
    entry = NamespaceEntry.parse(f"lora:sql={tmp_path}")
    assert entry.owner == ("lora", "sql")
    assert entry.version
    with pytest.raises(ArgumentError, match="lora:NAME=PATH"):
        NamespaceEntry.parse("lora:sql")
    with pytest.raises(IdentityError):
        NamespaceEntry.parse(f"lora:sql={tmp_path}/missing")


def test_wrong_entries_are_errors() -> None:
    with pytest.raises(ArgumentError, match="one of info, salt, lora"):
        NamespaceEntry("tenant", "a")
    with pytest.raises(ArgumentError, match="give text"):
        NamespaceEntry("salt", 7)                           # type: ignore[arg-type]
