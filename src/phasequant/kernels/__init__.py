"""How a quantized linear is computed here: the reference (the definition) and the kernels that equal it.

`PHASEQUANT_KERNEL=name` takes one of them for all linears, or says why it cannot.
"""

import os

import torch

from phasequant.errors import PhaseQuantError
from phasequant.kernels.contract import Kernel, LinearSpec, LinearTensors, Prepared
from phasequant.kernels.cpu_onednn import OneDnn
from phasequant.kernels.humming import Humming
from phasequant.kernels.int8_cpu import Int8Cpu
from phasequant.kernels.reference import Reference, dense_weight, round_input
from phasequant.kernels.triton_int import TritonInt

KERNELS: tuple[Kernel, ...] = (Humming(), TritonInt(), OneDnn(), Int8Cpu(), Reference())
"""In order of preference."""
CHOICE = "PHASEQUANT_KERNEL"


def choose(spec: LinearSpec, device: torch.device, name: str | None = None) -> Kernel:
    """The first kernel that can run `spec` on `device`, or the one called `name`; if none, an error with reasons."""
    name = name or os.environ.get(CHOICE) or None
    reasons = []
    for kernel in KERNELS:
        if name is not None and kernel.name != name:
            continue
        ok, reason = kernel.can_run(spec, device)
        if ok:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    known = ", ".join(kernel.name for kernel in KERNELS)
    raise PhaseQuantError(f"no kernel runs {spec} on {device}: {'; '.join(reasons) or f'unknown; there are {known}'}")


__all__ = ["KERNELS", "Kernel", "LinearSpec", "LinearTensors", "Prepared", "choose", "dense_weight", "round_input"]
