"""A progress bar for those who watch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Of ``tqdm``, what is used here."""

    def update(self, count: int, /) -> object:
        """So many more are done; this may draw the bar."""

    def clear(self) -> None:
        """Something else is to be written to the terminal; the bar comes back with an update."""


class _NoBar:
    def update(self, count: int, /) -> None:
        pass

    def clear(self) -> None:
        pass


@contextmanager
def progress(total: int, what: str) -> Iterator[Bar]:
    """A bar of so many requests, if stderr is a terminal and tqdm is installed; else one that does nothing."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc=what, unit=" requests", leave=False) as bar:
                yield bar
            return
    yield _NoBar()
