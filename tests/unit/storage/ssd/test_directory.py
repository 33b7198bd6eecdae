"""Directories of the SSD tier: their size, the conversion of old ones, and exclusive use."""

import errno
import logging
import os
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexkv._core.io.io_queue import IoQueue
from flexkv.errors import CapacityError, DirectoryInUseError, StorageError
from flexkv.storage.ssd import data_file
from flexkv.storage.ssd.directory import slots_that_fit, total_bytes
from tests.support.faulty_files import FaultyFiles
from tests.support.ssd_store import SLOT_BYTES, Tier, opened


def size_of(*directories: Path) -> int:
    return sum(path.stat().st_size for directory in directories for path in directory.iterdir())


# ---- capacity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_bytes", [4096, 8192, 1 << 20])
def test_capacity_is_kept_to_the_byte(tmp_path: Path, slot_bytes: int) -> None:
    for capacity in (total_bytes(1, slot_bytes), total_bytes(7, slot_bytes), total_bytes(8, slot_bytes) - 1, 3 << 20):
        directory = tmp_path / str(capacity)
        with opened([directory], num_slots=slots_that_fit(capacity, slot_bytes), slot_bytes=slot_bytes) as tier:
            assert tier.write(range(min(64, tier.store.num_slots))).all()
            tier.store.clear()
            blocks = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
            assert size_of(directory) <= capacity
            assert blocks <= capacity
            assert capacity - total_bytes(tier.store.num_slots, slot_bytes) < slot_bytes + 4096
            data = (directory / "flexkv.data").stat()
            assert data.st_blocks * 512 >= data.st_size                         # really allocated


def test_slots_that_fit_is_exact() -> None:
    for slot_bytes in (4096, 12288):
        for capacity in range(0, 500_000, 1000):
            num = slots_that_fit(capacity, slot_bytes)
            assert total_bytes(num + 1, slot_bytes) > capacity
            assert num == 0 or total_bytes(num, slot_bytes) <= capacity


def test_a_capacity_of_less_than_a_slot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="ssd_cache_gb higher"):
        Tier([tmp_path / "a"], num_slots=0)


@pytest.mark.parametrize(("code", "old"), [
    (errno.ENOSPC, 0), (errno.EDQUOT, 0), (errno.EFBIG, 0), (errno.ENOSPC, 8)])
def test_a_full_disk_is_an_error_at_start_and_leaves_nothing_large(tmp_path: Path, code: int, old: int) -> None:
    directory = tmp_path / "a"
    if old:
        with opened([directory], num_slots=old) as tier:
            assert tier.write(range(old)).all()
    before = size_of(directory) if old else 0
    files = FaultyFiles()
    files.fault = lambda name, fd, offset, length: code if name == "allocate" and length > 100_000 else 0
    with pytest.raises(CapacityError, match=r"missing; set ssd_cache_gb lower"):
        Tier([directory], num_slots=100, files=files)
    assert size_of(directory) <= max(before, 200)
    if old:
        with opened([directory], num_slots=old) as tier:
            assert len(tier.recover()) == old


def test_other_errors_at_start_name_the_directory(tmp_path: Path) -> None:
    files = FaultyFiles()
    for failing in ("allocate", "write", "sync", "read"):
        files.fault = lambda name, *_: errno.EIO if name == failing else 0      # noqa: B023
        if failing == "read":
            continue
        with pytest.raises(StorageError, match=str(tmp_path)):
            Tier([tmp_path / "a"], files=files)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=rf"{wrong} .* a directory above it, is a file; set ssd_cache_dir"):
            Tier([wrong])
    with opened([tmp_path / "a"]):                                              # nothing has kept the lock
        pass


# ---- a directory that was made differently --------------------------------------------------------------------


def test_a_directory_grows_and_shrinks_and_keeps_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "a"
    with opened([directory], num_slots=8) as tier:
        assert tier.write(range(8), tier.allocate(8)).all()
    caplog.set_level(logging.INFO)
    with opened([directory], num_slots=50) as tier:
        assert "had 8 slots, and gets 50" in caplog.text
        found = tier.recover()
        assert len(found) == 8
        assert tier.read(list(found), list(found.values())).all()
        assert tier.write(range(100, 142)).all()
    with opened([directory], num_slots=5) as tier:
        found = tier.recover()
        assert sorted(found.values()) == list(range(5))
        assert tier.read(list(found), list(found.values())).all()
        assert size_of(directory) <= total_bytes(5, SLOT_BYTES)
    with opened([directory], num_slots=8) as tier:
        assert sorted(tier.recover().values()) == list(range(5))


def test_a_directory_with_other_slots_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "a"
    for slot_bytes in (4096, 8192, 4096):
        with opened([directory], slot_bytes=slot_bytes) as tier:
            assert tier.recover() == {}
            assert tier.write(range(16)).all()
    assert "its slots have 8192 bytes, and 4096 are needed" in caplog.text


@pytest.mark.parametrize("damage", ["no data", "no table", "header", "empty table"])
def test_a_directory_that_lost_something_is_made_anew(tmp_path: Path, damage: str) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(16)).all()
    data, table = tmp_path / "a" / "flexkv.data", tmp_path / "a" / "flexkv.table"
    if damage == "no data":
        data.unlink()
    elif damage == "no table":
        table.unlink()
    elif damage == "empty table":
        os.truncate(table, 0)
    else:
        with table.open("r+b") as file:
            file.write(b"something else")
    with opened([tmp_path / "a"]) as tier:
        assert tier.recover() == {}
        assert tier.write(range(16)).all()


def test_files_are_private_and_links_are_not_followed(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]):
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o600}
    (tmp_path / "b").mkdir()
    (tmp_path / "precious").write_text("not to be overwritten")
    (tmp_path / "b" / "flexkv.data").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError):
        Tier([tmp_path / "b"])
    assert (tmp_path / "precious").read_text() == "not to be overwritten"


# ---- one process a directory ----------------------------------------------------------------------------------


def test_a_second_process_is_told_who_has_the_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.support.ssd_store import Tier\n"
        "try: Tier([Path(sys.argv[1])])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with opened([tmp_path / "a"]):
        command = [sys.executable, "-c", code, str(tmp_path / "a")]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        assert told.stdout.startswith("DirectoryInUseError")
        assert f"process {os.getpid()} on {os.uname().nodename}" in told.stdout
        with pytest.raises(DirectoryInUseError, match=str(os.getpid())):
            Tier([tmp_path / "b", tmp_path / "a"])
        with opened([tmp_path / "b"]):                                          # was given back
            pass


def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    runs = os.eventfd(0)
    with opened([tmp_path / "a"]):
        child = os.fork()
        if child == 0:
            os.close(writes)
            os.eventfd_write(runs, 1)
            os.read(reads, 1)                                                   # until its parent is done
            os._exit(0)
        os.eventfd_read(runs)                                                   # the child has left its copies
        with pytest.raises(DirectoryInUseError):                                # the parent has it still
            Tier([tmp_path / "a"])
    with opened([tmp_path / "a"]):
        pass
    os.close(writes)
    os.waitpid(child, 0)
    os.close(reads)
    os.close(runs)


def test_a_full_disk_or_too_many_files_leave_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def too_many() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    for module, name, fault, error in ((os, "pwrite", full, StorageError), (select, "epoll", too_many, OSError)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(error, match=r"No space left on device; set ssd_cache_dir|Too many open files"):
                Tier([tmp_path / "a"], make_queue=IoQueue)
        with opened([tmp_path / "a"]):
            pass


def test_without_o_direct_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "offset_alignment", lambda fd: 65536)
    monkeypatch.setattr(data_file, "_DROP_BYTES", 5 * SLOT_BYTES)
    with opened([tmp_path / "a"], make_queue=IoQueue) as tier:
        assert "through the page cache: O_DIRECT there needs an alignment of 65536 bytes" in caplog.text
        slots = tier.allocate(16)
        assert tier.write(range(16), slots).all()
        assert tier.read(range(16), slots).all()
