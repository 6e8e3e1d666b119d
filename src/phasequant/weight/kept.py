"""Finished blocks of a run on disk, each under a hash of all that it depends on; a killed run goes on behind them.

An artifact is the block as the checkpoint will hold it: codes, scales and factors as they are, the rest in the stored
type. Its name has seen what is common to the run (recipe, plan, transform, versions, the source's files or the tokens)
and every block up to its own as it was before it was quantized. So what is taken is what would be computed again, bit
for bit. Of several ranks the first writes, and all read: the folder is one that all of them see.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.artifact import read_tensors, told_of, write_artifact
from phasequant.fingerprint import Fingerprint
from phasequant.nn import QuantLinear, quant_linears
from phasequant.numerics import QuantSpec
from phasequant.ranks import agreed, leads, wait
from phasequant.stream import finish, resident

VERSION = 1  # of what a kept block means


class KeptCodes:
    """The finished blocks of one run: `see` every block in order, then `told`, then `read` or `write`."""

    def __init__(self, folder: Path, common: str, stored: torch.dtype, *, rounded: bool = False) -> None:
        """`common`: what all blocks depend on; `stored`: type of what is not codes; `rounded`: what branches read."""
        self.folder, self.stored, self.rounded = folder, stored, rounded
        self.taken = 0
        self.paths: dict[int, Path] = {}
        self._past = Fingerprint()
        self._past.text(f"{VERSION} {common}")
        self._key = ""

    def add(self, tensors: list[Tensor]) -> None:
        """More that all blocks depend on."""
        for tensor in tensors:
            self._past.tensor(tensor)

    def see(self, index: int, block: nn.Module) -> None:
        """The next block, not quantized yet."""
        if not leads():  # rank 0's word counts
            return
        self._past.text(f"block {index}")
        for name, tensor in block.state_dict().items():
            if not tensor.is_meta:  # a streamed block is known by its source and transform
                self._past.text(name)
                self._past.tensor(tensor)
        for name, linear in quant_linears(block):
            self._past.text(f"{name} {linear.input_spec}")
        self._key = self._past.hex(64)

    def path(self, index: int) -> Path:
        """Where a block's artifact is."""
        return self.folder / f"block-{index:05d}.safetensors"

    def told(self, index: int) -> Any | None:
        """What was told of the block that was seen last, if it was finished by an earlier run."""
        found = agreed(told_of(self.path(index), self._key) if leads() else None)
        if found is not None:
            self.taken += 1
            self.paths[index] = self.path(index)
        return found

    def read(self, index: int, prefix: str) -> dict[str, Tensor]:
        """A finished block's tensors, by their names in the block."""
        return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(self.path(index)).items()}

    def write(self, index: int, block: nn.Module, prefix: str, told: Any) -> None:
        """Keep the block that was seen last, quantized now."""
        parameters = {name for name, _ in block.named_parameters()}
        tensors = {
            prefix + name: tensor.to(self.stored) if name in parameters else tensor
            for name, tensor in block.state_dict().items()
        }
        if leads():
            write_artifact(self.path(index), self._key, tensors, told)
        wait()
        self.paths[index] = self.path(index)
        finish(block, self.path(index), prefix)

    def settle(self, index: int, block: nn.Module, prefix: str, specs: Mapping[str, QuantSpec]) -> None:
        """Give a block, whose linears are dense, the codes that were kept of it."""
        tensors = self.read(index, prefix)
        for name, spec in specs.items():
            _take(_linear(block, name), name, tensors, spec, self.rounded)
        finish(block, self.path(index), prefix)

    def show(self, index: int, block: nn.Module, prefix: str, specs: Mapping[str, QuantSpec]) -> None:
        """Have a block compute as it did behind its own quantization: with dense weights, the values of its codes."""
        tensors = self.read(index, prefix)
        for name, spec in specs.items():
            linear = _linear(block, name)
            bare = copy.copy(linear)
            bare._buffers, bare._parameters = dict(linear._buffers), dict(linear._parameters)
            _take(bare, name, tensors, spec, self.rounded)
            assert linear.weight_dense is not None
            linear.weight_dense.data = bare.dense_weight().to(linear.weight_dense.dtype)
            if bare.lowrank_down is not None and bare.lowrank_up is not None:
                linear.set_branch(bare.lowrank_down, bare.lowrank_up, rounded=self.rounded)


def keep_blocks(model: PreTrainedModel, model_map: ModelMap, kept: KeptCodes, device: torch.device) -> list[Path]:
    """The artifacts of all blocks, in order; blocks without codes, which no walk has kept, are written now."""
    for index in model_map.blocks:
        if index in kept.paths:
            continue
        block, prefix = model.get_submodule(model_map.block_name(index)), f"{model_map.block_name(index)}."
        kept.see(index, block)
        if kept.told(index) is None:
            with resident(block, device):
                kept.write(index, block, prefix, [])
        else:
            finish(block, kept.path(index), prefix)
    return [kept.paths[index] for index in model_map.blocks]


PARTS = ("weight_packed", "weight_scale", "weight_zero", "weight_global", "lowrank_down", "lowrank_up")


def _linear(block: nn.Module, name: str) -> QuantLinear:
    found = block.get_submodule(name)
    assert isinstance(found, QuantLinear) and found.weight_dense is not None
    return found


def _take(linear: QuantLinear, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, rounded: bool) -> None:
    """Replace dense weights by the codes and branch that a file holds of a linear."""
    assert linear.weight_dense is not None
    device = linear.weight_dense.device
    linear.weight_spec, linear.weight_dense = spec, None
    for part in PARTS:
        tensor = tensors.get(f"{name}.{part}")
        setattr(linear, part, None if tensor is None else tensor.to(device))
    if linear.lowrank_down is not None:
        linear.branch_rounded, linear._rank_laid_out = rounded, len(linear.lowrank_down)
