r"""Linears on several devices (tensor parallel), in the integers of one.

    rows      q/k/v, gate/up: every device holds some of the outputs and sees the whole input. Nothing changes.
    columns   o, down: every device sees a part of the input, and the outputs are summed over devices.

               y = Σ_d s_x · s_w · Σ_{i in d} q_x[i]·q_w[i]

A token's scale s_x is that of its whole input: the largest magnitudes of the parts are exchanged (one number a token,
two on asymmetric grids), and each device puts them behind its part as columns of their own, whose weights are zero. So
every kernel finds the scale of the whole, and every integer is the one of a single device; only the sum over devices is
of rounded numbers. An online map must be blocks that divide among the devices (`support` refuses others).

Costs a token: one all-reduce of 4 to 8 bytes, and a tile of 64 columns more in the product.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.nn import ModelLayout, OnlineMap, QuantLinear, empty_linear
from phasequant.numerics import QuantSpec, pack, packed_width
from phasequant.runtime.linear import Linear
from phasequant.serving.slots import tensors_of

TILE = 64  # columns: what kernels want widths to be multiples of


def local_layout(online: dict[str, Any], devices: int) -> dict[str, Any]:
    """An online map's layout on one of the devices: its share of the blocks."""

    def share(side: list[int] | None) -> list[int] | None:
        return side if side is None or side[0] == 1 else [side[0] // devices, side[1]]

    return {
        **online,
        "blocks": online["blocks"] // devices,
        "left": share(online["left"]),
        "right": share(online["right"]),
    }


def extra_columns(weight: QuantSpec | None, given: QuantSpec | None) -> int:
    """Columns behind the input for what is exchanged: none where nothing is (16 bits, static grids)."""
    if given is None or given.static:
        return 0
    size = weight.group_size if weight is not None and weight.group_size else 1
    return -(-TILE // size) * size if size < TILE else size


class Columns:
    """A linear's share of the input's columns: laid out empty, filled by slots, then computing."""

    def __init__(
        self,
        layout: ModelLayout,
        block: int,
        group: str,
        width: int,
        out: int,
        devices: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`width`: columns of this device."""
        self.width = width
        given = layout.activations[block, group]
        weight = layout.weights_at(block, group)
        self.given, self.more = given, extra_columns(weight, given)
        plain = replace(layout, online={})
        self.part: QuantLinear = empty_linear(
            plain, block, group, (width + self.more, out), bias=False, device=device, dtype=dtype
        )
        self.map: OnlineMap | None = None
        if group in layout.online:
            self.map = OnlineMap(local_layout(layout.online[group], devices), device)
        self.linear: Linear | None = None

    def targets(self) -> dict[str, Tensor]:
        """What slots fill: this device's columns of every tensor."""
        found = {}
        for name, tensor in tensors_of(self.part).items():
            spec = self.part.weight_spec
            end = tensor.shape[-1]
            if name in ("weight_dense", "lowrank_down"):
                end = self.width
            elif name == "weight_packed" and spec is not None:
                end = packed_width(self.width, spec)
            elif name in ("weight_scale", "weight_zero") and spec is not None:
                end = spec.groups(self.width)
            found[name] = tensor.detach()[..., :end]
        if self.map is not None:
            found.update({f"online.{name}": tensor for name, tensor in tensors_of(self.map).items()})
        return found

    def close(self, device: torch.device, dtype: torch.dtype, bias: Tensor | None) -> None:
        """Zero weights behind the columns, and the kernel's layout."""
        part, spec = self.part, self.part.weight_spec
        if self.more:
            if spec is None:
                assert part.weight_dense is not None
                part.weight_dense.data[:, self.width :] = 0
            else:
                self._zero_codes(part, spec)
            if part.lowrank_down is not None:
                part.lowrank_down[:, self.width :] = 0
        if bias is not None:
            part.bias = nn.Parameter(bias, requires_grad=False)
        self.linear = Linear(part, device, dtype)
        self.linear.release([part])

    def _zero_codes(self, part: QuantLinear, spec: QuantSpec) -> None:
        assert part.weight_packed is not None and part.weight_scale is not None
        codes = torch.zeros(part.out_features, self.more, dtype=torch.int64, device=part.weight_packed.device)
        grouped = spec.granularity == "group"
        if part.weight_zero is not None and not grouped:
            codes += part.weight_zero.to(codes.dtype)
        like = replace(spec, granularity="channel", group_size=None)
        part.weight_packed[:, packed_width(self.width, spec) :] = pack(codes.to(torch.int32), like)
        if grouped:
            part.weight_scale[:, spec.groups(self.width) :] = 1
            if part.weight_zero is not None:
                part.weight_zero[:, spec.groups(self.width) :] = 0

    def describe(self) -> dict[str, str]:
        """As `Linear` does."""
        assert self.linear is not None
        return self.linear.describe()

    def plain(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """This device's part of the sum."""
        assert self.linear is not None
        read = x if self.map is None else self.map(x)
        return self.linear.plain(self._with_ends(read) if self.more else read)

    def _with_ends(self, read: Tensor) -> Tensor:
        assert self.given is not None
        if self.given.symmetric:
            ends = read.abs().amax(-1, keepdim=True)
        else:
            ends = torch.stack((read.amax(-1), -read.amin(-1)), -1)
        from vllm.distributed import get_tp_group

        wide = ends.float()
        dist.all_reduce(wide, op=dist.ReduceOp.MAX, group=get_tp_group().device_group)
        ends = wide.to(read.dtype)
        if not self.given.symmetric:
            ends = ends * torch.tensor([1.0, -1.0], dtype=read.dtype, device=read.device)
        behind = read.new_zeros(len(read), self.more)
        behind[:, : ends.shape[-1]] = ends
        return torch.cat((read, behind), -1)
