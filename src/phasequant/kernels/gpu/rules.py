"""What the Triton kernels take, as rules that import no Triton: so that they can be asked where it is not installed."""

import torch

from phasequant.kernels.machine import Machine
from phasequant.numerics import QuantSpec

LARGEST_HEAD, MOST_GROUPS = 256, 4


def too_old(machine: Machine) -> str:
    """Why a GPU has no TF32 products; empty where it has them, and for the interpreter."""
    if machine.kind == "cuda" and (machine.hip or (machine.capability or (0, 0)) < (8, 0)):
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    return ""


def kv_fits(spec: QuantSpec, d_head: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the kernels read and write a KV grid, for queries of `dtype`; if not, why."""
    if not spec.is_int or spec.symmetric or spec.bits > 4 or spec.mixed or spec.clip == "mse":
        return False, f"reads asymmetric integers, two to a byte, not {spec}"
    if spec.granularity not in ("token", "group"):
        return False, f"reads a grid a token or group, not one a {spec.granularity}"
    groups = spec.groups(d_head)
    if groups > 1 and d_head // groups % 2:
        return False, f"a byte of two groups (group_size {spec.group_size})"
    if d_head > LARGEST_HEAD or groups > MOST_GROUPS:
        return False, f"reads heads of up to {LARGEST_HEAD} in up to {MOST_GROUPS} groups, not {d_head} in {groups}"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"multiplies 16-bit queries, not {dtype}"
    return True, "4-bit codes, two to a byte"
