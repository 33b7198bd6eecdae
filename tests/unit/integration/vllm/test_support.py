"""The allow-list: an engine that the adapter does not support runs without FlexKV, and the log says why in one line."""

import logging
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.cache import CacheDType
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from flexkv.integration.vllm import support, vllm_v1_adapter
from flexkv.integration.vllm.off import OffScheduler, OffWorker
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.support import unsupported, unsupported_layers, unsupported_tensors
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from flexkv.integration.vllm.worker import WorkerSide
from tests.support.vllm_stub import request, step, vllm_config

CPU_MLA = {"model_config__use_mla": True, "attention_config__backend": SimpleNamespace(name="CPU_MLA")}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parallel_config__decode_context_parallel_size": 2}, "divisors of tensor_parallel_size"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2"),
    ({"model_config__is_attention_free": True}, "has no attention"),
    ({"model_config__is_hybrid": True}, "recurrent layers"),
    ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
    ({"model_config__is_diffusion": True}, "denoises"),
    ({"model_config__rswa_window": 8}, "drops KV"),
    ({"model_config__attn_type": "encoder_only"}, "encoder_only"),
    ({"model_config__runner_type": "pooling", "model_config__is_prefix_caching_supported": False}, "pools"),
    ({"model_config__multimodal_config": SimpleNamespace(mm_encoder_only=True)}, "encoder only"),
    ({"cache_config__sliding_window": 64}, "sliding window"),
    (CPU_MLA, "MLA on a CPU"),
    ({"attention_config__hisparse_config": object()}, "HiSparse"),
    ({"cache_config__cache_dtype": "int2_of_tomorrow"}, "int2_of_tomorrow"),
    ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    ({"cache_config__block_size": None}, "block size is None"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_an_engine_that_is_not_supported_runs_without_flexkv(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = vllm_config(**changes)
    assert reason in str(unsupported(config))
    with caplog.at_level(logging.INFO, "flexkv"):
        scheduler = FlexKVConnectorV1Impl(config, KVConnectorRole.SCHEDULER)
        worker = FlexKVConnectorV1Impl(config, KVConnectorRole.WORKER)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "KV caching is off" in lines[0]
    assert reason in lines[0]
    assert isinstance(scheduler.scheduler, OffScheduler)
    assert isinstance(worker.worker, OffWorker)
    prompt = request("r", list(range(16)))
    scheduler.on_new_request(prompt)
    assert scheduler.get_num_new_matched_tokens(prompt, 0) == (0, False)
    scheduler.update_state_after_alloc(prompt, SimpleNamespace(get_block_ids=lambda: ([1], [2])), 0)
    meta = scheduler.build_connector_meta(step({"r": 16}))
    assert (meta.has_forward, meta.loads, meta.finishing) == (True, [], {})
    scheduler.update_connector_output(SimpleNamespace())
    assert scheduler.request_finished(prompt, [1]) == (False, None)
    assert scheduler.reset_cache()
    worker.register_kv_caches({"layer": torch.zeros(64, 2, 4, 1, 64)})
    worker.start_load_kv(None)
    worker.wait_for_layer_load("layer")
    worker.wait_for_save()
    assert worker.get_finished(set()) == (None, None)
    assert worker.get_block_ids_with_load_errors() == set()
    for half in (scheduler, worker):
        half.shutdown()


def test_both_halves_can_be_off() -> None:
    """The adapter calls nothing that a half does not have when caching is off."""
    for on, off in ((SchedulerSide, OffScheduler), (WorkerSide, OffWorker)):
        public = {name for name in vars(on) if not name.startswith("_")}
        assert public <= set(dir(off)), f"{off.__name__} lacks methods of {on.__name__}"


def test_a_property_that_raises_is_a_reason() -> None:
    class Strange:
        @property
        def is_hybrid(self) -> bool:
            raise KeyError("layers_block_type")

    config = vllm_config()
    config.model_config = Strange()
    assert "layers_block_type" in str(unsupported(config))


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_other_platforms_are_off(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name=platform)
    monkeypatch.setattr(support, "current_platform", other)
    assert platform in str(unsupported(vllm_config()))


@pytest.mark.parametrize("name", get_args(CacheDType))
def test_every_cache_dtype_of_vllm_is_supported(name: str) -> None:
    config = vllm_config(cache_config__cache_dtype=name)
    assert unsupported(config) is None
    model = vllm_v1_adapter._model_config(config)
    assert model.dtype
    others = {vllm_v1_adapter._model_config(vllm_config(cache_config__cache_dtype=other)).dtype
              for other in get_args(CacheDType) if other != name}
    alias = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8", "auto": "bfloat16", "bfloat16": "auto"}
    assert (model.dtype in others) == (name in alias)


def kv_cache_config(*specs: Any) -> KVCacheConfig:
    return KVCacheConfig(num_blocks=64, kv_cache_tensors=[],
                         kv_cache_groups=[KVCacheGroupSpec([f"l{i}"], spec) for i, spec in enumerate(specs)])


def full(**changes: Any) -> FullAttentionSpec:
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    return FullAttentionSpec(**(fields | changes))


def test_one_group_of_full_attention_is_supported() -> None:
    mla = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32)
    different = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"l0": full(), "l1": full(head_size=128)})
    for spec in (full(), full(sliding_window=64), mla, different):
        assert unsupported_layers(kv_cache_config(spec), 16) is None


def test_other_groups_are_not() -> None:
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64)
    chunks = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, attention_chunk_size=64
    )
    mamba = MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,))
    for specs, reason in (
        ((), "0 KV cache groups"), ((full(), full()), "2 KV cache groups"), ((window,), "SlidingWindowSpec"),
        ((chunks,), "ChunkedLocalAttentionSpec"), ((mamba,), "MambaSpec"), ((full(non_causal=True),), "later tokens"),
        ((full(block_size=32),), "holds 32 tokens"),
    ):
        assert reason in str(unsupported_layers(kv_cache_config(*specs), 16))


def test_with_context_parallelism_all_layers_share_out_their_tokens() -> None:
    whole = full(dcp_sharded=False)
    mixed = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"l0": full(), "l1": whole})
    for spec, off in ((full(), False), (whole, True), (mixed, True)):
        assert unsupported_layers(kv_cache_config(spec), 16) is None
        reason = unsupported_layers(kv_cache_config(spec), 16, 2)
        assert (reason is not None and "store all tokens on each rank" in reason) == off


def test_tensors_that_show_a_part_of_a_page_are_not() -> None:
    config = kv_cache_config(full(dtype=torch.uint8, state_content_bytes=2 * 64 + 8))     # with a scale for K and V
    whole = torch.zeros(64, 2, 16, 2 * 64 + 8, dtype=torch.uint8)
    assert unsupported_tensors({"l0": whole}, config) is None
    assert "outside of it" in str(unsupported_tensors({"l0": whole[..., : 2 * 64]}, config))
    assert "not a tensor" in str(unsupported_tensors({"l0": [whole, whole]}, config))       # type: ignore[dict-item]


def test_a_rank_with_layers_of_another_kind_does_not_register(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    registered: list[Any] = []
    half = SimpleNamespace(register_kv_caches=lambda *a: registered.append(a), shutdown=lambda: closed.append(True))
    monkeypatch.setattr(FlexKVConnectorV1Impl, "_make_worker", lambda self, rank: half)
    tensors = {"l0": torch.zeros(64, 2, 16, 2, 64)}
    for config, off in ((None, False), (kv_cache_config(full()), False), (kv_cache_config(full(), full()), True)):
        monkeypatch.setattr(vllm_v1_adapter, "find_kv_cache_config", lambda owner, config=config: config)
        registered.clear()
        impl = FlexKVConnectorV1Impl(vllm_config(cache_config__block_size=16), KVConnectorRole.WORKER)
        impl.register_kv_caches(tensors)
        assert (len(registered), isinstance(impl.worker, OffWorker), bool(closed)) == (0 if off else 1, off, off)
    assert "2 KV cache groups" in caplog.text


def test_a_rank_with_tensors_of_an_unknown_shape_does_not_stop_the_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexkv.config import ConnectorConfig

    client = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(FlexKVConnectorV1Impl, "_make_worker", lambda self, rank: WorkerSide(client, ConnectorConfig()))
    impl = FlexKVConnectorV1Impl(vllm_config(), KVConnectorRole.WORKER)
    impl.register_kv_caches({"l0": torch.zeros(63, 2, 16, 2, 64)})             # vLLM says that there are 64 blocks
    assert "cannot hold 64 blocks" in caplog.text
    assert isinstance(impl.worker, OffWorker)


def test_a_rank_that_is_not_told_of_the_number_of_blocks_does_not_register() -> None:
    impl = FlexKVConnectorV1Impl(vllm_config(cache_config__num_gpu_blocks=None), KVConnectorRole.SCHEDULER)
    assert "number of KV blocks" in str(impl._unsupported_caches({"l0": torch.zeros(2, 2, 16, 2, 64)}))
    impl.shutdown()
