"""Runs one scenario on a real vLLM, in a process of its own, and prints what happened as one line of JSON.

usage: python -m tests.integration.vllm_session '{"block_size": 32, ...}'
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = "@result "


def make_model(directory: Path, num_kv_heads: int = 2) -> str:
    """A small Llama with random weights, wide enough apart that its answers depend on the whole prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=num_kv_heads, head_dim=32, max_position_embeddings=4096, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return str(directory)


def make_adapter(path: Path, seed: int) -> None:
    """A LoRA of that model, with random weights large enough to change its answers."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    tensors = {}
    for layer in range(3):
        for name, size in sizes.items():
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(8, 128, generator=random) * 0.2
            tensors[f"{base}.lora_B.weight"] = torch.randn(size, 8, generator=random) * 0.2
    save_file(tensors, str(path / "adapter_model.safetensors"))
    (path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(sizes), "base_model_name_or_path": "m",
    }))


def make_prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Prompts of which each shares a prefix of some length with an earlier one."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for i in range(count):
        shared = prompts[rng.randrange(i)][: rng.randrange(0, length)] if i % 2 else []
        size = length - rng.randrange(0, length // 3)
        prompts.append(shared + [rng.randrange(3, 512) for _ in range(max(1, size - len(shared)))])
    return prompts


class Engine:
    """A vLLM engine whose scheduler is in this process, and its worker too."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = None
        self.has_flexkv = options.get("flexkv", True)
        if self.has_flexkv:
            transfer = KVTransferConfig(
                kv_connector=options.get("connector", "FlexKVConnectorV1"),
                kv_connector_module_path=options.get("module"),
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"audit": True, "cpu_cache_gb": 0.25, **options.get("settings", {})},
            )
        self.lora = options.get("lora")
        arguments = {
            "block_size": options["block_size"], "max_model_len": options.get("max_len", 1024),
            "num_gpu_blocks_override": options["gpu_blocks"], "max_num_seqs": options.get("max_seqs", 4),
            "enable_chunked_prefill": options.get("chunked", True),
            "max_num_batched_tokens": options.get("batched_tokens", 1024), "enforce_eager": True,
            "enable_prefix_caching": True, "disable_log_stats": True, "dtype": "float32", **options.get("llm", {}),
        }
        with tempfile.TemporaryDirectory() as directory:
            self.llm = LLM(
                options.get("model") or make_model(Path(directory)), skip_tokenizer_init=True,
                kv_transfer_config=transfer, **arguments,
            )
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.ids = iter(range(1 << 30))
        self.preemptions = self.failed_loads = 0
        preempt = self.core.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.core.scheduler._preempt_request = counted
        if self.has_flexkv:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until KV can be saved: these answers are short, and could all be there before the host pool is."""
        from tests.support.harness import until

        side = self.flexkv()
        if hasattr(side, "_controller"):          # caching is not off
            until(side._controller.is_ready, 60.0)

    def params(self, tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)

    def lora_request(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self.lora) if self.lora else None

    def wait_ssd(self) -> None:
        """Wait until the SSD tier is open, and its recovered blocks are in the index."""
        from tests.support.harness import until

        manager = self.flexkv()._controller
        until(lambda: manager.is_ready() and "ssd_written_blocks" in manager.stats(), 60.0)

    def run(self, prompts: list[list[int]], tokens: int, salt: str | None = None, abort_after: int = 0) -> Any:
        """Answer prompts together; the odd ones are aborted after ``abort_after`` steps."""
        names = [f"r{next(self.ids)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            request = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            self.engine.add_request(name, request, self.params(tokens), lora_request=self.lora_request())
        answers: dict[str, list[int]] = {}
        cached = steps = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
                    cached += output.num_cached_tokens or 0
            steps += 1
            if steps == abort_after:
                self.engine.abort_request(names[1::2])
        self.settle()
        if self.has_flexkv:
            self.settle_ssd(self.flexkv()._controller)
        return [answers.get(name) for name in names], cached

    def settle(self) -> None:
        """Step until saves of finished requests have let go of their blocks."""
        while self.core.scheduler.has_finished_requests():
            self.engine.step()

    def flexkv(self) -> Any:
        return self.core.scheduler.connector._flexkv_connector.scheduler

    def fail_loads(self, share: float) -> None:
        """That share of the loads leaves some of its pages as they are."""
        manager, rng = self.flexkv()._controller, random.Random(1)
        get_blocks = manager.get_blocks

        def get(keys: Any, start: int, pages: Any, *args: Any, **more: Any) -> Any:
            if rng.random() < share:
                self.failed_loads += 1
                pages = pages.copy()
                pages[rng.randrange(len(pages)) :] = 1 << 24            # a page that does not exist
            return get_blocks(keys, start, pages, *args, **more)

        manager.get_blocks = get

    def pass_time(self, seconds: float) -> None:
        """The clock of the cache goes forward at once."""
        cache = self.flexkv()._controller._space.index
        clock = cache._clock
        cache._clock = lambda: clock() + seconds

    def settle_ssd(self, manager: Any) -> None:
        """Wait until nothing is read from or written to SSD, nor queued for it."""
        from tests.support.harness import until

        names = ("blocks_being_fetched", "ssd_queued_blocks", "ssd_blocks_being_written")
        until(lambda: not any(manager.stats().get(name, 0) for name in names), 30.0)

    def report(self) -> dict[str, Any]:
        from flexkv.tools.demo.session import audit_counts

        side = self.flexkv()
        manager = side._controller
        unsettled = manager.tasks.unsettled()
        manager.wait(unsettled, 10.0, completely=True)
        self.settle_ssd(manager)
        manager.check_integrity()
        pool = self.core.scheduler.kv_cache_manager.block_pool
        stats = manager.stats()
        manager.reset()                        # what is not leaked is free then, on every tier
        after = manager.stats()
        return {
            "lost_slots": after["num_slots"] - after["free_slots"],
            "lost_ssd_slots": after.get("ssd_slots", 0) - after.get("ssd_free_slots", 0),
            **side.stats(), **stats, **self.llm.collective_rpc(audit_counts)[0], "tracked": len(side._requests),
            "preemptions": self.preemptions, "failed_loads": self.failed_loads,
            "outstanding": len(manager.tasks.unsettled()),
            "leaked_pages": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        }


def main() -> None:
    options = json.loads(sys.argv[1])
    engine = Engine(options)
    if options.get("wait_ssd"):
        engine.wait_ssd()
    if share := options.get("fail_loads", 0.0):
        engine.fail_loads(share)
    passes = []
    for stage in options["passes"]:
        if stage.pop("reset_prefix_cache", False):
            assert engine.llm.reset_prefix_cache(reset_connector=stage.pop("reset_connector", False))
        if later := stage.pop("later_s", 0.0):
            engine.pass_time(later)
        if delete := stage.pop("delete", None):
            shutil.rmtree(delete)
        prompts = make_prompts(stage["seed"], stage["count"], stage["length"])
        if stage.get("one_by_one"):
            results = [engine.run([prompt], stage["tokens"], stage.get("salt")) for prompt in prompts]
            answers, cached = [r[0][0] for r in results], sum(r[1] for r in results)
        else:
            answers, cached = engine.run(prompts, stage["tokens"], stage.get("salt"), stage.get("abort_after", 0))
        passes.append({"answers": answers, "cached": cached})
    report = engine.report() if engine.has_flexkv and options.get("report", True) else {}
    print(RESULT + json.dumps({"passes": passes, "report": report}), flush=True)
    engine.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
