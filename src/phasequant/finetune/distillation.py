r"""End-to-end distillation of a quantized model's few continuous parameters (`polished`):

    min  E_t KL( p_16bit(· | x_<t) ‖ p_quantized(· | x_<t) )        AdamW, cosine to a hundredth

on calibration text, rounding passed straight through; where a sequence's graph would hold more than 4 GiB, every block
is computed again for the gradient. The teacher's final hidden states are taken before weights become codes (`teach`),
and kept on the host: tokens × width × 4 bytes; its logits are made from them a few positions at a time. An eighth of
the sequences is held out: where the KL there did not fall, everything is put back and that is said. It stops when
`finetune.minutes` are over; the cosine then ends there.

The idea is that of EfficientQAT's second phase (arXiv 2407.11062: step sizes alone, end to end), with KL in place of
its next-token loss, and clips, norms and branches beside them. Costs a step: a forward (or two) and a backward of
`finetune.batch` sequences, one by one; memory the model, its codes unpacked to int8, and one sequence's graph.
"""

import math
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phasequant.arch import ModelMap
from phasequant.console import note, progress, warn
from phasequant.errors import PhaseQuantError
from phasequant.finetune.contract import Polished, PolishTask, held_out, optimizer, set_rates
from phasequant.finetune.polished import PolishedBlock, PolishedNorm
from phasequant.nn import Recomputed, capped_logits, in_16_bits, kv_in_16_bits, replace_module
from phasequant.numerics import learning_product, multiplies_bfloat16
from phasequant.ranks import agreed, gradients_together, world
from phasequant.stream import BlockStream, resident

ROWS = 512  # of logits at once
KEPT_BYTES = 4 * 2**30


@torch.no_grad()
def teach(task: PolishTask) -> list[Float[Tensor, "T D"]]:
    """The final hidden states (after the last norm) of the model in 16 bits, sequence by sequence, on the host."""
    norm = task.model.get_submodule(task.map.family.final_norm)
    with in_16_bits(task.model), kv_in_16_bits(task.model):
        stream = BlockStream(task.model, task.map, task.tokens, task.device)
        for _ in stream.steps("teacher"):
            pass
        with resident(norm, task.device):
            return [norm(row.to(task.device)[None])[0].cpu() for row in stream.hidden]


def kept_bytes(model_map: ModelMap, tokens: int) -> int:
    """About how much a sequence's graph holds, in fp32: a block keeps some 24 tensors of the model's width and 10 of
    the MLP's."""
    shape = model_map.shape
    active = max(shape.active, 1)
    return 4 * tokens * shape.blocks * (24 * shape.d_model + 10 * active * shape.d_ffn)


class _Student:
    """The quantized model with learnable parameters, in place, until `settle`."""

    def __init__(self, task: PolishTask) -> None:
        self.task = task
        self.wants = frozenset(task.part.parameters)
        self.blocks: list[PolishedBlock] = []
        for index in task.map.blocks:
            name = task.map.block_name(index)
            block = task.model.get_submodule(name)
            self.blocks.append(PolishedBlock(block, task.map, self.wants, task.qk.get(index)))
            if kept_bytes(task.map, task.tokens.shape[1]) > KEPT_BYTES:
                replace_module(task.model, name, Recomputed(block))
        self.norm = PolishedNorm(task.model, task.map.family.final_norm, task.map.family.norm, self.wants)
        self.more = (("norms", self.norm.log_gain),) if self.norm.log_gain.requires_grad else ()

    def parameters(self) -> list[nn.Parameter]:
        return [p for block in self.blocks for _, p in block.learned()] + [p for _, p in self.more]

    def settle(self, keep: bool) -> Polished:
        polished = Polished()
        self.norm.settle(self.task.stored, keep)
        for index, block in enumerate(self.blocks):
            replace_module(self.task.model, self.task.map.block_name(index), block.block)
            polished.add(index, block.settle(self.task.stored, keep))
        return polished


def divergence(
    task: PolishTask, row: Int[Tensor, " T"], teacher: Float[Tensor, "T D"], *, exact: bool = True
) -> Float[Tensor, ""]:
    """Mean KL over a sequence; the head runs a few positions at a time, recomputed for the gradient. `exact`: the
    head's product in full, not as learning takes it."""
    model, model_map = task.model, task.map
    decoder, head = (model.get_submodule(n) for n in (model_map.family.decoder, model_map.family.head))
    hidden = decoder(input_ids=row[None].to(task.device), use_cache=False).last_hidden_state[0]

    def logs(x: Tensor) -> Tensor:
        logits = head(x) if exact else learning_product(x, head.weight)
        return capped_logits(model, model_map, logits).float().log_softmax(-1)

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        q, p = logs(x), logs(wanted)
        return nn.functional.kl_div(q, p.detach(), reduction="sum", log_target=True)

    total = hidden.new_zeros((), dtype=torch.float32)
    for x, wanted in zip(hidden.split(ROWS), teacher.to(hidden).split(ROWS), strict=True):
        piece = checkpoint(part, x, wanted, use_reentrant=False)
        assert isinstance(piece, Tensor)
        total = total + piece
    return total / len(hidden)


@torch.no_grad()
def _mean_divergence(task: PolishTask, rows: Tensor, teachers: list[Tensor]) -> float | None:
    found = [float(divergence(task, row, t)) for row, t in zip(rows, teachers, strict=True)]
    return sum(found) / len(found) if found else None


def distill(task: PolishTask, teacher: list[Float[Tensor, "T D"]]) -> Polished:
    """Polish a quantized model end to end, in place."""
    device = task.device
    kept_out = held_out(len(task.tokens))
    train = len(task.tokens) - kept_out
    home = next(task.model.parameters()).device
    frozen = {p: p.requires_grad for p in task.model.parameters()}
    task.model.requires_grad_(False).to(device)
    begun = time.monotonic()
    judges = task.tokens[train:], teacher[train:]
    before = _mean_divergence(task, *judges)
    student, keep = _Student(task), False
    try:
        steps = _learn(task, student, teacher[:train])
        after = _mean_divergence(task, *judges)
        keep = agreed(before is None or after is None or after < before)
    finally:
        polished = student.settle(keep)
        for parameter, grad in frozen.items():
            parameter.requires_grad_(grad)
        task.model.to(home)
    if before is not None:
        note(f"finetune (distillation): KL on held-out calibration text {before:.4f} → {after:.4f} nats a token")
    if not keep:
        warn("finetune did not lower the KL on held-out text: the model stays as it was")
    polished.told = {
        "kind": "distillation",
        "seconds": round(time.monotonic() - begun, 1),
        "steps": steps,
        "kl_before": before,
        "kl_after": after,
        "kept": keep,
    }
    return polished


@torch.enable_grad()
def _learn(task: PolishTask, student: _Student, teacher: list[Tensor]) -> int:
    """How many steps were taken."""
    part = task.part
    params = student.parameters()
    if not params:
        raise PhaseQuantError("finetune.parameters names nothing that this model has: nothing can be polished")
    adam = optimizer(student.blocks, part, student.more)
    generator = torch.Generator().manual_seed(task.seed)
    begun, steps = time.monotonic(), 0
    head = task.model.get_submodule(task.map.family.head)
    plain_head = getattr(head, "bias", None) is not None  # the fast product has none
    if multiplies_bfloat16(task.device):
        note("finetune: products in bfloat16 while learning (this device has units for it); measured without")
    limit = None if part.minutes is None else 60 * part.minutes
    with progress("finetune (distillation)", part.steps) as tick:
        order: list[int] = []
        for step in range(part.steps):
            gone = 0.0 if limit is None else agreed((time.monotonic() - begun) / limit)
            if gone >= 1:
                note(f"finetune: {part.minutes:g} minutes are over after {step} of {part.steps} steps")
                break
            done = max(step / part.steps, gone)
            set_rates(adam, done)
            adam.zero_grad()
            total = 0.0
            for turn in range(part.batch):
                order = order or torch.randperm(len(teacher), generator=generator).tolist()
                index = order.pop()
                if turn % world().size != world().rank:  # another rank's
                    continue
                loss = divergence(task, task.tokens[index], teacher[index], exact=plain_head) / part.batch
                loss.backward()
                total += float(loss.detach())
            total = gradients_together(params, total)
            if not math.isfinite(total):
                raise PhaseQuantError(f"finetune: the loss of step {step} is {total}: lower finetune.lr ({part.lr})")
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            steps += 1
            tick()
    return steps


__all__ = ["distill", "teach"]
