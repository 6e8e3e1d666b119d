r"""RoPE of queries and keys on a GPU, and the queries' map (R3), as one kernel over the stacked product of q, k and v.

    x' = RN(RN(x·cos) + RN(r(x)·sin)),   r(x) = (-high half, low half)     of q and k, rounded as Transformers rounds
    q  = RN(q'·T),                       three TF32 products, fp32's precision, rounded as `OnlineMap` rounds

Without T both are Transformers' bit for bit; with it q has a rounding on the edge here and there. A program takes 32
heads of any rows and all columns of T, or, where there are few rows, 16 and 32: a decoding step would leave most of the
GPU idle otherwise. v is left where it is.

Bytes: q and k once in, once out; cos and sin, and T for every program (64 KB at d_head 128), from the L2 cache.
One launch, where Transformers' steps take ten, and T's four more.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from phasequant.kernels.gpu import runs_on
from phasequant.kernels.gpu.entrance_grid import nearest, wide
from phasequant.kernels.gpu.kv import too_old

LARGEST_HEAD = 256
COLUMNS = 32  # of T at a time
MANY = 4096  # query heads of all rows: from here on a program takes all of T's columns


def can_run(d_head: int, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel rotates heads of `d_head` numbers of `dtype` on `device`; if not, why."""
    ok, reason = runs_on(device)
    if not ok or too_old(device):
        return False, reason if not ok else too_old(device)
    if d_head % 2 or d_head > LARGEST_HEAD:
        return False, f"rotates even heads of up to {LARGEST_HEAD}, not {d_head}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"rotates 16-bit and fp32 numbers, not {dtype}"
    return True, "RoPE and the queries' map in one"


@triton.jit
@no_type_check
def _tile(
    x, cos, sin, matrix, out, tile, rows, stride, HEADS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # WIDTH: half a head, padded.
    HALF: tl.constexpr = H // 2
    dtype = out.dtype.element_ty
    i, j = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row, there = (i // HEADS).to(tl.int64), (i < rows * HEADS)[:, None]
    real = there & (j < HALF)[None, :]
    source, angle = x + (row * stride + i % HEADS * H)[:, None] + j[None, :], row[:, None] * H + j[None, :]
    target = out + i.to(tl.int64)[:, None] * H
    low = wide(tl.load(source, mask=real, other=0))
    high = wide(tl.load(source + HALF, mask=real, other=0))
    low_cos = wide(tl.load(cos + angle, mask=real, other=0))
    low_sin = wide(tl.load(sin + angle, mask=real, other=0))
    high_cos = wide(tl.load(cos + angle + HALF, mask=real, other=0))
    high_sin = wide(tl.load(sin + angle + HALF, mask=real, other=0))
    first = nearest(nearest(low * low_cos, dtype) - nearest(high * low_sin, dtype), dtype)
    second = nearest(nearest(high * high_cos, dtype) + nearest(low * high_sin, dtype), dtype)
    if matrix is None:
        tl.store(target + j[None, :], first.to(dtype), mask=real)
        tl.store(target + HALF + j[None, :], second.to(dtype), mask=real)
    else:
        for start in range(tl.program_id(1) * COLUMNS, H, tl.num_programs(1) * COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            inside, at = (j < HALF)[:, None] & (n < H)[None, :], matrix + j[:, None] * H + n[None, :]
            sums = tl.dot(first, tl.load(at, mask=inside, other=0), input_precision="tf32x3")
            lower = tl.load(at + HALF * H, mask=inside, other=0)
            sums = tl.dot(second, lower, sums, input_precision="tf32x3")
            tl.store(target + n[None, :], nearest(sums, dtype).to(dtype), mask=there & (n < H)[None, :])


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def _rope(
    qkv, cos, sin, matrix, q, k, rows, stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, queries = tl.program_id(0), tl.cdiv(rows * HEADS, ROWS)
    if tile < queries:
        _tile(qkv, cos, sin, matrix, q, tile, rows, stride, HEADS, H, WIDTH, ROWS, COLUMNS)
    elif tl.program_id(1) == 0:
        keys = qkv + HEADS * H
        _tile(keys, cos, sin, None, k, tile - queries, rows, stride, KV_HEADS, H, WIDTH, ROWS, COLUMNS)


@torch.library.custom_op("phasequant::rope", mutates_args=())
def _rope_op(
    qkv: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    rows, d_head = cos.shape
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    q, k = qkv.new_empty(rows, heads, d_head), qkv.new_empty(rows, kv_heads, d_head)
    many = matrix is not None and rows * heads >= MANY
    tile = 32 if many and d_head <= 128 else 16  # larger heads would not fit the registers
    programs = -(-rows * heads // tile) + -(-rows * kv_heads // tile)
    width = max(16, triton.next_power_of_2(d_head // 2))
    with torch.cuda.device_of(qkv):
        _rope[(programs, 1 if many or matrix is None else -(-d_head // COLUMNS))](
            qkv, cos.contiguous(), sin.contiguous(), matrix, q, k, rows, qkv.stride(0), heads, kv_heads, d_head, width,
            tile, COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return q, k


@_rope_op.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, matrix: Any, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    rows, d_head = cos.shape
    return qkv.new_empty(rows, heads, d_head), qkv.new_empty(rows, kv_heads, d_head)


def rope(
    qkv: Float[Tensor, "R O"],
    cos: Float[Tensor, "R H"],
    sin: Float[Tensor, "R H"],
    heads: int,
    kv_heads: int,
    matrix: Float[Tensor, "H H"] | None = None,
) -> tuple[Float[Tensor, "R N H"], Float[Tensor, "R K H"]]:
    """q·T and k after RoPE, of rows (q, k, …) with `heads` and `kv_heads` heads; `cos` and `sin` in their type, as
    Transformers' rotary embedding gives them. `matrix`: T, contiguous, in fp32; q is not mapped without it."""
    return _rope_op(qkv, cos, sin, matrix, heads, kv_heads)
