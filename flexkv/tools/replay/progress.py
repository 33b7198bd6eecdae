"""A progress bar on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """The part of ``tqdm`` that replay uses."""

    def update(self, count: int, /) -> object:
        """Add ``count`` to the requests that are done; may draw the bar."""

    def clear(self) -> None:
        """Remove the bar from the terminal, so that other output can be written; ``update`` draws it again."""


class _NoBar:
    def update(self, count: int, /) -> None:
        pass

    def clear(self) -> None:
        pass


@contextmanager
def progress(total: int, label: str) -> Iterator[Bar]:
    """A bar for ``total`` requests with the label ``label``, if stderr is a terminal and tqdm is installed; else an
    object that draws no bar."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc=label, unit=" requests", leave=False) as bar:
                yield bar
            return
    yield _NoBar()
