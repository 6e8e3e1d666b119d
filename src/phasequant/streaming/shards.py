"""The weights of a streamed model as the shards of a checkpoint: finished blocks as they are, the rest beside them.

model-00001-of-N     embeddings, what stands beside them, the seal
model-0000b-of-N     a block each: its artifact
model-0000N-of-N     last norm and head
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.artifact import read_tensors, write_tensors
from phasequant.checkpoint.tensors import check_tensors, headers
from phasequant.streaming.conversion import saved_names
from phasequant.streaming.lazy import LazyMatrix
from phasequant.streaming.tensors import INDEX, SINGLE


def _place(source: Path, target: Path, model: PreTrainedModel) -> None:
    """The same file under another name, or a copy where a file system has no links, or where tensors are named as
    Transformers does at saving."""
    names = saved_names(model, headers([source]))
    if any(name != saved for name, saved in names.items()):
        write_tensors(target, {names[name]: tensor for name, tensor in read_tensors(source).items()})
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _outside(model: PreTrainedModel, model_map: ModelMap) -> tuple[dict[str, str], dict[str, str]]:
    """(before, behind) the blocks: parameter → its module's name."""
    family = model_map.family
    before: dict[str, str] = {}
    behind: dict[str, str] = {}
    for name, _ in model.named_parameters():  # a tied head is not named again
        if name.startswith(f"{family.blocks}."):
            continue
        owner = name.rpartition(".")[0]
        (behind if owner in (family.final_norm, family.head) else before)[name] = owner
    return before, behind


def _tensors(model: PreTrainedModel, names: dict[str, str], stored: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, owner in names.items():
        lazy = getattr(model.get_submodule(owner), "lazy", None)
        if isinstance(lazy, LazyMatrix) and name.endswith(".weight"):
            found[name] = lazy.whole(stored)
        else:
            found[name] = model.get_parameter(name).detach().to(stored)
    names = saved_names(model, found)
    return {names[name]: tensor for name, tensor in found.items()}


def write_shards(model: PreTrainedModel, model_map: ModelMap, blocks: Sequence[Path], folder: Path) -> None:
    """Put the weights and their index into `folder`, where Transformers saved what it knew of the model, its seal; and
    hold them against what the model is laid out for."""
    config = model.config.quantization_config
    stored = getattr(torch, config.dtype)
    count = len(blocks) + 2
    files = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    sealed = read_tensors(folder / SINGLE)
    (folder / SINGLE).unlink()
    before, behind = _outside(model, model_map)
    write_tensors(files[0], {**_tensors(model, before, stored), **sealed})
    for source, target in zip(blocks, files[1:-1], strict=True):
        _place(source, target, model)
    write_tensors(files[-1], _tensors(model, behind, stored))
    found = {path: headers([path]) for path in files}
    every = {name: entry for one in found.values() for name, entry in one.items()}
    check_tensors(folder, {name: entry for name, entry in every.items() if name not in sealed}, model)
    placed = {name: path.name for path, one in found.items() for name in one}
    index = {
        "metadata": {"total_size": sum(path.stat().st_size for path in files)},
        "weight_map": dict(sorted(placed.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
