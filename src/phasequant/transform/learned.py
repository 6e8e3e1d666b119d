r"""A decoder block whose maps, scales and clips are parameters: what block-wise and end-to-end learning both stand on.

Every weight is made anew from the original at each step, quantized with a straight-through gradient, and used by the
model's own block: nothing of Transformers' attention or MLP is rewritten. With the maps of `contract.BlockTransform`:

    norm(x)·diag(c)·T  ─Q→  q, k, v, gate, up:   W' = V_outᵀ·(W / c)·T^{-T}  ─Q→
    o:     y·(M ⊗ I)   ─Q→  W' = W·V^{-T}·M^{-T} ─Q→
    down:  h·T         ─Q→  W' = (W / c)·T^{-T}  ─Q→       up's rows are multiplied by that c
    k·T, q·T^{-T} after RoPE, keys and values ─Q→          in the attention function

A clip ratio is sigmoid(p), p = 4 at the start (0.982, FlatQuant's), one per weight scale, one per input, key and value
grid. A scale is exp(p). Inverses of the small factors are taken at each step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.nn import QuantLinear, replace_module
from phasequant.nn.attention import SLOT
from phasequant.nn.prefix import PREFIX
from phasequant.numerics import LinearMap, QuantSpec, apply_map, grid, learning_product, polar, straight_through
from phasequant.optim import qr_orthogonal
from phasequant.transform.contract import MAPS, BlockTransform

CLIP_START = 4.0
LEAST_CLIP = 0.05
ALMOST_ONE = 0.998


def inverse(factor: Float[Tensor, "m n n"]) -> Float[Tensor, "m n n"]:
    """Inverses of a stack of small matrices, without the check that would make a CUDA device wait."""
    return torch.linalg.inv_ex(factor, check_errors=False).inverse


class LearnedMap(nn.Module):
    """A `LinearMap` whose factors are parameters (or stay fixed)."""

    diagonal: Tensor | None

    def __init__(self, start: LinearMap, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.start = start
        self.left = nn.Parameter(start.left.to(dtype))
        self.right = nn.Parameter(start.right.to(dtype)) if start.right is not None else None
        self.register_buffer("diagonal", None if start.diagonal is None else start.diagonal.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """The factors as they stand."""
        return self.left, self.right

    def forward(self, x: Tensor) -> Tensor:
        """x·T."""
        left, right = self.factors()
        return apply_map(x, left, right, tail=self.start.tail, diagonal=self.diagonal)

    def inverse_factors(self) -> tuple[Tensor, Tensor | None]:
        """Factors of T^{-T}."""
        left, right = self.factors()
        return inverse(left).transpose(-1, -2), None if right is None else inverse(right).transpose(-1, -2)

    def inverse_transpose(self, weight: Tensor, heads: tuple[int, int] | None = None) -> Tensor:
        """weight·T^{-T}; with `heads` (kv heads, heads), of a map of kv heads as all query heads see it."""
        left, right = self.inverse_factors()
        diagonal = None if self.diagonal is None else self.diagonal.reciprocal()
        if heads is not None:
            kv_heads, times = heads[0], heads[1] // heads[0]
            if len(left) > 1:
                left = left.unflatten(0, (kv_heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
            if diagonal is not None:
                diagonal = diagonal.unflatten(0, (kv_heads, -1)).repeat_interleave(times, 0).flatten()
        return apply_map(weight, left, right, tail=self.start.tail, diagonal=diagonal)

    def result(self) -> LinearMap:
        """The map as it stands, fp64; the very start where it does not learn."""
        if not self.left.requires_grad:
            return self.start
        left, right = (None if f is None else f.detach().to("cpu", torch.float64) for f in self.factors())
        assert left is not None
        return replace(self.start, kind="learned", left=left, right=right, orthogonal=False)


class LearnedRotation(LearnedMap):
    """A map whose factors stay orthogonal by their optimizer (Cayley): its inverse transpose is itself."""

    def hold(self, on: bool) -> None:
        """Compute the factors once for many uses, where that costs anything; here it does not."""

    def inverse_factors(self) -> tuple[Tensor, Tensor | None]:
        """The factors themselves."""
        return self.factors()

    def result(self) -> LinearMap:
        """The rotation as it stands, fp64, cleaned of rounding; the very start where it does not learn."""
        if not self.left.requires_grad:
            return self.start
        left, right = (None if f is None else polar(f.detach().to("cpu", torch.float64)) for f in self.factors())
        assert left is not None
        return replace(self.start, kind="learned", left=left, right=right, orthogonal=True)


class QrRotation(LearnedRotation):
    """A rotation as the Q of free matrices (QR-Orth): any optimizer may move them."""

    _held: tuple[Tensor, Tensor | None] | None = None

    def hold(self, on: bool) -> None:
        """Take the QR now and use it until the next call: a rotation that all blocks share needs one a step."""
        self._held = None
        if on:
            self._held = self.factors()

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Q of the QR decomposition, signs fixed."""
        if self._held is not None:
            return self._held
        return qr_orthogonal(self.left), None if self.right is None else qr_orthogonal(self.right)


class Clip(nn.Module):
    """sigmoid(p): fractions of the largest magnitude."""

    def __init__(self, start: Float[Tensor, "..."]) -> None:
        """Begins at the fractions `start`; where those are 1, at FlatQuant's 0.982."""
        super().__init__()
        self.shape = start.shape
        self.logit = nn.Parameter(torch.empty(start.numel(), device=start.device))
        self.begin_at(start)

    @torch.no_grad()
    def begin_at(self, start: Float[Tensor, "..."]) -> None:
        """Begin at other fractions."""
        logits = torch.logit(start.float().clamp(LEAST_CLIP, ALMOST_ONE))
        self.logit.copy_(torch.where(start < 1, logits, CLIP_START).flatten())

    def forward(self) -> Tensor:
        """The fractions."""
        return self.logit.sigmoid().reshape(self.shape)


class Grid(nn.Module):
    """A grid with a clip that is learned or fixed; no spec: the input stays as it is."""

    fixed: Tensor | None

    def __init__(
        self,
        spec: QuantSpec | None,
        *,
        learned: bool,
        start: Float[Tensor, "..."] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`start`: clip ratios to begin with, or to stay at where they are not learned; default: the grid's own."""
        super().__init__()
        self.spec = spec
        self.clip: Clip | None = None
        self.register_buffer("fixed", start)
        if learned and spec is not None:
            own = torch.tensor(1.0 if spec.clip == "mse" else float(spec.clip), device=device)
            self.clip = Clip(own if start is None else start)

    def forward(self, x: Tensor) -> Tensor:
        """x rounded, with a straight-through gradient."""
        if self.spec is None:
            return x
        return straight_through(x, self.spec, self.fixed if self.clip is None else self.clip())

    def result(self) -> QuantSpec | None:
        """The grid with its learned clip, if it has one."""
        if self.clip is None or self.spec is None:
            return None
        return replace(self.spec, clip=float(self.clip().detach()))


class LearnedKV(nn.Module):
    """Stands in an attention module where a `KVQuantizer` would: rounds, and hands dense states on."""

    enabled = True

    def __init__(self, keys: Grid, values: Grid, qk: LearnedMap | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.qk = qk

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped and rounded keys, rounded values."""
        return self.keys(keys if self.qk is None else self.qk(keys)), self.values(values)

    def rotate_keys(self, keys: Tensor) -> Tensor:
        """k·T, of the prefix, which is not rounded."""
        return keys if self.qk is None else self.qk(keys)

    def decode(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """They are dense already."""
        return _for_attention(states)

    def rotate_queries(self, queries: Tensor) -> Tensor:
        """q·T^{-T}."""
        return _for_attention(queries if self.qk is None else self.qk.inverse_transpose(queries))


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


def _for_attention(states: Tensor) -> Tensor:
    """In bfloat16 on a GPU, which has fast attention for that alone; keys and values were rounded to 4 bits before."""
    return states.bfloat16() if states.is_cuda else states


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


def searched_clips(weight: Float[Tensor, "O I"], spec: QuantSpec) -> Float[Tensor, "O G"]:
    """The clip ratio that the MSE search finds for every scale of a weight."""
    searched, _ = grid(weight, replace(spec, clip="mse"))
    plain, _ = grid(weight, replace(spec, clip=1.0))
    return searched / plain
