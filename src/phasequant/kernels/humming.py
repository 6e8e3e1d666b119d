"""Integer products on NVIDIA GPUs by `humming-kernels` (vLLM project, Apache-2.0): packed int4 or int8 weights times
int8 codes, compiled for the device and the shape at the first call.

On Hopper, which has no 4-bit matrix unit, 4-bit codes travel in int8 lanes: the same integers, and the gain is in the
bytes of the weights and in int8 arithmetic. humming holds scales of weights in 16 bits; ours are numbers of bfloat16
(`numerics.weight_scale`), so nothing is lost, and checkpoints whose scales are not are refused. Sums are int32; the
product with s_x is rounded to 16 bits, then the product with s_w. Where warps or blocks share a long sum (few rows),
humming adds their parts in 16 bits: outputs are within four 16-bit units of the larger of themselves and the mean
magnitude (measured on an H100, 1 to 4097 rows), not of themselves alone; `triton-int8` adds integers throughout.

The weights are laid out anew (`prepare`), the same bytes as they were. Group scales are refused: humming rounds them to
integers of 1/1024 of the largest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.kernels.machine import Machine
from phasequant.kernels.triton_int import entrance, int8_lanes

ALIGNED = 64  # both sides of a weight come in tiles of it


@dataclass(frozen=True, slots=True)
class Laid:
    """A layer of humming's, and what it does not hold."""

    layer: Any
    tensors: LinearTensors


class Humming:
    """See the module's docstring."""

    name = "humming-int8"
    split = False

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Symmetric int4 or int8 weights with a scale a channel, int8 lanes, 16-bit in and out, an NVIDIA GPU."""
        return self.can_run_on(spec, Machine.of(device))

    def can_run_on(self, spec: LinearSpec, machine: Machine) -> tuple[bool, str]:
        """The same of a machine that need not be here."""
        if "humming" not in machine.packages:
            return False, "humming-kernels is not installed"
        if machine.kind != "cuda":
            return False, f"runs on NVIDIA GPUs, not on {machine.kind}"
        if (machine.capability or (0, 0)) < (7, 5):
            return False, "needs compute capability 7.5"
        return self.takes(spec)

    def takes(self, spec: LinearSpec) -> tuple[bool, str]:
        """The same, but for the machine."""
        ok, reason = int8_lanes(spec)
        if not ok or spec.weight is None:
            return ok, reason
        weight = spec.weight
        if weight.bits not in (4, 8) or not weight.symmetric or weight.granularity != "channel":
            return False, "needs symmetric weights of 4 or 8 bits with a scale a channel"
        if spec.in_features % ALIGNED or spec.out_features % ALIGNED:
            return False, f"needs widths that are multiples of {ALIGNED}"
        if spec.dtype not in (torch.bfloat16, torch.float16, None):
            return False, "gives 16-bit outputs"
        return True, "int32 sums, 16-bit scaling"

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> Laid:
        """humming's layout of the same codes."""
        assert weights.scale is not None
        scale = weights.scale.to(spec.dtype or torch.bfloat16)
        if not torch.equal(scale.float(), weights.scale):
            raise PhaseQuantError(
                "the scales of this checkpoint's weights are no 16-bit numbers (it was made before they were): "
                "quantize the model again, or take another kernel: PHASEQUANT_KERNEL=triton-int8"
            )
        return Laid(_layer(weights, scale, spec), LinearTensors(down=weights.down, up=weights.up))

    def product(
        self, codes: Tensor, scale: Tensor, weights: Laid, spec: LinearSpec, down: Tensor | None = None
    ) -> Tensor:
        """(T, I) codes of x with (T,) scales → (T, O), in 16 bits; `down`: x·Aᵀ."""
        y: Tensor = weights.layer(codes, input_scale=scale[:, None])
        if down is not None:
            assert weights.tensors.up is not None
            y = torch.addmm(y, down.to(y.dtype), weights.tensors.up.to(y.dtype).T)
        return y

    def linear(self, x: Float[Tensor, "*rows I"], weights: Laid, spec: LinearSpec) -> Float[Tensor, "*rows O"]:
        """The reference's integers."""
        codes, scale, down = entrance(x.reshape(-1, spec.in_features), weights.tensors, spec, split=False)
        return self.product(codes, scale, weights, spec, down).reshape(*x.shape[:-1], spec.out_features)


def _layer(weights: LinearTensors, scale: Tensor, spec: LinearSpec) -> Any:
    from humming.layer import HummingLayer

    assert spec.weight is not None and weights.packed is not None
    with torch.cuda.device(weights.packed.device):
        layer = HummingLayer(
            shape_n=spec.out_features,
            shape_k=spec.in_features,
            weight_config={"dtype": f"int{spec.weight.bits}"},
            input_config={"dtype": "int8"},
            has_bias=weights.bias is not None,
            torch_dtype=scale.dtype,
        ).to(weights.packed.device)
        found = {"weight": weights.packed.contiguous().view(torch.int32), "weight_scale": scale}
        if weights.bias is not None:
            found["bias"] = weights.bias.to(scale.dtype)
        layer.load_from_tensors(found)
        layer.transform()
    return layer
