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
from phasequant.kernels.machine import Machine
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


def choose_on(spec: LinearSpec, machine: Machine, name: str | None = None) -> tuple[Kernel | None, dict[str, str]]:
    """What `choose` takes on a machine that need not be here, by the same rules, and why not what it prefers to that;
    None where nothing runs. `cpu` is always this one: what a CPU adds without overflow is tried, not looked up."""
    name = name or os.environ.get(CHOICE) or None
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        if name is not None and kernel.name != name:
            continue
        asked = getattr(kernel, "can_run_on", None)  # of those that depend on more than the kind of device
        ok, reason = kernel.can_run(spec, torch.device(machine.kind)) if asked is None else asked(spec, machine)
        if ok:
            return kernel, reasons
        reasons[kernel.name] = reason
    return None, reasons


__all__ = [
    "KERNELS",
    "Kernel",
    "LinearSpec",
    "LinearTensors",
    "Machine",
    "Prepared",
    "choose",
    "choose_on",
    "dense_weight",
    "round_input",
]
