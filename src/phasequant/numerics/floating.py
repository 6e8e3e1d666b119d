r"""Floating-point grids of 4 and 8 bits: E2M1 codes under NVFP4 or MXFP4 scales, E4M3 codes under one scale a token.

    E2M1     0, ½, 1, 1½, 2, 3, 4, 6 and their negatives; a code is the nibble sign·8 + index; ties to the even index
    nvfp4    16 values share s = e4m3( g·max|x| / 6 ) / g,   g = 448·6 / peak  in fp32: largest scale ↔ largest E4M3
    mxfp4    32 values share s = 2^(e - 127),   e = 127 + ⌊log2(max|x| rounded up from 1.75·2^k)⌋ - 2,  stored as e
    fp8      a row shares s = max|x| / 448; E4M3 codes

`peak` is the largest magnitude of the whole tensor for weights (one g a tensor, as servers store it) and of its own row
for activations. A group of zeros gets the scale that compressed-tensors gives it (E4M3 0.125, e = 0). Values and bytes
equal compressed-tensors' `nvfp4-pack-quantized` and `mxfp4-pack-quantized`, negative zeros included.

Source: OCP Microscaling Formats v1.0; NVIDIA's NVFP4 as compressed-tensors 0.20 writes it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.numerics.spec import QuantSpec

E2M1_MAX, E4M3_MAX = 6.0, 448.0
EMPTY_E4M3 = 0.125  # the scale of a group of zeros
BIAS, E2M1_EXPONENT = 127, 2
ROUND_UP = 1 << 21  # pushes mantissas from 1.75 on to the next power of two, in fp32's 23 bits
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_e2m1(x: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """(codes, values): the nearest E2M1 number of each x, saturating; codes are nibbles, as floating-point numbers."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    value = torch.round(size / step) * step
    index = torch.where(value < 2, 2 * value, torch.where(value < 4, value + 2, value / 2 + 4))
    negative = torch.signbit(x) & (x != 0)
    return index + 8 * negative, torch.where(negative, -value, value)


def e2m1_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What nibbles stand for."""
    table = torch.tensor((*VALUES, *(-v for v in VALUES)), dtype=dtype, device=codes.device)
    return table[codes.long()]


def second_scale(peak: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """NVFP4's g, by which group scales are multiplied before they are rounded to E4M3."""
    tiny = torch.finfo(torch.float32).tiny
    found = peak.clamp(min=tiny).reciprocal() * (E4M3_MAX * E2M1_MAX)  # to the last bit as compressed-tensors has it
    return torch.nan_to_num(found, nan=1.0, posinf=1.0, neginf=1.0)


def e4m3_scales(largest: Float[Tensor, "*rows G"], second: Float[Tensor, "*any"]) -> Tensor:
    """NVFP4's group scales as stored, of groups whose largest magnitudes are given."""
    scaled = second * (largest / torch.full_like(largest, E2M1_MAX))
    stored = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(stored.to(torch.float32) == 0, EMPTY_E4M3, stored.to(torch.float32)).to(torch.float8_e4m3fn)


def e8m0_scales(largest: Float[Tensor, "*rows G"]) -> Tensor:
    """MXFP4's group scales as stored: exponents with bias 127."""
    bits = largest.to(torch.float32).contiguous().view(torch.int32)
    power = ((bits + ROUND_UP) & (0x1FF << 23)).view(torch.float32)
    exponent = BIAS + torch.floor(torch.log2(power)) - E2M1_EXPONENT
    return exponent.clamp(0, 255).to(torch.uint8)


def e8m0_values(stored: Tensor) -> Float[Tensor, "*any"]:
    """2^(e - 127), fp32."""
    return torch.exp2(stored.to(torch.float32) - BIAS)


def float_scale(
    kind: str, largest: Float[Tensor, "*rows G"], peak: Float[Tensor, "*any"] | None
) -> Float[Tensor, "*rows G"]:
    """The scale of every group, as a number to multiply its codes' values by; `peak` of the tensor or of each row."""
    if kind == "mxfp4":
        return e8m0_values(e8m0_scales(largest)).to(largest.dtype)
    if kind == "nvfp4":
        second = second_scale((largest.amax(-1, keepdim=True) if peak is None else peak).to(torch.float32))
        return (e4m3_scales(largest.to(torch.float32), second).to(torch.float32) / second).to(largest.dtype)
    scale = largest / torch.full_like(largest, E4M3_MAX)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def round_float(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, values) of scaled numbers."""
    if kind != "fp8":
        return round_e2m1(x)
    value = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return value, value


def store_scales(
    scale: Float[Tensor, "O G"], spec: QuantSpec, peak: Tensor | None
) -> tuple[Tensor, Float[Tensor, "1"] | None]:
    """(scales as stored, NVFP4's second scale) of scales that `float_scale` gave: bytes of E4M3 or E8M0; integer grids'
    as they are."""
    if spec.kind == "mxfp4":
        return (torch.log2(scale) + BIAS).round().to(torch.uint8), None
    if spec.kind == "nvfp4":
        assert peak is not None
        second = second_scale(peak.to(torch.float32)).reshape(1)
        return (scale * second).to(torch.float8_e4m3fn).view(torch.uint8), second
    return scale, None


def read_scales(stored: Tensor, spec: QuantSpec, second: Tensor | None) -> Float[Tensor, "O G"]:
    """The inverse of `store_scales`."""
    if spec.kind == "mxfp4":
        return e8m0_values(stored)
    if spec.kind == "nvfp4":
        assert second is not None
        return stored.view(torch.float8_e4m3fn).to(torch.float32) / second
    return stored
