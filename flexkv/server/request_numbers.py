"""The numbers of a session's requests, which are the ids of its tasks."""

from typing import Self

from flexkv.errors import RegistrationError

TASK_BITS = 32
"""Bits of a request's number within its session; the bits above them are the number of the session."""

_MAX_LATE = 4096
"""Numbers that may still come after a larger one."""


class RequestNumbers:
    """Accepts each number of a session once, and gives it to the next task. Not thread safe.

    Threads of an engine may send requests in another order than that of their numbers. A number of another
    session would be the id of a task there.

    Parameters
    ----------
    first : int
        The session's numbers are larger, and equal to it in the bits above ``TASK_BITS``.
    """

    def __init__(self, first: int) -> None:
        self._first = self._largest = first
        self._late: dict[int, None] = {}             # smaller than the largest, and not used
        self._number = first

    def take(self, number: int) -> None:
        """Give the next task this id; RegistrationError if it was used before, or is not the session's."""
        if number >> TASK_BITS != self._first >> TASK_BITS:
            raise RegistrationError(f"it has used the number {number}, which is not one of its session")
        if number > self._largest:
            self._late.update(dict.fromkeys(range(max(self._largest + 1, number - _MAX_LATE), number)))
            while len(self._late) > _MAX_LATE:
                del self._late[next(iter(self._late))]
            self._largest = number
        elif number in self._late:
            del self._late[number]
        else:
            raise RegistrationError(f"it has used the number {number} of a request twice")
        self._number = number

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        return self._number
