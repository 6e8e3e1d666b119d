r"""A decoder block whose maps, scales and clips are parameters: what block-wise and end-to-end learning both stand on.

Every weight is made anew from the original at each step, quantized with a straight-through gradient, and used by the
model's own block: nothing of Transformers' attention or MLP is rewritten. With the maps of `contract.BlockTransform`:

    norm(x)·diag(c)·T  ─Q→  q, k, v, gate, up:   W' = V_outᵀ·(W / c)·T^{-T}  ─Q→
    o:     y·(M ⊗ I)   ─Q→  W' = W·V^{-T}·M^{-T} ─Q→
    down:  h·T         ─Q→  W' = (W / c)·T^{-T}  ─Q→       up's rows are multiplied by that c
    k·T, q·T^{-T} after RoPE, keys and values ─Q→          in the attention function

Maps are `learned_maps`, clips `learned_grids`; a scale is exp(p).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.nn import QuantLinear, replace_module
from phasequant.nn.attention import SLOT
from phasequant.nn.prefix import PREFIX
from phasequant.numerics import LinearMap, QuantSpec, learning_product
from phasequant.transform.contract import MAPS, BlockTransform
from phasequant.transform.learned_grids import Clip, Grid, LearnedKV, searched_clips
from phasequant.transform.learned_maps import LearnedMap


class _Reader(nn.Module):
    """A linear whose weight is made at each call."""

    def __init__(self, inputs: Callable[[Tensor], Tensor], dense: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.inputs, self.dense = inputs, dense

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.dense()
        y = learning_product(self.inputs(x.float()), weight, None if torch.is_grad_enabled() else False)
        return y if bias is None else y + bias


class _Prepared(nn.Module):
    """A norm, and what its readers' quantizer does: scale, map, round. Done once for all of them."""

    def __init__(self, norm: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.prepare = norm, prepare

    def forward(self, x: Tensor) -> Tensor:
        return self.prepare(self.norm(x))


class _Turned(nn.Module):
    """A router, which is not rounded, behind a norm of the rotated stream: x·R1ᵀ is what it reads."""

    def __init__(self, router: nn.Module, residual: LearnedMap) -> None:
        super().__init__()
        self.router = router
        self.residual = (residual,)

    def forward(self, x: Tensor) -> Any:
        (residual,) = self.residual
        return self.router(x @ residual.factors()[0][0].T)


class LearnedBlock(nn.Module):
    """A block (changed in place, its weights frozen) whose transform is `parameters()`. `clips`: of which grids they
    are learned (weights, activations, kv); `maps`, `scales`: whether those are."""

    def __init__(
        self,
        block: nn.Module,
        model_map: ModelMap,
        start: BlockTransform,
        inputs: dict[str, QuantSpec | None],
        weights: QuantSpec | None,
        kv: QuantSpec | None,
        *,
        clips: frozenset[str] = frozenset(),
        maps: frozenset[str] = frozenset(),
        scales: bool = False,
        weight_starts: dict[str, Tensor] | None = None,
        residual: LearnedMap | None = None,
        make: type[LearnedMap] = LearnedMap,
    ) -> None:
        """`weight_starts`: clip ratios of the weights' scales, by linear. `residual`: a rotation of the residual
        stream, which belongs to all blocks; `block`'s norms then have no gain. `make`: how maps are parameters."""
        super().__init__()
        self.block = block.requires_grad_(False)
        self.model_map = model_map
        self._residual = (residual,)  # in a tuple: it is no parameter of this block
        device = next(block.parameters()).device
        names = [n for n in MAPS if getattr(start, n) is not None and (n != "qk" or kv is not None)]
        self.maps = nn.ModuleDict({n: make(getattr(start, n)).to(device) for n in names})
        for name, module in self.maps.items():
            module.requires_grad_(name in maps)
        self.log_scales = nn.ParameterDict(
            {
                g: nn.Parameter(start.scales[g].to(device, torch.float32).log(), scales)
                for g in model_map.scaled
                if g in start.scales
            }
        )
        self.inputs = nn.ModuleDict(
            {g: Grid(spec, learned="activations" in clips, device=device) for g, spec in inputs.items()}
        )
        self.weight_grids = nn.ModuleDict()
        self._frozen: dict[str, tuple[Tensor, Tensor | None]] = {}
        for group in model_map.groups:
            for name in group.linears:
                linear = block.get_submodule(name)
                weight = linear.dense_weight() if isinstance(linear, QuantLinear) else linear.get_parameter("weight")
                bias = getattr(linear, "bias", None)
                self._frozen[name] = weight.detach().float(), None if bias is None else bias.detach().float()
                begin = None if weight_starts is None else weight_starts[name].to(device).float()
                if begin is None and weights is not None:
                    begin = torch.ones(len(weight), weights.groups(weight.shape[1]), device=device)
                self.weight_grids[_key(name)] = Grid(weights, learned="weights" in clips, start=begin)
        self.kv: LearnedKV | None = None
        if kv is not None:
            qk = self._map("qk")
            keys, values = (Grid(kv, learned="kv" in clips, device=device) for _ in range(2))
            self.kv = LearnedKV(keys, values, qk)
            setattr(block.get_submodule(model_map.family.attention), SLOT, self.kv)
        prefix = getattr(block.get_submodule(model_map.family.attention), PREFIX, None)
        if prefix is not None:
            prefix.value_map = self._map("value")
        self._install()

    def _map(self, name: str) -> LearnedMap | None:
        if name not in self.maps:
            return None
        found = self.maps[name]
        assert isinstance(found, LearnedMap)
        return found

    def _scale(self, group: str) -> Tensor | None:
        """What a group's input is scaled by."""
        name = self.model_map.scale_of(group)
        return None if name is None or name not in self.log_scales else self.log_scales[name].exp()

    def _install(self) -> None:
        (residual,) = self._residual
        for group in self.model_map.groups:
            prepare = self._preparer(group.name)
            routers = self.model_map.routers_behind(group.norm) if group.norm is not None else ()
            for router in routers if residual is not None else ():
                assert residual is not None
                replace_module(self.block, router, _Turned(self.block.get_submodule(router), residual))
            if group.norm is not None and not self.model_map.shared(group.norm):  # once for all that read it
                norm = self.block.get_submodule(group.norm)
                replace_module(self.block, group.norm, _Prepared(norm, prepare))
                prepare = _same
            for name in group.linears:
                replace_module(self.block, name, _Reader(prepare, self._maker(name, group.name)))

    def _preparer(self, group: str) -> Callable[[Tensor], Tensor]:
        rounded, online = self.inputs[group], self._map("heads" if group == "o" else group)
        behind_norm = self.model_map.group(group).norm is not None

        def prepare(x: Tensor) -> Tensor:
            scale = self._scale(group) if behind_norm else None  # down's stands in up's rows
            if scale is not None:
                x = x * scale
            return rounded(x if online is None else online(x))

        return prepare

    def _maker(self, name: str, group: str) -> Callable[[], tuple[Tensor, Tensor | None]]:
        transformed, rounded = self._transformed(name, group), self.weight_grids[_key(name)]

        def make() -> tuple[Tensor, Tensor | None]:
            weight, bias = transformed()
            return rounded(weight), bias

        return make

    def _transformed(self, name: str, group: str) -> Callable[[], tuple[Tensor, Tensor | None]]:
        family, shape = self.model_map.family, self.model_map.shape
        online = self._map("heads" if group == "o" else group)
        value, (residual,) = self._map("value"), self._residual
        reads_norm = self.model_map.group(group).norm is not None

        def make() -> tuple[Tensor, Tensor | None]:
            weight, bias = self._frozen[name]
            if reads_norm and residual is not None:
                weight = residual(weight)
            scale = self._scale(group)
            if scale is not None:
                weight = weight / scale
            if name == family.value and value is not None:
                weight, bias = _changed(weight, bias, self.model_map.value_rows, lambda x: value(x.t()).t())
            if name in family.ups and "down" in self.log_scales:
                times = self.log_scales["down"].exp()
                weight, bias = _changed(weight, bias, self.model_map.up_rows, lambda x: (x.t() * times).t())
            if group == "o" and value is not None:
                weight = value.inverse_transpose(weight, (shape.kv_heads, shape.heads))
            if online is not None:
                weight = online.inverse_transpose(weight)
            if name in family.writers and residual is not None:
                weight = residual(weight.T).T
                bias = None if bias is None else residual(bias)
            return weight, bias

        return make

    @torch.no_grad()
    def search_clips(self, spec: QuantSpec) -> None:
        """Begin the clips of weights where the MSE search finds them, on the weights as the maps now make them."""
        for group in self.model_map.groups:
            for name in group.linears:
                clip = self.weight_grids[_key(name)].clip
                if isinstance(clip, Clip):
                    clip.begin_at(searched_clips(self._transformed(name, group.name)()[0], spec))

    def forward(self, x: Tensor, **arguments: object) -> Tensor:
        """The block on (B, T, D)."""
        y = self.block(x, **arguments)
        return y[0] if isinstance(y, tuple) else y

    @torch.no_grad()
    def result(self, start: BlockTransform, **notes: float) -> BlockTransform:
        """What was learned, as a `BlockTransform`; what was not is `start`'s."""
        maps: dict[str, LinearMap | None] = {n: getattr(start, n) for n in MAPS}
        maps |= {name: module.result() for name, module in self.maps.items()}  # type: ignore[operator]
        inputs = {g: one.result() for g, one in self.inputs.items()}  # type: ignore[operator]
        kv: tuple[QuantSpec, QuantSpec] | None = None
        if self.kv is not None:
            keys, values = self.kv.keys.result(), self.kv.values.result()
            kv = None if keys is None or values is None else (keys, values)
        weight_clips = {}
        for name in self._frozen:
            clip = self.weight_grids[_key(name)].clip
            if clip is not None:
                weight_clips[name] = clip().cpu()  # type: ignore[operator]
        conditions = [found.condition() for found in maps.values() if found is not None and not found.orthogonal]
        notes |= {"condition": max(conditions)} if conditions else {}
        return BlockTransform(
            **maps,
            scales={g: p.detach().exp().to("cpu", torch.float64) for g, p in self.log_scales.items()},
            weight_clips=weight_clips,
            inputs={g: spec for g, spec in inputs.items() if spec is not None},
            kv=kv,
            notes=notes,
        )


def _key(name: str) -> str:
    return name.replace(".", "_")


def _same(x: Tensor) -> Tensor:
    return x


def _changed(
    weight: Tensor, bias: Tensor | None, rows: slice, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Some rows of a linear changed: the first ones stay, and all from `rows.start` on are `change`d."""
    kept = rows.start or 0

    def of(x: Tensor) -> Tensor:
        return change(x) if not kept else torch.cat((x[:kept], change(x[kept:])))

    return of(weight), None if bias is None else of(bias)
