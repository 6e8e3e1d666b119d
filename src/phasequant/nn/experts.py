r"""Experts of a mixture as linears of their own, in place of the two stacked tensors that Transformers keeps.

    y_t = Σ_j p_tj · down_e( act(gate_e x_t) · up_e x_t ),   e = the j-th expert that the router gave to token t

Rows go through in the order of tokens, `active` rows a token: what stands before `down` is (T·active, F), row
t·active + j of token t, and each expert's linear is given its rows alone. So an input of a group is seen in one place
for all experts (`prepare`: after what runs online, which is the same for all), and weights, codes and clips are each
expert's own.

A shared expert, whose width is that of several, is taken apart into as many (of a gated MLP every channel is on its
own), which are the last ones by number and which `Mixture` gives to every token:

    y_t = Σ_j p_tj · expert_j(x_t) + s_t · shared(x_t),   s_t = σ(x_t·w) where the shared expert has a gate, else 1

gpt-oss' experts (`ClampedExperts`) have biases, and an act of their own:

    inner = (1 + clamp(u, -L, L)) · g·σ(a·g),   g = min(gate_e x_t, L), u = up_e x_t

An opened model is taken apart (`take_apart`), one that is laid out for loading too, before its weights come: the
checkpoint holds `experts.gate.0.weight_packed` and the like. So is a block of a streamed model whenever it is read
(`take_block_apart`). The router and a shared expert's gate stay as they are, in 16 bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap


def prepared(module: nn.Module, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows I"]:
    """What the quantizers of the linears behind `module`, or its own, see of its input."""
    prepare: Callable[[Tensor], Tensor] | None = getattr(module, "prepare", None)
    return x if prepare is None else prepare(x)


class ExpertLinears(nn.ModuleList):
    """One linear an expert; every row goes through its expert's."""

    def prepare(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows I"]:
        """What the quantizer of any expert sees."""
        return prepared(self[0], x)

    def forward(self, rows: Float[Tensor, "R I"], experts: Int[Tensor, " R"]) -> Float[Tensor, "R O"]:
        """Row r through linear `experts[r]`."""
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=len(self)).tolist()
        pieces = zip(self, rows[order].split(counts), strict=True)
        found = torch.cat([linear(piece) for linear, piece in pieces if len(piece)])
        return found[order.argsort()]


class Experts(nn.Module):
    """All experts of a block."""

    def __init__(self, gate: ExpertLinears, up: ExpertLinears, down: ExpertLinears, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate, self.up, self.down, self.act_fn = gate, up, down, act

    def prepare(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """What the quantizer of any expert's gate and up sees."""
        return self.gate.prepare(x)

    def forward(
        self, hidden: Float[Tensor, "T D"], chosen: Int[Tensor, "T k"], shares: Float[Tensor, "T k"]
    ) -> Float[Tensor, "T D"]:
        """As the model's own: `chosen` experts of every token, and their `shares`."""
        active, experts = chosen.shape[1], chosen.flatten()
        rows = hidden.repeat_interleave(active, 0)
        inner = self.inner(self.gate(rows, experts), self.up(rows, experts))
        out = self.down(inner, experts).unflatten(0, (-1, active))
        return (out * shares[..., None]).sum(1).to(hidden.dtype)

    def inner(self, gate: Float[Tensor, "R F"], up: Float[Tensor, "R F"]) -> Float[Tensor, "R F"]:
        """What `down` reads."""
        return self.act_fn(gate) * up


class ClampedExperts(Experts):
    """gpt-oss'."""

    def __init__(self, gate: ExpertLinears, up: ExpertLinears, down: ExpertLinears, slope: float, limit: float):
        super().__init__(gate, up, down, lambda x: x * torch.sigmoid(slope * x))
        self.limit = limit

    def inner(self, gate: Float[Tensor, "R F"], up: Float[Tensor, "R F"]) -> Float[Tensor, "R F"]:
        """What `down` reads."""
        return self.act_fn(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + 1)


class Mixture(nn.Module):
    """Router, experts and the gate of the shared one, in the place of the model's own."""

    def __init__(self, gate: nn.Module, experts: Experts, shared: int, shared_expert_gate: nn.Module | None) -> None:
        """The last `shared` of `experts` are every token's."""
        super().__init__()
        self.gate, self.experts, self.shared_expert_gate = gate, experts, shared_expert_gate
        self.shared = shared

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """As the model's own."""
        x = hidden.reshape(-1, hidden.shape[-1])
        _, shares, chosen = self.gate(x)
        count = len(self.experts.gate)
        always = torch.arange(count - self.shared, count, device=chosen.device).expand(len(x), -1)
        own = shares.new_ones(len(x), 1) if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid()
        shares = torch.cat((shares, own.to(shares.dtype).expand(-1, self.shared)), -1)
        found: Tensor = self.experts(x, torch.cat((chosen, always), -1), shares)
        return found.reshape(hidden.shape)


def _linears(weights: Float[Tensor, "E O I"], biases: Float[Tensor, "E O"] | None = None) -> ExpertLinears:
    made = []
    for e, weight in enumerate(weights):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
        if biases is not None:
            linear.bias = nn.Parameter(biases[e].detach().clone(), requires_grad=False)
        made.append(linear)
    return ExpertLinears(made)


def _apart(stacked: Any) -> Experts:
    """The experts of two stacked tensors."""
    if hasattr(stacked, "gate_up_proj_bias"):  # gpt-oss: (E, I, O), rows of gate and up in turns
        both, bias = stacked.gate_up_proj.detach().transpose(1, 2), stacked.gate_up_proj_bias.detach()
        gate, up = (_linears(both[:, at::2], bias[:, at::2]) for at in (0, 1))
        down = _linears(stacked.down_proj.detach().transpose(1, 2), stacked.down_proj_bias.detach())
        return ClampedExperts(gate, up, down, stacked.alpha, stacked.limit)
    gate, up = (_linears(half) for half in stacked.gate_up_proj.detach().chunk(2, dim=1))
    return Experts(gate, up, _linears(stacked.down_proj), stacked.act_fn)


def _join(experts: Experts, shared: Any, count: int) -> None:
    """Add a gated MLP to the experts, in `count` pieces."""
    parts = (
        shared.gate_proj.weight.unflatten(0, (count, -1)),
        shared.up_proj.weight.unflatten(0, (count, -1)),
        shared.down_proj.weight.unflatten(1, (count, -1)).transpose(0, 1),
    )
    for linears, weights in zip((experts.gate, experts.up, experts.down), parts, strict=True):
        linears.extend(_linears(weights))


def take_block_apart(block: nn.Module, model_map: ModelMap) -> None:
    """Replace the stacked experts of one block by `Experts`; their weights are in memory twice meanwhile."""
    family = model_map.family
    assert family.experts is not None
    parent, _, leaf = family.experts.rpartition(".")
    owner: Any = block.get_submodule(parent)
    stacked = getattr(owner, leaf)
    if isinstance(stacked, Experts):
        return
    made = _apart(stacked).train(stacked.training)
    if family.shared is None:
        setattr(owner, leaf, made)
        return
    count = model_map.shape.shared
    _join(made, block.get_submodule(family.shared), count)
    gate = None if family.shared_gate is None else block.get_submodule(family.shared_gate)
    mixture = Mixture(owner.gate, made, count, gate).train(stacked.training)
    outer, _, inner = parent.rpartition(".")
    setattr(block.get_submodule(outer), inner, mixture)


def take_apart(model: PreTrainedModel, model_map: ModelMap) -> None:
    """`take_block_apart` for every block of a mixture of experts, one after the other."""
    if model_map.family.experts is None:
        return
    for index in model_map.blocks:
        take_block_apart(model.get_submodule(model_map.block_name(index)), model_map)
