"""The quantized modules of a model: laid out empty by a `ModelLayout`, found, and set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.nn.attention import attach, switch_attention
from phasequant.nn.experts import take_apart
from phasequant.nn.kv import KVQuantizer
from phasequant.nn.layout import Activations, LowRank, ModelLayout
from phasequant.nn.linear import QuantLinear
from phasequant.nn.online import OnlineMap
from phasequant.nn.prefix import attach_prefix
from phasequant.nn.softcap import is_capped


def set_activations(model: nn.Module, model_map: ModelMap, activations: Activations) -> None:
    """Put every linear's input on its group's grid."""
    for block, group, name in model_map.linears():
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        module.input_spec = activations[block, group]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def empty_linear(
    layout: ModelLayout,
    block: int,
    group: str,
    size: tuple[int, int],
    *,
    bias: bool,
    device: torch.device | None,
    dtype: torch.dtype,
) -> QuantLinear:
    """A linear of a group as the layout has it, (inputs, outputs) wide, to be filled by a loader."""
    branch = layout.lowrank or LowRank({})
    return QuantLinear(
        *size,
        bias=bias,
        weight_spec=layout.weights_at(block, group),
        input_spec=layout.activations[block, group],
        online=OnlineMap(layout.online[group], device) if group in layout.online else None,
        rank=branch.ranks.get(group, 0),
        branch_rounded=branch.rounded,
        branch_dtype=getattr(torch, branch.dtype),
        device=device,
        dtype=dtype,
    )


def lay_out(model: PreTrainedModel, model_map: ModelMap, layout: ModelLayout, dtype: torch.dtype) -> None:
    """Replace the linears of an unfilled model by empty `QuantLinear`s, on the device where the linears are."""
    take_apart(model, model_map)
    for block, group, name in model_map.linears():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        width, device = (linear.in_features, linear.out_features), linear.weight.device
        bias = linear.bias is not None
        module = empty_linear(layout, block, group, width, bias=bias, device=device, dtype=dtype)
        replace_module(model, name, module)
    if is_capped(model, model_map):
        switch_attention(model, model_map)
    device = next(model.parameters()).device
    if layout.kv:
        attach(model, model_map, lambda block: KVQuantizer(layout.kv[block], model_map.shape.d_head, device))
    if layout.prefix is not None:
        shape = model_map.shape
        size = (shape.kv_heads, len(layout.prefix.tokens), shape.d_head)
        kind = getattr(torch, layout.prefix.dtype)
        attach_prefix(model, model_map, [
            (torch.empty(size, dtype=kind, device=device), torch.empty(size, dtype=kind, device=device))
            for _ in model_map.blocks
        ])  # fmt: skip


def quant_linears(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    """Every `QuantLinear` with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def row_share(model: nn.Module, *, forget: bool = False) -> float | None:
    """The share of the linear multiply-adds that single rows read in 8 bits, counted in all forwards since the last
    `forget`; None where no input has rows of its own, or none was read."""
    wide = seen = 0
    for _, linear in quant_linears(model):
        macs = linear.in_features * linear.out_features
        raised, rows = linear.rows_read(forget=forget)
        if linear.input_spec is None or not linear.input_spec.mixed:
            rows = 0
        wide, seen = wide + raised * macs, seen + rows * macs
    return wide / seen if seen else None


@contextmanager
def in_16_bits(module: nn.Module) -> Iterator[None]:
    """Activations of a model or block in 16 bits for a while."""
    kept = [(linear, linear.input_spec) for _, linear in quant_linears(module)]
    for linear, _ in kept:
        linear.input_spec = None
    try:
        yield
    finally:
        for linear, spec in kept:
            linear.input_spec = spec
