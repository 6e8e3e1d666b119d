r"""The packed KV cache on a GPU, written and read back: `KVQuantizer.encode` and `decode`, a kernel each.

Writing goes into slots that the device knows. A program takes 16 new tokens of any rows and heads, keys or values:

    k·T (R3) in three TF32 products, fp32's precision, rounded to k's type as `OnlineMap` rounds it
    s = (c·max(x,0) - c·min(x,0))/q_max in fp16, at least 2^-24;  z;  c = clamp(round(x/s) + z, 0, q_max), two a byte

with the divisions rounded to nearest: without a map the codes are the reference's bit for bit, with one but for a
rounding on the edge here and there. Row b's tokens go to slots start[b], start[b] + 1, …, where `start` is on the
device, so a CUDA graph goes on writing at the end of growing rows. Bytes: what comes in and what is written, and the
matrix for every 16 tokens (64 KB at d_head 128, from the L2 cache).

Reading (prefill: attention over more than one new token a row) gives RN(s·(c - z)), the reference's numbers bit for
bit: a byte and a grid in, two channels of 16 bits out, 64 + 3 and 256 bytes a token and head at d_head 128.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import rules, runs_on
from phasequant.kernels.gpu.entrance_grid import TO_INTEGER, nearest
from phasequant.kernels.machine import Machine
from phasequant.numerics import QuantSpec

ROWS = 16  # tokens of a program that writes
READ = 32  # and of one that reads
TINY = tl.constexpr(2.0**-24)  # as in `nn.kv`
CACHES = tuple(f"{side}_{part}" for side in ("key", "value") for part in ("codes", "scale", "zero"))

Packed = tuple[UInt8[Tensor, "B K S bytes"], Float16[Tensor, "B K S G"], UInt8[Tensor, "B K S G"]]
"""Codes, scales, zero points."""


def too_old(device: torch.device) -> str:
    """Why a GPU has no TF32 products; empty where it has them, and for the interpreter."""
    return rules.too_old(Machine.of(device))


def can_run(spec: QuantSpec, d_head: int, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the kernels read and write a KV grid, for queries of `dtype` on `device`; if not, why."""
    ok, reason = runs_on(device)
    if not ok or too_old(device):
        return False, reason if not ok else too_old(device)
    return rules.kv_fits(spec, d_head, dtype)


def padded(size: int) -> int:
    """Bytes of a group of so many channels, as an axis of a tile."""
    return max(16, triton.next_power_of_2((size + 1) // 2))


def _strides(t: Tensor) -> tuple[int, int]:
    batch, head, token, last = (0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    if token not in (0, t.shape[3]) or last > 1:
        raise PhaseQuantError("a cache whose tokens do not lie one after another, which the kernels cannot read")
    return batch, head


def alike(keys: Packed, values: Packed) -> tuple[int, ...]:
    """Strides of batch and head, of codes and of grids, the same for keys and values; tokens lie one after another."""
    codes, *grids = ({_strides(t) for t in both} for both in zip(keys, values, strict=True))
    grid = set.union(*grids)
    if len(codes) > 1 or len(grid) > 1:
        raise PhaseQuantError("keys and values that lie differently, which the kernels cannot read")
    return *codes.pop(), *grid.pop()


@triton.jit
@no_type_check
def _rounded(x):
    """To nearest, ties to even; |x| < 2^22."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
@no_type_check
def _code(x, scale, zero, steps):
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return tl.minimum(tl.maximum(_rounded(quotient) + zero[:, None], 0.0), steps).to(tl.int32)


@triton.jit
@no_type_check
def _rows(
    x, matrix, start, codes, scales, zeros, clip, steps, rows, kv_heads, count, capacity, x_b, x_k, x_t, codes_b,
    codes_k, grid_b, grid_k, G: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # SIZE: channels of a group; WIDTH: its bytes, padded.
    BYTES: tl.constexpr = (SIZE + 1) // 2
    H: tl.constexpr = G * SIZE
    CHUNK: tl.constexpr = 32
    dtype = x.dtype.element_ty
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    real, paired = (j < BYTES)[None, :], (2 * j + 1 < SIZE)[None, :]
    b, k, t = (r // (kv_heads * count)).to(tl.int64), r // count % kv_heads, r % count
    ours = (r < rows)[:, None]
    source = x + (b * x_b + k * x_k + t * x_t)[:, None]
    slot = tl.load(start + b, mask=r < rows, other=0) + t
    fits = (r < rows) & (slot < capacity)
    for g in tl.static_range(G):
        at = g * SIZE + 2 * j[None, :]
        if matrix is None:
            even = tl.load(source + at, mask=ours & real, other=0).to(tl.float32)
            odd = tl.load(source + at + 1, mask=ours & paired, other=0).to(tl.float32)
        else:
            even, odd = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
            for first in range(0, H, CHUNK):
                c = first + tl.arange(0, CHUNK)
                part = tl.load(source + c[None, :], mask=ours & (c < H)[None, :], other=0).to(tl.float32)
                inside, column = (c < H)[:, None], matrix + c[:, None] * H + at
                even_side = tl.load(column, mask=inside & real, other=0)
                odd_side = tl.load(column + 1, mask=inside & paired, other=0)
                even = tl.dot(part, even_side, even, input_precision="tf32x3")
                odd = tl.dot(part, odd_side, odd, input_precision="tf32x3")
            even, odd = nearest(even, dtype), nearest(odd, dtype)
        low = tl.minimum(tl.minimum(tl.min(even, 1), tl.min(odd, 1)), 0.0) * clip
        high = tl.maximum(tl.maximum(tl.max(even, 1), tl.max(odd, 1)), 0.0) * clip
        step = tl.div_rn(high - low, steps + tl.zeros_like(high))
        step = tl.where(step > 0, step, 1.0)
        zero = tl.minimum(_rounded(tl.div_rn(-low, step)), steps)
        scale = tl.maximum(step.to(tl.float16).to(tl.float32), TINY)
        second = tl.where(paired, _code(odd, scale, zero, steps), 0)
        pair = _code(even, scale, zero, steps) | (second << 4)
        cells = (b * codes_b + k * codes_k + slot * (G * BYTES))[:, None] + g * BYTES + j[None, :]
        tl.store(codes + cells, pair.to(tl.uint8), mask=fits[:, None] & real)
        grids = b * grid_b + k * grid_k + slot * G + g
        tl.store(scales + grids, scale.to(tl.float16), mask=fits)
        tl.store(zeros + grids, zero.to(tl.uint8), mask=fits)


@triton.jit(do_not_specialize=["rows", "capacity", "grid_b", "grid_k"])
@no_type_check
def _write(
    keys, values, matrix, start, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, key_clip,
    value_clip, steps, rows, kv_heads, count, capacity, keys_b, keys_k, keys_t, values_b, values_k, values_t, codes_b,
    codes_k, grid_b, grid_k, G: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _rows(
            keys, matrix, start, key_codes, key_scale, key_zero, key_clip, steps, rows, kv_heads, count, capacity,
            keys_b, keys_k, keys_t, codes_b, codes_k, grid_b, grid_k, G, SIZE, WIDTH, ROWS,
        )  # fmt: skip
    else:
        _rows(
            values, None, start, value_codes, value_scale, value_zero, value_clip, steps, rows, kv_heads, count,
            capacity, values_b, values_k, values_t, codes_b, codes_k, grid_b, grid_k, G, SIZE, WIDTH, ROWS,
        )  # fmt: skip


@torch.library.custom_op("phasequant::write_kv", mutates_args=CACHES)
def _write_op(
    keys: Tensor, values: Tensor, start: Tensor, matrix: Tensor | None, key_codes: Tensor, key_scale: Tensor,
    key_zero: Tensor, value_codes: Tensor, value_scale: Tensor, value_zero: Tensor, bits: int, key_clip: float,
    value_clip: float,
) -> None:  # fmt: skip
    batch, kv_heads, count, d_head = keys.shape
    rows, groups = batch * kv_heads * count, key_scale.shape[3]
    size = d_head // groups
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    strides = alike((key_codes, key_scale, key_zero), (value_codes, value_scale, value_zero))
    with torch.cuda.device_of(keys):
        _write[(-(-rows // ROWS), 2)](
            keys, values, matrix, start, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
            key_clip, value_clip, 2.0**bits - 1, rows, kv_heads, count, key_codes.shape[2], *keys.stride()[:3],
            *values.stride()[:3], *strides, groups, size, padded(size), ROWS,
            num_warps=4, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip


@_write_op.register_fake
def _(*_: Any) -> None:
    return None


def write_kv(
    keys: Float[Tensor, "B K T H"],
    values: Float[Tensor, "B K T H"],
    start: Int[Tensor, " B"],
    key_cache: Packed,
    value_cache: Packed,
    specs: tuple[QuantSpec, QuantSpec],
    matrix: Float[Tensor, "H H"] | None = None,
) -> None:
    """Quantize new tokens into a cache, those of row b from slot `start[b]` (int32) on; what exceeds its capacity is
    dropped. `matrix`: keys are k·T, computed in fp32. `specs`: of keys and of values, alike but for their clips."""
    ours, theirs = specs
    clips = float(ours.clip), float(theirs.clip)
    _write_op(keys, values, start, matrix, *key_cache, *value_cache, ours.bits, *clips)


@triton.jit
@no_type_check
def _read(
    codes, scales, zeros, out, kv_heads, tokens, codes_b, codes_k, codes_t, scales_b, scales_k, scales_t, zeros_b,
    zeros_k, zeros_t, G: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = (SIZE + 1) // 2
    dtype = out.dtype.element_ty
    head = tl.program_id(0).to(tl.int64)
    b, k = head // kv_heads, head % kv_heads
    t = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j, c = tl.arange(0, WIDTH), tl.arange(0, 2 * WIDTH)
    ours = t < tokens
    source = codes + (b * codes_b + k * codes_k + t * codes_t)[:, None] + j[None, :]
    target = out + ((head * tokens + t) * (G * SIZE))[:, None] + c[None, :]
    for g in tl.static_range(G):
        pair = tl.load(source + g * BYTES, mask=ours[:, None] & (j < BYTES)[None, :], other=0)
        scale = tl.load(scales + (b * scales_b + k * scales_k + t * scales_t + g), mask=ours, other=0)
        zero = tl.load(zeros + (b * zeros_b + k * zeros_k + t * zeros_t + g), mask=ours, other=0)
        both = tl.interleave(pair & 15, pair >> 4).to(tl.float32)
        x = (both - zero.to(tl.float32)[:, None]) * scale.to(tl.float32)[:, None]
        tl.store(target + g * SIZE, nearest(x, dtype).to(dtype), mask=ours[:, None] & (c < SIZE)[None, :])


@torch.library.custom_op("phasequant::read_kv", mutates_args=())
def _read_op(codes: Tensor, scale: Tensor, zero: Tensor, d_head: int, dtype: torch.dtype, length: int) -> Tensor:
    batch, kv_heads, _, groups = scale.shape
    codes, scale, zero = (x if x.stride(3) == 1 else x.contiguous() for x in (codes, scale, zero))
    out = torch.empty(batch, kv_heads, length, d_head, dtype=dtype, device=codes.device)
    size = d_head // groups
    with torch.cuda.device_of(codes):
        _read[(batch * kv_heads, -(-length // READ))](
            codes, scale, zero, out, kv_heads, length, *codes.stride()[:3], *scale.stride()[:3], *zero.stride()[:3],
            groups, size, padded(size), READ, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_read_op.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, d_head: int, dtype: torch.dtype, length: int) -> Tensor:
    return torch.empty(*scale.shape[:2], length, d_head, dtype=dtype, device=codes.device)


def read_kv(
    codes: UInt8[Tensor, "B K S bytes"],
    scale: Float16[Tensor, "B K S G"],
    zero: UInt8[Tensor, "B K S G"],
    d_head: int,
    dtype: torch.dtype,
    length: int,
) -> Float[Tensor, "B K T H"]:
    """Keys or values of the first `length` slots in `dtype`, of 16 bits or fp32; keys stay mapped."""
    return _read_op(codes, scale, zero, d_head, dtype, length)
