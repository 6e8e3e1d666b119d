r"""A row's grid and codes inside a Triton kernel: the numbers of `numerics.integer`, bit for bit, without dividing.

    s = c·max|x| / q_max,   q = clamp(round(x/s), -q_max-1, q_max),   rows of max|x| > τ on q_max = 127, c = 1

What is rounded to an integer is the fp32 quotient, itself rounded, so x times a rounded 1/s would differ next to ties.
With i = RN(1/s) and its error e = (1 - s·i)·i,

    y = RN(x·i + x·e),   RN(x/s) = RN(y + i·(x - s·y))          four operations, three of them fused

by Markstein's theorem (IBM J. Res. Dev. 34, 1990): i is correctly rounded and y within one unit in the last place, so
the remainder is exact and the result correctly rounded. x and s are first multiplied by the power of two that brings s
to 1 … 4: exact, and nothing overflows or vanishes, whatever the row's size (what becomes subnormal rounds to 0 either
way). Then y + 1.5·2^23 rounds to nearest, ties to even, and leaves the code in the lowest byte.

About ten operations a value, where a division takes some twenty and a branch: beside 2 to 5 bytes a value of memory
traffic the former is hidden on a Hopper GPU (28·10^12 operations/s, 3·10^12 bytes/s) and the latter is not.

Triton's interpreter truncates to bfloat16, loses its subnormals and multiplies matrices of it as integers: there `wide`
and `nearest` go by bits, and operands of products are fp32 of the same values. It fuses multiply-adds from 3.9 on;
before, it divides. Functions for Triton are marked `no_type_check`: the wrapper of a checked one hides the module's
names from Triton.
"""

from typing import no_type_check

import triton
import triton.language as tl

from phasequant.kernels.gpu import interpreted

INTERPRETED = tl.constexpr(interpreted())
FUSED = tl.constexpr(not interpreted() or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))
TO_INTEGER = tl.constexpr(1.5 * 2**23)


@triton.jit
@no_type_check
def scale_of(largest, clip, above, HIGHEST: tl.constexpr):
    """(s, largest code) of a row with max|x| = `largest`; `above` None where rows are not mixed."""
    scale = tl.div_rn(largest * clip, HIGHEST * 1.0)
    highest = HIGHEST * 1.0
    if above is not None:
        scale = tl.where(largest > above, tl.div_rn(largest, 127.0), scale)
        highest = tl.where(largest > above, 127.0, highest)
    return tl.where(scale > 0, scale, 1.0), highest


@triton.jit
@no_type_check
def codes_of(x, scale, highest, FAR: tl.constexpr):
    """int8 codes of a row on its scale. `FAR`: x may exceed the grid by any factor, as on a static one."""
    if FAR:
        x = tl.minimum(tl.maximum(x, -256.0 * scale), 256.0 * scale)
    if FUSED:
        exponent = scale.to(tl.int32, bitcast=True) >> 23
        power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        x *= power
        s = scale * power
        i = tl.div_rn(1.0, s)
        e = tl.fma(-s, i, 1.0) * i
        y = tl.fma(x, i, x * e)
        quotient = tl.fma(tl.fma(-s, y, x), i, y)
    else:
        quotient = tl.div_rn(x, scale + tl.zeros_like(x))
    quotient = tl.minimum(tl.maximum(quotient, -highest - 1.0), highest)
    return (quotient + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
@no_type_check
def wide(x):
    """What was read, as fp32."""
    if x.dtype == tl.bfloat16 and INTERPRETED:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
@no_type_check
def nearest(x, dtype: tl.constexpr):
    """fp32 → the nearest number of `dtype`, as fp32."""
    if dtype == tl.float32:
        return x
    elif dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
@no_type_check
def operand(x):
    """fp32 numbers of bfloat16, or bfloat16 ones, as a matrix product takes them."""
    return x.to(tl.float32) if INTERPRETED else x.to(tl.bfloat16)
