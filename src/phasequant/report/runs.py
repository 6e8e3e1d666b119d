"""Kernels and bytes: what a plan's linears and KV cache take, and which kernel runs them on this device.

Asked of the plan and the architecture, so it is known before a weight is quantized: bytes are those that a checkpoint's
tensors have, kernels those that `kernels.choose` takes. Embeddings, head and norms stay in 16 bits.
"""

import torch

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.kernels import LinearSpec, choose
from phasequant.nn import KVQuantizer
from phasequant.numerics import QuantSpec, packed_width
from phasequant.plan import PrecisionPlan
from phasequant.report.sides import Json


def what_runs(model_map: ModelMap, plan: PrecisionPlan, device: torch.device, dtype: torch.dtype) -> Json:
    """`linears`: an entry for all blocks in which a group has the same grids; `kv`: bytes a token over all blocks."""
    others = plan.weights_others
    found: dict[tuple[str, QuantSpec | None, QuantSpec | None], list[int]] = {}
    for group in model_map.groups:
        for block in model_map.blocks:
            weights, inputs = others.get((block, group.name), plan.weights), plan.spec(block, group.name)
            if inputs is not None:  # clips and thresholds of rows choose no kernel
                inputs = QuantSpec.from_dict({**inputs.to_dict(), "clip": 1.0, "above": inputs.above and 1.0})
            found.setdefault((group.name, weights, inputs), []).append(block)
    norms = {group.name: group.norm for group in model_map.groups}
    return {
        "device": str(device),
        "gated": model_map.gated,
        "parallel": norms["qkv"] is not None and norms["gate_up"] in (None, norms["qkv"]),
        "norms": [*(["input"] if norms["qkv"] else []), *(["output"] if model_map.family.post_norms else [])],
        "linears": [_entry(model_map, *key, blocks, device, dtype) for key, blocks in found.items()],
        "kv": {"bytes": _kv(model_map, plan), "bytes_16": _kv_16(model_map) * model_map.shape.blocks},
    }


def _entry(
    model_map: ModelMap,
    group: str,
    weights: QuantSpec | None,
    inputs: QuantSpec | None,
    blocks: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Json:
    wide, tall = model_map.width_in(group), model_map.width_out(group)
    named = model_map.group(group)
    copies = model_map.shape.experts if named.probe is not None else 1
    try:
        kernel, why = choose(LinearSpec(wide, tall, weights, inputs, dtype=dtype), device).name, ""
    except PhaseQuantError as error:
        kernel, why = "none", str(error)
    return {
        "group": group, "names": [name.rsplit(".", 1)[-1] for name in named.linears] if copies == 1 else [group],
        "blocks": blocks, "in": wide, "out": tall, "copies": copies,
        "weights": weights and weights.to_dict(), "inputs": inputs and inputs.to_dict(), "kernel": kernel, "why": why,
        "bytes": len(blocks) * copies * _bytes(wide, tall, weights),
        "bytes_16": len(blocks) * copies * _bytes(wide, tall, None),
    }  # fmt: skip


def _bytes(wide: int, tall: int, spec: QuantSpec | None) -> int:
    """Codes, scales and zero points of one linear."""
    if spec is None:
        return 2 * wide * tall
    scale = (4 if spec.is_int else 1) + (0 if spec.symmetric else 1)
    return tall * (packed_width(wide, spec) + scale * spec.groups(wide))


def _kv_16(model_map: ModelMap) -> int:
    """Bytes of a token's keys and values in one block."""
    return 4 * model_map.shape.kv_heads * model_map.shape.d_head


def _kv(model_map: ModelMap, plan: PrecisionPlan) -> int:
    total, shape = 0, model_map.shape
    for block in model_map.blocks:
        spec = plan.kv_at(block)
        if spec is None:
            total += _kv_16(model_map)
        else:
            total += KVQuantizer.of(spec, spec, shape.d_head, None).bytes_per_token(shape.kv_heads)
    return total
