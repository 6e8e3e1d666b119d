"""Linears of a model's shape against 16 bits, FP8 and INT8 of the same shape, in one run.

Ours is all that a checkpoint's linear does behind its map: rounding the 16-bit input, the product, scaling, 16 bits
out. The others are given what they like best: FP8 and INT8 products get their inputs already rounded. `roofline`: the
larger of the bytes that must move and the operations to do, by the ceilings measured in the same run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phasequant.arch import ModelMap
from phasequant.bench.timing import ceilings, copies_for, name_of, time_calls
from phasequant.kernels import LinearSpec, LinearTensors, choose
from phasequant.numerics import QuantSpec, packed_width

WEIGHTS = QuantSpec(4, True, "channel")


def random_tensors(width: int, out: int, device: torch.device, weights: QuantSpec = WEIGHTS) -> LinearTensors:
    """Random codes with scales that give outputs of about the inputs' size."""
    packed = torch.randint(0, 256, (out, packed_width(width, weights)), dtype=torch.uint8, device=device)
    scale = torch.full((out, 1), 0.25 / width**0.5, device=device).to(torch.bfloat16).float()
    return LinearTensors(packed=packed, scale=scale, zero=torch.zeros_like(scale))


def _ours(x: Sequence[Tensor], width: int, out: int, grid: QuantSpec, name: str | None) -> tuple[str, list[Callable]]:
    spec = LinearSpec(width, out, WEIGHTS, grid, dtype=x[0].dtype)
    kernel = choose(spec, x[0].device, name)
    calls = []
    for one in x:
        weights = kernel.prepare(random_tensors(width, out, one.device), spec)
        calls.append(lambda one=one, weights=weights: kernel.linear(one, weights, spec))
    return kernel.name, calls


def _float8(x: Tensor, w: Tensor) -> Callable[[], object]:
    kind = torch.float8_e4m3fn
    a, b = x.to(kind), w.to(kind)
    ones = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(w), device=x.device)
    return lambda: torch._scaled_mm(a, b.T, scale_a=ones[0], scale_b=ones[1], out_dtype=torch.bfloat16)


def _int8(x: Tensor, w: Tensor) -> Callable[[], object]:
    a, b = (torch.randint(-127, 128, t.shape, dtype=torch.int8, device=t.device) for t in (x, w))
    return lambda: torch._int_mm(a, b.T)


@torch.no_grad()
def time_products(
    model_map: ModelMap, rows: Sequence[int], device: torch.device, names: Sequence[str | None] = (None,)
) -> dict[str, Any]:
    """Every group's stacked linear at every number of rows: microseconds and ratios to bfloat16. `names`: of our
    kernels, None for the one that would be chosen."""
    top = ceilings(device)
    found = []
    for group in model_map.groups:
        width, out = model_map.width_in(group.name), model_map.width_out(group.name)
        for count in rows:
            copies = copies_for(width * out // 2)
            x = [torch.randn(count, width, device=device, dtype=torch.bfloat16) for _ in range(copies)]
            dense = [torch.randn(out, width, device=device, dtype=torch.bfloat16) for _ in range(min(copies, 8))]
            pairs = [(x[i], dense[i % len(dense)]) for i in range(copies)]
            sides: dict[str, Any] = {"bf16": [partial(functional.linear, *pair) for pair in pairs]}
            if device.type == "cuda":
                if torch.cuda.get_device_capability(device) >= (8, 9):
                    sides["fp8"] = [_float8(*pair) for pair in pairs[: len(dense)]]
                if count > 16:
                    sides["int8"] = [_int8(*pair) for pair in pairs[: len(dense)]]
            for name in names:
                for bits in (4, 8):
                    label, calls = _ours(x, width, out, QuantSpec(bits), name)
                    sides[f"W4A{bits} {label}"] = calls
            times = time_calls(sides, device)
            moved = width * out / 2 + 4 * out + 2 * count * (width + out)
            roofline = max(moved / top["bytes"], 2 * count * width * out / top["int8"]) * 1e6
            found.append(
                {
                    "group": group.name, "in": width, "out": out, "rows": count, "microseconds": times,
                    "ratio": {side: times["bf16"] / taken for side, taken in times.items()}, "roofline": roofline,
                }
            )  # fmt: skip
            del sides, pairs, x, dense
    return {"device": name_of(device), "ceilings": top, "linears": found}
