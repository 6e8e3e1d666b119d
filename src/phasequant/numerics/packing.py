"""Two 4-bit codes in one byte.

The code at an even place of the last axis lies in the low four bits, its right neighbour in the high four; an odd
width is padded with one zero. Symmetric codes are stored with 8 added, so that every nibble is unsigned. Grids of up
to 4 bits are packed; 5 to 8 bits take a byte a code. E2M1 codes are nibbles already.
"""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from phasequant.numerics.spec import QuantSpec

OFFSET = 8  # added to symmetric codes of up to 4 bits


def packed_width(width: int, spec: QuantSpec) -> int:
    """Bytes that a row of `width` codes takes."""
    return (width + 1) // 2 if spec.bits <= 4 else width


def pack(codes: Integer[Tensor, "*rows width"], spec: QuantSpec) -> UInt8[Tensor, "*rows bytes"]:
    """Codes to bytes."""
    if spec.bits > 4:
        return codes.to(torch.int16).add(128 if spec.symmetric else 0).to(torch.uint8)
    nibbles = codes.to(torch.int16).add(OFFSET if spec.symmetric and spec.is_int else 0).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*rows bytes"], width: int, spec: QuantSpec) -> Integer[Tensor, "*rows width"]:
    """Bytes to codes: int8 where symmetric, uint8 where not; the inverse of `pack`."""
    if spec.bits > 4:
        return packed if not spec.symmetric else (packed ^ 128).view(torch.int8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width]
    return nibbles if not (spec.symmetric and spec.is_int) else nibbles.view(torch.int8) - OFFSET
