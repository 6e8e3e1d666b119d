"""Kernels for GPUs, in Triton. Imported where they are wanted: Triton is no dependency of this package (torch brings it
where there is a GPU). With `TRITON_INTERPRET=1` set before the first import they run on CPU tensors too, for tests.
"""

import importlib.util
import os

import torch


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether Triton kernels run on `device`; if not, why."""
    return runs(device.type, importlib.util.find_spec("triton") is not None)


def runs(kind: str, triton: bool) -> tuple[bool, str]:
    """Whether they run on a kind of device, with or without Triton installed; if not, why."""
    if not triton:
        return False, "Triton is not installed"
    if kind == "cuda" or (kind == "cpu" and interpreted()):
        return True, "Triton's interpreter" if interpreted() else "Triton"
    return False, f"runs on a GPU, not on {kind}"
