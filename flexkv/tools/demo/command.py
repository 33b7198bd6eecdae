"""The command ``flexkv demo``: shows a progress bar, a table, a chart, and a last line for programs."""

import argparse
import importlib.util
import json
import re
import statistics
import sys
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flexkv.config import cache_directory, process_environment
from flexkv.errors import FlexKVError
from flexkv.tools.demo.chart import PHASES, Answers, can_draw, draw
from flexkv.tools.demo.child import Child
from flexkv.tools.demo.ending_signals import EndingSignals
from flexkv.tools.demo.model import prepare_model
from flexkv.tools.demo.output import new_file, scratch_folder
from flexkv.tools.demo.session import EVENT

SESSION = [sys.executable, "-m", "flexkv.tools.demo.session"]
"""Command of the engine's process."""

_LOG_LINES = 8
"""Number of last lines of the engine's log that an error shows."""

_REQUEST_LINE = re.compile(r"request (cold|warm|restarted)-(\d+)\S*: (.*)")
"""Line of FlexKV's log about a request, at DEBUG."""

_KV_GIB_PER_TOKEN = 2 * 30 * 3 * 64 * 2 / (1 << 30)
"""KV of a token of SmolLM2-135M in bfloat16, in GiB: K and V, 30 layers, 3 heads of 64."""

_ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the audit's counts are fetched by a function sent to the worker
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flexkv demo", description="A real vLLM answers prompts whose KV it computes, loads from memory, and, in "
        "a new process, loads from SSD. Takes 2 minutes on an idle machine, 10 on a busy one.",
    )
    parser.add_argument("--prompts", type=int, default=8, help="prompts to ask (default 8)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each prompt (default 2048)")
    parser.add_argument("--host-prompts", type=int,
                        help="prompts that host memory can hold; SSD holds all (default: all)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"),
                        help="folder for chart and log; nothing in it is overwritten (default %(default)s)")
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


class _Engine:
    """Runs the demo's engine one or more times, with the same SSD folder.

    Parameters
    ----------
    ssd : Path
        Folder for KV on SSD.
    log : Path
        File for the log of the engine.
    """

    def __init__(
        self, args: argparse.Namespace, model: Path, ssd: Path, log: Path, signals: EndingSignals
    ) -> None:
        self._signals = signals
        all_gb = max(0.25, 1.5 * (args.prompts + 2) * args.tokens * _KV_GIB_PER_TOKEN)
        host_gb = args.host_prompts * args.tokens * _KV_GIB_PER_TOKEN if args.host_prompts else all_gb
        self._log = log
        settings = {
            "cpu_cache_gb": round(host_gb, 3), "ssd_cache_gb": round(2 * all_gb, 2), "ssd_cache_dir": [str(ssd)],
            "ssd_admission": "all", "audit_path": str(ssd / "audit"), "log_level": "DEBUG",
        }
        self._command = [
            *SESSION, "--lifeline", "--model", str(model), "--prompts", str(args.prompts),
            "--tokens", str(args.tokens), "--settings", json.dumps(settings), "--phases",
        ]
        self._total = len(PHASES) * args.prompts
        self.answers: Answers = {phase: [] for phase in PHASES}
        self.audits: list[dict[str, Any]] = []

    def _progress(self, text: str) -> None:
        _bar(sum(map(len, self.answers.values())), self._total, text)

    def run(self, *phases: str) -> None:
        """Start vLLM and FlexKV, send every prompt in each phase, and stop them.

        Raises
        ------
        FlexKVError
            The engine failed.
        """
        self._progress("starting vLLM (about a minute)")
        audits = len(self.audits)
        with self._log.open("a") as log, Child(
            [*self._command, *phases], self._log, process_environment(**_ENGINE_ENVIRONMENT), self._signals
        ) as child:
            for line in child.lines():
                if line.startswith(EVENT):
                    self._take(json.loads(line.removeprefix(EVENT)))
                else:
                    log.write(line)
                    log.flush()
            status = child.status()
        if status != 0 or len(self.audits) == audits:
            raise FlexKVError(f"the engine ended with status {status}; its log, {self._log}, ends with\n{self._end()}")

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "ready":
            self._progress("vLLM is ready")
        elif kind == "answer":
            self.answers[event["phase"]].append(event)
            self._progress(f"{event['phase']}, first token after {event['ttft_ms']:.0f} ms")
        elif kind == "audit":
            self.audits.append(event)

    def _end(self) -> str:
        with self._log.open(errors="replace") as log:
            lines = deque((line.rstrip() for line in log if line.strip()), _LOG_LINES)
        return "\n".join(f"    {line}" for line in lines) or "    (it is empty)"

    def reasons(self) -> dict[tuple[str, int], str]:
        """Text of FlexKV's log about each request, by phase and prompt."""
        with self._log.open(errors="replace") as log:
            found = [match for line in log if (match := _REQUEST_LINE.search(line))]
        return {(match[1], int(match[2])): match[3].strip() for match in found}


def _same(answers: Answers, prompt: int) -> bool:
    """Whether the prompt had the same answer in every phase."""
    return len({tuple(answers[phase][prompt]["tokens"]) for phase in PHASES}) == 1


def _median_ms(answers: Answers, phase: str) -> float:
    return round(float(statistics.median(answer["ttft_ms"] for answer in answers[phase])), 1)


def _table(answers: Answers, reasons: dict[tuple[str, int], str]) -> None:
    print(f"\n{'':>6}  {'time to first token, ms':^32}  {'tokens from FlexKV':^20}")
    print(f"{'prompt':>6}  {'cold':>10}{'warm':>10}{'restarted':>12}  {'memory':>10}{'SSD':>10}  same answer")
    for i, (cold, warm, restarted) in enumerate(zip(*(answers[phase] for phase in PHASES), strict=True)):
        times = f"{cold['ttft_ms']:>10.0f}{warm['ttft_ms']:>10.0f}{restarted['ttft_ms']:>12.0f}"
        same = "yes" if _same(answers, i) else "NO"
        print(f"{i + 1:>6}  {times}  {warm['cached']:>10}{restarted['cached']:>10}  {same}")
    for phase in PHASES[1:]:
        for i, answer in enumerate(answers[phase]):
            if not answer["cached"]:
                reason = reasons.get((phase, i), "the log has no reason")
                print(f"prompt {i + 1}, {phase}: nothing was loaded: {reason}")


def _check() -> None:
    """Raise FlexKVError unless all packages that the demo needs are installed."""
    for module, name in (("torch", "PyTorch"), ("transformers", "transformers"), ("vllm", "vLLM")):
        if importlib.util.find_spec(module) is None:
            raise FlexKVError(f"{name} is not installed: ./build.sh demo installs it")


def main(argv: list[str]) -> int:
    """Run the demo; returns 0 if all answers are equal and all loaded bytes are right."""
    args = _parse(argv)
    _check()
    if args.model is not None and not (args.model / "config.json").is_file():
        raise FlexKVError(f"--model {args.model} is not the folder of a model (it has no config.json)")
    with ExitStack() as stack:
        signals = stack.enter_context(EndingSignals())
        log = new_file(args.output, "engine.log")
        ssd = stack.enter_context(scratch_folder(args.output, signals))
        model = args.model or prepare_model(cache_directory() / "smollm2-135m")
        engine = _Engine(args, model, ssd, log, signals)
        engine.run("cold", "warm")
        engine.run("restarted")
    answers = engine.answers
    _table(answers, engine.reasons())
    if can_draw():
        chart = new_file(args.output, "demo.png")
        draw(answers, chart)
        print(f"\nchart: {chart}")
    else:
        print("\nno chart: matplotlib is not installed")
    return _result(args, engine)


def _result(args: argparse.Namespace, engine: _Engine) -> int:
    """Print the line for programs; returns the exit status."""
    answers = engine.answers
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
