"""`QuantLinear`: packed weights, the grid its input is read on, and what is done to the input before.

    y = W̃ · Q( online(x) ) + B·A·online(x) + b          B·A: a low-rank branch in 16 bits, where there is one

Q takes its range from each token (or call), or is static: calibrated, in `input_range`.

On disk and in memory the weights are codes (two to a byte up to 4 bits) with fp32 scales (out, groups) and, where the
grid is asymmetric, zero points; FP4 codes have their own 8-bit scales (bytes), and NVFP4's second one. With 16-bit
weights the tensor is `weight_dense`: never `weight`, so that a loader that does not know this package finds nothing it
could mistake for a plain linear.

What the kernel makes of the weights (`Kernel.prepare`) is kept until one of them, the spec or the device is another:
every call compares identity, address and version of all tensors held. Only what is written through `.data` goes
unseen: write to the tensors themselves. Copies, pickles, moves and state dicts leave it behind.

On a CPU linears of a group map what they read once (`shared_maps`; kernels keep its codes likewise).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.errors import PhaseQuantError
from phasequant.kernels import Kernel, LinearSpec, LinearTensors, Prepared, choose, dense_weight, round_input
from phasequant.nn.online import OnlineMap
from phasequant.nn.shared_maps import SharedMaps, stamp_of
from phasequant.numerics import QuantSpec, pack, packed_width, read_scales, store_scales, wide_rows


class _Kept(NamedTuple):
    """Prepared weights: `stamp` says of what, `held` keeps the identities in it from being given out again."""

    stamp: tuple[Any, ...]
    held: tuple[Tensor | None, ...]
    kernel: Kernel
    spec: LinearSpec
    weights: Prepared


_maps = SharedMaps()


class QuantLinear(nn.Module):
    """A linear of a quantized model; `kernels.reference` defines its forward."""

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    weight_global: Tensor | None
    lowrank_down: Tensor | None
    lowrank_up: Tensor | None
    input_range: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        weight_spec: QuantSpec | None = None,
        input_spec: QuantSpec | None = None,
        online: OnlineMap | None = None,
        rank: int = 0,
        branch_rounded: bool = False,
        branch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Empty buffers of the right shapes, to be filled by a quantizer or a loader."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.input_spec = input_spec
        self.weight_spec = weight_spec
        self.online = online
        self._kept: _Kept | None = None
        self._rows_seen = 0
        self._rows_wide: Tensor | None = None
        self.weight_dense: nn.Parameter | None = None
        if weight_spec is None:
            dense = torch.empty(out_features, in_features, device=device, dtype=dtype)
            self.weight_dense = nn.Parameter(dense, requires_grad=False)
        self._register_codes(weight_spec, device)
        self.branch_rounded = branch_rounded
        self._rank_laid_out = rank
        down = torch.empty(rank, in_features, dtype=branch_dtype, device=device) if rank else None
        up = torch.empty(out_features, rank, dtype=branch_dtype, device=device) if rank else None
        self.register_buffer("lowrank_down", down)
        self.register_buffer("lowrank_up", up)
        self.register_buffer("input_range", self._empty_range(input_spec, device))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)

    def _empty_range(self, spec: QuantSpec | None, device: torch.device | None) -> Tensor | None:
        if spec is None or not spec.static:
            return None
        return torch.empty(2, self.in_features if spec.granularity == "column" else 1, device=device)

    def _register_codes(self, spec: QuantSpec | None, device: torch.device | None) -> None:
        packed = scale = zero = second = None
        if spec is not None:
            shape = (self.out_features, spec.groups(self.in_features))
            width = packed_width(self.in_features, spec)
            packed = torch.empty(self.out_features, width, dtype=torch.uint8, device=device)
            scale = torch.empty(shape, dtype=torch.float32 if spec.is_int else torch.uint8, device=device)
            if spec.kind == "nvfp4":
                second = torch.empty(1, dtype=torch.float32, device=device)
            zero = None if spec.symmetric else torch.empty(shape, dtype=torch.uint8, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", zero)
        self.register_buffer("weight_global", second)

    @classmethod
    def dense(
        cls, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None, online: OnlineMap | None = None
    ) -> "QuantLinear":
        """With 16-bit weights, to be quantized later or not at all."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias=bias is not None, online=online, dtype=weight.dtype)
        module.weight_dense = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def set_codes(
        self,
        codes: Tensor,
        scale: Float[Tensor, "O G"],
        zero: Float[Tensor, "O G"],
        spec: QuantSpec,
        peak: Float[Tensor, ""] | None = None,
    ) -> None:
        """Replace the dense weights by codes; `peak`: what NVFP4's second scale was taken from."""
        device = scale.device
        self.weight_spec = spec
        self.weight_dense = None
        self._register_codes(spec, device)
        self.weight_packed = pack(codes, spec)
        self.weight_scale, self.weight_global = store_scales(scale.to(torch.float32), spec, peak)
        if not spec.symmetric:
            self.weight_zero = zero.to(torch.uint8)

    def set_branch(self, down: Float[Tensor, "r I"], up: Float[Tensor, "O r"], *, rounded: bool) -> None:
        """Add a low-rank branch; `rounded`: it reads the input as its grid rounds it."""
        self.lowrank_down, self.lowrank_up, self.branch_rounded = down.clone(), up.clone(), rounded
        self._rank_laid_out = len(down)

    def set_range(self, calibrated: Float[Tensor, "2 m"] | None) -> None:
        """What a static input grid reads: the lowest and highest value, of all columns or of each."""
        device = next(b for b in (self.weight_dense, self.weight_packed) if b is not None).device
        self.input_range = None if calibrated is None else calibrated.to(device, torch.float32, copy=True)

    def rounded(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows I"]:
        """A prepared input as its grid rounds it; as it comes where it has none."""
        return round_input(x, self.tensors, self.spec)

    @property
    def rank(self) -> int:
        """Of the low-rank branch; 0 where there is none."""
        return 0 if self.lowrank_down is None else len(self.lowrank_down)

    def check(self, name: str) -> None:
        """Raise where a tensor does not have the shape that the spec promises: a loader may not look."""
        expected: dict[str, tuple[int, ...]] = {"weight_dense": (self.out_features, self.in_features)}
        if self.weight_spec is not None:
            scales = (self.out_features, self.weight_spec.groups(self.in_features))
            packed = (self.out_features, packed_width(self.in_features, self.weight_spec))
            expected = {"weight_packed": packed, "weight_scale": scales, "weight_zero": scales, "weight_global": (1,)}
        expected["lowrank_down"] = (self._rank_laid_out, self.in_features)
        expected["lowrank_up"] = (self.out_features, self._rank_laid_out)
        if self.input_spec is not None and self.input_spec.static:
            expected["input_range"] = (2, self.in_features if self.input_spec.granularity == "column" else 1)
        for key, shape in expected.items():
            tensor = getattr(self, key)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise PhaseQuantError(
                    f"'{name}.{key}' has shape {tuple(tensor.shape)}, and its config says {shape}: "
                    "config and weights are not of one checkpoint; get it again"
                )

    @property
    def spec(self) -> LinearSpec:
        """What a kernel is asked."""
        return LinearSpec(
            self.in_features, self.out_features, self.weight_spec, self.input_spec, self.rank, self.branch_rounded
        )

    @property
    def tensors(self) -> LinearTensors:
        """What a kernel is given; zero points are 0 where the grid is symmetric."""
        zero, scale = self.weight_zero, self.weight_scale
        if scale is not None:
            assert self.weight_spec is not None
            scale = read_scales(scale, self.weight_spec, self.weight_global)
            zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        return LinearTensors(
            self.weight_dense,
            self.weight_packed,
            scale,
            zero,
            self.bias,
            self.lowrank_down,
            self.lowrank_up,
            self.input_range,
        )

    def dense_weight(self) -> Float[Tensor, "O I"]:
        """The weights as floating-point numbers, dequantized where they are codes; without the low-rank branch."""
        return dense_weight(self.tensors, self.spec)

    def prepare(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows I"]:
        """What the quantizer of the input sees."""
        return x if self.online is None else _maps.map(x, self.online)

    def kernel(self, device: torch.device, dtype: torch.dtype | None = None) -> Kernel:
        """The kernel that runs this linear on `device`, for inputs of `dtype`."""
        return choose(replace(self.spec, dtype=dtype), device)

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        """(*, I) → (*, O)."""
        read = self.prepare(x)
        if self.input_spec is not None and self.input_spec.mixed:
            self._count(read, self.input_spec)
        ready = self._ready(x.device, x.dtype)
        return ready.kernel.linear(read, ready.weights, ready.spec)

    def _ready(self, device: torch.device, dtype: torch.dtype) -> _Kept:
        """The weights as the kernel wants them: those kept where nothing has changed since."""
        held = (*self._parameters.values(), *self._buffers.values())
        seen = stamp_of(held)
        stamp = (device, dtype, self.weight_spec, self.input_spec, self.branch_rounded, seen)
        if seen is not None and self._kept is not None and self._kept.stamp == stamp:
            return self._kept
        self._kept = None  # before another is made: not both in memory
        spec = replace(self.spec, dtype=dtype)
        kernel = choose(spec, device)
        with torch.inference_mode(False), torch.no_grad():
            made = _Kept(stamp, held, kernel, spec, kernel.prepare(self.tensors, spec))
        if seen is not None:
            self._kept = made
        return made

    def _count(self, x: Tensor, spec: QuantSpec) -> None:
        wide = wide_rows(x.detach().to(torch.promote_types(x.dtype, torch.float32)), spec)
        self._rows_seen += wide.numel()
        counted = wide.sum()
        self._rows_wide = counted if self._rows_wide is None else self._rows_wide.to(counted) + counted

    def rows_read(self, *, forget: bool = False) -> tuple[int, int]:
        """(rows read on the wide grid, all rows) of a mixed input grid, since the last `forget`."""
        found = 0 if self._rows_wide is None else int(self._rows_wide), self._rows_seen
        if forget:
            self._rows_seen, self._rows_wide = 0, None
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without prepared weights."""
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        """Moves go through; `.half()` and the like must not round scales or online factors: those define the grid."""
        self._kept = None
        kept = [(m, name, b) for m in self.modules() for name, b in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        weights = self.weight_spec or "16-bit"
        return f"{self.in_features} → {self.out_features}, weights {weights}, input {self.input_spec or '16-bit'}"
