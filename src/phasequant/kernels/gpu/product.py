r"""int8 codes times packed weights, in Triton: the product of a quantized linear on a GPU, without a second copy of it.

    y[t,o] = s_x[t] · s_w[o] · Σ_i q_x[t,i]·(q_w[o,i] - z_w[o])  +  Σ_k d[t,k]·B[o,k]  +  b[o],     d = x·Aᵀ

Weights stay as the checkpoint has them, two codes to a byte, even column low. Codes of x lie as [even | odd] columns
(`split_columns`), so that a tile of bytes meets two tiles of x and nothing is interleaved: Σ lo·x_even + Σ hi·x_odd.
The tile of W is the left operand (unpacked in registers, as Hopper's matrix units take it), y is stored transposed.
Sums are int32, so splitting them over programs (few rows) changes nothing; scaling is fp32, first by s_w, then by s_x:
the reference's integers and its order. With scales by group every group's sums are scaled on their own, in its order.

Costs: bytes of W once, of x once a tile of outputs; unpacking about two operations a byte for every tile of rows, which
at thousands of rows costs a third of what int8·int8 can do (740 against 1,016 to 1,130 TOPS on an H200, shared
readings). `kernels.humming` is faster where it runs; this is what runs where it does not.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from phasequant.kernels.gpu import interpreted


class Tiles(NamedTuple):
    """How a product is cut: rows of x, outputs and bytes of a row of W a program, and how many share a sum."""

    rows: int
    outputs: int
    bytes: int
    split: int
    warps: int
    stages: int


def tiles_for(rows: int, outputs: int, width: int, processors: int) -> Tiles:
    """For `rows` × `outputs`, `width` bytes a row of W, on a device of so many multiprocessors."""
    if rows <= 16:
        tiles = Tiles(16, 64, 128, 1, 4, 4)
    elif rows <= 64:
        tiles = Tiles(64, 64, 64, 1, 4, 4)
    elif rows <= 512:
        tiles = Tiles(64, 128, 64, 1, 4, 4)
    else:
        tiles = Tiles(256, 128, 64, 1, 8, 3)
    programs = triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outputs)
    steps = triton.cdiv(width, tiles.bytes)
    split = 1
    while 2 * split * programs <= 4 * processors and 4 * split <= steps and rows <= 64:
        split *= 2
    return tiles._replace(split=split)


@triton.jit
@no_type_check
def _weights(pointers, mask, zero, PACKED: tl.constexpr):
    """(low, high) codes minus their zero point as int8; `high` is nothing of use where a byte is a code."""
    raw = tl.load(pointers, mask=mask, other=0)
    if PACKED:
        low = (raw & 15).to(tl.int8) - zero
        high = (raw >> 4).to(tl.int8) - zero
    else:
        low = (raw ^ 128).to(tl.int8, bitcast=True)
        high = low
    return low, high


@triton.jit
@no_type_check
def _product(
    x, packed, y, x_scale, w_scale, w_zero, bias, down, up,
    rows, outputs, width, groups, rank,
    PACKED: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    # Programs walk down bands of BAND tiles of outputs, so that neighbours share W or x in the L2 cache.
    pid = tl.program_id(0)
    across, along = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    band = pid // (BAND * across)
    first = band * BAND
    tall = tl.minimum(along - first, BAND)
    at_o = first + (pid % (BAND * across)) % tall
    at_t = (pid % (BAND * across)) // tall
    o = at_o * OUTPUTS + tl.arange(0, OUTPUTS)
    t = at_t * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BYTES)
    here_o, here_t = o < outputs, t < rows
    if SYMMETRIC:
        zero = tl.full((OUTPUTS, 1), 8, tl.int8)
    else:
        zero = tl.load(w_zero + o * groups, mask=here_o, other=0)[:, None].to(tl.int8)
    w_at = packed + o[:, None].to(tl.int64) * width
    columns = 2 * width if PACKED else width
    x_at = x + t[None, :].to(tl.int64) * columns
    if GROUP == 0:
        part = tl.cdiv(tl.cdiv(width, BYTES), SPLIT) * BYTES
        start = tl.program_id(1) * part
        sums = tl.zeros((OUTPUTS, ROWS), tl.int32)
        for at in range(start, tl.minimum(start + part, width), BYTES):
            inside = at + k < width
            seen = inside[:, None] & here_t[None, :]
            low, high = _weights(w_at + (at + k)[None, :], here_o[:, None] & inside[None, :], zero, PACKED)
            even = tl.load(x_at + (at + k)[:, None], mask=seen, other=0)
            sums = tl.dot(low, even, sums, out_dtype=tl.int32)
            if PACKED:
                odd = tl.load(x_at + (width + at + k)[:, None], mask=seen, other=0)
                sums = tl.dot(high, odd, sums, out_dtype=tl.int32)
        if SPLIT > 1:
            out = y + tl.program_id(1).to(tl.int64) * rows * outputs + t[None, :].to(tl.int64) * outputs + o[:, None]
            tl.store(out, sums, mask=here_o[:, None] & here_t[None, :])
            return
        value = sums.to(tl.float32) * tl.load(w_scale + o, mask=here_o, other=0)[:, None]
    else:
        value = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for g in range(groups):
            if not SYMMETRIC:
                zero = tl.load(w_zero + o * groups + g, mask=here_o, other=0)[:, None].to(tl.int8)
            sums = tl.zeros((OUTPUTS, ROWS), tl.int32)
            for at in range(g * GROUP, (g + 1) * GROUP, BYTES):
                low, high = _weights(w_at + (at + k)[None, :], here_o[:, None], zero, PACKED)
                even = tl.load(x_at + (at + k)[:, None], mask=here_t[None, :], other=0)
                sums = tl.dot(low, even, sums, out_dtype=tl.int32)
                if PACKED:
                    odd = tl.load(x_at + (width + at + k)[:, None], mask=here_t[None, :], other=0)
                    sums = tl.dot(high, odd, sums, out_dtype=tl.int32)
            value += sums.to(tl.float32) * tl.load(w_scale + o * groups + g, mask=here_o, other=0)[:, None]
    value *= tl.load(x_scale + t, mask=here_t, other=0)[None, :]
    value = _rest(value, bias, down, up, o, t, here_o, here_t, rank, BIAS, RANK)
    out = y + t[None, :].to(tl.int64) * outputs + o[:, None]
    tl.store(out, value.to(y.dtype.element_ty), mask=here_o[:, None] & here_t[None, :])


@triton.jit
@no_type_check
def _rest(value, bias, down, up, o, t, here_o, here_t, rank, BIAS: tl.constexpr, RANK: tl.constexpr):
    """+ (x·Aᵀ)·Bᵀ + b, of these what there is."""
    if RANK > 0:
        r = tl.arange(0, RANK)
        left = tl.load(up + o[:, None] * rank + r[None, :], mask=here_o[:, None] & (r < rank)[None, :], other=0)
        right = tl.load(down + t[None, :] * rank + r[:, None], mask=here_t[None, :] & (r < rank)[:, None], other=0)
        value += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="tf32x3")
    if BIAS:
        value += tl.load(bias + o, mask=here_o, other=0)[:, None].to(tl.float32)
    return value


@triton.jit
@no_type_check
def _combine(
    parts, y, x_scale, w_scale, bias, down, up, rows, outputs, rank,
    BIAS: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here_o, here_t = o < outputs, t < rows
    both = here_o[:, None] & here_t[None, :]
    at = t[None, :].to(tl.int64) * outputs + o[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for split in range(SPLIT):
        sums += tl.load(parts + split * rows * outputs + at, mask=both, other=0)
    value = sums.to(tl.float32) * tl.load(w_scale + o, mask=here_o, other=0)[:, None]
    value *= tl.load(x_scale + t, mask=here_t, other=0)[None, :]
    value = _rest(value, bias, down, up, o, t, here_o, here_t, rank, BIAS, RANK)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=both)


def split_columns(codes: Int8[Tensor, "T I"]) -> Int8[Tensor, "T columns"]:
    """[even | odd] columns, an odd width padded by a zero: the layout that packed weights are multiplied in."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return torch.cat((codes[:, 0::2], codes[:, 1::2]), 1)


@torch.library.custom_op("phasequant::int_product", mutates_args=())
def int_product(
    codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
    split: int = 0,
) -> Tensor:
    """See `product`."""
    rows, outputs, width = len(codes), len(packed), packed.shape[1]
    is_packed = codes.shape[1] == 2 * width
    groups = w_scale.shape[1]
    y = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    if rows == 0:
        return y
    rank = 0 if down is None else down.shape[1]
    padded = 0 if rank == 0 else max(16, triton.next_power_of_2(rank))
    processors = 1 if interpreted() else torch.cuda.get_device_properties(codes.device).multi_processor_count
    tiles = tiles_for(rows, outputs, width, processors)
    tiles = tiles._replace(split=split or (1 if groups > 1 else tiles.split))
    span = width // groups if groups > 1 else 0
    step = tiles.bytes if span == 0 else min(tiles.bytes, span & -span)
    parts = torch.empty(tiles.split, rows, outputs, dtype=torch.int32, device=y.device) if tiles.split > 1 else y
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outputs), tiles.split)
    _product[grid](
        codes, packed, parts, x_scale, w_scale, w_zero, bias, down, up, rows, outputs, width, groups, rank,
        PACKED=is_packed, SYMMETRIC=w_zero is None, BIAS=bias is not None, RANK=padded, SPLIT=tiles.split, GROUP=span,
        ROWS=tiles.rows, OUTPUTS=tiles.outputs, BYTES=step, BAND=8, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if tiles.split > 1:
        _combine[(triton.cdiv(outputs, 64), triton.cdiv(rows, 16))](
            parts, y, x_scale, w_scale, bias, down, up, rows, outputs, rank,
            BIAS=bias is not None, RANK=padded, SPLIT=tiles.split, ROWS=16, OUTPUTS=64, num_warps=4,
        )  # fmt: skip
    return y


@int_product.register_fake
def _(codes, x_scale, packed, w_scale, w_zero, bias, down, up, dtype, split=0):
    return codes.new_empty(len(codes), len(packed), dtype=dtype)


def product(
    codes: Int8[Tensor, "T columns"],
    x_scale: Float[Tensor, " T"],
    packed: UInt8[Tensor, "O bytes"],
    w_scale: Float[Tensor, "O G"],
    dtype: torch.dtype,
    *,
    w_zero: Float[Tensor, "O G"] | None = None,
    bias: Float[Tensor, " O"] | None = None,
    down: Float[Tensor, "T r"] | None = None,
    up: Float[Tensor, "O r"] | None = None,
    split: int = 0,
) -> Float[Tensor, "T O"]:
    """y of the module's docstring, in `dtype`. `codes`: of x, by `split_columns` where a byte of weights holds two
    codes, else as they are. `w_zero`: None where symmetric. `split`: programs that share a sum; 0 leaves it to us."""
    return int_product(codes, x_scale, packed, w_scale, w_zero, bias, down, up, dtype, split)
