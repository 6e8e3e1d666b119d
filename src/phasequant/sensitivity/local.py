r"""Output error of a group under its own low-bit input:

    harm(g, b) = Σ_t ‖W·(Q_b(x_t) - x_t)‖² / Σ_t ‖W·x_t‖²          W over all linears of the group

In the units of the group's own output, so groups whose output matters little weigh as much as others. Costs one sweep,
and one more product of the group's weights for each grid.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from phasequant.arch import Place
from phasequant.arch.families import GroupNames
from phasequant.nn import QuantLinear, prepared
from phasequant.numerics import QuantSpec, fake_quantize
from phasequant.sensitivity.contract import Ask, Sensitivity, bits_of
from phasequant.stream import BlockStream


def _keeper(block: nn.Module, group: GroupNames, grids: list[QuantSpec], sums: dict[int, float]) -> Callable[..., None]:
    linears = [m for name in group.linears if isinstance(m := block.get_submodule(name), QuantLinear)]
    weight = torch.cat([linear.dense_weight() for linear in linears]).float()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = prepared(module, args[0].flatten(0, -2).float())
        sums[16] += float((x @ weight.T).square().sum())
        for spec in grids:
            sums[spec.bits] += float(((fake_quantize(x, spec) - x) @ weight.T).square().sum())

    return keep


@torch.no_grad()
def local(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    begun = time.monotonic()
    specs = [spec for spec in (ask.low, *ask.choices) if spec is not None]
    harm: dict[Place, dict[int, float]] = {}
    stream = BlockStream(ask.run.model, ask.map, ask.run.tokens, ask.run.device, spread=True)
    for step in stream.steps("sensitivity (local)"):
        sums = {g.name: dict.fromkeys([16, *(s.bits for s in specs)], 0.0) for g in ask.map.groups}
        grids = {g.name: [own for s in specs if (own := ask.at((step.index, g.name), s))] for g in ask.map.groups}
        hooks = [
            step.block.get_submodule(g.input).register_forward_pre_hook(
                _keeper(step.block, g, grids[g.name], sums[g.name])
            )
            for g in ask.map.groups
        ]
        step.drain()
        for hook in hooks:
            hook.remove()
        for name, seen in sums.items():
            found = {bits: stream.dealt.total(value) for bits, value in seen.items()}
            power = max(found.pop(16), 1e-30)
            harm[step.index, name] = {bits: error / power for bits, error in found.items()}
    for choice in ask.choices:
        for by in harm.values():
            by.setdefault(bits_of(choice), 0.0)
    return Sensitivity("local", harm, time.monotonic() - begun, {})
