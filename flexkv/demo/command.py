"""The demo as its user sees it: a progress bar, a table, a chart, and a last line for machines."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexkv.config import process_environment
from flexkv.demo.model import prepare_model
from flexkv.demo.session import EVENT
from flexkv.errors import FlexKVError

_KV_GIB_PER_TOKEN = 2 * 30 * 3 * 64 * 2 / (1 << 30)
"""Of SmolLM2-135M in bfloat16: K and V, 30 layers, 3 heads of 64."""

_ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the audit's counts are fetched by a function sent to the worker
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flexkv demo", description=__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="prompts to ask (default 8)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for chart and log")
    parser.add_argument("--model", type=Path, help="folder of a model to use instead of SmolLM2-135M")
    args = parser.parse_args(argv)
    if args.prompts < 1 or args.tokens < 64:
        parser.error("--prompts must be at least 1, --tokens at least 64")
    return args


def _bar(done: int, total: int, text: str) -> None:
    filled = 30 * done // total
    line = f"[{'█' * filled}{'░' * (30 - filled)}] {done}/{total} {text}"
    if sys.stdout.isatty():
        print(f"\r{line:<78}", end="\n" if done == total else "", flush=True)
    else:
        print(line, flush=True)


def _events(process: "subprocess.Popen[str]", log: Any) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None  # narrowing: it was asked for
    for line in process.stdout:
        if line.startswith(EVENT):
            yield json.loads(line.removeprefix(EVENT))
        else:
            log.write(line)


def _run(args: argparse.Namespace, model: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    answers: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    audit: dict[str, Any] = {}
    total = 2 * args.prompts
    log_path = args.output / "engine.log"
    command = [
        sys.executable, "-m", "flexkv.demo.session", "--model", str(model), "--prompts", str(args.prompts),
        "--tokens", str(args.tokens),
        "--cpu-cache-gb", f"{max(0.25, 1.5 * (args.prompts + 2) * args.tokens * _KV_GIB_PER_TOKEN):.2f}",
    ]
    _bar(0, total, "starting vLLM (about a minute)")
    with log_path.open("w") as log, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=process_environment(**_ENGINE_ENVIRONMENT)
    ) as process:
        for event in _events(process, log):
            kind = event.pop("event")
            if kind == "ready":
                _bar(0, total, "vLLM is ready")
            elif kind == "answer":
                answers[event["phase"]].append(event)
                done = len(answers["cold"]) + len(answers["warm"])
                _bar(done, total, f"{event['phase']}, first token after {event['ttft_ms']:.0f} ms")
            elif kind == "audit":
                audit = event
    if process.returncode != 0 or not audit:
        raise FlexKVError(f"the engine ended with status {process.returncode}; its log is {log_path}")
    return answers, audit


def _table(answers: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{'prompt':>6}  {'TTFT cold ms':>12}  {'TTFT warm ms':>12}  {'tokens from FlexKV':>18}  same answer")
    for i, (cold, warm) in enumerate(zip(answers["cold"], answers["warm"], strict=True)):
        same = "yes" if cold["tokens"] == warm["tokens"] else "NO"
        print(f"{i + 1:>6}  {cold['ttft_ms']:>12.0f}  {warm['ttft_ms']:>12.0f}  {warm['cached']:>18}  {same}")


def _chart(answers: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    positions = range(1, len(answers["cold"]) + 1)
    for phase, shift, color in (("cold", -0.2, "#b0b7c3"), ("warm", 0.2, "#2f7ed8")):
        heights = [answer["ttft_ms"] for answer in answers[phase]]
        label = "cold: computed" if phase == "cold" else "warm: loaded by FlexKV"
        bars = axes.bar([position + shift for position in positions], heights, 0.4, color=color, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(xlabel="prompt", ylabel="time to first token, ms", title="The same prompts, computed and loaded")
    axes.set_xticks(list(positions))
    axes.legend()
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> int:
    """Run the demo; returns 0 if every answer was the same and every byte right."""
    args = _parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    model = args.model or prepare_model(Path.home() / ".cache" / "flexkv" / "smollm2-135m")
    answers, audit = _run(args, model)
    _table(answers)
    chart = args.output / "demo.png"
    _chart(answers, chart)
    print(f"\nchart: {chart}")
    cold, warm = (statistics.median(answer["ttft_ms"] for answer in answers[phase]) for phase in ("cold", "warm"))
    same = all(a["tokens"] == b["tokens"] for a, b in zip(answers["cold"], answers["warm"], strict=True))
    result = {
        "prompts": args.prompts,
        "tokens": args.prompts * args.tokens,
        "ttft_cold_ms_p50": round(cold, 1),
        "ttft_warm_ms_p50": round(warm, 1),
        "speedup": round(cold / warm, 1),
        "same_outputs": same,
        "hit_tokens": sum(answer["cached"] for answer in answers["warm"]),
        "wrong_bytes": audit["wrong_bytes"],
    }
    unchecked = audit["checked_blocks"] == 0 or audit["unknown_blocks"] > 0
    print(f"RESULT {json.dumps(result)}")
    return 0 if same and audit["wrong_bytes"] == 0 and not unchecked else 1
