"""Numbers of a session's requests: each is used once, in about any order, and none is another session's."""

import pytest

from flexkv.errors import RegistrationError
from flexkv.server.request_numbers import TASK_BITS, RequestNumbers

FIRST = 7 << TASK_BITS


def test_numbers_may_come_in_another_order() -> None:
    numbers = RequestNumbers(FIRST)
    for number in (3, 1, 2, 9, 4):
        numbers.take(FIRST + number)
        assert next(numbers) == FIRST + number
    for number in (1, 3, 9, 0):
        with pytest.raises(RegistrationError, match="twice"):
            numbers.take(FIRST + number)


@pytest.mark.parametrize("number", [0, FIRST - 1, FIRST + (1 << TASK_BITS), (1 << 64) - 1])
def test_numbers_of_other_sessions_are_refused(number: int) -> None:
    with pytest.raises(RegistrationError, match="not one of its session"):
        RequestNumbers(FIRST).take(number)


def test_few_numbers_are_remembered() -> None:
    numbers = RequestNumbers(FIRST)
    numbers.take(FIRST + (1 << 31))
    numbers.take(FIRST + (1 << 31) - 4096)
    with pytest.raises(RegistrationError, match="twice"):
        numbers.take(FIRST + 1)
