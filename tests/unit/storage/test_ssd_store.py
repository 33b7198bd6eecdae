"""The SSD store over a twin of the queue, and over the real one: blocks, slots, restarts, and who may use a directory."""

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.cli import main
from flexkv._core.io_queue import IoQueue
from flexkv.errors import CapacityError, DirectoryInUseError, StorageError
from flexkv.storage import ssd_store
from flexkv.storage.ssd_directory import slots_that_fit, total_bytes
from tests.faulty_files import FaultyFiles, ThreadQueue
from tests.tier import SLOT_BYTES, Tier, keys_of

QUEUES = {
    "twin": ThreadQueue, "uring": partial(IoQueue, method="auto"), "threads": partial(IoQueue, method="threads"),
}


@pytest.fixture(params=list(QUEUES))
def queue(request: pytest.FixtureRequest) -> Any:
    return QUEUES[request.param]


@contextmanager
def opened(*args: Any, **options: Any) -> Iterator[Tier]:
    tier = Tier(*args, **options)
    try:
        yield tier
        tier.store.slots.check_integrity()
    finally:
        tier.close()


def size_of(*directories: Path) -> int:
    return sum(path.stat().st_size for directory in directories for path in directory.iterdir())


# ---- blocks ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_there_after_a_restart(tmp_path: Path, queue: Any) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    with opened(directories, make_queue=queue) as tier:
        assert tier.recover() == {}
        slots = tier.allocate(10)
        assert tier.write(range(10), slots).all()
        assert tier.read(range(10), slots).all()
        assert tier.read([3, 99, 5], slots[[3, 4, 5]]).tolist() == [True, False, True]
        stats = tier.store.stats()
        assert (stats["blocks_written"], stats["blocks_read"], stats["key_mismatches"]) == (10, 12, 1)
        assert stats["queued_bytes"] == 0
    with opened(directories, make_queue=queue) as tier:
        found = tier.store.recover()
        assert found.keys.tolist() == keys_of(range(10)).tolist()             # in the order they were written
        assert [path.tolist() for path in found.paths()] == [list(range(10))]
        assert len(found.cut_off) == 0
        assert tier.store.slots.num_free == 32 - 10
        assert tier.read(range(10), found.slots).all()


def test_a_slot_that_is_rewritten_holds_the_new_block_only(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a"], make_queue=queue) as tier:
        slots = tier.allocate(1)
        for number in range(5):
            assert tier.write([number], slots).all()
        assert not tier.read([3], slots).any()
        assert tier.read([4], slots).all()
    with opened([tmp_path / "a"], make_queue=queue) as tier:
        assert tier.recover() == {4: int(slots[0])}


def test_of_two_records_of_a_key_the_newest_counts(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        first, second, third = tier.allocate(3)
        for slot in (second, third, first):
            assert tier.write([7], np.array([slot])).all()
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.recover() == {7: int(first)}
        assert tier.store.slots.num_free == 31


def test_blocks_of_other_domains_are_not_offered_and_their_slots_are_free(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(4)).all()
    with opened([tmp_path / "a"], domain=b"another model") as tier:
        assert tier.recover() == {}
        assert tier.store.slots.num_free == 16
        assert tier.write([50]).all()
    with opened([tmp_path / "a"]) as tier:
        assert sorted(tier.recover()) == [1, 2, 3]


def test_clear_forgets_everything_also_after_a_restart(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        slots = tier.allocate(20)
        assert tier.write(range(20), slots).all()
        tier.store.clear()
        assert not tier.read(range(20), slots).any()
        assert tier.write([33], slots[:1]).all()
        assert tier.read([33], slots[:1]).all()
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        assert tier.recover() == {33: int(slots[0])}


def test_a_directory_that_was_not_there_when_all_was_cleared_holds_nothing_either(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.write(range(32)).all()
    with opened([tmp_path / "a"]) as tier:
        tier.store.clear()
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.recover() == {}


def test_what_is_cleared_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    for after in range(8):
        with opened([tmp_path / str(after)]) as tier:
            slots = tier.allocate(8)
            job = tier.start_write(range(8), slots)
            for _ in range(after):
                tier.take()
            tier.store.clear()
            tier.wait(job, 8)
            assert not tier.read(range(8), slots).any()
        with opened([tmp_path / str(after)]) as tier:
            assert tier.recover() == {}


def test_cancelled_jobs_end_and_each_block_has_one_result(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        slots = tier.allocate(16)
        tier.store.cancel(12345)
        for round_number in range(30):
            job = tier.start_write(range(16), slots)
            if round_number % 2:
                tier.take()
            tier.store.cancel(job)
            ok = tier.wait(job, 16)
            assert tier.read(range(16), slots).tolist() == ok.tolist()
            job = tier.start_read(range(16), slots)
            tier.store.cancel(job)
            tier.wait(job, 16)
        assert tier.store.stats()["read_errors"] == tier.store.stats()["write_errors"] == 0
        assert tier.store.usable()


def test_arguments_are_checked(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]) as tier:
        one = np.array([0], dtype=np.int32)
        for slots, host in ((one + 16, one), (one - 1, one), (one, one + 64), (one, one - 1), (one, one[:0])):
            with pytest.raises(ValueError):
                tier.store.read(1, slots, host, keys_of([1]))
        with pytest.raises(ValueError, match="twice"):
            tier.store.write(1, np.array([3, 3], np.int32), np.array([0, 1], np.int32), keys_of([1, 2]), keys_of([-1, 1]))
        assert not tier.write([-1]).any()                                       # zeros are no key
        assert tier.write([]).tolist() == []
    for wrong in (0, 4095, 6000):
        with pytest.raises(ValueError, match="4096"):
            ssd_store.SsdStore([tmp_path / "a"], 1 << 20, wrong, b"", bytearray(4096))
    with pytest.raises(CapacityError):
        ssd_store.SsdStore([], 1 << 20, 4096, b"", bytearray(4096))


def test_after_close_nothing_is_done_and_everything_is_told(tmp_path: Path, queue: Any) -> None:
    tier = Tier([tmp_path / "a"], make_queue=queue)
    slots = tier.allocate(16)
    job = tier.start_write(range(16), slots)
    tier.close()
    told = [(number, index, good) for number, indices, ok in tier.store.results()
            for index, good in zip(indices.tolist(), ok.tolist(), strict=True)]
    assert sorted(index for _, index, _ in told) == list(range(16))
    tier.store.write(job + 1, slots, slots, keys_of(range(16)), keys_of(range(16)))
    tier.store.read(job + 2, slots, slots, keys_of(range(16)))
    assert [(number, len(indices), ok.any()) for number, indices, ok in tier.store.results()] == [
        (job + 1, 16, False), (job + 2, 16, False)]
    assert not tier.store.usable()
    tier.close()
    with opened([tmp_path / "a"]) as again:
        good = {index for _, index, ok in told if ok}
        found = again.recover()
        assert set(found) >= good
        assert again.read(sorted(found), [found[number] for number in sorted(found)]).all()


# ---- slots ----------------------------------------------------------------------------------------------------


def test_slots_are_spread_over_directories_in_runs(tmp_path: Path) -> None:
    with opened([tmp_path / name for name in "abc"], num_slots=20, slot_bytes=1 << 20) as tier:
        slots = tier.allocate(24)                                               # 8 MiB at a time
        assert sorted(np.bincount(slots // 20)) == [8, 8, 8]
        assert (np.diff(slots) == 1).sum() == 21


def test_the_directory_with_the_least_to_do_gives_slots(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        first, second = tier.store._directories
        first.begin(1 << 20)
        assert (tier.allocate(4) // 16 == 1).all()
        second.begin(4 << 20)
        assert (tier.allocate(4) // 16 == 0).all()
        second._moved_bytes = 1e12                                              # so much faster
        assert (tier.allocate(4) // 16 == 1).all()
        first.end(1 << 20, 0)
        second.end(4 << 20, 0)


def test_all_slots_can_be_had_and_no_more(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        slots = tier.allocate(32)
        assert sorted(slots.tolist()) == list(range(32))
        assert tier.store.slots.allocate(1) is None
        assert tier.write(range(32), slots).all()
        assert tier.read(range(32), slots).all()


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
    with pytest.raises(StorageError, match="file"):
        Tier([tmp_path / "file"])
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


def test_a_directory_with_other_slots_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "a"
    for slot_bytes in (4096, 8192, 4096):
        with opened([directory], slot_bytes=slot_bytes) as tier:
            assert tier.recover() == {}
            assert tier.write(range(16)).all()
    assert "its slots have 8192 bytes, and 4096 are wanted" in caplog.text


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
        "import sys; from pathlib import Path; from tests.tier import Tier\n"
        "try: Tier([Path(sys.argv[1])])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with opened([tmp_path / "a"]):
        told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
        assert told.stdout.startswith("DirectoryInUseError")
        assert f"process {os.getpid()} on {os.uname().nodename}" in told.stdout
        with pytest.raises(DirectoryInUseError, match=str(os.getpid())):
            Tier([tmp_path / "b", tmp_path / "a"])
        with opened([tmp_path / "b"]):                                          # was given back
            pass


def test_without_o_direct_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from flexkv.storage import data_file

    monkeypatch.setattr(data_file, "offset_alignment", lambda fd: 65536)
    monkeypatch.setattr(data_file, "_DROP_BYTES", 5 * SLOT_BYTES)
    with opened([tmp_path / "a"], make_queue=IoQueue) as tier:
        assert "through the page cache: O_DIRECT there needs an alignment of 65536 bytes" in caplog.text
        slots = tier.allocate(16)
        assert tier.write(range(16), slots).all()
        assert tier.read(range(16), slots).all()


# ---- flexkv inspect -------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(5)).all()
        assert main(["inspect", "--json", str(tmp_path / "a")]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["used_by"].startswith(f"process {os.getpid()} ")
        assert (told["num_slots"], told["slot_bytes"], told["closed_cleanly"]) == (16, SLOT_BYTES, False)
        assert told["slots"] == {"used": 5, "void": 0, "broken": 0, "empty": 11}
        assert list(told["domains"].values()) == [5]
        tier.store.clear()
    assert main(["inspect", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "16 slots of 4096 bytes: 0" not in text
    assert "5 void, 11 empty" in text
    assert "not in use; closed cleanly; last cleared: 20" in text
    assert main(["inspect", str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err
