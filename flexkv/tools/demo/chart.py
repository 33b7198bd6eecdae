"""The demo's chart: time to the first token of each prompt in each phase."""

import importlib.util
from pathlib import Path
from typing import Any

PHASES = ("cold", "warm", "restarted")

Answers = dict[str, list[dict[str, Any]]]
"""Answers to the prompts in each phase, as the session reports them."""

_LOOKS = {
    "cold": ("cold: computed", "#b0b7c3"), "warm": ("warm: loaded from memory", "#2f7ed8"),
    "restarted": ("restarted: loaded from SSD by a new process", "#7cb342"),
}
_NOT_LOADED = "computed again: nothing was loaded"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(answers: Answers, path: Path) -> None:
    """Draw the chart. A hatched bar marks a repeated prompt for which no KV was loaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    positions = range(1, len(answers["cold"]) + 1)
    for number, (phase, (label, color)) in enumerate(_LOOKS.items()):
        places = [position + 0.28 * (number - 1) for position in positions]
        bars = axes.bar(places, [answer["ttft_ms"] for answer in answers[phase]], 0.28, color=color, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        for bar, answer in zip(bars, answers[phase], strict=True):
            if phase != "cold" and not answer["cached"]:
                bar.set(hatch="////", facecolor="white", edgecolor=color)
    axes.set(xlabel="prompt", ylabel="time to first token, ms", title="The same prompts, computed and loaded")
    axes.set_xticks(list(positions))
    axes.margins(y=0.1)
    handles, labels = axes.get_legend_handles_labels()
    if any(not answer["cached"] for phase in PHASES[1:] for answer in answers[phase]):
        handles.append(Patch(facecolor="white", edgecolor="#444444", hatch="////"))
        labels.append(_NOT_LOADED)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
