r"""A quantized block whose few continuous parameters can be learned, its codes staying as they are.

    y = ( (q_w - z)·s·exp(a) ) · Q_c(x) + B·A·x + b        n(x)·γ·exp(g)

    scales      a, one for every scale of the weights         155,000 in SmolLM2, of 135 million parameters
    clips       c = sigmoid(p), one for the low grid of every group, for its keys and for its values
    norms       g, one for every gain of a norm (not where a router reads it: it would route elsewhere)
    branches    A and B of low-rank branches

Rounding is passed straight through. Floating-point codes have 8-bit scales, which stay; so do clips of static grids and
of groups that were raised. Everything is settled into the very tensors that a checkpoint holds: inference costs
nothing more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.nn import SLOT, KVQuantizer, QuantLinear, replace_module
from phasequant.numerics import LinearMap, QuantSpec, learning_product, unpack, weight_scale
from phasequant.transform.learned_grids import Grid, LearnedKV
from phasequant.transform.learned_maps import LearnedMap
from phasequant.transform.norms import gain_of, scale_bias, set_gain, stored_gain

LEAST_BITS_FREE = 8  # grids of so many bits have codes to spare: their clip stays


def _product(x: Float[Tensor, "*rows I"], weight: Shaped[Tensor, "O I"]) -> Float[Tensor, "*rows O"]:
    """x·Wᵀ: as learning takes it where gradients are, in full where something is measured."""
    return learning_product(x, weight, None if torch.is_grad_enabled() else False)


class _Reads(nn.Module):
    """What the linears of a group read: mapped and rounded once for all `readers`."""

    def __init__(self, linear: QuantLinear, grid: Grid | None, readers: int) -> None:
        super().__init__()
        self._linear, self._grid, self._readers = (linear,), (grid,), readers  # in tuples: not parameters of this
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._left = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mapped, rounded)."""
        if self._last is not None and self._last[0] is x:
            found = self._last[1:]
            self._left -= 1
            if not self._left:
                self._last = None
            return found
        (linear,), (grid,) = self._linear, self._grid
        mapped = linear.prepare(x.float())
        if grid is not None:
            rounded = grid(mapped)
        else:  # no gradient to its range, and the identity's to x
            rounded = mapped + (linear.rounded(mapped.detach()) - mapped.detach())
        self._left = self._readers - 1
        self._last = (x, mapped, rounded) if self._left else None
        return mapped, rounded


class PolishedLinear(nn.Module):
    """Stands in for a `QuantLinear`; see the module's docstring."""

    def __init__(self, linear: QuantLinear, reads: _Reads, wants: frozenset[str]) -> None:
        super().__init__()
        self._linear, self._reads = (linear,), (reads,)
        spec = linear.weight_spec
        self.log_scale: nn.Parameter | None = None
        self.register_buffer("codes", None)
        if spec is not None and spec.is_int:
            codes = unpack(linear.tensors.packed, linear.in_features, spec)  # type: ignore[arg-type]
            if not spec.symmetric:
                zero = linear.tensors.zero
                assert zero is not None
                width = linear.in_features // zero.shape[1]
                codes = codes.to(torch.int16) - zero.to(torch.int16).repeat_interleave(width, 1)
            self.codes = codes
            assert linear.weight_scale is not None
            self.log_scale = nn.Parameter(torch.zeros_like(linear.weight_scale), "scales" in wants)
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if linear.rank:
            assert linear.lowrank_down is not None and linear.lowrank_up is not None
            self.down = nn.Parameter(linear.lowrank_down.float(), "branches" in wants)
            self.up = nn.Parameter(linear.lowrank_up.float(), "branches" in wants)

    def _scale(self) -> Float[Tensor, "O G"]:
        """Scales as they would be stored; the gradient passes straight through that rounding."""
        (linear,) = self._linear
        assert self.log_scale is not None and linear.weight_scale is not None and linear.weight_spec is not None
        exact = linear.weight_scale * self.log_scale.exp()
        return exact + (weight_scale(exact, linear.weight_spec) - exact).detach()

    def product(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        """x times what the codes stand for, with the scales as they are being learned. A scale for each row is applied
        to the product: it then has a gradient without a product of its own."""
        (linear,) = self._linear
        if self.log_scale is None:
            return _product(x, linear.dense_weight())
        assert self.codes is not None
        scale = self._scale()
        if scale.shape[1] == 1:
            return _product(x, self.codes) * scale[:, 0]
        grouped = self.codes.to(x.dtype).unflatten(1, (scale.shape[1], -1))
        return _product(x, (grouped * scale[..., None]).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        (linear,), (reads,) = self._linear, self._reads
        mapped, rounded = reads(x)
        y = self.product(rounded)
        if linear.bias is not None:
            y = y + linear.bias.float()
        if self.down is not None and self.up is not None:
            read = rounded if linear.branch_rounded else mapped
            y = y + _product(_product(read, self.down), self.up)
        return y.to(x.dtype)

    @torch.no_grad()
    def settle(self, keep: bool) -> QuantLinear:
        """The linear, with what was learned if that is to be kept."""
        (linear,) = self._linear
        if not keep:
            return linear
        if self.log_scale is not None:
            assert linear.weight_scale is not None
            linear.weight_scale.copy_(self._scale())
        for name in ("down", "up"):
            learned, kept = getattr(self, name), getattr(linear, f"lowrank_{name}")
            if learned is not None:
                kept.copy_(learned)
        return linear


class _Gained(nn.Module):
    """A norm whose output is scaled by exp(g)."""

    def __init__(self, norm: nn.Module, log_gain: nn.Parameter) -> None:
        super().__init__()
        self.norm, self.log_gain = norm, log_gain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y * self.log_gain.exp().to(y.dtype)


class PolishedNorm:
    """A norm that learns its gain, in the place `name` of `parent`."""

    def __init__(self, parent: nn.Module, name: str, kind: str, wants: frozenset[str]) -> None:
        self.parent, self.name, self.kind = parent, name, kind
        self.norm = parent.get_submodule(name)
        gain = gain_of(self.norm, kind)
        self.log_gain = nn.Parameter(torch.zeros_like(gain, dtype=torch.float32), "norms" in wants)
        replace_module(parent, name, _Gained(self.norm, self.log_gain))

    @torch.no_grad()
    def settle(self, stored: torch.dtype, keep: bool) -> None:
        """Put the norm back; what was learned, if kept, rounded as it will be stored."""
        replace_module(self.parent, self.name, self.norm)
        if not keep:
            return
        before = gain_of(self.norm, self.kind)
        after = stored_gain(before * self.log_gain.exp().to(before), self.kind, stored)
        set_gain(self.norm, self.kind, after)
        scale_bias(self.norm, self.log_gain.exp().double())
        bias = getattr(self.norm, "bias", None)
        if bias is not None:
            bias.data = bias.data.to(stored).to(bias.dtype)


@dataclass
class Settled:
    """What the plan and the KV grids take over: clips of low grids by group, and the grids of keys and values."""

    clips: Mapping[str, float] = field(default_factory=dict)
    kv: tuple[QuantSpec, QuantSpec] | None = None


class PolishedBlock(nn.Module):
    """A quantized block, changed in place until `settle` puts it back together."""

    def __init__(self, block: nn.Module, model_map: ModelMap, wants: frozenset[str], qk: LinearMap | None) -> None:
        """`wants`: which of scales, clips, norms, branches are learned. `qk`: the map of its keys."""
        super().__init__()
        self.block = block
        self.model_map = model_map
        device = next(block.parameters()).device
        self.grids = nn.ModuleDict()
        self._names: dict[str, PolishedLinear] = {}
        for group in model_map.groups:
            for part in model_map.parts(group):
                first = block.get_submodule(part.linears[0])
                assert isinstance(first, QuantLinear)
                grid = self._grid(group.name, first.input_spec, wants, device)
                reads = _Reads(first, grid, len(part.linears))
                for name in part.linears:
                    linear = block.get_submodule(name)
                    assert isinstance(linear, QuantLinear)
                    self._names[name] = PolishedLinear(linear, reads, wants)
        for name, linear in self._names.items():
            replace_module(block, name, linear)
        names = dict.fromkeys(g.norm for g in model_map.groups if g.norm is not None)
        self.norms = [
            PolishedNorm(block, name, model_map.family.norm, wants)
            for name in names
            if not model_map.routers_behind(name)
        ]
        self.kv: LearnedKV | None = None
        attention = block.get_submodule(model_map.family.attention)
        self._quantizer = getattr(attention, SLOT, None)
        if isinstance(self._quantizer, KVQuantizer):
            layout = self._quantizer.layout
            learned = "clips" in wants and layout.keys.bits < LEAST_BITS_FREE
            own = None if qk is None else LearnedMap(qk).to(device).requires_grad_(False)
            keys, values = (Grid(s, learned=learned, device=device) for s in (layout.keys, layout.values))
            self.kv = LearnedKV(keys, values, own)
            setattr(attention, SLOT, self.kv)

    def _grid(self, group: str, spec: QuantSpec | None, wants: frozenset[str], device: torch.device) -> Grid | None:
        """The low grid of a group, its clip learned; None for grids that are taken as they are."""
        if spec is None or spec.static or not spec.is_int:
            return None
        if group not in self.grids:
            learned = "clips" in wants and spec.bits < LEAST_BITS_FREE
            self.grids[group] = Grid(spec, learned=learned, device=device)
        found = self.grids[group]
        assert isinstance(found, Grid)
        return found

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(kind, parameter) of everything that learns: scales, clips, norms, branches."""
        for linear in self._names.values():
            for kind, one in (("scales", linear.log_scale), ("branches", linear.down), ("branches", linear.up)):
                if one is not None and one.requires_grad:
                    yield kind, one
        for norm in self.norms:
            if norm.log_gain.requires_grad:
                yield "norms", norm.log_gain
        clips = [*self.grids.values(), *(() if self.kv is None else (self.kv.keys, self.kv.values))]
        for grid in clips:
            if grid.clip is not None:
                yield "clips", grid.clip.logit

    def forward(self, x: Tensor, **arguments: object) -> Tensor:
        """The block on (B, T, D)."""
        y = self.block(x, **arguments)
        return y[0] if isinstance(y, tuple) else y

    def settle(self, stored: torch.dtype, keep: bool = True) -> Settled:
        """Put the block back together, with what was learned if that is to be kept."""
        for name, linear in self._names.items():
            replace_module(self.block, name, linear.settle(keep))
        for norm in self.norms:
            norm.settle(stored, keep)
        if self.kv is not None:
            setattr(self.block.get_submodule(self.model_map.family.attention), SLOT, self._quantizer)
        return self._settled() if keep else Settled()

    def _settled(self) -> Settled:
        found = {group: grid.result() for group, grid in self.grids.items()}  # type: ignore[operator]
        clips = {group: float(spec.clip) for group, spec in found.items() if spec is not None}
        for group in self.model_map.groups:
            for name in group.linears:
                linear = self.block.get_submodule(name)
                assert isinstance(linear, QuantLinear)
                if group.name in clips and linear.input_spec is not None:
                    linear.input_spec = replace(linear.input_spec, clip=clips[group.name])
        if self.kv is None:
            return Settled(clips)
        assert isinstance(self._quantizer, KVQuantizer)
        layout = self._quantizer.layout
        grids = self.kv.keys.result() or layout.keys, self.kv.values.result() or layout.values
        self._quantizer.layout = replace(layout, keys=grids[0], values=grids[1])
        return Settled(clips, grids)


__all__ = ["PolishedBlock", "PolishedLinear", "PolishedNorm", "Settled"]
