r"""Zeta: an optimizer for matrices that whitens the momentum twice, by coordinate and then by spectrum.

For a parameter W (m × n) with gradient G:

    M ← β₁·M + (1−β₁)·G,      V ← β₂·V + (1−β₂)·G∘G
    coordinate whitening      C = M / (√V + ε)                                    no bias correction, no Nesterov
    spectral whitening        X₀ = C / (‖C‖_F + ε), transposed where m > n; 5 Newton–Schulz steps (Jordan's quintic)
                              A = X·Xᵀ,  X ← a·X + (b·A + c·A·A)·X,      (a, b, c) = (3.4445, −4.7750, 2.0315)
    RMS-matched step          ΔW = 0.2·√(mn) / (‖U‖_F + ε) · U,      U = the last stage's result
    decoupled decay           W ← (1−ηλ)·W − η·ΔW

Leading dimensions of a tensor with three or more are a batch of independent matrices. Parameters with fewer than two
dimensions take AdamW with bias correction. The quintic is fast, not exact: five steps take singular values above 0.2 %
of ‖C‖_F into [0.68, 1.20], without converging to 1, and smaller ones fall short. That is why the order of the stages
matters: rows and columns of unequal scale make small singular values, and C is the same whatever those scales are.
Spread (`orthogonalization_error`) of ΔW for 64 × 64 gradients (mean + noise) with rows and columns scaled by 10^±s:

    s                             0       1       2       3
    coordinate → spectral       0.37    0.37    0.37    0.37
    spectral alone              0.35    0.66    1.40    1.89
    spectral → coordinate       0.66    2.07    2.37    3.40

`stages` names the stages and their order, so that the claim can be tested: ("spectral",) is Muon without Nesterov,
("coordinate",) is Adam without bias correction, ("spectral", "coordinate") is the wrong order (the same V, which is of
gradients). All end in the RMS-matched step, so one learning rate means one length of step.

Cost a step: Newton–Schulz, 2·m·m·n + m³ multiply-adds each of 5 times (m ≤ n), in `ns_dtype`; matrices of one shape are
stacked. Memory as AdamW: M and V (V only where a stage reads it), and copies of the matrices stacked at a time.

Source: Zeta (arXiv 2606.14187) and its code. Of its defaults, β = (0.9, 0.95), ε = 10⁻⁸ and η = 1.5·10⁻³ are the
code's, which its training scripts use too; the paper itself names β = (0.95, 0.99) with λ = 0.1, and λ is taken there
(code: 0.01, its scripts 0.2).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.optim.checked import CheckedOptimizer

STAGES = ("coordinate", "spectral")
QUINTIC = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of a step's entries at learning rate 1: about what AdamW's are
STACKED = 1 << 26  # entries of the matrices that are stacked at a time: bounds the memory beside the moments


def coordinate_whiten(
    momentum: Float[Tensor, "*batch m n"], second: Float[Tensor, "*batch m n"], eps: float = 1e-8
) -> Float[Tensor, "*batch m n"]:
    """M / (√V + ε): every entry by its own scale."""
    return momentum / (second.sqrt() + eps)


def newton_schulz(
    x: Float[Tensor, "*batch m n"], steps: int = 5, eps: float = 1e-8, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch m n"]:
    """About U·Vᵀ of x = U·S·Vᵀ, by `steps` quintic steps computed in `dtype` (None: that of `x`)."""
    a, b, c = QUINTIC
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    wide = wide / (_frobenius(wide) + eps)
    y = wide.reshape(math.prod(wide.shape[:-2]), *wide.shape[-2:]).to(dtype or x.dtype)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(wide.shape).to(x.dtype)
    return y.mT if x.shape[-2] > x.shape[-1] else y


def _frobenius(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return norm


def orthogonalization_error(u: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
    """‖U·Uᵀ/c − I‖_F / √m with c = ‖U‖²_F / m (U transposed where m > n): how unequal the singular values are.

    It is the relative spread std(σ²)/mean(σ²): 0 where U is a multiple of a matrix with orthonormal rows, √(m−1) where
    it has rank 1, and the same for any multiple of U but 0 (there NaN).
    """
    wide = u.mT if u.shape[-2] > u.shape[-1] else u
    gram = wide @ wide.mT
    side = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    error = gram / mean - torch.eye(side, dtype=u.dtype, device=u.device)
    return _frobenius(error)[..., 0, 0] / math.sqrt(side)


def zeta_update(
    momentum: Float[Tensor, "*batch m n"],
    second: Float[Tensor, "*batch m n"] | None,
    stages: Sequence[str] = STAGES,
    eps: float = 1e-8,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    """ΔW: the momentum through `stages`, scaled to RMS 0.2. `second` is read by the stage "coordinate" alone."""
    _check_stages(stages)
    u = momentum
    for stage in stages:
        if stage == "spectral":
            u = newton_schulz(u, ns_steps, eps, ns_dtype)
        elif second is None:
            raise PhaseQuantError("zeta_update: the stage 'coordinate' reads the second moment: pass it")
        else:
            u = coordinate_whiten(u, second, eps)
    scale = RMS * math.sqrt(u.shape[-2] * u.shape[-1])
    return u * (scale / (_frobenius(u) + eps))


class Zeta(CheckedOptimizer):
    """Zeta for parameters of two and more dimensions, AdamW (by `vector_betas`) for the others; fp32 or fp64.

    Every option may differ by parameter group. `ns_dtype=None` is bf16 on CUDA and the parameter's own elsewhere. A
    step waits for no result of the device, so that after a first one it can be captured in a CUDA graph (with `lr` a
    tensor on that device, if it is to change).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        stages: Sequence[str] = STAGES,
        ns_dtype: torch.dtype | None = None,
        vector_betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "stages": stages,
            "ns_dtype": ns_dtype,
            "vector_betas": vector_betas,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse options and parameters that the step is not made for."""
        _check(group)

    def move(self) -> None:
        """One step."""
        trained = [_trained(group["params"]) for group in self.param_groups]  # refused before anything has moved
        for group, params in zip(self.param_groups, trained, strict=True):
            if matrices := [p for p in params if p.ndim >= 2]:
                self._step_matrices(matrices, group)
            if vectors := [p for p in params if p.ndim < 2]:
                self._step_vectors(vectors, group)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        stages, eps, lr = group["stages"], group["eps"], group["lr"]
        momentum, second = self._moments(params, group["betas"], needs_second="coordinate" in stages)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for indices in _alike(params):
            w = [matrix for i in indices for matrix in _matrices(params[i])]
            m = [matrix for i in indices for matrix in _matrices(momentum[i])]
            v = [matrix for i in indices for matrix in _matrices(second[i])] if second else []
            dtype = group["ns_dtype"] or (torch.bfloat16 if w[0].is_cuda else w[0].dtype)
            size = max(1, STACKED // w[0].numel())
            for start in range(0, len(w), size):
                part = slice(start, start + size)
                stacked = torch.stack(v[part]) if v else None
                update = zeta_update(torch.stack(m[part]), stacked, stages, eps, group["ns_steps"], dtype)
                torch._foreach_sub_(w[part], list((update * lr).unbind()))

    def _step_vectors(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["vector_betas"]
        momentum, second = self._moments(params, group["vector_betas"])
        for p in params:
            # On the parameter's device and in its precision; not "step", which load_state_dict would leave elsewhere.
            self.state[p].setdefault("steps", torch.zeros((), dtype=p.dtype, device=p.device))
        steps = [self.state[p]["steps"] for p in params]
        torch._foreach_add_(steps, 1)
        correction1 = torch._foreach_neg(torch._foreach_sub(torch._foreach_pow(beta1, steps), 1))
        correction2 = torch._foreach_neg(torch._foreach_sub(torch._foreach_pow(beta2, steps), 1))
        update = torch._foreach_div(second, correction2)
        torch._foreach_sqrt_(update)
        torch._foreach_add_(update, group["eps"])
        torch._foreach_mul_(update, correction1)
        update = torch._foreach_div(momentum, update)
        torch._foreach_mul_(update, group["lr"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(params, update)

    def _moments(
        self, params: list[Tensor], betas: tuple[float, float], needs_second: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """M and V of each parameter, with this step's gradients taken in; V is empty where it is not needed."""
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            for name in ("momentum", "second")[: 1 + needs_second]:
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        momentum = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momentum, betas[0])
        torch._foreach_add_(momentum, grads, alpha=1 - betas[0])
        if not needs_second:
            return momentum, []
        second = [self.state[p]["second"] for p in params]
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, grads, grads, value=1 - betas[1])
        return momentum, second


def _trained(params: list[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient and entries; a sparse gradient is refused."""
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise PhaseQuantError(
                f"Zeta: a parameter {tuple(p.shape)} has a sparse gradient ({p.grad.layout}): "
                "make it dense (nn.Embedding(sparse=False)) or leave it to torch.optim.SparseAdam"
            )
    return [p for p in params if p.grad is not None and p.numel()]


def _alike(params: list[Tensor]) -> Iterator[list[int]]:
    """Indices of the parameters whose matrices can be stacked: one shape, one precision, one device."""
    buckets: dict[Any, list[int]] = defaultdict(list)
    for index, p in enumerate(params):
        buckets[p.shape[-2:], p.dtype, p.device].append(index)
    yield from buckets.values()


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """The matrices of a tensor, as views that may be written."""
    tensor = tensor.detach()
    if tensor.ndim == 2:
        yield tensor
    else:
        for part in tensor.unbind():
            yield from _matrices(part)


def _check(group: dict[str, Any]) -> None:
    """Refuse options and parameters that the step is not made for."""
    _check_stages(group["stages"])
    for name in ("lr", "eps", "weight_decay", "ns_steps"):
        if not float(group[name]) >= 0:
            raise PhaseQuantError(f"Zeta: {name} is {group[name]}: give 0 or more")
    for name in ("betas", "vector_betas"):
        if len(group[name]) != 2 or not all(0 <= beta < 1 for beta in group[name]):
            raise PhaseQuantError(f"Zeta: {name} are {group[name]}: give two numbers in [0, 1)")
    for index, p in enumerate(group["params"]):
        if p.layout != torch.strided or p.dtype not in (torch.float32, torch.float64):
            raise PhaseQuantError(
                f"Zeta: parameter {index} of its group, {tuple(p.shape)}, is {p.dtype} ({p.layout}); steps of size "
                "lr vanish or overflow in fewer than 32 bits: keep dense float32 weights and use torch.autocast"
            )


def _check_stages(stages: Sequence[str]) -> None:
    if isinstance(stages, str) or not stages or len(set(stages)) < len(stages):
        raise PhaseQuantError(f"Zeta: stages {stages!r}: give a tuple of one or two different names of {STAGES}")
    for stage in stages:
        if stage not in STAGES:
            raise PhaseQuantError(f"Zeta: unknown stage '{stage}': {did_you_mean(str(stage), STAGES)}")
