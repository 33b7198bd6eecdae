"""A part of the oracle on a real vLLM, in a process of its own; prints what happened as one line of JSON.

usage: python -m tests.integration.oracle_session '{"directory": ..., "mode": "plain", ...}'

In mode ``plain`` an engine without FlexKV answers all requests, and what it writes is recorded. In the other modes an
engine with FlexKV, far too small and with loads that fail, answers a part of them; each answer and each block of
FlexKV's index is compared with what the plain engine has computed.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.integration.async_on_cpu import schedule_asynchronously
from tests.integration.kv_records import Pages, Records, RecordsAudit, RecordsWriter, block_names
from tests.integration.vllm_session import RESULT, Engine
from tests.integration.workload import Asked, FailingLoads, make_requests, serve

BLOCK = 32
PAGES, HOST_BLOCKS = 34, 60
PLAIN_PAGES = 1501
CORRUPTED = 12
NUM_ADAPTERS = 2
MODES = [(loads, scheduling) for loads in ("always", "auto", "never") for scheduling in ("sync", "async")]


def requests_of(mode: str, options: dict[str, Any]) -> list[Asked]:
    """A third of them ask again, later, for an answer of another length: their whole prompt is to be loaded."""
    seed = 1000 * options.get("seed", 1) + options["modes"].index(mode)
    rng, count = random.Random(seed), options["count"]
    requests = make_requests(count - count // 3, seed, 400, 0.4, (0, 0, 1, 2), crossing=0.2)
    arrives = requests[-1].arrives
    again = [
        replace(rng.choice(requests), name=f"again{i}", tokens=rng.randrange(1, 24), arrives=arrives + 3 * i, abort=0)
        for i in range(count // 3)
    ]
    return requests + again


class OracleEngine(Engine):
    """An engine whose worker is in this process too."""

    def __init__(self, options: dict[str, Any], directory: Path) -> None:
        # vLLM on the CPU computes tokens without an adapter with the last place for one: it must stay empty
        lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": NUM_ADAPTERS + 1}
        model = {"block_size": BLOCK, "model": str(directory / "model")}
        super().__init__({**options, **model, "llm": {**lora, **options["llm"]}})
        self.directory = directory
        self.scheduler = self.core.scheduler
        runner = self.core.model_executor.driver_worker.worker.model_runner
        self.pages = Pages(runner.kv_caches, options["gpu_blocks"])
        self.answers: dict[str, list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.between_steps: Callable[[], None] = lambda: None
        self.on_added: Callable[[str, Any], None] = lambda name, request: None

    def add(self, name: str, prompt: list[int], tokens: int, salt: str | None = None, lora: int = 0) -> None:
        from vllm.lora.request import LoRARequest

        request = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
        adapter = LoRARequest(f"lora{lora}", lora, str(self.directory / f"lora{lora}")) if lora else None
        before = set(self.scheduler.requests)
        self.engine.add_request(name, request, self.params(tokens), lora_request=adapter)
        [new] = set(self.scheduler.requests) - before
        self.requests[name] = self.scheduler.requests[new]
        self.answers[name] = []
        self.on_added(name, self.requests[name])

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])

    def step(self) -> None:
        for output in self.engine.step():
            self.answers[output.request_id] = list(output.outputs[0].token_ids)
        self.between_steps()

    def run(self) -> None:
        """Until nothing is to be done."""
        for _ in range(100_000):
            if not self.scheduler.has_requests() and not self.core.batch_queue:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


# ---- without FlexKV -------------------------------------------------------------------------------------------------


def record_all(engine: OracleEngine, writer: RecordsWriter) -> None:
    """Record the KV of each request that ends."""
    cache = engine.scheduler.kv_cache_manager
    free = cache.free

    def record(request: Any) -> None:
        if request.is_finished():
            lora = request.lora_request.lora_int_id if request.lora_request else 0
            names = block_names(request.all_token_ids[:-1], lora, BLOCK)
            for name, page in zip(names, cache.get_block_ids(request.request_id)[0], strict=False):
                writer.add(name, engine.pages.read(page))
        free(request)

    cache.free = record


def answer_over_wrong_page(engine: OracleEngine, one: Asked, block: int) -> list[int]:
    """The answer if, after the first token, the page of ``block`` gets the content of the first one."""
    name = f"wrong/{one.name}/{block}"
    engine.add(name, one.prompt, one.tokens + 1, None, one.lora)
    while not engine.answers[name]:
        engine.step()
    table = engine.scheduler.kv_cache_manager.get_block_ids(engine.requests[name].request_id)[0]
    engine.pages.copy(table[0], table[block])
    engine.run()
    return engine.answers[name][:-1]


def plain(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    llm = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    engine = OracleEngine(
        {"flexkv": False, "gpu_blocks": PLAIN_PAGES, "max_len": 512, "max_seqs": 16, "llm": llm}, directory
    )
    writer = RecordsWriter()
    all_requests = [(mode, one) for mode in options["modes"] for one in requests_of(mode, options)]
    record_all(engine, writer)
    for mode, one in all_requests:              # one token more than is asked for: it has the last one's KV
        engine.add(f"{mode}/{one.name}", one.prompt, one.tokens + 1, None, one.lora)
    engine.run()
    answers: dict[str, dict[str, list[int]]] = {mode: {} for mode in options["modes"]}
    for mode, one in all_requests:
        answers[mode][one.name] = engine.answers[f"{mode}/{one.name}"][:-1]
    (directory / "answers.json").write_text(json.dumps(answers))
    writer.write(directory)
    largest = writer.largest                    # before pages are made wrong
    worth = [(m, one) for m, one in all_requests if one.tokens > 2 and len(one.prompt) > 3 * BLOCK][:CORRUPTED]
    changed = sum(
        answer_over_wrong_page(engine, one, 1 + i % 2) != answers[mode][one.name] for i, (mode, one) in enumerate(worth)
    )
    return {
        "requests": len(all_requests), "blocks": writer.num_blocks, "corrupted": len(worth), "changed": changed,
        "largest_repeated": largest, "smallest_difference": Records(directory).smallest_difference(20_000),
    }


# ---- with FlexKV ----------------------------------------------------------------------------------------------------


class Oracle:
    """An engine with FlexKV, and what a plain one has computed for the same requests."""

    def __init__(self, options: dict[str, Any], directory: Path) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        mode, faulty = options["mode"], options.get("faulty", False)
        loads, scheduling = mode.split("-")
        if scheduling == "async":
            schedule_asynchronously()
        self.engine = OracleEngine(
            {
                "gpu_blocks": PAGES, "max_seqs": 8, "batched_tokens": 256, "max_len": 512,
                "llm": {"async_scheduling": scheduling == "async"},
                "settings": {
                    "layerwise_loads": loads, "num_cpu_blocks": HOST_BLOCKS, "ssd_cache_gb": options["ssd_gb"],
                    "ssd_cache_dir": str(directory / f"ssd-{mode}-{faulty}"), "ssd_admission": "all",
                    "load_policy": "always",
                },
            },
            directory,
        )
        self.side = self.engine.flexkv()
        self.manager = self.engine.manager = self.side._controller
        assert self.side._steps._several == (scheduling == "async")
        if faulty:                              # each save is accepted, whatever failed: to be found
            self.side._steps.first_suspect = lambda pages: None
        self.engine.wait_ssd()
        connector = get_kv_transfer_group()
        self.engine.workers = [SimpleNamespace(connector=connector)]
        self.audit = RecordsAudit(self.engine.pages, Records(directory))
        connector._flexkv_connector.worker._audit = self.audit
        self.right = json.loads((directory / "answers.json").read_text())[mode]
        self.requests = requests_of(mode, options)
        self.keys: dict[str, Any] = {}
        self.engine.on_added = self.announce

    def announce(self, name: str, request: Any) -> None:
        """Keys of the request with its right answer, before anything is saved under them."""
        from flexkv.integration.vllm.tracked_request import namespace_of

        lora = request.lora_request.lora_int_id if request.lora_request else 0
        tokens = list(request.prompt_token_ids) + self.right[name]
        hasher = self.manager.hasher(namespace_of(request, self.side._loras))
        hasher.extend(np.array(tokens[: len(tokens) // BLOCK * BLOCK], dtype=np.int64))
        self.keys[name] = hasher.keys.copy()
        for key, content in zip(self.keys[name], block_names(tokens, lora, BLOCK), strict=True):
            assert self.audit.name_of.setdefault(key.tobytes(), content) == content, "a key of two contents"

    def wrong_answers(self) -> list[str]:
        """Requests whose answer is not the plain engine's; of those that were aborted, what there is of it."""
        wrong = []
        for one in self.requests:
            got, want = self.engine.answers[one.name], self.right[one.name]
            if got != want[: len(got)] or (not one.abort and len(got) != len(want)):
                wrong.append(one.name)
        return wrong

    def check_index(self) -> dict[str, int]:
        """Load every block of the index, and compare it."""
        manager, engine = self.manager, self.engine
        manager.wait(manager.tasks.unsettled(), 30.0, completely=True)
        engine.settle_ssd(manager)
        assert engine.llm.reset_prefix_cache()
        known = {
            key.tobytes() for keys in self.keys.values() for key in keys[: manager.lookup(keys).num_ready]
        }
        figures = {"indexed": manager.stats()["indexed_blocks"], "known": len(known), "compared": 0, "wrong": 0}
        seen: set[bytes] = set()
        for keys in self.keys.values():
            ready = manager.lookup(keys).num_ready
            if all(key.tobytes() in seen for key in keys[:ready]):
                continue
            pages = np.arange(1, ready + 1, dtype=np.int32)
            task = manager.get_blocks(keys[:ready], 0, pages)
            result = manager.wait(task, 30.0, completely=True)[task]
            assert result.status.value == "success", result
            for key, page in zip(keys[:ready], pages, strict=True):
                if key.tobytes() not in seen:
                    seen.add(key.tobytes())
                    figures["compared"] += 1
                    figures["wrong"] += not self.audit.is_right(key.tobytes(), int(page))
        return figures

    def run(self, share: float) -> dict[str, Any]:
        failing = FailingLoads(self.engine, share, 1)                           # type: ignore[arg-type]
        serve(self.engine, self.requests)                                       # type: ignore[arg-type]
        failing.stop()
        loads = {**self.audit.counts(), "wrong_saves": self.audit.num_wrong_saves}
        wrong = self.wrong_answers()
        index = self.check_index()
        stats = {**self.side.stats(), **self.manager.stats()}
        names = ("layerwise_loads", "evicted_blocks", "ssd_store_blocks_read", "ssd_evicted_blocks")
        complete = sum(len(self.engine.answers[one.name]) == one.tokens for one in self.requests)
        return {
            "requests": len(self.requests), "complete": complete,
            "aborted": len(self.requests) - complete, "wrong_answers": wrong,
            "preemptions": self.engine.preemptions, "loads": failing.num_loads, "failed_loads": failing.num_failed,
            "loaded": loads, "index": index, "largest": self.audit.largest,
            "smallest_wrong": self.audit.smallest_wrong if self.audit.smallest_wrong < np.inf else None,
            "tracked": len(self.side._requests), **{name: stats.get(name) for name in names},
        }


def main() -> None:
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    if options["mode"] == "plain":
        result = plain(options, directory)
    else:
        oracle = Oracle(options, directory)
        result = oracle.run(options["share"])
        result["leaks"] = {
            name: count for name, count in oracle.engine.report().items()
            if name in ("lost_slots", "lost_ssd_slots", "outstanding", "leaked_pages")
        }
        oracle.engine.engine.engine_core.shutdown()
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
