"""The folder of the demo's output. No file in it is overwritten, and only files of the demo are removed."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flexkv.errors import FlexKVError
from flexkv.tools.demo.ending_signals import EndingSignals


class OutputError(FlexKVError, OSError):
    """The output folder cannot be used."""


def new_file(folder: Path, name: str) -> Path:
    """Create an empty file with an unused name: ``chart.png``, else ``chart.1.png`` and so on.

    Raises
    ------
    OutputError
        The folder cannot be created, or is not writable.
    """
    path = folder / name
    for number in range(1, 1_000_000):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
        except FileExistsError as error:
            if not folder.is_dir():
                raise OutputError(f"{folder} is not a folder: choose another --output") from error
            path = folder / f"{Path(name).stem}.{number}{Path(name).suffix}"
        except OSError as error:
            raise OutputError(f"{path} cannot be made: {error.strerror}; choose another --output") from error
        else:
            return path
    raise OutputError(f"{folder} has a million files named {name}: choose another --output")


@contextlib.contextmanager
def scratch_folder(folder: Path, signals: EndingSignals) -> Iterator[Path]:
    """Create a folder ``flexkv-demo-XXXX`` in ``folder`` for KV on SSD, and remove it at the end.

    Raises
    ------
    OutputError
        The folder cannot be created.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="flexkv-demo-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error.strerror}; choose another --output") from error
    try:
        yield Path(made.name)
    finally:
        with signals.held():
            made.cleanup()
