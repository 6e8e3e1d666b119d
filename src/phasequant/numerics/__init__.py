"""Grids, packing and orthogonal matrices as pure functions on tensors. Knows torch and nothing above it."""

from phasequant.numerics.hadamard import Rotation, apply_factors, hadamard, random_orthogonal, spreading_rotation
from phasequant.numerics.integer import dequantize, fake_quantize, grid, quantize, round_to_codes
from phasequant.numerics.packing import pack, packed_width, unpack
from phasequant.numerics.spec import QuantSpec

__all__ = [
    "QuantSpec",
    "Rotation",
    "apply_factors",
    "dequantize",
    "fake_quantize",
    "grid",
    "hadamard",
    "pack",
    "packed_width",
    "quantize",
    "random_orthogonal",
    "round_to_codes",
    "spreading_rotation",
    "unpack",
]
