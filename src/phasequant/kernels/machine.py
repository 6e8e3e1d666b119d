"""What decides which kernels there are: the kind of device, its compute capability, what is installed.

Kernels answer for a `Machine`, so that they can be asked about a GPU that is not here (`doctor`); for a device that is,
`Machine.of` fills it in.
"""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from phasequant.errors import PhaseQuantError

PACKAGES = ("humming", "triton")


@dataclass(frozen=True, slots=True)
class Machine:
    """`kind`: cpu, cuda, or another type of torch device. `capability`: of an NVIDIA GPU. `packages`: of `PACKAGES`."""

    kind: str = "cpu"
    capability: tuple[int, int] | None = None
    packages: frozenset[str] = frozenset()
    hip: bool = False

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """The machine around a device."""
        capability = None
        if device.type == "cuda" and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
        return cls(device.type, capability, installed(), torch.version.hip is not None)

    @classmethod
    def named(cls, name: str, packages: Iterable[str]) -> "Machine":
        """cpu, or an NVIDIA GPU by its architecture: sm_80, sm_90, sm_100 …"""
        if name == "cpu":
            return cls("cpu", None, frozenset(packages))
        found = re.fullmatch(r"sm_(\d{1,2})(\d)a?", name)
        if found is None:
            raise PhaseQuantError(f"unknown GPU '{name}': name its architecture, as in sm_90 (or cpu, or auto)")
        return cls("cuda", (int(found[1]), int(found[2])), frozenset(packages))

    @property
    def name(self) -> str:
        """As `named` takes it."""
        return self.kind if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


@cache
def installed() -> frozenset[str]:
    """Which of `PACKAGES` are here."""
    return frozenset(name for name in PACKAGES if importlib.util.find_spec(name) is not None)
