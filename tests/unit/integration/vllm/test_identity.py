"""The identity of a vLLM engine's KV, from real configurations: no engine is started."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from flexkv.config import CacheConfig, domain
from flexkv.config.domain import layout_of
from flexkv.integration.vllm import identity
from flexkv.integration.vllm.identity import canonical, config_digest, identify, process_started_ns
from flexkv.integration.vllm.vllm_v1_adapter import _model_config
from tests.support.vllm_stub import vllm_config
from tests.unit.config.test_weights import TIME_NS, hub, in_tensor, model, same_time

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "dtype": "float32",
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this test were not changed during the start of an engine."""
    monkeypatch.setattr(identity, "process_started_ns", lambda: 1 << 62)


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    root = model(tmp_path / "model")
    (root / "config.json").write_text(json.dumps(LLAMA))
    same_time(root)
    return root


def engine_config(root: Path | str, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "enforce_eager": True, **options}
    return EngineArgs(model=str(root), skip_tokenizer_init=True, **options).create_engine_config()


def domain_of(config: Any) -> bytes:
    return domain(_model_config(config), CacheConfig(tokens_per_block=16, num_cpu_blocks=64))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}
OPTIONS: dict[str, dict[str, Any]] = {
    "rope theta": {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
    "rope scaling": {"hf_overrides": {"rope_parameters": YARN}},
    "norm epsilon": {"hf_overrides": {"rms_norm_eps": 1e-2}},
    "dummy weights": {"load_format": "dummy"},
    "dummy weights of another seed": {"load_format": "dummy", "seed": 1},
    "maximum length": {"max_model_len": 512},
    "dtype": {"dtype": "bfloat16"},
    "KV dtype": {"kv_cache_dtype": "fp8_e5m2"},
    "revision": {"revision": "v2"},
    "tensor parallelism": {"tensor_parallel_size": 2},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "more ranks than heads": {"tensor_parallel_size": 4},
    "context parallelism": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    "interleave": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2, "cp_kv_cache_interleave_size": 8},
    "older interleave": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2,
                         "dcp_kv_cache_interleave_size": 4},
    "LoRA dtype": {"enable_lora": True, "lora_dtype": "float16"},
    "implementation": {"model_impl": "transformers"},
    "extra of the loader": {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
}


def test_every_option_that_changes_kv_is_another_domain(root: Path) -> None:
    domains = {"none": domain_of(engine_config(root))}
    assert domain_of(engine_config(root)) == domains["none"]
    for name, options in OPTIONS.items():
        domains[name] = domain_of(engine_config(root, **options))
    same = {name: [other for other in domains if domains[other] == domains[name] and other != name] for name in domains}
    assert not {name: others for name, others in same.items() if others}


def test_the_layout_of_context_parallelism_does_not_depend_on_vllms_hashes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and interleave are in the domain itself, in the part that decides which engines may share slots."""
    options = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}
    monkeypatch.setattr(identity, "_SECTIONS", ())
    one, two = (engine_config(root, **options, cp_kv_cache_interleave_size=size) for size in (1, 2))
    older = engine_config(root, **options, dcp_kv_cache_interleave_size=2)
    none = engine_config(root, tensor_parallel_size=4)
    assert domain_of(two) == domain_of(older)
    assert len({layout_of(domain_of(config).decode()) for config in (none, one, two)}) == 3
    assert "dcp 2 interleave 2" in domain_of(two).decode()
    assert "dcp" not in domain_of(none).decode()


def test_what_changes_no_kv_is_the_same_domain(root: Path) -> None:
    base = domain_of(engine_config(root))
    for options in ({"max_num_seqs": 7}, {"gpu_memory_utilization": 0.5}, {"seed": 5}, {"served_model_name": "x"},
                    {"num_gpu_blocks_override": 99}, {"disable_log_stats": True}, {"enable_prefix_caching": False},
                    {"max_num_batched_tokens": 4096}):
        assert domain_of(engine_config(root, **options)) == base, options


def test_the_gpu_and_the_layers_of_each_pipeline_stage_are_part_of_the_domain(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU has other kernels, which arrange KV otherwise; stages of other sizes hold other layers."""
    config = engine_config(root)
    digests = [config_digest(config)]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    digests.append(config_digest(config))
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA B200"):
        gpu = type("Gpu", (), {"is_cpu": lambda self: False, "get_device_name": lambda self, name=name: name})
        monkeypatch.setattr(identity, "current_platform", gpu())
        digests.append(config_digest(config))
    assert len(set(digests)) == len(digests)


def test_a_domain_is_the_same_in_every_process(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.unit.integration.vllm.test_identity import domain_of, engine_config\n"
        "print('@', domain_of(engine_config(Path(sys.argv[1]))).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], env={**os.environ, "PYTHONHASHSEED": "7"},
                          capture_output=True, text=True, check=True, timeout=200)
    other = next(line for line in done.stdout.splitlines() if line.startswith("@")).removeprefix("@ ")
    assert other == domain_of(engine_config(root)).decode()
    assert " engine " not in other


def test_other_weights_are_another_domain(root: Path) -> None:
    before = domain_of(engine_config(root))
    in_tensor(root)
    same_time(root)
    assert domain_of(engine_config(root)) != before


def test_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    snapshot = hub(tmp_path, "a" * 40)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    found = identify(engine_config(snapshot))
    assert found.weights_id.startswith("a" * 40 + ":")
    assert not found.unknown


def test_weights_that_change_during_the_start_are_not_known(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_started_ns() > TIME_NS
    monkeypatch.setattr(identity, "process_started_ns", process_started_ns)
    found = identify(engine_config(root))
    assert "changed after this process started" in found.unknown       # the test has written them just now
    assert identify(engine_config(root)).weights_id != found.weights_id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_config__load_format": "tensorizer"}, "load_format tensorizer"),
        ({"load_config__load_format": "of_a_plugin"}, "load_format of_a_plugin"),
        ({"model_config__model": "s3://bucket/model"}, "neither local files"),
        ({"model_config__model": "org/not-in-the-cache"}, "neither local files"),
        ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"cache_config__calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"model_config__hf_config": None}, "cannot be read"),
    ],
)
def test_what_cannot_be_known_is_used_once(changes: dict[str, Any], reason: str, root: Path) -> None:
    config = engine_config(root)
    for name, value in changes.items():
        section, attribute = name.split("__")
        object.__setattr__(getattr(config, section), attribute, value)
    first, second = identify(config), identify(config)
    assert reason in first.unknown
    assert first.weights_id != second.weights_id
    config = engine_config(root)
    config.weight_transfer_config = object()
    assert "weight_transfer_config" in identify(config).unknown


def test_a_start_without_identity_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model_config = _model_config(vllm_config())
    lines = [record.getMessage() for record in caplog.records if "for this process only" in record.getMessage()]
    assert len(lines) == 1
    assert " engine " in model_config.weights_id


def test_a_draft_model_has_its_own_weights(root: Path, tmp_path: Path) -> None:
    config = engine_config(root)
    digests = set()
    for seed in (1, 2):
        draft = model(tmp_path / f"draft-{seed}", seed)
        config.speculative_config = type("Speculative", (), {
            "draft_model_config": type("Draft", (), {"model": str(draft), "revision": None}),
            "method": "draft_model", "num_speculative_tokens": 2,
        })
        digests.add(identify(config).weights_id)
    assert len(digests) == 2


def test_canonical_values_hold_no_addresses() -> None:
    class Thing:
        def __init__(self) -> None:
            self.value = {"b": {3, 1, 2}, "a": (1.5, None)}

    first, second = json.dumps(canonical(Thing())), json.dumps(canonical(Thing()))
    assert first == second
    assert "0x" not in first
    assert canonical({"_name_or_path": "/a", "transformers_version": "5", "x": 1}) == {"x": 1}
    assert canonical(len)
    assert canonical(object())
    assert config_digest
