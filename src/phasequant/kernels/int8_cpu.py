"""Integer products on a CPU by `torch._int_mm`: int8 codes, int32 sums. For where `cpu_onednn` does not run.

Takes symmetric per-channel weights and symmetric per-token or per-tensor activations of up to 8 bits. Weights are
unpacked once: a byte a weight more in memory. The sums are the reference's integers and the scaling is the
same fp32 in the same order, so results are equal bit for bit as long as the sums fit fp32 exactly. x86 CPUs without
VNNI add pairs of products in 16 bits, which saturates with 8-bit weights: tried once, and declined.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.kernels.reference import EXACT_FP32, add_rest, input_grid
from phasequant.numerics import round_to_codes, unpack

UNSIGNED, INT16 = 255, 2**15 - 1  # CPUs have u8·s8: a signed operand is shifted


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Codes (O, I), int8; `tensors` for the rest."""

    codes: Tensor
    tensors: LinearTensors


class Int8Cpu:
    """See the module's docstring."""

    name = "cpu-int8-torch"

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Symmetric integer grids on a CPU, one scale a row, sums below 2^24."""
        ok, reason = one_scale_a_row(spec, device)
        if not ok or spec.weight is None or spec.input is None:
            return ok, reason
        if 2 * UNSIGNED * spec.weight.reach > INT16 and not _exact():
            return False, "this CPU adds int8 products in 16 bits, where 8-bit weights overflow"
        return True, "exact int32 sums"

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> Unpacked:
        """Codes as int8."""
        assert spec.weight is not None and weights.packed is not None
        return Unpacked(unpack(weights.packed, spec.in_features, spec.weight).contiguous(), weights)

    def linear(
        self, x: Float[Tensor, "*rows I"], weights: Unpacked | LinearTensors, spec: LinearSpec
    ) -> Float[Tensor, "*rows O"]:
        """The reference's integers by `torch._int_mm`."""
        if isinstance(weights, LinearTensors):
            weights = self.prepare(weights, spec)
        tensors = weights.tensors
        assert spec.input is not None and tensors.scale is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)
        s_x, z_x = input_grid(values, tensors, spec)
        q_x = round_to_codes(values, s_x, z_x, spec.input).reshape(-1, spec.in_features)
        sums = torch._int_mm(q_x, weights.codes.T).reshape(*x.shape[:-1], spec.out_features)
        return add_rest(sums.to(wide) * tensors.scale[:, 0].to(wide) * s_x, values, tensors, spec).to(x.dtype)


def one_scale_a_row(spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
    """Whether a linear is a product of int8 codes scaled by row and column, on a CPU; if not, why."""
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
    return True, "codes of 8 bits or less"


@cache
def _exact() -> bool:
    """Whether the largest products are added exactly here."""
    codes = torch.full((2, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(rows, codes.T) == 64 * 127**2).all()) for rows in (codes, codes[:1]))
