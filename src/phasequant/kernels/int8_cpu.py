"""Integer matrix units of the CPU: `torch._int_mm` on int8 codes, int32 sums (AMX or VNNI where the CPU has them).

Takes symmetric per-channel weights and symmetric per-token or per-tensor activations of up to 8 bits. Weights stay
packed in memory and are unpacked to int8 for the call. The sums are the reference's integers and the scaling is the
same fp32 in the same order, so results are equal bit for bit as long as the sums fit fp32 exactly.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.kernels.reference import EXACT_FP32, add_rest, input_grid
from phasequant.numerics import round_to_codes, unpack


class Int8Cpu:
    """See the module's docstring."""

    name = "cpu-int8"

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Symmetric integer grids on a CPU, sums below 2^24."""
        if device.type != "cpu":
            return False, f"runs on the CPU, not on {device.type}"
        if spec.weight is None or spec.input is None:
            return False, "needs integer weights and integer activations"
        if not (spec.weight.is_int and spec.input.is_int):
            return False, "needs integer grids"
        if not (spec.weight.symmetric and spec.input.symmetric):
            return False, "needs symmetric grids"
        if spec.weight.granularity == "group" or spec.input.granularity in ("group", "column"):
            return False, "has one scale a row, not one a group or column"
        if spec.in_features * spec.input.reach * spec.weight.reach > EXACT_FP32:
            return False, "the sums may exceed 2^24, where fp32 scaling would round them"
        return True, "exact int32 sums"

    def linear(self, x: Float[Tensor, "*rows I"], weights: LinearTensors, spec: LinearSpec) -> Float[Tensor, "*rows O"]:
        """The reference's integers by `torch._int_mm`."""
        assert spec.weight is not None and spec.input is not None
        assert weights.packed is not None and weights.scale is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)
        s_x, z_x = input_grid(values, weights, spec)
        q_x = round_to_codes(values, s_x, z_x, spec.input).reshape(-1, spec.in_features)
        q_w = unpack(weights.packed, spec.in_features, spec.weight)
        sums = torch._int_mm(q_x, q_w.T).reshape(*x.shape[:-1], spec.out_features)
        return add_rest(sums.to(wide) * weights.scale[:, 0].to(wide) * s_x, values, weights, spec).to(x.dtype)
