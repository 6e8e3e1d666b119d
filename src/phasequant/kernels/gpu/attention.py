r"""The packed KV cache on a GPU: attention of one new token a row over 4-bit keys and values.

With x̂ = s·(c - z) (`nn.kv`), codes c of 0 … 15, and the groups g of a head's channels,

    score   q·k̂ᵀ = Σ_g s_g·( q_g·(c_g - 8)ᵀ - (z_g - 8)·Σq_g )         c - 8 exact in 16 bits, sums in fp32
    output  Σ_t p_t·v̂_t,  a group:  Σ_t bf16(p_t·s_t)·(c_t - z_t)       c - z exact in bfloat16, sums in fp32

so keys and values are never rounded a second time; only p·s is, where 16-bit attention rounds p. Even channels lie in
low nibbles and odd ones in high nibbles: q is read as its even and odd channels, the output is kept and stored so, and
nothing is interleaved. A nibble under the exponent of 2^7 (bfloat16) or 2^10 (fp16) is 128 + c or 1024 + c: two byte
permutations make four numbers, one fused multiply-add centres two.

`decode_attention`: a program takes one kv head, its query heads as columns, and one of `splits` equal parts of the
row's tokens (FlashDecoding: `_combine` weighs the parts by their log-sum-exp). How many parts is decided by shapes
alone, where they begin by the lengths on the device: a CUDA graph stays right while rows grow, and a part that a short
row does not have ends at once. Programs are single warps, ten on an SM: no barrier stands between loads and products.
The 16-bit prefix is the first part's, seen whatever the window; tokens that a window hides are not read.

Bytes a token and kv head: d_head + 6 a group, against 4·d_head in 16 bits (134 : 512 at d_head 128). Instructions:
three a code (sm_90), so 75 of the 128 that an H100's SM can issue a clock, where memory brings it 13 bytes, 25 codes.

Sources: FlashDecoding (Dao et al., 2023) for the split; the online softmax is Milakov and Gimelshein's (1805.02867).
"""

import math
from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phasequant.kernels.gpu.entrance_grid import INTERPRETED, nearest
from phasequant.kernels.gpu.kv import Packed, alike, padded

QUERY_HEADS = (
    8,
    16,
)  # query heads of a program: the columns of a matrix unit's tile, and the most that fit its registers
PROGRAMS = 10  # of one warp on an SM, whose shared memory has room for eleven at d_head 128
SMALLEST_PART = 64  # tokens
COMBINED = 32  # channels of a program that combines
LOG2_E = math.log2(math.e)


class Tiling(NamedTuple):
    """How `decode_attention` is cut; None: chosen by shapes. `splits`: parts of a row; `block`: tokens of a step."""

    splits: int | None = None
    block: int | None = None
    warps: int = 1
    stages: int = 3


def _nibbles(kind: str, shift: str) -> str:
    """Four bytes' nibbles as four 16-bit numbers, $3 and $4 added."""
    exponent, one, pair = {
        "bf16": ("0x43434343", "0x3F803F80", "bf16x2"),
        "fp16": ("0x64646464", "0x3C003C00", "f16x2"),
    }[kind]
    return f"""{{
        .reg .b32 bytes, one;
        mov.b32 one, {one};
        {shift}
        and.b32 bytes, bytes, 0x0F0F0F0F;
        prmt.b32 $0, bytes, {exponent}, 0x7170;
        prmt.b32 $1, bytes, {exponent}, 0x7372;
        fma.rn.{pair} $0, $0, one, $3;
        fma.rn.{pair} $1, $1, one, $4;
    }}"""


LOW, HIGH = "mov.b32 bytes, $2;", "shr.u32 bytes, $2, 4;"
LOW_BF16, HIGH_BF16 = tl.constexpr(_nibbles("bf16", LOW)), tl.constexpr(_nibbles("bf16", HIGH))
LOW_FP16, HIGH_FP16 = tl.constexpr(_nibbles("fp16", LOW)), tl.constexpr(_nibbles("fp16", HIGH))


@triton.jit
@no_type_check
def _centred(codes, zero, ODD: tl.constexpr, dtype: tl.constexpr, STAY: tl.constexpr):
    """Even or odd channels' codes less `zero` (fp32, broadcast). `STAY`: in the layout they were loaded in; without it
    the compiler loads bytes as a product's operand, which is best for keys, and for values (transposed) worst."""
    if INTERPRETED:
        found = (codes >> 4 if ODD else codes & 15).to(tl.float32) - zero
    elif dtype == tl.bfloat16:
        away = (-128.0 - zero).to(tl.bfloat16)
        found = tl.inline_asm_elementwise(
            HIGH_BF16 if ODD else LOW_BF16, "=&r,=&r,r,r,r", [codes, away], tl.bfloat16, is_pure=not STAY, pack=4
        )
    else:
        away = (-1024.0 - zero).to(tl.float16)
        found = tl.inline_asm_elementwise(
            HIGH_FP16 if ODD else LOW_FP16, "=&r,=&r,r,r,r", [codes, away], tl.float16, is_pure=not STAY, pack=4
        )
    return found


@triton.jit
@no_type_check
def _operand(x, dtype: tl.constexpr):
    """As a product takes it: the interpreter multiplies fp32 only."""
    return nearest(x.to(tl.float32), dtype) if INTERPRETED else x.to(dtype)


@triton.jit
@no_type_check
def _grids(key_scale, key_zero, value_scale, value_zero, t, seen, G: tl.constexpr):
    """Scales and zero points of tokens t: four tensors a group."""
    found = ()
    for g in tl.static_range(G):
        found += (
            tl.load(key_scale + t * G + g, mask=seen, other=0),
            tl.load(key_zero + t * G + g, mask=seen, other=0),
            tl.load(value_scale + t * G + g, mask=seen, other=0),
            tl.load(value_zero + t * G + g, mask=seen, other=0),
        )
    return found


@triton.jit
@no_type_check
def _visible(mask, t, last):
    """Which of tokens t, all before `last`, are seen."""
    seen = t < last
    if mask is not None:
        seen &= tl.load(mask + t, mask=seen, other=0) != 0
    return seen


@triton.jit
@no_type_check
def _capped(x, gain, cap):
    """Scores in units of log 2: x·gain, or cap·tanh(x·gain)."""
    if cap is None:
        return x * gain
    else:
        return cap * (1.0 - 2.0 / (tl.exp2(2.8853900817779268 * gain * x) + 1.0))


@triton.jit
@no_type_check
def _softmax(x, seen, top):
    """exp2(x - top'), top' with this step's scores, and what earlier sums have become."""
    x = tl.where(seen[:, None], x, float("-inf"))
    above = tl.maximum(top, tl.max(x, 0))
    base = tl.where(above == float("-inf"), 0.0, above)
    return tl.exp2(x - base[None, :]), above, tl.exp2(top - base)


@triton.jit(do_not_specialize=["window", "capacity", "prefix", "splits", "grid_b", "grid_k", "mask_b"])
@no_type_check
def _decode(
    query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, prefix_keys, prefix_values,
    mask, out, weights, gain, cap, window, capacity, prefix, splits, codes_b, codes_k, grid_b, grid_k, mask_b,
    RATIO: tl.constexpr, TILES: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # SIZE: channels of a group; WIDTH: its bytes, padded.
    BYTES: tl.constexpr = (SIZE + 1) // 2
    dtype = query.dtype.element_ty
    split, k, b = tl.program_id(0), tl.program_id(1) // TILES, tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1) // TILES
    length = capacity if lengths is None else tl.minimum(tl.load(lengths + b), capacity)
    start = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - start, splits), BLOCK) * BLOCK
    first = start + split * span
    last = tl.minimum(first + span, length)
    n = tl.program_id(1) % TILES * HEADS + tl.arange(0, HEADS)
    row = (b * kv_heads + k) * RATIO + n
    j = tl.arange(0, WIDTH)
    here, real, paired = (n < RATIO)[None, :], (j < BYTES)[None, :], (2 * j + 1 < SIZE)[None, :]
    if weights is not None:  # noqa: SIM102
        if (first >= last) & ((split > 0) | (prefix == 0)):  # a part that the row does not have
            tl.store(weights + row * splits + split, float("-inf"), mask=n < RATIO)
            return

    even, odd, sums, even_out, odd_out = (), (), (), (), ()
    for g in tl.static_range(G):
        at = query + row[None, :] * (G * SIZE) + g * SIZE + 2 * j[:, None]
        first_q = tl.load(at, mask=here & tl.trans(real), other=0)
        second_q = tl.load(at + 1, mask=here & tl.trans(paired), other=0)
        even += (_operand(first_q, dtype),)
        odd += (_operand(second_q, dtype),)
        sums += (tl.sum(first_q.to(tl.float32), 0) + tl.sum(second_q.to(tl.float32), 0),)
        even_out += (tl.zeros([WIDTH, HEADS], tl.float32),)
        odd_out += (tl.zeros([WIDTH, HEADS], tl.float32),)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, HEADS], tl.float32)  # summed over its tokens at the end

    wide = k.to(tl.int64)
    key_codes += b * codes_b + wide * codes_k
    value_codes += b * codes_b + wide * codes_k
    key_scale += b * grid_b + wide * grid_k
    key_zero += b * grid_b + wide * grid_k
    value_scale += b * grid_b + wide * grid_k
    value_zero += b * grid_b + wide * grid_k
    if mask is not None:
        mask += b * mask_b
    t = first + tl.arange(0, BLOCK)
    seen = _visible(mask, t, last)
    grids = _grids(key_scale, key_zero, value_scale, value_zero, t, t < last, G)
    for step in range(first, last, BLOCK):
        t = step + tl.arange(0, BLOCK)
        after = t + BLOCK  # its grids are on their way while this step's products are made
        seen_after = _visible(mask, after, last)
        grids_after = _grids(key_scale, key_zero, value_scale, value_zero, after, after < last, G)
        held = (t < last)[:, None] & real
        cells = t[:, None] * (G * BYTES) + j[None, :]
        score = tl.zeros([BLOCK, HEADS], tl.float32)
        for g in tl.static_range(G):
            codes = tl.load(key_codes + cells + g * BYTES, mask=held, other=0)
            eight = tl.full([BLOCK, WIDTH], 8.0, tl.float32)
            part = tl.dot(_centred(codes, eight, False, dtype, False), even[g])
            part = tl.dot(_centred(codes, eight, True, dtype, False), odd[g], part)
            part -= (grids[4 * g + 1].to(tl.float32) - 8.0)[:, None] * sums[g][None, :]
            score += part * grids[4 * g].to(tl.float32)[:, None]
        p, top, decay = _softmax(_capped(score, gain, cap), seen, top)
        total = total * decay[None, :] + p
        evens, odds = (), ()
        for g in tl.static_range(G):
            codes = tl.load(value_codes + cells + g * BYTES, mask=held, other=0)
            zero = tl.broadcast_to(grids[4 * g + 3].to(tl.float32)[:, None], [BLOCK, WIDTH])
            low, high = _centred(codes, zero, False, tl.bfloat16, True), _centred(codes, zero, True, tl.bfloat16, True)
            scaled = _operand(p * grids[4 * g + 2].to(tl.float32)[:, None], tl.bfloat16)
            evens += (tl.dot(tl.trans(low), scaled, even_out[g] * decay[None, :]),)
            odds += (tl.dot(tl.trans(high), scaled, odd_out[g] * decay[None, :]),)
        even_out, odd_out = evens, odds
        seen, grids = seen_after, grids_after

    summed = tl.sum(total, 0)
    if prefix_keys is not None:
        for step in range(0, tl.where(split == 0, prefix, 0), 16):
            token = step + tl.arange(0, 16)
            ours = (token < prefix)[:, None]
            cells = (k * prefix + token)[:, None] * (G * SIZE) + 2 * j[None, :]
            score = tl.zeros([16, HEADS], tl.float32)
            for g in tl.static_range(G):
                low = tl.load(prefix_keys + cells + g * SIZE, mask=ours & real, other=0)
                high = tl.load(prefix_keys + cells + g * SIZE + 1, mask=ours & paired, other=0)
                score = tl.dot(_operand(low, dtype), even[g], score)
                score = tl.dot(_operand(high, dtype), odd[g], score)
            p, top, decay = _softmax(_capped(score, gain, cap), token < prefix, top)
            summed = summed * decay + tl.sum(p, 0)
            weight = _operand(p, dtype)
            evens, odds = (), ()
            for g in tl.static_range(G):
                low = tl.load(prefix_values + cells + g * SIZE, mask=ours & real, other=0)
                high = tl.load(prefix_values + cells + g * SIZE + 1, mask=ours & paired, other=0)
                evens += (tl.dot(tl.trans(_operand(low, dtype)), weight, even_out[g] * decay[None, :]),)
                odds += (tl.dot(tl.trans(_operand(high, dtype)), weight, odd_out[g] * decay[None, :]),)
            even_out, odd_out = evens, odds

    summed = tl.where(summed > 0, summed, 1.0)
    if weights is not None:
        tl.store(weights + row * splits + split, top + tl.log2(summed), mask=n < RATIO)
    target = out.dtype.element_ty
    for g in tl.static_range(G):
        place = out + (row * splits + split)[None, :] * (G * SIZE) + g * SIZE + 2 * j[:, None]
        tl.store(place, nearest(even_out[g] / summed[None, :], target).to(target), mask=here & tl.trans(real))
        tl.store(place + 1, nearest(odd_out[g] / summed[None, :], target).to(target), mask=here & tl.trans(paired))


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def _combine(parts, weights, out, splits, H: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ_i 2^(w_i)·part_i / Σ_i 2^(w_i) of one head; parts that were not there have w = -∞."""
    row = tl.program_id(0).to(tl.int64)
    i, h = tl.arange(0, SPLITS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(weights + row * splits + i, mask=i < splits, other=float("-inf"))
    top = tl.max(w, 0)
    w = tl.exp2(w - tl.where(top == float("-inf"), 0.0, top))
    there = (w > 0)[:, None] & (h < H)[None, :]
    part = tl.load(parts + (row * splits + i)[:, None] * H + h[None, :], mask=there, other=0)
    total = tl.sum(w, 0)
    mean = tl.sum(part * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    target = out.dtype.element_ty
    tl.store(out + row * H + h, nearest(mean, target).to(target), mask=h < H)


@cache
def _processors(device: torch.device) -> int:
    """Of a GPU; the interpreter counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiling(tokens: int, rows: int, d_head: int, device: torch.device, chosen: Tiling | None = None) -> Tiling:
    """`chosen`, and by shapes what it leaves open. `rows`: of sequences, kv heads and tiles of query heads."""
    given = chosen or Tiling()
    block = given.block or (32 if d_head > 64 else 64)
    programs = _processors(device) * max(1, PROGRAMS * 128 // max(d_head, 128) // given.warps)
    splits = given.splits or max(1, min(programs // rows, -(-tokens // max(block, SMALLEST_PART))))
    return given._replace(splits=splits, block=block)


@torch.library.custom_op("phasequant::decode_attention", mutates_args=())
def _decode_op(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_zero: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_zero: Tensor, lengths: Tensor | None, prefix_keys: Tensor | None, prefix_values: Tensor | None,
    mask: Tensor | None, scale: float, window: int | None, softcap: float | None, splits: int | None,
    block: int | None, warps: int, stages: int,
) -> Tensor:  # fmt: skip
    batch, heads, d_head = query.shape
    kv_heads, tokens, groups = key_scale.shape[1:]
    ratio = heads // kv_heads
    columns = QUERY_HEADS[0] if ratio <= QUERY_HEADS[0] else QUERY_HEADS[1]
    tiles = -(-ratio // columns)
    strides = alike((key_codes, key_scale, key_zero), (value_codes, value_scale, value_zero))
    window = tokens if window is None else min(window, tokens)
    cut = tiling(window, batch * kv_heads * tiles, d_head, query.device, Tiling(splits, block, warps, stages))
    assert cut.splits is not None and cut.block is not None
    query = query.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    out = torch.empty_like(query)
    parts, weights = out, None
    if cut.splits > 1:
        parts = query.new_empty(batch, heads, cut.splits, d_head, dtype=torch.float32)
        weights = query.new_empty(batch, heads, cut.splits, dtype=torch.float32)
    prefix = 0
    if prefix_keys is not None and prefix_values is not None and prefix_keys.shape[1]:
        prefix = prefix_keys.shape[1]
        prefix_keys, prefix_values = prefix_keys.contiguous(), prefix_values.contiguous()
    gain, cap = scale * LOG2_E, None
    if softcap is not None:
        gain, cap = scale / softcap, softcap * LOG2_E
    size = d_head // groups
    with torch.cuda.device_of(query):
        _decode[(cut.splits, kv_heads * tiles, batch)](
            query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths,
            prefix_keys if prefix else None, prefix_values if prefix else None, mask, parts, weights, gain, cap, window,
            tokens, prefix, cut.splits, *strides, 0 if mask is None or len(mask) == 1 else tokens,
            ratio, tiles, columns, groups, size, padded(size), cut.block,
            num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if weights is not None:
            _combine[(batch * heads, -(-d_head // COMBINED))](
                parts, weights, out, cut.splits, d_head, triton.next_power_of_2(cut.splits), COMBINED,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@_decode_op.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def decode_attention(
    query: Float[Tensor, "B N H"],
    keys: Packed,
    values: Packed,
    lengths: Int[Tensor, " B"] | None = None,
    prefix: tuple[Float[Tensor, "K P H"], Float[Tensor, "K P H"]] | None = None,
    *,
    scale: float,
    mask: Bool[Tensor, "#B S"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    chosen: Tiling | None = None,
) -> Float[Tensor, "B N H"]:
    """Attention of one token a row over the prefix and the first `lengths` (int32) tokens of its cache (None: all), of
    these the last `window` and what `mask` shows. Queries are mapped as keys are; a row that sees nothing gets 0."""
    cut = chosen or Tiling()
    first, second = prefix or (None, None)
    return _decode_op(query, *keys, *values, lengths, first, second, mask, scale, window, softcap, *cut)
