"""A progress bar for those who watch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A function that is told how many more are done. Shows a bar if stderr is a terminal and tqdm is installed."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc=what, unit=" requests", leave=False) as bar:
                yield bar.update
            return
    yield lambda count: None
