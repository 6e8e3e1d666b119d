r"""Experts of a mixture as linears of their own, in place of the two stacked tensors that Transformers keeps.

    y_t = Σ_j p_tj · down_e( act(gate_e x_t) · up_e x_t ),   e = the j-th expert that the router gave to token t

Rows go through in the order of tokens, `active` rows a token: what stands before `down` is (T·active, F), row
t·active + j of token t, and each expert's linear is given its rows alone. So an input of a group is seen in one place
for all experts (`prepare`: after what runs online, which is the same for all), and weights, codes and clips are each
expert's own.

An opened model is taken apart (`take_apart`), one that is laid out for loading too, before its weights come: the
checkpoint holds `experts.gate.0.weight_packed` and the like. The router stays as it is, in 16 bits.
"""

from collections.abc import Callable

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
        inner = self.act_fn(self.gate(rows, experts)) * self.up(rows, experts)
        out = self.down(inner, experts).unflatten(0, (-1, active))
        return (out * shares[..., None]).sum(1).to(hidden.dtype)


def _linears(weights: Float[Tensor, "E O I"]) -> ExpertLinears:
    made = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        made.append(linear)
    return ExpertLinears(made)


def take_apart(model: PreTrainedModel, model_map: ModelMap) -> None:
    """Replace the stacked experts of every block by `Experts`; one block's weights are in memory twice meanwhile."""
    name = model_map.family.experts
    if name is None:
        return
    for index in model_map.blocks:
        parent, _, leaf = f"{model_map.block_name(index)}.{name}".rpartition(".")
        owner = model.get_submodule(parent)
        stacked = getattr(owner, leaf)
        if isinstance(stacked, Experts):
            continue
        gate, up = stacked.gate_up_proj.detach().chunk(2, dim=1)
        made = Experts(_linears(gate), _linears(up), _linears(stacked.down_proj), stacked.act_fn)
        setattr(owner, leaf, made.train(stacked.training))
