"""The demo as its user sees it: a progress bar, a table, a chart, and a last line for machines."""

import argparse
import json
import shutil
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

PHASES = ("cold", "warm", "restarted")

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
    parser.add_argument("--host-prompts", type=int, help="host memory holds so many, SSD all (default: both all)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for chart and log")
    parser.add_argument("--model", type=Path, help="folder of a model to use instead of SmolLM2-135M")
    args = parser.parse_args(argv)
    if args.prompts < 1 or args.tokens < 64 or (args.host_prompts is not None and args.host_prompts < 1):
        parser.error("--prompts and --host-prompts must be at least 1, --tokens at least 64")
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


Answers = dict[str, list[dict[str, Any]]]


class _Engine:
    """Runs of the demo's engine, one after the other, over the same SSD."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        all_gb = max(0.25, 1.5 * (args.prompts + 2) * args.tokens * _KV_GIB_PER_TOKEN)
        host_gb = args.host_prompts * args.tokens * _KV_GIB_PER_TOKEN if args.host_prompts else all_gb
        self._ssd = args.output / "ssd"
        self._log = args.output / "engine.log"
        self._settings = {
            "cpu_cache_gb": round(host_gb, 3), "ssd_cache_gb": round(2 * all_gb, 2), "ssd_cache_dir": str(self._ssd),
            "ssd_admission": "all", "audit_path": str(self._ssd / "audit"),
        }
        self._command = [
            sys.executable, "-m", "flexkv.demo.session", "--model", str(model), "--prompts", str(args.prompts),
            "--tokens", str(args.tokens), "--settings", json.dumps(self._settings), "--phases",
        ]
        self._total = len(PHASES) * args.prompts
        self.answers: Answers = {phase: [] for phase in PHASES}
        self.audits: list[dict[str, Any]] = []

    def __enter__(self) -> "_Engine":
        shutil.rmtree(self._ssd, ignore_errors=True)
        self._log.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._ssd, ignore_errors=True)

    def _progress(self, text: str) -> None:
        _bar(sum(map(len, self.answers.values())), self._total, text)

    def run(self, *phases: str) -> None:
        """Start vLLM and FlexKV, ask every prompt in each phase, and stop them.

        Raises
        ------
        FlexKVError
            The engine did not end well.
        """
        self._progress("starting vLLM (about a minute)")
        audits = len(self.audits)
        with self._log.open("a") as log, subprocess.Popen(
            [*self._command, *phases], stdout=subprocess.PIPE, stderr=log, text=True,
            env=process_environment(**_ENGINE_ENVIRONMENT),
        ) as process:
            for event in _events(process, log):
                kind = event.pop("event")
                if kind == "ready":
                    self._progress("vLLM is ready")
                elif kind == "answer":
                    self.answers[event["phase"]].append(event)
                    self._progress(f"{event['phase']}, first token after {event['ttft_ms']:.0f} ms")
                elif kind == "audit":
                    self.audits.append(event)
        if process.returncode != 0 or len(self.audits) == audits:
            raise FlexKVError(f"the engine ended with status {process.returncode}; its log is {self._log}")


def _same(answers: Answers, prompt: int) -> bool:
    """Whether the prompt had the same answer in every phase."""
    return len({tuple(answers[phase][prompt]["tokens"]) for phase in PHASES}) == 1


def _median_ms(answers: Answers, phase: str) -> float:
    return round(float(statistics.median(answer["ttft_ms"] for answer in answers[phase])), 1)


def _table(answers: Answers) -> None:
    print(f"\n{'':>6}  {'time to first token, ms':^32}  {'tokens from FlexKV':^20}")
    print(f"{'prompt':>6}  {'cold':>10}{'warm':>10}{'restarted':>12}  {'memory':>10}{'SSD':>10}  same answer")
    for i, (cold, warm, restarted) in enumerate(zip(*(answers[phase] for phase in PHASES), strict=True)):
        times = f"{cold['ttft_ms']:>10.0f}{warm['ttft_ms']:>10.0f}{restarted['ttft_ms']:>12.0f}"
        same = "yes" if _same(answers, i) else "NO"
        print(f"{i + 1:>6}  {times}  {warm['cached']:>10}{restarted['cached']:>10}  {same}")


def _chart(answers: Answers, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    positions = range(1, len(answers["cold"]) + 1)
    looks = {"cold": ("computed", "#b0b7c3"), "warm": ("loaded from memory", "#2f7ed8"),
             "restarted": ("loaded from SSD by a new process", "#7cb342")}
    for number, (phase, (what, color)) in enumerate(looks.items()):
        heights = [answer["ttft_ms"] for answer in answers[phase]]
        places = [position + 0.28 * (number - 1) for position in positions]
        bars = axes.bar(places, heights, 0.28, color=color, label=f"{phase}: {what}")
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
    with _Engine(args, model) as engine:
        engine.run("cold", "warm")
        engine.run("restarted")
    answers = engine.answers
    _table(answers)
    chart = args.output / "demo.png"
    _chart(answers, chart)
    print(f"\nchart: {chart}")
    cold, warm, restarted = (_median_ms(answers, phase) for phase in PHASES)
    same = all(_same(answers, prompt) for prompt in range(args.prompts))
    wrong_bytes = sum(audit["wrong_bytes"] for audit in engine.audits)
    result = {
        "prompts": args.prompts,
        "tokens": args.prompts * args.tokens,
        "ttft_cold_ms_p50": cold,
        "ttft_warm_ms_p50": warm,
        "ttft_restarted_ms_p50": restarted,
        "speedup": round(cold / warm, 1),
        "speedup_restarted": round(cold / restarted, 1),
        "same_outputs": same,
        "hit_tokens": sum(answer["cached"] for answer in answers["warm"]),
        "hit_tokens_restarted": sum(answer["cached"] for answer in answers["restarted"]),
        "wrong_bytes": wrong_bytes,
    }
    unchecked = any(audit["checked_blocks"] == 0 or audit["unknown_blocks"] > 0 for audit in engine.audits)
    print(f"RESULT {json.dumps(result)}")
    return 0 if same and wrong_bytes == 0 and not unchecked else 1
