"""The directory of an export: config, tensors, tokenizer, README.md; last export.json, which names every file in it.

Names of tensors are those of the 16-bit model; what is not quantized is written in the checkpoint's 16-bit type. Where
rotations were folded the head is a tensor of its own, and `tie_word_embeddings` is false.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest, versions
from phasequant.export.measure import Peaks
from phasequant.export.tensors import linear_tensors
from phasequant.nn import QuantLinear
from phasequant.surroundings import hushed_transformers

NAME, CARD = "export.json", "README.md"


def is_export(folder: Path) -> bool:
    """Whether a directory is an earlier export and holds nothing else."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        named = {NAME, CARD, *values["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} <= named


def stock_config(model: PreTrainedModel) -> PretrainedConfig:
    """The model's config without this package in it."""
    values = model.config.to_dict()
    for ours in ("quantization_config", "auto_map"):
        values.pop(ours, None)
    config: PretrainedConfig = type(model.config).from_dict(values)
    return config


def state_dict(
    model: PreTrainedModel, model_map: ModelMap, stored: torch.dtype, peaks: Peaks | None = None
) -> dict[str, Tensor]:
    """Every tensor of the export by its name in the 16-bit model."""
    places = {name: (block, group) for block, group, name in model_map.linears()}
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(stock_config(model)).state_dict()
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module not in places:
            if not (name == f"{model_map.family.head}.weight" and model.config.tie_word_embeddings):
                tensor = own[name].detach().cpu()
                found[name] = tensor.to(stored) if tensor.is_floating_point() else tensor
        elif leaf == "weight":
            linear = model.get_submodule(module)
            assert isinstance(linear, QuantLinear)
            peak = (peaks or {}).get(places[module])
            found |= {f"{module}.{key}": tensor for key, tensor in linear_tensors(linear, stored, peak).items()}
    return found


def scales_told(tensors: dict[str, Tensor], stored: torch.dtype) -> str | None:
    """A note where scales of weights could not be held in the checkpoint's 16-bit type."""
    scales = [tensor for name, tensor in tensors.items() if name.endswith(".weight_scale")]
    other = [t.dtype for t in scales if t.dtype not in (stored, torch.uint8, torch.float8_e4m3fn)]
    if not other:
        return None
    kinds = ", ".join(sorted({str(kind).removeprefix("torch.") for kind in other}))
    return (
        f"{len(other)} of {len(scales)} tensors of scales are stored as {kinds}, as "
        f"{str(stored).removeprefix('torch.')} would round them; vLLM rounds them when it loads"
    )


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any],
    stored: torch.dtype,
) -> None:
    """All that loaders read."""
    save_torch_state_dict(tensors, folder)
    with hushed_transformers():
        stock_config(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(stored).removeprefix("torch.")
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """The last file: what made the directory, and the hash of every other file (the page may be edited)."""
    values = {**content, "versions": versions(), "files": manifest.file_entries(folder)}
    (folder / NAME).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
