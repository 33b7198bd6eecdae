"""FlexKV's log inside vLLM: with vLLM's own configuration, and with those that an application makes."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flexkv.integration.vllm.log import follow_vllm_log

OURS, THEIRS, ROOT = logging.getLogger("flexkv"), logging.getLogger("vllm"), logging.getLogger()


@contextmanager
def vllm_logging(**settings: Any) -> Iterator[None]:
    """Logging as vLLM configures it in each of its processes; the test's own comes back afterwards."""
    logger = pytest.importorskip("vllm.logger")
    from vllm.config.logging import LoggingConfig

    factory = logging.getLogRecordFactory()
    before = [(log, log.handlers[:], log.level, log.propagate) for log in (OURS, THEIRS, ROOT)]
    try:
        for log, *_ in before:
            log.handlers[:] = []
        THEIRS.setLevel(logging.NOTSET)
        logger.configure_logging(LoggingConfig(**settings))
        yield
    finally:
        for log, handlers, level, propagate in before:
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)
        logging.setLogRecordFactory(factory)


def speak() -> None:
    log = logging.getLogger("flexkv.controller")
    log.debug("a detail")
    log.info("SSD tier: %d slots", 7)
    log.warning("line one\nline two")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "Triton" not in line]


def test_lines_have_time_process_and_name_in_vllms_format(capsys: pytest.CaptureFixture[str]) -> None:
    with vllm_logging():
        capsys.readouterr()
        follow_vllm_log("INFO")
        follow_vllm_log("INFO")                                # of a second connector in the process
        speak()
        said = lines(capsys)
        assert len(said) == 3
        process = r"\(\w+ pid=\d+\) "
        time = r"\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(process + rf"INFO {time} \[flexkv\.controller:\d+\] SSD tier: 7 slots", said[0])
        assert re.fullmatch(process + r"WARNING .* \[flexkv\.controller:\d+\] line one", said[1])
        assert re.fullmatch(process + r"WARNING .* \[flexkv\.controller:\d+\] line two", said[2])
        logging.getLogger("vllm.engine").info("hello")
        assert re.fullmatch(process + r"INFO .* \[test_log\.py:\d+\] hello", lines(capsys)[0])       # as before


@pytest.mark.parametrize(
    ("log_level", "vllm_level", "count"),
    [("INFO", "INFO", 3), ("INFO", "WARNING", 2), ("INFO", "ERROR", 0), ("INFO", "DEBUG", 3), ("DEBUG", "INFO", 4),
     ("DEBUG", "ERROR", 4), ("WARNING", "INFO", 2), ("ERROR", "DEBUG", 0)],
)
def test_the_setting_counts_and_its_default_follows_vllm(
    capsys: pytest.CaptureFixture[str], log_level: str, vllm_level: str, count: int
) -> None:
    with vllm_logging(log_level=vllm_level):
        capsys.readouterr()
        follow_vllm_log(log_level)
        speak()
        assert len(lines(capsys)) == count


@pytest.mark.parametrize("logger", [OURS, ROOT])
def test_an_application_that_has_configured_logging_gets_each_line_once(
    capsys: pytest.CaptureFixture[str], logger: logging.Logger
) -> None:
    with vllm_logging():
        capsys.readouterr()
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("app %(message)s"))
        logger.addHandler(handler)
        follow_vllm_log("INFO")
        speak()
        assert lines(capsys) == ["app SSD tier: 7 slots", "app line one", "line two"]


def test_another_format_than_vllms_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    class Json(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return json.dumps([record.name, record.getMessage()])

    with vllm_logging():
        capsys.readouterr()
        THEIRS.handlers[0].setFormatter(Json())
        follow_vllm_log("INFO")
        speak()
        assert lines(capsys)[0] == '["flexkv.controller", "SSD tier: 7 slots"]'


def test_without_vllms_configuration_no_handler_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    with vllm_logging(configure_logging=False):
        follow_vllm_log("INFO")
        logging.getLogger("flexkv.controller").info("SSD tier")
        assert OURS.handlers == []
        assert capsys.readouterr() == ("", "")
