"""The lines that the log has about requests."""

import logging
import math
import time
from collections.abc import Iterator

import pytest

from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import MissReason
from flexkv.controller.response import KVResponse, KVResponseStatus
from flexkv.integration.vllm.request_log import RequestLog


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.DEBUG, "flexkv")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("flexkv").addHandler(handler)
    yield lines
    logging.getLogger("flexkv").removeHandler(handler)


def log(every: int = 0) -> RequestLog:
    return RequestLog(every, 4, lambda: {"hit_blocks": 7, "tasks": 0})


def test_a_request_that_loads(told: list[str]) -> None:
    requests = log()
    requests.matched("r1", 13, 2, MatchResult(7, MissReason.EVICTED, 3, time.monotonic() - 42.0))
    requests.loading("r1", 5, 20)
    requests.tasks_ended([KVResponse(KVResponseStatus.SUCCESS, 4), KVResponse(KVResponseStatus.SUCCESS, 5)])
    requests.request_ended("r1", 53)
    assert told == [
        "DEBUG request r1: 13 blocks wanted, 2 in vLLM's cache, 5 found (3 on SSD), 5 loaded; block 7: evicted 42 s ago"
    ]


@pytest.mark.parametrize(
    ("match", "end"),
    [
        (MatchResult(13, MissReason.FULL_HIT), "13 found, 0 loaded"),
        (MatchResult(0, MissReason.NEVER_SEEN), "0 found, 0 loaded; block 0: never_seen"),
        (MatchResult(3, MissReason.NOT_READY, evicted_at=1.0), "3 found, 0 loaded; block 3: not_ready"),
        (MatchResult(3, MissReason.EXPIRED, evicted_at=math.nan), "3 found, 0 loaded; block 3: expired"),
    ],
)
def test_a_request_that_loads_nothing_says_why(told: list[str], match: MatchResult, end: str) -> None:
    requests = log()
    requests.matched("r1", 13, 0, match)
    requests.request_ended("r1", 53)
    assert told[0].endswith(end)


def test_a_load_that_fails(told: list[str]) -> None:
    requests = log()
    requests.matched("r1", 2, 0, MatchResult(2, MissReason.FULL_HIT))
    requests.loading("r1", 5, 8)
    requests.tasks_ended([KVResponse(KVResponseStatus.TIMEOUT, 5)])
    requests.request_ended("r1", 9)
    assert told[0].endswith("2 found, 0 loaded, load failed")


def test_a_line_comes_every_so_many_requests(told: list[str]) -> None:
    logging.getLogger("flexkv").setLevel(logging.INFO)
    requests = log(every=2)
    for i in range(5):
        requests.matched(f"r{i}", 2, 0, MatchResult(2, MissReason.FULL_HIT))
        requests.loading(f"r{i}", i, 8)
        requests.request_ended(f"r{i}", 10)
    assert told == [
        "INFO 2 requests, 20 prompt tokens, 16 loaded; {'hit_blocks': 7}",
        "INFO 4 requests, 40 prompt tokens, 32 loaded; {'hit_blocks': 7}",
    ]
    assert not requests._blocks                                  # nothing is kept where no line needs it
    assert not requests._loads


def test_a_request_of_which_nothing_was_asked(told: list[str]) -> None:
    log().request_ended("r1", 5)
    assert told == []
