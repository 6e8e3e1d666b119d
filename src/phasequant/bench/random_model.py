"""A model of some shape with random weights, in 16 bits or quantized, laid out as a checkpoint of it would be.

Codes are random, scales such that the residual stream stays finite; online maps are those a recipe would have: QuaRot's
Hadamards, or FlatQuant's Kronecker pairs. It says nothing of accuracy and everything of time and memory.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.nn import KVLayout, ModelLayout, OnlineMap, QuantLinear, lay_out, quant_linears
from phasequant.numerics import LinearMap, QuantSpec, random_orthogonal
from phasequant.numerics.hadamard import factors
from phasequant.transform.quarot import fixed_rotations

Style = Literal["16-bit", "quarot", "flat"]
PAPER = (0, 1, 2)  # DynamicPTQ's first blocks; the last is its fourth
SPREAD = 0.02


def paper_blocks(model_map: ModelMap) -> set[int]:
    """DynamicPTQ's set: blocks 1, 2, 3 and the last."""
    return {*(b for b in PAPER if b in model_map.blocks), model_map.blocks[-1]}


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    style: Style = "quarot",
    *,
    eight: Literal["none", "paper", "all"] = "none",
    kv_bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PreTrainedModel:
    """`eight`: which blocks read 8-bit activations."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model_map = ModelMap.from_config(model.config)
    if style != "16-bit":
        lay_out(model, model_map, _layout(model_map, style, eight, kv_bits), dtype)
    rotary = {name: m for name, m in model.named_modules() if hasattr(m, "inv_freq")}
    model.to_empty(device=device)
    for name, module in rotary.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], type(module)(config=config).to(device))
    for parameter in model.parameters():
        parameter.data.normal_(0, SPREAD) if parameter.dim() > 1 else parameter.data.fill_(1)
    for _, linear in quant_linears(model):
        _fill(linear, device)
    for module in model.modules():
        if isinstance(module, OnlineMap):
            _fill_map(module, device)
    return model.eval().requires_grad_(False)


def _layout(model_map: ModelMap, style: Style, eight: str, kv_bits: int) -> ModelLayout:
    chosen = fixed_rotations(model_map, 0)
    block = chosen.block(0)
    if style == "flat":
        pairs = {place: _pair(model_map.width_in(place)) for place in ("qkv", "gate_up", "down")}
        block = block.with_maps(pairs)
    raised = {"none": set[int](), "paper": paper_blocks(model_map), "all": set(model_map.blocks)}[eight]
    names = [group.name for group in model_map.groups]
    online = {name: found.layout() for name in names if (found := block.online(name)) is not None}
    keys = QuantSpec(kv_bits, False, "group", min(64, model_map.shape.d_head)) if kv_bits < 16 else None
    kv = {}
    if keys is not None:
        qk = None if block.qk is None else block.qk.layout()
        kv = {index: KVLayout(keys, replace(keys), qk) for index in model_map.blocks}
    return ModelLayout(
        weights=QuantSpec(4, True, "channel"),
        kv=kv,
        activations={(b, n): QuantSpec(8 if b in raised else 4) for b in model_map.blocks for n in names},
        online=online,
    )


def _pair(width: int) -> LinearMap:
    a, b = factors(width) or (1, width)
    return LinearMap.kronecker(random_orthogonal(a, 0), random_orthogonal(b, 1))


def _fill(linear: QuantLinear, device: torch.device) -> None:
    assert linear.weight_packed is not None and linear.weight_scale is not None
    shape = linear.weight_packed.shape
    linear.weight_packed = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, device=device)
    scale = torch.full(tuple(linear.weight_scale.shape), SPREAD / 4, device=device)
    linear.weight_scale = scale.to(torch.bfloat16).float()


def _fill_map(module: OnlineMap, device: torch.device) -> None:
    made = LinearMap.from_layout(module.layout(), {n: _factor(b, device) for n, b in module.named_buffers()})
    for name, tensor in made.tensors().items():
        setattr(module, name, tensor.to(getattr(module, name)))


def _factor(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    if like.dim() == 1:
        return torch.ones_like(like, device=device)
    return random_orthogonal(like.shape[-1], 0).to(device).expand(like.shape).contiguous()


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    held = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
