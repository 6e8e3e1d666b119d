r"""All that stands before the int8 product of a quantized linear, in one kernel: norm or gate, map, grid, codes.

    round_rows     x                                          → ·T → codes, scales
    norm_round     h = x + residual, h/√(mean h² + ε)·γ       → ·T → codes, scales; γ = w or 1 + w
    gated_round    act(gate)·up, act silu or gelu_tanh        → ·T → codes, scales

A row is one program's, read once into registers; its range is known before anything is written. So the bytes are x's
(and what is added or multiplied to it) and one a code: the range, the norm's mean and the map cost no more of them.
Roundings to x's type stand where the model's own modules and `OnlineMap` have them: codes and scales are the
reference's, but for the last bits of a mean, an exp or a map's sums, which now and then take a value of x's type to its
neighbour and a code with it. Without norm, gate and map they are the reference's bit for bit.

A map with a matrix for each block takes a kernel more (behind a norm another, for the mean): a program per block and
tile of rows, as a matrix is worth reading for many rows only, and then the rounding of what it wrote. Rows go through
in portions of `PORTION` bytes, which stay in the L2 cache: memory sees the same bytes as without. So does a low-rank
branch: x·Aᵀ is a product of its own over what the kernel rounded (kept in x's type, or as codes). Inside, every row
would read all of A (1.8 MB at I = 14336, r = 64), where a row fills a program.

Codes lie as x does, or (`split`) even columns first and odd ones after, an odd width padded by a zero code: the halves
that a GEMM multiplies with low and high nibbles.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import interpreted, runs_on
from phasequant.kernels.gpu.entrance_grid import INTERPRETED, codes_of, nearest, scale_of, wide
from phasequant.kernels.gpu.entrance_map import MapTiles, RowPlan, factor, map_fits, row_plan, times, under
from phasequant.numerics import LinearMap, QuantSpec

PORTION = 24 * 2**20
LARGEST_ROW = 2**16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("silu", "gelu_tanh")
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


class Entered(NamedTuple):
    """What a linear reads: codes (T, columns) int8, scales (T,) fp32; of its branch x·Aᵀ (T, r) fp32; x + residual."""

    codes: Tensor
    scale: Tensor
    low: Tensor | None = None
    total: Tensor | None = None


@triton.jit
@no_type_check
def _sigmoid(x):
    """1/(1 + 2^-(x·log2 e)); on a GPU by its approximations of 2^x and 1/x (2^-22), which here need no range."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
@no_type_check
def _gated(gate, up, dtype: tl.constexpr, GELU: tl.constexpr):
    """act(gate)·up. ½·(1 + tanh z) = σ(2z): both acts are gate·σ(·)."""
    inner = gate
    if GELU:
        inner = SQRT_8_OVER_PI * (gate + 0.044715 * gate * gate * gate)
    return nearest(nearest(gate * _sigmoid(inner), dtype) * up, dtype)


@triton.jit
@no_type_check
def _normed(x, rstd, weight, dtype: tl.constexpr, PLUS_ONE: tl.constexpr):
    """x·rstd·γ, rounded where LLaMA's norm rounds, or (1 + w) Gemma's."""
    if PLUS_ONE:
        return nearest(x * rstd * (1.0 + weight), dtype)
    return nearest(nearest(x * rstd, dtype) * weight, dtype)


@triton.jit
@no_type_check
def _rows(
    x, second, weight, left, right, diagonal, fixed, codes, scales, total, kept,
    rows, x_stride, second_stride, eps, clip, above, gain,
    a: tl.constexpr, b: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, ODD: tl.constexpr, HIGHEST: tl.constexpr,
    X: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SPLIT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    # ODD: GELU for a gate, 1 + w for a norm. X, LEFT, RIGHT: parts of bfloat16. SPLIT: 1 by pairs of columns, 2 by
    # single ones, where pairs straddle the tile's rows. KEEP: 1 what is rounded, 2 its codes.
    dtype = x.dtype.element_ty
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    at, here = i * b + j, (i < a) & (j < b)
    if RIGHT > 0:
        right_high = factor(right, B * B, B, 0)
        right_low = factor(right, B * B, B, RIGHT - 1)
    if LEFT > 0:
        left_high = factor(left, A * A, A, 0)
        left_low = factor(left, A * A, A, LEFT - 1)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at_row = tl.cast(row, tl.int64)
        value = wide(tl.load(x + at_row * x_stride + at, mask=here, other=0))
        if second is not None:
            other = wide(tl.load(second + at_row * second_stride + at, mask=here, other=0))
        if NORM:
            if second is not None:
                value = nearest(value + other, dtype)
                tl.store(total + at_row * (a * b) + at, value.to(dtype), mask=here)
            rstd = tl.rsqrt(tl.sum(value * value) / (a * b) + eps)
            value = _normed(value, rstd, wide(tl.load(weight + at, mask=here, other=0)), dtype, ODD)
        if GATE:
            value = _gated(value, other, dtype, ODD)
        if diagonal is not None:
            value *= tl.load(diagonal + at, mask=here, other=0)
        if RIGHT > 0:
            value = times(value, right_high, right_low, X, RIGHT)
        if LEFT > 0:
            value = under(left_high, left_low, value, 2 if RIGHT > 0 else X, LEFT)
        if RIGHT > 0 or LEFT > 0 or diagonal is not None:
            value = nearest(value * gain, dtype)
        if fixed is not None:
            scale, highest = tl.load(fixed), HIGHEST * 1.0
        else:
            scale, highest = scale_of(tl.max(tl.abs(value)), clip, above, HIGHEST)
        tl.store(scales + row, scale)
        found = codes_of(value, scale, highest, fixed is not None)
        if KEEP == 1:
            tl.store(kept + at_row * (a * b) + at, value.to(dtype), mask=here)
        if KEEP == 2:
            tl.store(kept + at_row * (a * b) + at, found.to(tl.float32).to(tl.bfloat16), mask=here)
        if SPLIT == 1:
            pairs: tl.constexpr = (b + 1) // 2
            even, odd = tl.split(tl.reshape(found, (A, B // 2, 2)))
            half = tl.arange(0, B // 2)[None, :]
            out = codes + at_row * (2 * a * pairs) + i * pairs + half
            tl.store(out, even, mask=(i < a) & (half < pairs))
            tl.store(out + a * pairs, odd, mask=(i < a) & (half < pairs))
        elif SPLIT == 2:
            evens: tl.constexpr = (a * b + 1) // 2
            tl.store(codes + at_row * (2 * evens) + (at % 2) * evens + at // 2, found, mask=here)
        else:
            tl.store(codes + at_row * (a * b) + at, found, mask=here)


@triton.jit
@no_type_check
def _mean(x, second, total, rstd, x_stride, second_stride, eps, n: tl.constexpr, N: tl.constexpr):
    """1/√(mean h² + ε) of a row, for kernels that see parts of it; h = x + second is written down."""
    row = tl.cast(tl.program_id(0), tl.int64)
    at = tl.arange(0, N)
    here = at < n
    value = wide(tl.load(x + row * x_stride + at, mask=here, other=0))
    if second is not None:
        value += wide(tl.load(second + row * second_stride + at, mask=here, other=0))
        value = nearest(value, x.dtype.element_ty)
        tl.store(total + row * n + at, value.to(x.dtype.element_ty), mask=here)
    tl.store(rstd + row, tl.rsqrt(tl.sum(value * value) / n + eps))


@triton.jit
@no_type_check
def _blocks(
    x, second, weight, rstd, blocks, diagonal, mapped, rows, x_stride, second_stride, gain,
    m: tl.constexpr, a: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, ODD: tl.constexpr, X: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    block = tl.program_id(0)
    k = tl.arange(0, A)[None, :]
    at = block * a + k
    high = factor(blocks + block * A * A, m * A * A, A, 0)
    low = factor(blocks + block * A * A, m * A * A, A, PARTS - 1)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        t = first + tl.arange(0, ROWS)[:, None]
        at_row = t.to(tl.int64)
        here = (t < rows) & (k < a)
        value = wide(tl.load(x + at_row * x_stride + at, mask=here, other=0))
        if NORM:
            scale = tl.load(rstd + t, mask=t < rows, other=0)
            value = _normed(value, scale, wide(tl.load(weight + at, mask=k < a, other=0)), dtype, ODD)
        if GATE:
            other = wide(tl.load(second + at_row * second_stride + at, mask=here, other=0))
            value = _gated(value, other, dtype, ODD)
        if diagonal is not None:
            value *= tl.load(diagonal + at, mask=k < a, other=0)
        value = nearest(times(value, high, low, X, PARTS) * gain, dtype)
        tl.store(mapped + at_row * (m * a) + at, value.to(dtype), mask=here)


def _warps(values: int) -> int:
    """Of a program that holds so many values: 16 a thread, 32 where a row is wide."""
    return min(max(values // 512, 1), 16 if values <= 2**14 else 32)


def _processors(x: Tensor) -> int:
    return 2 if interpreted() else torch.cuda.get_device_properties(x.device).multi_processor_count


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _map_blocks(
    x: Tensor, second: Tensor | None, weight: Tensor | None, blocks: Tensor, diagonal: Tensor | None, total: Tensor,
    mapped: Tensor, *, mode: str, odd: bool, eps: float, parts: int, gain: float,
) -> None:  # fmt: skip
    """x, after norm or gate, times a matrix a block, to `mapped`; x + residual to `total`."""
    rows, width = x.shape
    m = blocks.shape[1]
    rstd = None
    if mode == "norm":
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        n = triton.next_power_of_2(width)
        _mean[(rows,)](x, second, total, rstd, x.stride(0), _stride(second), eps, width, n, num_warps=_warps(n))
        x, second = (x if second is None else total), None
    tile = min(max(16, triton.next_power_of_2(rows)), 64)
    programs = min(triton.cdiv(rows, tile), max(1, 2 * _processors(x) // m))
    _blocks[(m, programs)](
        x, second, weight, rstd, blocks, diagonal, mapped, rows, x.stride(0), _stride(second), gain,
        m=m, a=width // m, A=blocks.shape[-1], ROWS=tile, NORM=mode == "norm", GATE=mode == "gate", ODD=odd,
        X=parts, PARTS=len(blocks), num_warps=4, num_stages=2 if x.itemsize == 2 else 1,
    )  # fmt: skip


def _project(x: Float[Tensor, "T I"], down: Float[Tensor, "r I"]) -> Float[Tensor, "T r"]:
    """x·Aᵀ with fp32 sums, in fp32."""
    if x.is_cuda and x.dtype == down.dtype != torch.float32:
        return torch.mm(x, down.T, out_dtype=torch.float32)
    return x.float() @ down.float().T


@torch.library.custom_op("phasequant::entrance", mutates_args=())
def entrance(
    x: Tensor, second: Tensor | None, weight: Tensor | None, left: Tensor | None, right: Tensor | None,
    blocks: Tensor | None, diagonal: Tensor | None, static: Tensor | None, down: Tensor | None, *, mode: str, odd: bool,
    eps: float, a: int, b: int, exact: bool, gain: float, highest: int, clip: float, above: float | None, split: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, scales, x·Aᵀ and x + residual (both empty where not asked for) of the public functions below."""
    rows, width = x.shape
    codes, scale, low, total = _outputs(x, second, down, mode, split)
    if rows == 0:
        return codes, scale, low, total
    with torch.cuda.device_of(x):
        parts = 1 if exact and x.dtype == torch.bfloat16 else 2
        lefts, rights = (0 if f is None else len(f) for f in (left, right))
        if lefts or rights:
            inputs = {"plain": 1, "gate": 2, "norm": 3}[mode]
            plan = row_plan(a, b, lefts, rights, x.itemsize, inputs, x.device)
        else:
            a, b, values = 1, width, max(16, triton.next_power_of_2(width))
            plan = RowPlan(1, values, _warps(values))
        scattered = split and a > 1 and b % 2 == 1
        if scattered:
            codes.zero_()
        changed = mode != "plain" or lefts or rights or diagonal is not None
        keep = 0 if down is None else 2 if rounded else int(blocks is None and bool(changed))
        between = {"mapped": x.dtype} if blocks is not None else {}
        if keep:
            between["kept"] = torch.bfloat16 if keep == 2 else x.dtype
        step = max(256, PORTION // (width * sum(d.itemsize for d in between.values()))) if between else rows
        held = {name: torch.empty(min(step, rows), width, dtype=d, device=x.device) for name, d in between.items()}
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            seen, beside, after, some = x[part], None if second is None else second[part], mode, total[part]
            if blocks is not None:
                mapped = held["mapped"][: len(seen)]
                _map_blocks(
                    seen, beside, weight, blocks, diagonal, some, mapped,
                    mode=mode, odd=odd, eps=eps, parts=parts, gain=gain,
                )  # fmt: skip
                seen, beside, after = mapped, None, "plain"
            kept = held["kept"][: len(seen)] if keep else seen
            programs = len(seen) if plan.A == 1 else min(len(seen), _processors(x) * plan.resident)
            _rows[(programs,)](
                seen, beside, weight if after == "norm" else None, left, right, diagonal if blocks is None else None,
                static, codes[part], scale[part], some, kept,
                len(seen), seen.stride(0), _stride(beside), eps, clip, above, gain,
                a=a, b=b, A=plan.A, B=plan.B, NORM=after == "norm", GATE=after == "gate", ODD=odd, HIGHEST=highest,
                X=parts, LEFT=lefts, RIGHT=rights, SPLIT=2 if scattered else int(split), KEEP=keep,
                num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
            )  # fmt: skip
            if down is not None:
                low[part] = _project(kept, down)
                if rounded:
                    low[part] *= scale[part, None]
    return codes, scale, low, total


def _outputs(x: Tensor, second: Tensor | None, down: Tensor | None, mode: str, split: bool) -> tuple[Tensor, ...]:
    rows, width = x.shape
    return (
        x.new_empty(rows, width + width % 2 if split else width, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows if down is not None else 0, 0 if down is None else down.shape[0], dtype=torch.float32),
        x.new_empty(rows if mode == "norm" and second is not None else 0, width),
    )


@entrance.register_fake
def _(x, second, weight, left, right, blocks, diagonal, static, down, *, mode, split, **rest):
    return _outputs(x, second, down, mode, split)


def grid_fits(spec: QuantSpec) -> tuple[bool, str]:
    """Whether the kernels read a grid; if not, why."""
    if not (spec.is_int and spec.symmetric):
        return False, f"reads symmetric integer grids, not {spec}"
    if spec.granularity != ("tensor" if spec.static else "token"):
        return False, f"has one scale a token, or a static one, not {spec}"
    if spec.clip == "mse":
        return False, "searches no clip"
    if spec.rows_by not in (None, "absmax"):
        return False, f"rows by {spec.rows_by} divide by a sum, whose last bit depends on its order"
    return True, "symmetric integers"


def can_run(
    spec: QuantSpec | None,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    linear_map: LinearMap | None = None,
    act: str | None = None,
) -> tuple[bool, str]:
    """Whether the functions below take inputs of `dtype` and `width` on a grid, with a map and an act before it; if
    not, why: then the steps are run one by one."""
    ok, reason = runs_on(device)
    if not ok:
        return False, reason
    if spec is None:
        return False, "has nothing to round: the input stays in 16 bits"
    if dtype not in DTYPES:
        return False, f"reads float32, bfloat16 and float16, not {dtype}"
    if width > LARGEST_ROW:
        return False, f"a row of {width} values does not fit one program"
    if act is not None and act not in ACTS:
        return False, f"knows {' and '.join(ACTS)}, not {act}"
    for fits, why in (grid_fits(spec), (True, "") if linear_map is None else map_fits(linear_map, dtype, device)):
        if not fits:
            return False, why
    return True, reason


def _enter(
    x: Tensor, second: Tensor | None, weight: Tensor | None, spec: QuantSpec, mode: str, odd: bool, eps: float,
    linear_map: MapTiles | None, static_scale: Tensor | None, split: bool, down: Tensor | None, rounded: bool,
) -> Entered:  # fmt: skip
    fits, why = grid_fits(spec)
    if not fits:
        raise PhaseQuantError(f"the entrance kernel {why}")
    if spec.static != (static_scale is not None):
        raise PhaseQuantError(f"a static scale goes with a static grid, and only with it, not with {spec}")
    if any(t is not None and (t.stride(-1) != 1 or t.dtype != x.dtype) for t in (x, second)):
        raise PhaseQuantError("the entrance kernel reads rows of one type whose values lie next to each other")
    tiles = MapTiles(1, x.shape[1]) if linear_map is None else linear_map
    if tiles.width != x.shape[1]:
        raise PhaseQuantError(f"a map of {tiles.width} channels cannot act on {x.shape[1]}")
    codes, scale, low, total = entrance(
        x, second, weight, tiles.left, tiles.right, tiles.blocks, tiles.diagonal, static_scale, down,
        mode=mode, odd=odd, eps=eps, a=tiles.a, b=tiles.b, exact=tiles.exact, gain=tiles.gain, highest=spec.highest,
        clip=float(spec.clip), above=spec.above, split=split, rounded=rounded,
    )  # fmt: skip
    summed = mode == "norm" and second is not None
    return Entered(codes, scale, None if down is None else low, total if summed else None)


def round_rows(
    x: Float[Tensor, "T I"],
    spec: QuantSpec,
    *,
    linear_map: MapTiles | None = None,
    static_scale: Float[Tensor, "1"] | None = None,
    split: bool = False,
    down: Float[Tensor, "r I"] | None = None,
    rounded: bool = False,
) -> Entered:
    """x·T on its grid. `static_scale`: of a static grid (`numerics.static_grid`). `down`: A of a low-rank branch, which
    reads x·T, or (`rounded`) what the codes stand for."""
    return _enter(x, None, None, spec, "plain", False, 0.0, linear_map, static_scale, split, down, rounded)


def norm_round(
    x: Float[Tensor, "T I"],
    weight: Float[Tensor, " I"],
    eps: float,
    spec: QuantSpec,
    *,
    plus_one: bool = False,
    residual: Float[Tensor, "T I"] | None = None,
    linear_map: MapTiles | None = None,
    static_scale: Float[Tensor, "1"] | None = None,
    split: bool = False,
    down: Float[Tensor, "r I"] | None = None,
    rounded: bool = False,
) -> Entered:
    """norm(x + residual)·T on its grid, and the sum; γ = weight, as in LLaMA's RMSNorm, or (`plus_one`) 1 + weight, as
    in Gemma's. The rest as in `round_rows`."""
    if not plus_one and weight.dtype != x.dtype:
        raise PhaseQuantError(f"a norm's weight of {weight.dtype} would make {x.dtype} wider: the kernel does not")
    return _enter(x, residual, weight, spec, "norm", plus_one, eps, linear_map, static_scale, split, down, rounded)


def gated_round(
    gate: Float[Tensor, "T I"],
    up: Float[Tensor, "T I"],
    act: str,
    spec: QuantSpec,
    *,
    linear_map: MapTiles | None = None,
    static_scale: Float[Tensor, "1"] | None = None,
    split: bool = False,
    down: Float[Tensor, "r I"] | None = None,
    rounded: bool = False,
) -> Entered:
    """(act(gate)·up)·T on its grid; gate and up may be halves of one tensor. The rest as in `round_rows`."""
    if act not in ACTS:
        raise PhaseQuantError(f"the entrance kernel knows {' and '.join(ACTS)}, not {act}")
    odd = act == "gelu_tanh"
    return _enter(gate, up, None, spec, "gate", odd, 0.0, linear_map, static_scale, split, down, rounded)
