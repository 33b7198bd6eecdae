"""In place of the demo's session: a process tree that answers like an engine, hangs or fails, as the test requests.

usage: fake_session.py MODE PIDS [options of flexkv.tools.demo.session]

PIDS is a file to which every process of the tree appends its number. MODE is ``good``, ``fail``, or a list of
``deaf`` (all ignore SIGTERM and SIGINT), ``hang`` (after some output), ``orphan`` (ends, while its child hangs).
"""

import json
import os
import signal
import sys
from pathlib import Path

from flexkv.tools.demo.process_group import end_with_parent
from flexkv.tools.demo.session import EVENT


def note(pids: Path) -> None:
    fd = os.open(pids, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{os.getpid()}\n".encode())
    os.close(fd)


def start_core(pids: Path) -> None:
    """As vLLM starts its engine core: a child that has the same output, and a child of its own."""
    ready, say = os.pipe()
    if os.fork() == 0:
        note(pids)
        if os.fork() == 0:
            note(pids)
            os.write(say, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)


def main() -> None:
    mode, pids = sys.argv[1].split(","), Path(sys.argv[2])
    end_with_parent()
    if "deaf" in mode:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    note(pids)
    start_core(pids)
    phases = sys.argv[sys.argv.index("--phases") + 1 :]
    settings = json.loads(sys.argv[sys.argv.index("--settings") + 1])
    Path(settings["ssd_cache_dir"][0], "block").write_text("KV")
    print("a line of vLLM", flush=True)
    if "fail" in mode:
        print("the reason of it all", file=sys.stderr, flush=True)
        os._exit(7)
    print(EVENT + json.dumps({"event": "ready"}), flush=True)
    if "hang" in mode:
        signal.pause()
    if "orphan" in mode:
        os._exit(0)
    for phase in phases:
        for prompt in range(2):
            cached = 0 if (phase, prompt) == ("warm", 1) else 64 * (phase != "cold")
            print(f"DEBUG [flexkv.vllm] request {phase}-{prompt}-1a2b: 2 blocks wanted; evicted 3 s ago", flush=True)
            answer = {"phase": phase, "prompt": prompt, "ttft_ms": 5.0, "tokens": [1], "cached": cached}
            print(EVENT + json.dumps({"event": "answer", **answer}), flush=True)
    audit = {"checked_blocks": 4, "unknown_blocks": 0, "wrong_bytes": 0}
    print(EVENT + json.dumps({"event": "audit", **audit}), flush=True)
    os._exit(0)                            # the core is left behind


if __name__ == "__main__":
    main()
