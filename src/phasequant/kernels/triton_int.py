"""Integer products on a GPU by our Triton kernels, from the very bytes that the checkpoint holds.

Takes symmetric activations per token (4-bit codes travel as int8, single rows may read 8 bits at no cost) and integer
weights: symmetric or not up to 4 bits, symmetric of 8; one scale a channel, or a group of 64 and more. Sums are the
reference's integers (`gpu.product`), scaling its fp32; a bias may be added in one rounding with the scaling. Nothing is
prepared and nothing kept twice.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.kernels.gpu import runs
from phasequant.kernels.machine import Machine

INT32 = 2**31 - 1
SMALLEST_GROUP = 64  # half of it, the bytes, is the least depth that int8 matrix units take


class TritonInt:
    """See the module's docstring."""

    name = "triton-int8"
    split = True
    """Whether codes of 4-bit weights' inputs come as [even | odd] columns."""

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Integer grids that one product of int8 codes can give."""
        return self.can_run_on(spec, Machine.of(device))

    def can_run_on(self, spec: LinearSpec, machine: Machine) -> tuple[bool, str]:
        """The same of a machine that need not be here."""
        ok, reason = runs(machine.kind, "triton" in machine.packages)
        if not ok or machine.kind != "cuda":  # the interpreter is for tests, which ask for it by hand
            return False, reason if not ok else "Triton's interpreter is for tests"
        return self.takes(spec)

    def takes(self, spec: LinearSpec) -> tuple[bool, str]:
        """The same, but for the device."""
        ok, reason = int8_lanes(spec)
        if not ok or spec.weight is None:
            return ok, reason
        weight = spec.weight
        if weight.bits > 4 and not (weight.symmetric and weight.granularity == "channel"):
            return False, "weights of more than 4 bits are symmetric, with a scale a channel"
        if weight.granularity == "group":
            size = weight.group_size or 0
            if size < SMALLEST_GROUP or size % SMALLEST_GROUP:
                return False, f"groups are of multiples of {SMALLEST_GROUP}, not of {size}"
        return True, "exact int32 sums"

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> LinearTensors:
        """The tensors themselves."""
        return weights

    def product(
        self, codes: Tensor, scale: Tensor, weights: LinearTensors, spec: LinearSpec, down: Tensor | None = None
    ) -> Tensor:
        """(T, columns) codes of x with (T,) scales → (T, O), in `spec.dtype`; `down`: x·Aᵀ."""
        from phasequant.kernels.gpu.product import product

        assert spec.weight is not None and weights.packed is not None and weights.scale is not None
        return product(
            codes, scale, weights.packed, weights.scale, spec.dtype or torch.float32,
            w_zero=None if spec.weight.symmetric else weights.zero, bias=weights.bias, down=down,
            up=None if down is None else weights.up,
        )  # fmt: skip

    def linear(self, x: Float[Tensor, "*rows I"], weights: LinearTensors, spec: LinearSpec) -> Float[Tensor, "*rows O"]:
        """The reference's integers."""
        codes, scale, down = entrance(x.reshape(-1, spec.in_features), weights, spec, split=self.split)
        y = self.product(codes, scale, weights, spec, down)
        return y.reshape(*x.shape[:-1], spec.out_features).to(x.dtype)


def int8_lanes(spec: LinearSpec) -> tuple[bool, str]:
    """Whether a linear is a product of int8 codes with a scale a token."""
    if spec.weight is None or spec.input is None:
        return False, "needs integer weights and integer activations"
    if not (spec.weight.is_int and spec.input.is_int):
        return False, "needs integer grids"
    if not spec.input.symmetric or spec.input.granularity != "token":
        return False, "needs symmetric activations with a scale a token"
    if spec.input.rows_by == "gsr":
        return False, "rows by gsr depend on the order of a sum: take rows by absmax"
    if spec.in_features * spec.input.reach * spec.weight.reach > INT32:
        return False, "the sums may exceed 32 bits"
    return True, "codes of 8 bits or less"


def entrance(
    x: Float[Tensor, "T I"], weights: LinearTensors, spec: LinearSpec, *, split: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and x·Aᵀ (where there is a branch) of a linear's input."""
    from phasequant.kernels.gpu.entrance import round_rows

    assert spec.input is not None and spec.weight is not None
    split = split and spec.weight.bits <= 4
    found = round_rows(x.contiguous(), spec.input, split=split, down=weights.down, rounded=spec.branch_rounded)
    return found.codes, found.scale, found.low
