"""A Hugging Face directory as a `Source` whose blocks, embeddings and head are read when they are needed.

Before anything is allocated every tensor's shape is held against the config. Small tensors beside the blocks (the last
norm, positions) are read here. Files may lay a model out otherwise than Transformers does (`conversion`), and
Transformers a mixture's experts otherwise than this package (`nn.experts`). What is in no file, or cannot be read in
parts, is not streamed: `NotStreamable` says why, and the model can still be opened whole.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationConfig

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import is_capped, switch_attention, take_block_apart
from phasequant.streaming.conversion import NotStreamable, Pieces, find_pieces, make
from phasequant.streaming.lazy import LazyBlock, LazyMatrix
from phasequant.streaming.skeleton import computed_buffers, skeleton
from phasequant.streaming.tensors import SourceTensors

__all__ = ["NotStreamable", "Opened", "open_lazily"]

META = torch.device("meta")
IGNORED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Ends of names that old files hold and models compute."""


class Opened:
    """A lazily opened model with what belongs to it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_map: ModelMap, source: SourceTensors
    ) -> None:
        self.model, self.tokenizer, self.map, self.source = model, tokenizer, model_map, source


def _check_shapes(model: PreTrainedModel, source: SourceTensors, pieces: Pieces, tied: set[str]) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    persistent = {name for name in model.state_dict() if name not in expected}
    if persistent:
        raise NotStreamable(f"the model has tensors that are no weights ('{sorted(persistent)[0]}')")
    missing = sorted(expected.keys() - pieces.of.keys() - tied)
    extra = [name for name in pieces.extra if not name.endswith(IGNORED)]
    if missing:
        why = f"; they have '{extra[0]}' instead" if extra else ""
        raise NotStreamable(f"its files do not hold '{missing[0]}' (and {len(missing) - 1} more){why}")
    for name in sorted(expected.keys() & pieces.of.keys()):
        piece = pieces.of[name]
        if piece.makes[name] != expected[name]:
            parts = "" if piece.converter is None else f" (made of '{piece.names[0]}' and {len(piece.names) - 1} more)"
            raise PhaseQuantError(
                f"the tensor '{name}'{parts} in {source.folder} has shape {piece.makes[name]}, and its config says "
                f"{expected[name]}: config and weights are not of one model; get its files again"
            )


def _check_types(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse parts that Transformers would compute in 32 bits."""
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    kept += list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else []
    if kept:
        raise NotStreamable(
            f"in {dtype} some of it ('{min(kept)}') stays in 32 bits, which is not streamed (with `dtype` bfloat16 in "
            "config.json nothing does)"
        )


def _lazy_block(
    model: PreTrainedModel, model_map: ModelMap, index: int, source: SourceTensors, pieces: Pieces, dtype: torch.dtype
) -> LazyBlock:
    prefix, config = f"{model_map.block_name(index)}.", model.config
    block = model.get_submodule(model_map.block_name(index))
    own = pieces.needed(f"{prefix}{name}" for name, _ in block.named_parameters())

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in make(own, source.read, config):
            yield name.removeprefix(prefix), tensor

    apart = None if model_map.family.experts is None else partial(take_block_apart, model_map=model_map)
    return LazyBlock(block, read, dtype, apart)


def open_lazily(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> Opened:
    """Open a directory; `dtype`: what is computed in."""
    model_map = ModelMap.from_config(config)
    source = SourceTensors(folder)
    if not source.shapes:
        raise NotStreamable(f"{folder} holds no safetensors")
    model = skeleton(config, dtype)
    _check_types(model, dtype)
    pieces = find_pieces(model, source.shapes)
    family = model_map.family
    embeddings, head = model.get_submodule(family.embeddings), model.get_submodule(family.head)
    embedded, headed = f"{family.embeddings}.weight", f"{family.head}.weight"
    tied = head.weight is embeddings.weight
    if tied and headed in pieces.of:
        raise NotStreamable(f"its config ties the head to the embeddings, and its files hold '{headed}' too")
    _check_shapes(model, source, pieces, {headed} if tied else set())
    for index in model_map.blocks:
        prefix = model_map.block_name(index)
        block = model.get_submodule(prefix)
        if found := computed_buffers(block):
            raise NotStreamable(f"its blocks hold what no file does ('{found[0]}')")
        block.to(META)
        block.lazy = _lazy_block(model, model_map, index, source, pieces, dtype)
    model_map.check(model)
    for module, name in ((embeddings, embedded), (head, embedded if tied else headed)):
        whole = pieces.only(name)
        if whole is None:
            raise NotStreamable(f"'{name}' is made of several tensors, and is read by rows")
        module.lazy = LazyMatrix(source, whole, dtype)
    _read_rest(model, source, pieces, dtype, {embedded, headed}, f"{family.blocks}.")
    model.name_or_path = config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    if is_capped(model, model_map):
        switch_attention(model, model_map)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return Opened(model, tokenizer, model_map, source)


def _read_rest(
    model: PreTrainedModel, source: SourceTensors, pieces: Pieces, dtype: torch.dtype, lazy: set[str], blocks: str
) -> None:
    wanted = [name for name, _ in model.named_parameters() if name not in lazy and not name.startswith(blocks)]
    for name, tensor in make(pieces.needed(wanted), source.read, model.config):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[leaf] = nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)
