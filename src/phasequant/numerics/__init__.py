"""Grids, packing and orthogonal matrices as pure functions on tensors. Knows torch and nothing above it."""

from phasequant.numerics.floating import read_scales, store_scales
from phasequant.numerics.hadamard import hadamard, random_orthogonal, spreading_mix, spreading_rotation
from phasequant.numerics.integer import (
    codes_type,
    dequantize,
    fake_quantize,
    grid,
    quantize,
    round_to_codes,
    round_values,
    static_grid,
    weight_scale,
)
from phasequant.numerics.linear_map import LinearMap, apply_map, layout_shapes
from phasequant.numerics.packing import pack, packed_width, unpack
from phasequant.numerics.procrustes import polar, procrustes_step
from phasequant.numerics.product import learning_product, multiplies_bfloat16, summing_type
from phasequant.numerics.rows import measure_rows, row_measure, wide_rows
from phasequant.numerics.spec import QuantSpec
from phasequant.numerics.straight_through import straight_through

__all__ = [
    "LinearMap",
    "QuantSpec",
    "apply_map",
    "codes_type",
    "dequantize",
    "fake_quantize",
    "grid",
    "hadamard",
    "layout_shapes",
    "learning_product",
    "measure_rows",
    "multiplies_bfloat16",
    "pack",
    "packed_width",
    "polar",
    "procrustes_step",
    "quantize",
    "random_orthogonal",
    "read_scales",
    "round_to_codes",
    "round_values",
    "row_measure",
    "spreading_mix",
    "spreading_rotation",
    "static_grid",
    "store_scales",
    "straight_through",
    "summing_type",
    "unpack",
    "weight_scale",
    "wide_rows",
]
