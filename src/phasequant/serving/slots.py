"""Slots: parameters that vLLM's loader finds by name, whose loaders hand each tensor on to where it belongs.

A fused layer of vLLM's has one slot a name; the loader is called once for each shard, whose own empty tensor is filled.
Shapes and types are compared, and what was never filled is found at the end: vLLM itself looks after neither in
quantized models.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from phasequant.errors import PhaseQuantError

Shard = str | int | None
DENSE = "weight_dense"  # may come in another floating-point type than it is computed in; codes and scales may not


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Buffers and parameters of a module by their dotted names, as a checkpoint has them."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


class Slots:
    """The slots of one layer: shard → name → the tensor to fill."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        targets: Mapping[Shard, Mapping[str, Tensor]],
        rank: int = 0,
        devices: int = 1,
    ) -> None:
        """Add the slots to `layer`, called `name` in messages; of several devices each takes its share of a tensor."""
        self.layer, self.name, self.targets = layer, name, targets
        self.rank, self.devices = rank, devices
        self.missing = {(shard, key) for shard, tensors in targets.items() for key in tensors}
        self.keys: list[str] = sorted({key for tensors in targets.values() for key in tensors})
        for key in self.keys:
            dtype = next(tensors[key].dtype for tensors in targets.values() if key in tensors)
            self._add(key, dtype)

    def _add(self, key: str, dtype: torch.dtype) -> None:
        *parents, leaf = key.split(".")
        holder = self.layer
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

        def load(_: nn.Parameter, given: Tensor, shard: Shard = None) -> None:
            self.fill(key, given, getattr(given, "shard_id", None) if shard is None else shard)

        slot.weight_loader = load  # type: ignore[attr-defined]
        holder.register_parameter(leaf, slot)

    def fill(self, key: str, given: Tensor, shard: Shard) -> None:
        """Copy a tensor of the checkpoint to its place."""
        target = self.targets.get(shard, {}).get(key)
        if target is None:
            raise PhaseQuantError(f"'{self.name}.{key}' (shard {shard}) is not in this checkpoint's layout")
        given = share(given, target.shape, self.rank, self.devices)
        if target.shape != given.shape or (target.dtype != given.dtype and key != DENSE):
            raise PhaseQuantError(
                f"'{self.name}.{key}' (shard {shard}) is {given.dtype} {tuple(given.shape)}, and its config says "
                f"{target.dtype} {tuple(target.shape)}: config and weights are not of one checkpoint; get it again"
            )
        with torch.no_grad():
            target.copy_(given)
        self.missing.discard((shard, key))

    def close(self) -> None:
        """All must be filled; take the slots away."""
        if self.missing:
            shard, key = sorted(self.missing, key=str)[0]
            raise PhaseQuantError(
                f"the checkpoint lacks {len(self.missing)} tensors of '{self.name}', first '{key}' (shard {shard}): "
                "get it again"
            )
        for key in self.keys:
            top = key.split(".")[0]
            if hasattr(self.layer, top):
                delattr(self.layer, top)


def share(given: Tensor, shape: torch.Size, rank: int, devices: int) -> Tensor:
    """The part of a tensor that a device of the shape wants: along the one axis that is as many times too long."""
    if given.dim() != len(shape):
        return given
    longer = [at for at, size in enumerate(shape) if given.shape[at] != size]
    if len(longer) != 1 or given.shape[longer[0]] != shape[longer[0]] * devices:
        return given
    size = shape[longer[0]]
    return given.narrow(longer[0], rank * size, size)


def sealed(layer: nn.Module, key: str, meant: Callable[[], Tensor]) -> None:
    """A slot whose tensor is compared, and not kept: it must be `meant()`."""

    def compare(_: nn.Parameter, given: Tensor, shard: Shard = None) -> None:
        if not torch.equal(given.cpu(), meant()):
            raise PhaseQuantError("the checkpoint's weights are not those of its config: get it again")

    slot = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    slot.weight_loader = compare  # type: ignore[attr-defined]
    layer.register_parameter(key, slot)
