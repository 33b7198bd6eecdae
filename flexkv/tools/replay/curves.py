"""Plot of hit rate over capacity."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flexkv.errors import FlexKVError
from flexkv.tools.replay.report import Line


class PlotError(FlexKVError, RuntimeError):
    """The plot cannot be drawn or written."""


def check_plot(path: Path) -> None:
    """Raise PlotError if it is foreseeable that a plot cannot be drawn or written to ``path``."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError(f"--plot needs matplotlib ({error}): pip install 'flexkv[replay]'") from error
    matplotlib.use("Agg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in ("", *known):
        raise PlotError(f"{path} cannot be written: its ending must be one of {', '.join(sorted(known))}")
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}") from error


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw a panel for each trace, with a curve for each policy and for the upper bounds.

    Raises
    ------
    PlotError
        The file cannot be written.
    """
    check_plot(path)
    from matplotlib import pyplot

    traces = list(dict.fromkeys(line.trace for line in lines))
    figure, panels = pyplot.subplots(
        1, len(traces), figsize=(7 * len(traces), 4.5), layout="constrained", squeeze=False
    )
    for axes, trace in zip(panels[0], traces, strict=True):
        of_trace = [line for line in lines if line.trace == trace]
        for policy in dict.fromkeys(line.policy for line in of_trace):
            curve = sorted((line.capacity_tokens, line.hit_rate) for line in of_trace if line.policy == policy)
            if policy == "unbounded":
                axes.axhline(curve[0][1], color="#888888", linestyle=":", label="unbounded")
                continue
            look = {"color": "black", "linestyle": "--"} if policy == "opt" else {"marker": "."}
            axes.plot(*zip(*curve, strict=True), label="OPT (clairvoyant)" if policy == "opt" else policy, **look)
        axes.set_xscale("log")
        axes.set(xlabel="capacity, tokens", ylabel="hit rate", title=trace, ylim=(0, None))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
