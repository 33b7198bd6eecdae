"""The demo's engine, in a separate process: answers every prompt in each phase, and reports line by line."""

import argparse
import json
import time
from typing import Any

from flexkv.tools.demo.process_group import end_with_parent

EVENT = "@flexkv "
"""Start of a line that is an event; all other lines are the engine's log."""

BLOCK_SIZE = 32
ANSWER_TOKENS = 12


def emit(**event: Any) -> None:
    """Print an event as one line of JSON."""
    print(EVENT + json.dumps(event), flush=True)


def audit_counts(worker: Any) -> dict[str, int]:
    """Counts of the worker's audit; runs in the worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    counts: dict[str, int] = get_kv_transfer_group()._flexkv_connector.worker.audit_counts()
    return counts


def make_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Make ``count`` different prompts of ``length`` tokens from Python's language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer.encode(text)
    if len(tokens) < count * length:
        raise SystemExit(f"the text has {len(tokens)} tokens, less than {count} x {length}; use fewer or shorter "
                         "prompts")
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


class Session:
    """A vLLM engine with FlexKV. The engine's own KV cache has room for about one prompt."""

    def __init__(self, model: str, prompt_tokens: int, settings: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        length = -(-(prompt_tokens + ANSWER_TOKENS) // BLOCK_SIZE) * BLOCK_SIZE
        self.llm = LLM(
            model,
            block_size=BLOCK_SIZE,
            max_model_len=length,
            max_num_seqs=4,
            num_gpu_blocks_override=length // BLOCK_SIZE + 8,
            enforce_eager=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector="FlexKVConnectorV1",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"audit": True, **settings},
            ),
        )

    def ask(self, prompt: list[int], name: str, answer_tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
        """Answer one prompt; returns the time to the first token, the tokens, and the number of cached tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=answer_tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE
        )
        engine = self.llm.llm_engine
        start = time.perf_counter()
        first = None
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if first is None and output.outputs[0].token_ids:
                    first = time.perf_counter() - start
                last = output
        assert first is not None  # narrowing: an answer has at least one token
        tokens = list(last.outputs[0].token_ids)
        return {"ttft_ms": first * 1e3, "tokens": tokens, "cached": last.num_cached_tokens or 0}


def main() -> None:
    """Run the child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--phases", nargs="+", required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="settings of FlexKV, as JSON")
    parser.add_argument("--lifeline", action="store_true", help="end as soon as standard input ends")
    args = parser.parse_args()
    if args.lifeline:
        end_with_parent()
    session = Session(args.model, args.tokens, args.settings)
    prompts = make_prompts(session.llm.get_tokenizer(), args.prompts + 1, args.tokens)
    # the last prompt warms the engine up, and evicts the KV of other prompts from the engine's own cache
    session.ask(prompts[-1][: args.tokens // 2], "warm-up", 1)
    emit(event="ready")
    for phase in args.phases:
        for i, prompt in enumerate(prompts[:-1]):
            emit(event="answer", phase=phase, prompt=i, **session.ask(prompt, f"{phase}-{i}"))
        session.ask(prompts[-1], f"evict-{phase}", 1)
    counts = session.llm.collective_rpc(audit_counts)
    emit(event="audit", block_size=BLOCK_SIZE, **counts[0])
    session.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
