"""Blocks, embeddings and head whose numbers are made when they are needed.

A lazy module stands in the model with its structure and no numbers (meta tensors). Made resident it is, in this order,

    read        from the source's files, as Transformers makes a model's parameters of them (`conversion`); a mixture's
                experts are then taken apart, and all is cast to the type that the model computes in
    changed     by all that was done to it so far (a transform), again: cheaper than keeping it in 32 bits on a disk
    rounded     to the stored type, once that was asked for

or, once it is finished, taken from its artifact. What was put into it meanwhile and is small (ranges of static grids,
KV grids, a prefix) stays in memory.
"""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from phasequant.artifact import read_tensors
from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear, quant_linears
from phasequant.stream import lazy_of
from phasequant.streaming.memory import give_back
from phasequant.streaming.tensors import SourceTensors

ROWS = 4096
META = torch.device("meta")
Change = Callable[[nn.Module], None]
Read = Iterable[tuple[str, Tensor]]


def round_dense(module: nn.Module, stored: torch.dtype, *, but_linears: bool) -> None:
    """What stays dense takes its stored type's values; weights that will be codes are left exact until then."""
    left = {id(m.weight_dense) for _, m in quant_linears(module)} if but_linears else set()
    for parameter in module.parameters():
        if id(parameter) not in left:
            parameter.data = parameter.data.to(stored).to(parameter.dtype)


def round_model(model: nn.Module, stored: torch.dtype, *, but_linears: bool) -> None:
    """`round_dense` for a model; what is lazy in it is rounded whenever it is made."""
    round_dense(model, stored, but_linears=but_linears)
    for module in model.modules():
        lazy = lazy_of(module)
        if lazy is not None:
            lazy.round(stored, but_linears=but_linears)


def is_lazy(model: nn.Module) -> bool:
    """Whether a model's blocks are read when they are needed."""
    return any(isinstance(getattr(module, "lazy", None), LazyBlock) for module in model.modules())


class LazyBlock:
    """What makes the numbers of one block."""

    def __init__(
        self, block: nn.Module, read: Callable[[], Read], dtype: torch.dtype, arrange: Change | None = None
    ) -> None:
        """`block`: as Transformers lays it out, without numbers; `read`: (parameter, tensor) for all of it, anew at
        every call; `arrange`: lays it out as this package has it, at once and whenever it is read."""
        self.read, self.dtype, self.arrange = read, dtype, arrange
        self.pristine = copy.deepcopy(block)
        if arrange is not None:
            arrange(block)
        self.changes: list[Change] = []
        self.rounding: tuple[torch.dtype, bool] | None = None
        self.finished: Path | None = None
        self._prefix = ""

    def change(self, block: nn.Module, change: Change) -> None:
        """Change the block: its structure now, its numbers whenever they are made."""
        change(block)
        self.changes.append(change)

    def round(self, stored: torch.dtype, *, but_linears: bool) -> None:
        """Have what stays dense rounded from now on."""
        self.rounding = stored, but_linears

    def finish(self, artifact: Path, prefix: str) -> None:
        """From now on the block is what an artifact holds, its names without `prefix`."""
        self.finished, self._prefix = artifact, prefix

    @torch.no_grad()
    def fill(self, block: nn.Module, device: torch.device) -> None:
        """Give the block its numbers, on `device`."""
        if self.finished is not None:
            _assign(block, {n.removeprefix(self._prefix): t for n, t in read_tensors(self.finished).items()}, device)
            return
        made = copy.deepcopy(self.pristine)
        for key, tensor in self.read():
            owner, leaf = _owner(made, key)
            kept = tensor if self.arrange is not None else tensor.to(self.dtype, copy=True)
            owner._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
            del tensor, kept
        if self.arrange is not None:
            self.arrange(made)
            for owner in made.modules():
                for leaf, parameter in owner._parameters.items():
                    if parameter is not None:
                        kept = parameter.to(self.dtype, copy=True)  # what was read may be the file's own memory
                        owner._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
        made.to(device)
        for change in self.changes:
            change(made)
        if self.rounding is not None:
            stored, but_linears = self.rounding
            round_dense(made, stored, but_linears=but_linears)
        _adopt(block, made)

    def drop(self, block: nn.Module) -> None:
        """Let the numbers go; what is small and was not read stays."""
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to(META), requires_grad=False)
        for _, linear in quant_linears(block):
            linear._kept = None
            for module in linear.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and name != "input_range":
                        module._buffers[name] = buffer.to(META)
        give_back()


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _adopt(block: nn.Module, made: nn.Module) -> None:
    """Move the numbers of `made` into `block`, which has the same structure and perhaps more in it."""
    for name, module in made.named_modules():
        own = block.get_submodule(name)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                own._parameters[leaf] = parameter
        for leaf, buffer in module._buffers.items():
            before = own._buffers.get(leaf)
            if buffer is not None and (before is None or before.is_meta):
                own._buffers[leaf] = buffer
        if isinstance(own, QuantLinear):
            own._kept = None


def _assign(block: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give a laid-out block the tensors of a file, parameters in the type that they have in it."""
    for name, tensor in tensors.items():
        owner, leaf = _owner(block, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor.to(device)
        else:
            like = owner._parameters[leaf]
            assert like is not None
            owner._parameters[leaf] = nn.Parameter(tensor.to(device, like.dtype), requires_grad=False)


Rows = Callable[[Tensor], Tensor]


class LazyMatrix:
    """What makes the weight of the embeddings, or of the head: row by row, so that it need never be whole."""

    def __init__(self, source: SourceTensors, name: str, dtype: torch.dtype) -> None:
        self.source, self.name, self.dtype = source, name, dtype
        self.changes: list[Rows] = []
        self.rounding: torch.dtype | None = None
        self._home: nn.Parameter | None = None

    def change(self, change: Rows) -> None:
        """Change rows, fp64 → fp64."""
        self.changes.append(change)

    def round(self, stored: torch.dtype, *, but_linears: bool) -> None:
        """Have it rounded from now on."""
        self.rounding = stored

    @torch.no_grad()
    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, in `dtype` (default: what the model computes in)."""
        made = torch.empty(self.source.shapes[self.name], dtype=dtype or self.dtype)
        at = 0
        for raw in self.source.rows(self.name, ROWS):
            rows = raw.to(self.dtype, copy=True)
            for change in self.changes:
                rows.copy_(change(rows.to(torch.float64)))
            if self.rounding is not None:
                rows = rows.to(self.rounding).to(self.dtype)
            made[at : at + len(rows)].copy_(rows)
            at += len(rows)
            del raw, rows
        return made

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give the module its weight, on `device`."""
        self._home = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(self.whole().to(device), requires_grad=False)

    def drop(self, module: nn.Module) -> None:
        """Let it go."""
        if self._home is None:
            raise PhaseQuantError("a matrix that was not read cannot be let go")
        module._parameters["weight"], self._home = self._home, None
        give_back()
