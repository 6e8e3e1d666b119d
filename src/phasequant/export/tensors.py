r"""A linear's tensors in compressed-tensors' layout, codes and scales as they are.

    pack-quantized          weight_packed int32 (O, I·b/32), little end first; codes are stored with 2^(b-1) added
                            weight_scale (O, G); weight_shape int64 (2); weight_zero_point, packed along O
    nvfp4-pack-quantized    weight_packed uint8 (O, I/2); weight_scale E4M3 (O, I/16); weight_global_scale fp32 (1),
                            a divisor, equal in linears that servers fuse; input_global_scale fp32 (1), likewise
    mxfp4-pack-quantized    weight_packed uint8 (O, I/2); weight_scale uint8 exponents (O, I/32)

FP4 bytes are those that `QuantLinear` holds. Only 4 and 8 bits are written: compressed-tensors 0.17 and 0.20 pack other
widths differently. An unsigned code q with zero point z becomes q - 2^(b-1) with z - 2^(b-1).
"""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from phasequant.nn import QuantLinear
from phasequant.numerics import unpack
from phasequant.numerics.floating import second_scale

WIDE = torch.float32


def scale_type(scale: Tensor, stored: torch.dtype) -> torch.dtype:
    """The narrowest type that holds scales without loss: the checkpoint's own, bfloat16, or fp32."""
    for dtype in (stored, torch.bfloat16):
        if torch.equal(scale.to(dtype).to(WIDE), scale.to(WIDE)):
            return dtype
    return WIDE


def _own(tensor: Tensor) -> Tensor:
    """A tensor that is all of its storage, as safetensors wants it."""
    return tensor.clone(memory_format=torch.contiguous_format)


def linear_tensors(linear: QuantLinear, stored: torch.dtype, peak: float | None = None) -> dict[str, Tensor]:
    """The tensors of one linear by local name; `peak`: of its input, where its profile has a second scale for it."""
    spec = linear.weight_spec
    assert spec is not None and linear.weight_packed is not None and linear.weight_scale is not None
    packed, scale = linear.weight_packed.cpu(), linear.weight_scale.cpu()
    found: dict[str, Tensor] = {}
    if spec.is_int:
        middle = 2 ** (spec.bits - 1)
        codes = unpack(packed, linear.in_features, spec)
        if not spec.symmetric:
            assert linear.weight_zero is not None
            codes = (codes.to(torch.int16) - middle).to(torch.int8)
            zero = (linear.weight_zero.cpu().to(torch.int16) - middle).to(torch.int8)
            found["weight_zero_point"] = _own(pack_to_int32(zero, spec.bits, packed_dim=0))
        found["weight_packed"] = _own(pack_to_int32(codes.contiguous(), spec.bits))
        found["weight_scale"] = scale.to(scale_type(scale, stored))
        found["weight_shape"] = torch.tensor([linear.out_features, linear.in_features])
    else:
        found["weight_packed"] = packed
        found["weight_scale"] = scale
        if spec.kind == "nvfp4":
            assert linear.weight_global is not None
            found["weight_scale"] = scale.view(torch.float8_e4m3fn)
            found["weight_global_scale"] = linear.weight_global.cpu()
        if peak is not None:
            found["input_global_scale"] = second_scale(torch.tensor([peak], dtype=WIDE))
    if linear.bias is not None:
        found["bias"] = linear.bias.detach().cpu().to(stored)
    return found
