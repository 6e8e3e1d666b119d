r"""Block reconstruction: each quantized block's few continuous parameters (`polished`), learned on what reaches it.

    min Σ_t ‖ block_Q(x̃_t) - block(x_t) ‖²        x̃ from the quantized blocks before, already polished; x in 16 bits

block after block, AdamW, cosine to a hundredth, `finetune.epochs` passes. Targets are taken before weights become codes
(`aims`) and wait on the host in the stored type: blocks × tokens × width × 2 bytes. An eighth of the sequences is held
out; a block whose error there did not fall stays as it was. Costs an epoch a forward and a backward of all sequences;
memory one block's activations of a batch.

The idea is BRECQ's (arXiv 2102.05426), without its rounding: codes stay.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.console import note
from phasequant.finetune.contract import Polished, PolishTask, held_out, optimizer, set_rates
from phasequant.finetune.polished import PolishedBlock
from phasequant.nn import in_16_bits, kv_in_16_bits
from phasequant.ranks import agreed, agreed_tensor
from phasequant.stream import BlockStream

Aims = list[list[Float[Tensor, "T D"]]]
"""Block → what it gives in 16 bits, sequence by sequence."""


@torch.no_grad()
def aims(task: PolishTask) -> Aims:
    """What every block of the model in 16 bits gives."""
    found: Aims = []
    with in_16_bits(task.model), kv_in_16_bits(task.model):
        stream = BlockStream(task.model, task.map, task.tokens, task.device)
        for step in stream.steps("targets of blocks"):
            step.drain()
            assert step.outputs is not None
            found.append([row.to(task.stored) for row in step.outputs])
    return found


def reconstruct(task: PolishTask, targets: Aims) -> Polished:
    """Polish a quantized model block by block, in place."""
    polished = Polished()
    begun = time.monotonic()
    errors: list[tuple[float, float]] = []
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    for step in stream.steps("finetune (blocks)"):
        frozen = {p: p.requires_grad for p in step.block.parameters()}
        step.block.requires_grad_(False)
        lesson = _Lesson(task, stream.hidden, targets[step.index], stream.arguments[step.index], step.index)
        before = lesson.judged(step.block)
        block = PolishedBlock(step.block, task.map, frozenset(task.part.parameters), task.qk.get(step.index))
        keep = False
        try:
            lesson.learn(block)
            after = lesson.judged(block)
            for _, parameter in block.learned():
                agreed_tensor(parameter.data)
            keep = agreed(after < before)
            errors.append((before, after if keep else before))
        finally:
            polished.add(step.index, block.settle(task.stored, keep))
            for parameter, grad in frozen.items():
                parameter.requires_grad_(grad)
        step.drain()
    ratio = math.exp(sum(math.log(max(b, 1e-30) / max(a, 1e-30)) for a, b in errors) / max(1, len(errors)))
    note(f"finetune (blocks): error of a block's output {ratio:.3f} × what it was, geometric mean, held-out")
    polished.told = {
        "kind": "reconstruction",
        "seconds": round(time.monotonic() - begun, 1),
        "ratio": ratio,
        "blocks": [{"before": a, "after": b} for a, b in errors],
    }
    return polished


class _Lesson:
    """One block's inputs and targets, the last of them held out."""

    def __init__(
        self,
        task: PolishTask,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        arguments: Mapping[str, Any],
        index: int,
    ) -> None:
        self.task, self.inputs, self.targets, self.arguments, self.index = task, inputs, targets, arguments, index
        self.train = len(inputs) - held_out(len(inputs))

    def error(self, block: nn.Module, chosen: Sequence[int]) -> Tensor:
        x, target = (torch.stack([of[i] for i in chosen]).to(self.task.device) for of in (self.inputs, self.targets))
        y = block(x, **self.arguments)
        return ((y[0] if isinstance(y, tuple) else y).float() - target.float()).square().mean()

    @torch.no_grad()
    def judged(self, block: nn.Module) -> float:
        """The error on held-out sequences; on all, where none is."""
        rows = range(self.train, len(self.inputs)) if self.train < len(self.inputs) else range(self.train)
        return sum(float(self.error(block, [i])) for i in rows) / len(rows)

    @torch.enable_grad()
    def learn(self, block: PolishedBlock) -> None:
        """All epochs."""
        part = self.task.part
        if not any(True for _ in block.learned()):
            return
        adam = optimizer([block], part)
        generator = torch.Generator().manual_seed(self.task.seed + self.index)
        steps = part.epochs * math.ceil(self.train / part.batch)
        done = 0
        for _ in range(part.epochs):
            for chosen in torch.randperm(self.train, generator=generator).split(part.batch):
                set_rates(adam, done / steps)
                adam.zero_grad()
                loss = self.error(block, chosen.tolist())
                (loss / loss.detach().clamp(min=1e-30)).backward()
                adam.step()
                done += 1


__all__ = ["aims", "reconstruct"]
