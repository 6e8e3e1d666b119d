"""A Hugging Face directory as a `Source` whose blocks, embeddings and head are read when they are needed.

Before anything is allocated every tensor's shape is held against the config. Small tensors beside the blocks (the last
norm, positions) are read here. What is laid out otherwise in the files than in the model (experts, renamed parts) is
not streamed: `NotStreamable` says why, and the model can still be opened whole.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationConfig

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import is_capped, switch_attention
from phasequant.streaming.lazy import LazyBlock, LazyMatrix
from phasequant.streaming.skeleton import computed_buffers, skeleton
from phasequant.streaming.tensors import SourceTensors, check_values

META = torch.device("meta")
IGNORED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Ends of names that old files hold and models compute."""


class NotStreamable(PhaseQuantError):
    """This model cannot be read block by block; the message says why."""


class Opened:
    """A lazily opened model with what belongs to it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_map: ModelMap, source: SourceTensors
    ) -> None:
        self.model, self.tokenizer, self.map, self.source = model, tokenizer, model_map, source


def _check_shapes(model: PreTrainedModel, source: SourceTensors, tied: set[str]) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    persistent = {name for name in model.state_dict() if name not in expected}
    if persistent:
        raise NotStreamable(f"the model has tensors that are no weights ('{sorted(persistent)[0]}')")
    missing = sorted(expected.keys() - source.shapes.keys() - tied)
    extra = sorted(name for name in source.shapes.keys() - expected.keys() if not name.endswith(IGNORED))
    if missing:
        why = f"; they have '{extra[0]}' instead" if extra else ""
        raise NotStreamable(f"its files do not hold '{missing[0]}' (and {len(missing) - 1} more){why}")
    for name in sorted(expected.keys() & source.shapes.keys()):
        if source.shapes[name] != expected[name]:
            raise PhaseQuantError(
                f"the tensor '{name}' in {source.folder} has shape {source.shapes[name]}, and its config says "
                f"{expected[name]}: config and weights are not of one model; get its files again"
            )


def open_lazily(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> Opened:
    """Open a directory; `dtype`: what is computed in."""
    model_map = ModelMap.from_config(config)
    if model_map.family.experts is not None:
        raise NotStreamable("a mixture of experts stands in its files otherwise than in the model")
    source = SourceTensors(folder)
    if not source.shapes:
        raise NotStreamable(f"{folder} holds no safetensors")
    model = skeleton(config, dtype)
    model_map.check(model)
    family = model_map.family
    embeddings, head = model.get_submodule(family.embeddings), model.get_submodule(family.head)
    embedded, headed = f"{family.embeddings}.weight", f"{family.head}.weight"
    tied = head.weight is embeddings.weight
    if tied and headed in source.shapes:
        raise NotStreamable(f"its config ties the head to the embeddings, and its files hold '{headed}' too")
    _check_shapes(model, source, {headed} if tied else set())
    for index in model_map.blocks:
        prefix = model_map.block_name(index)
        block = model.get_submodule(prefix)
        if found := computed_buffers(block):
            raise NotStreamable(f"its blocks hold what no file does ('{found[0]}')")
        block.to(META)
        names = {name: f"{prefix}.{name}" for name, _ in block.named_parameters()}
        block.lazy = LazyBlock(block, source, names, dtype)
    embeddings.lazy = LazyMatrix(source, embedded, dtype)
    head.lazy = LazyMatrix(source, embedded if tied else headed, dtype)
    _read_rest(model, source, dtype, {embedded, headed}, f"{family.blocks}.")
    model.name_or_path = config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    if is_capped(model, model_map):
        switch_attention(model, model_map)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return Opened(model, tokenizer, model_map, source)


def _read_rest(model: PreTrainedModel, source: SourceTensors, dtype: torch.dtype, lazy: set[str], blocks: str) -> None:
    wanted = {name: name for name, _ in model.named_parameters() if name not in lazy and not name.startswith(blocks)}
    for name, tensor in source.read(wanted):
        check_values(name, tensor)
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[leaf] = nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)
