"""A real vLLM in a process of its own that answers prompts when it is asked, beside others.

usage: python -m tests.integration.vllm_engine_process '{"block_size": 32, ...}'

Options are those of ``vllm_session``. Each line of its input is a stage, each answer a line of its output.
"""

import json
import sys
from typing import Any

from tests.integration.vllm_session import RESULT, Engine, make_prompts


def _say(value: Any) -> None:
    print(RESULT + json.dumps(value), flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    engine = Engine(options)
    _say("ready")
    for line in sys.stdin:
        stage = json.loads(line)
        if stage.get("wait_ready"):
            engine.wait_ready()
            _say("ready")
            continue
        if stage.get("reset_prefix_cache", True):
            engine.llm.reset_prefix_cache()
        before = engine.flexkv().stats() if engine.has_flexkv else {}
        prompts = make_prompts(stage["seed"], stage["count"], stage["length"])
        answers = []
        for prompt in prompts:
            answers += engine.run([prompt], stage["tokens"])[0]
        after = engine.flexkv().stats() if engine.has_flexkv else {}
        pool = engine.core.scheduler.kv_cache_manager.block_pool
        _say({
            "answers": answers, "hit_tokens": after.get("hit_tokens", 0) - before.get("hit_tokens", 0),
            "leaked_pages": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        })
    engine.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
