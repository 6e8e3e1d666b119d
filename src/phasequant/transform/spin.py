r"""SpinQuant: rotations learned end to end through the rounded model (arXiv 2405.16406).

    min over rotations of   CE( next token | model with W4 A4 KV4 as the plan has them )     or KL to the 16-bit model

rounding passed straight through. Learned are R1 (one for the residual, or, with rotation.where: online, the two factors
of a rotation after every norm) and R2 (every kv head of every block); R3 and R4 stay Hadamards. All start as QuaRot's.

    folded   R1, R2: free at inference        online   R3, R4; nothing before o (SpinQuant has no mixing of heads)
             R2 only where v is a linear of its own

Optimizers (`learning.optimizer`): `cayley` (SGD on the Stiefel manifold, SpinQuant's: lr 1.5, cosine to 0, 100 steps);
`qr-orth` (DartQuant's: SGD on free Z, R = qr(Z)); `zeta` (Zeta on those Z). Weights are rounded too, each row at the
clip ratio that the MSE search finds at the start; `learning.through_weights: false` leaves them in 16 bits, where GPTQ
is to follow. Massive tokens, clips and bits are whatever the plan says: learned clips come after, by block.

Cost: a step is a forward, a second one block by block (gradient checkpointing) and a backward of `learning.batch`
sequences, with every weight rotated and rounded anew; memory one block's activations and one copy of the model. The
rotations can be kept: `Quantized.transform` with `save_transform`, and given back by `transform: {method: load}`.
"""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import GROUPS
from phasequant.console import note, progress
from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear, Recomputed, capped_logits, replace_module
from phasequant.nn.attention import ATTENTION
from phasequant.numerics import LinearMap
from phasequant.optim import CayleySGD, Zeta
from phasequant.ranks import gradients_together, world
from phasequant.transform.apply import transform_block
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.learned import LearnedBlock
from phasequant.transform.learned_grids import searched_clips
from phasequant.transform.learned_maps import LearnedRotation, QrRotation
from phasequant.transform.norms import gain_of, set_gain
from phasequant.transform.quarot import fixed_rotations

RATES = {"cayley": 1.5, "qr-orth": 0.5, "zeta": 5e-3}
ROWS = 512  # of logits at once


def start(task: Task) -> Transform:
    """Where learning begins: QuaRot's rotations without the mixing of heads, one R2 for every kv head."""
    base = fixed_rotations(task.map, task.seed, task.rotation.where, "spin", online=task.rotation.online)
    shape = task.map.shape
    one, own = base.block(0).value, None
    if one is not None:
        matrix = one.matrix()[: shape.d_head, : shape.d_head]
        own = LinearMap.dense(matrix.expand(shape.kv_heads, -1, -1), one.kind)
    base = base.changed(lambda _, block: replace(block, value=own, heads=None))
    if base.residual is not None:
        base = replace(base, residual=LinearMap.dense(base.residual.matrix(), base.residual.kind))
    return base


class _Unrotated(nn.Module):
    """The final norm of a rotated stream: n(xR1)·R1ᵀ·diag(γ) = n(x)·diag(γ), so that the head stays as it is."""

    def __init__(self, norm: nn.Module, kind: str, residual: LearnedRotation) -> None:
        super().__init__()
        gain = gain_of(norm, kind)
        set_gain(norm, kind, torch.ones_like(gain))
        self.gain = gain.to(norm.get_parameter("weight").dtype)
        self.norm = norm
        self.residual = (residual,)

    def forward(self, x: Tensor) -> Tensor:
        (residual,) = self.residual
        found: Tensor = self.norm(x) @ residual.factors()[0][0].T * self.gain
        return found


class RotatedModel(nn.Module):
    """A copy of the model, computed through learnable rotations and rounded as the plan says."""

    def __init__(self, task: Task, begin: Transform, make: type[LearnedRotation]) -> None:
        super().__init__()
        self.model: PreTrainedModel = copy.deepcopy(task.model).float().to(task.device).eval().requires_grad_(False)
        family = task.map.family
        self.residual = make(begin.residual).to(task.device) if begin.residual is not None else None
        weights = task.weights if task.learning.through_weights else None
        learned = {"value"} if begin.residual is not None else {"value", "qkv", "gate_up"}  # value: where there is one
        self.blocks = nn.ModuleList()
        for index in task.map.blocks:
            block = self.model.get_submodule(task.map.block_name(index))
            if begin.folds_norms:
                transform_block(block, BlockTransform(), task.map, folds_norms=True)
                block.to(task.device)
            starts = None
            if weights is not None:
                starts = {}
                for group in task.map.groups:
                    for name in group.linears:
                        linear = block.get_submodule(name)
                        dense = linear.dense_weight() if isinstance(linear, QuantLinear) else linear.weight
                        if group.norm is not None and begin.residual is not None:
                            dense = begin.residual.apply(dense.double()).float()
                        starts[name] = searched_clips(dense.float(), weights)
            grids = {group: task.activations.get((index, group)) for group in GROUPS}
            self.blocks.append(
                LearnedBlock(
                    block,
                    task.map,
                    begin.block(index),
                    grids,
                    weights,
                    task.kv,
                    maps=frozenset(learned),
                    weight_starts=starts,
                    residual=self.residual,
                    make=make,
                )
            )
        self.model.config._attn_implementation = ATTENTION
        decoder = self.model.get_submodule(family.decoder)
        decoder.config._attn_implementation = ATTENTION
        if self.residual is not None:
            norm = self.model.get_submodule(family.final_norm)
            replace_module(self.model, family.final_norm, _Unrotated(norm, family.norm, self.residual))
        for index in task.map.blocks:
            name = task.map.block_name(index)
            replace_module(self.model, name, Recomputed(self.model.get_submodule(name)))
        self.map, self.family = task.map, family

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, D), after the final norm."""
        x = self.model.get_submodule(self.family.embeddings)(tokens)
        if self.residual is not None:
            self.residual.hold(True)
            x = self.residual(x)
        found: Tensor = self.model.get_submodule(self.family.decoder)(
            inputs_embeds=x, use_cache=False
        ).last_hidden_state
        return found

    def head(self, x: Tensor) -> Tensor:
        """Logits."""
        return capped_logits(self.model, self.map, self.model.get_submodule(self.family.head)(x))

    def result(self, begin: Transform) -> Transform:
        """The rotations as they stand."""
        if self.residual is not None:
            self.residual.hold(False)
        residual = self.residual.result() if self.residual is not None else None
        made = [block.result(begin.block(i)) for i, block in enumerate(self.blocks)]  # type: ignore[operator]
        kept = [replace(block, qk=begin.block(i).qk) for i, block in enumerate(made)]
        return replace(begin, residual=residual, blocks=tuple(kept))


def _loss(rotated: RotatedModel, teacher: PreTrainedModel | None, row: Tensor) -> Tensor:
    """Mean over a sequence's predictions; the head runs a few positions at a time, recomputed for the gradient."""
    hidden = rotated.hidden(row[None])[0, :-1]
    target: Tensor = row[1:]
    if teacher is not None:
        with torch.no_grad():
            decoder = teacher.get_submodule(rotated.family.decoder)
            target = decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        logits = rotated.head(x).float()
        if teacher is None:
            return nn.functional.cross_entropy(logits, wanted, reduction="sum")
        p = rotated.head(wanted).float().log_softmax(-1)
        return nn.functional.kl_div(logits.log_softmax(-1), p, reduction="sum", log_target=True)

    total = hidden.new_zeros(())
    for x, wanted in zip(hidden.split(ROWS), target.split(ROWS), strict=True):
        piece = torch.utils.checkpoint.checkpoint(part, x, wanted, use_reentrant=False)
        assert isinstance(piece, Tensor)
        total = total + piece
    return total / len(hidden)


def spin(task: Task) -> Transform:
    """SpinQuant's rotations of a model."""
    assert task.tokens is not None
    learning = task.learning
    kind = "cayley" if learning.optimizer == "auto" else learning.optimizer
    rate = learning.lr or RATES[kind]
    begin = start(task)
    rotated = RotatedModel(task, begin, LearnedRotation if kind == "cayley" else QrRotation)
    teacher = copy.deepcopy(task.model).float().to(task.device) if learning.loss == "kl" else None
    params = [p for p in rotated.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if kind == "cayley":
        optimizer = CayleySGD(params, lr=rate)
    elif kind == "zeta":
        optimizer = Zeta(params, lr=rate, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(params, lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(task.seed)
    losses: list[float] = []
    with progress(f"learn (spin, {kind})", learning.steps) as tick:
        for step in range(learning.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / learning.steps))
            optimizer.zero_grad()
            total = 0.0
            drawn = torch.randint(len(task.tokens), (learning.batch,), generator=generator).tolist()
            for index in drawn[world().rank :: world().size]:
                loss = _loss(rotated, teacher, task.tokens[index].to(task.device)) / learning.batch
                loss.backward()
                total += float(loss.detach())
            total = gradients_together(params, total)
            if not math.isfinite(total):
                raise PhaseQuantError(
                    f"spin: the loss of step {step} is {total}: lower learning.lr (now {rate}), or start from a model "
                    "whose 16-bit perplexity is sane"
                )
            optimizer.step()
            losses.append(total)
            tick()
    if losses:
        edge = max(1, len(losses) // 10)
        note(f"spin: loss {sum(losses[:edge]) / edge:.3f} → {sum(losses[-edge:]) / edge:.3f} nats")
    return rotated.result(begin)
