r"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded.

    min over codes of  tr( E·H·Eᵀ ),   E = W - Ŵ,   H = Σ_t x_t·x_tᵀ

With the upper triangular R of H = R·Rᵀ (the Cholesky factor of H read backwards) the objective is ‖E·R‖²_F, and
column j of E·R sees only columns up to j:

    (E·R)_j = Σ_{i<j} E_i·R_ij + E_j·R_jj      so column j should be rounded not at W_j but at
    w̃_j     = W_j + Σ_{i<j} E_i·R_ij / R_jj    and is left with  (E·R)_j = R_jj·(w̃_j - Ŵ_j)

which is GPTQ (its U is R^{-1}) read from the left: one Cholesky factorization, no inverse, the loss for free. Columns
go in blocks of 128; all errors before a block reach it in one matrix product (GPTQ's lazy update), inside a block one
matrix-vector product a column. Rows are independent: all linears that read one input are solved stacked. On CUDA the
128 columns of a block are one captured graph, so Python does not rule the loop.

`order: activation` takes columns by falling H_jj; scales of groups are those of the natural order and codes are stored
in it (static ordering: nothing to undo at inference).

With `rounds`, other scales are tried, and each row keeps those that leave it the least loss: first its scales times
1.1, 0.9, 1.05 and 0.95 in turn, then, round by round, those refitted to its codes. For given codes the loss is a
quadratic of a row's scales, with its least where (Q_g·H·Q_hᵀ)·s = Q_g·H·wᵀ. Each round is one solve more.

It never dies. H is divided by its mean diagonal; columns whose input is always zero (dead) get H_jj = 1 and no
neighbours, which rounds them to nearest. The damping λ is added to the diagonal; where the factorization fails or is
not finite: λ times ten, three times; then the same in fp64; then round to nearest, said in `Told.why`. A Hessian that
is not finite goes there at once. Weights that are not finite are an error: there is nothing to round.

Source: GPTQ (arXiv 2210.17323); options as in QuaRot's and llm-compressor's. Memory: H, R and three copies of W, fp32.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec, codes_type, grid, round_to_codes, round_values, weight_scale
from phasequant.weight.codes import Told, WeightCodes, peak_of

BLOCK = 128
STRETCHES = (1.1, 0.9, 1.05, 0.95)  # of each row's scales, tried one after the other
COARSE = 4  # every fourth ratio of the clip search, where other scales are tried anyway
RUNGS = 4  # dampings: λ, 10λ, 100λ, 1000λ


def factor(hessian: Float[Tensor, "I I"], damping: float) -> tuple[Float[Tensor, "I I"] | None, str]:
    """(R, rung) with H + λI = R·Rᵀ, R upper triangular; (None, why) where no rung of the ladder holds."""
    if not bool(torch.isfinite(hessian).all()):
        return None, "the Hessian is not finite"
    reverse = hessian.flip(0, 1)
    for dtype in (torch.float32, torch.float64):
        wide = reverse.to(dtype)
        for power in range(RUNGS):
            ridge = damping * 10**power
            tried = wide.clone()
            tried.diagonal().add_(ridge)
            lower, info = torch.linalg.cholesky_ex(tried, check_errors=False)
            if int(info) == 0 and bool(torch.isfinite(lower).all()):
                lower = lower.to(torch.float32)
                if bool((lower.diagonal() > 0).all()):
                    plain = dtype == torch.float32 and power == 0
                    rung = "gptq" if plain else f"gptq (damping {ridge:g}, {str(dtype).removeprefix('torch.')})"
                    return lower.flip(0, 1), rung
    return None, f"the Hessian has no Cholesky factor, not with damping {ridge:g} in fp64"


def normalized(hessian: Float[Tensor, "I I"]) -> tuple[Float[Tensor, "I I"], int]:
    """H divided by its mean diagonal, dead columns set apart; and how many are dead."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0  # NaN is not dead: it fails later, and is told
    alive = diagonal[~dead]
    mean = alive.double().mean() if len(alive) else torch.ones((), dtype=torch.float64, device=hessian.device)
    scaled = (hessian / mean).to(torch.float32)
    if bool(dead.any()):
        scaled[dead] = 0.0
        scaled[:, dead] = 0.0
        scaled.diagonal()[dead] = 1.0
    return scaled, int(dead.sum())


class _Columns:
    """Rounds the columns of one block after the other; on CUDA the work on a block is captured once and replayed.

    `w`: what the columns are to be rounded at before the block itself is looked at, (B, O); `r`: R / diag(R) within
    the block, (B, B); errors and codes come out in `e` and `q`.
    """

    def __init__(self, rows: int, size: int, spec: QuantSpec, device: torch.device) -> None:
        self.spec, self.size = spec, size
        made = [torch.zeros(size, rows, device=device) for _ in range(6)]
        self.w, self.target, self.scale, self.zero, self.e, self.q = made
        self.r = torch.zeros(size, size, device=device)
        self.loss = torch.zeros(size, rows, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self.scale.fill_(1.0)
            with torch.cuda.device(device):
                self._capture()

    def _run(self) -> None:
        for j in range(self.size):
            at = self.target[j]
            if j:
                at = torch.addmv(at, self.e[:j].T, self.r[:j, j])
            codes, values = round_values(at, self.scale[j], self.zero[j], self.spec)
            self.q[j] = codes
            self.e[j] = self.w[j] - values
            self.loss[j] = at - values

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
            self.graph = graph
        except RuntimeError as error:
            note(f"gptq: columns run one by one, they could not be captured ({error})")
            torch.cuda.synchronize()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()


def solve(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    scale: Float[Tensor, "O G"],
    zero: Float[Tensor, "O G"],
    spec: QuantSpec,
    order: Int[Tensor, " I"] | None = None,
    block: int = BLOCK,
    workspaces: dict[int, _Columns] | None = None,
) -> tuple[Tensor, Float[Tensor, " O"]]:
    """Codes (O, I) of GPTQ on given scales, and each row's E·H·Eᵀ. `upper`: R of the (reordered) H. `workspaces`: kept
    between solves of one shape, by block width."""
    rows, width = weight.shape
    span = width // scale.shape[1]
    order = torch.arange(width, device=weight.device) if order is None else order
    columns = weight.T[order].contiguous()
    ends = upper.diagonal()
    relative = upper / ends
    errors = torch.empty_like(columns)
    codes = torch.empty(width, rows, dtype=codes_type(spec), device=weight.device)
    scales, zeros = scale.T.contiguous(), zero.T.contiguous()
    loss = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    workspaces = {} if workspaces is None else workspaces
    for start in range(0, width, block):
        part = slice(start, min(start + block, width))
        size = part.stop - part.start
        step = workspaces.get(size)
        if step is None:
            step = workspaces[size] = _Columns(rows, size, spec, weight.device)
        group = order[part] // span
        step.w.copy_(columns[part])
        step.target.copy_(columns[part])
        if start:
            step.target.addmm_(relative[:start, part].T, errors[:start])
        step.scale.copy_(scales[group])
        step.zero.copy_(zeros[group])
        step.r.copy_(relative[part, part])
        step()
        errors[part] = step.e
        codes[part] = step.q.to(codes.dtype)
        loss += (step.loss * ends[part, None]).square().sum(0, dtype=torch.float64)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return natural.T.contiguous(), loss


def refit(
    weight: Float[Tensor, "O I"],
    codes: Tensor,
    scale: Float[Tensor, "O G"],
    zero: Float[Tensor, "O G"],
    hessian: Float[Tensor, "I I"],
    spec: QuantSpec,
) -> Float[Tensor, "O G"]:
    """The scales that bring tr(E·H·Eᵀ) to its least for given codes; a row whose solve is of no use keeps its own."""
    groups = scale.shape[1]
    centred = (
        (_grouped(codes.float(), scale) - zero[..., None]) if not spec.symmetric else _grouped(codes.float(), scale)
    )
    span = centred.shape[-1]
    wanted = (weight @ hessian).unflatten(-1, (groups, span))
    right = (centred * wanted).sum(-1)
    normal = torch.empty(len(weight), groups, groups, device=weight.device)
    for g in range(groups):
        part = centred[:, g] @ hessian[g * span : (g + 1) * span]
        normal[:, g] = (part.unflatten(-1, (groups, span)) * centred).sum(-1)
    normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-30)
    found, info = torch.linalg.solve_ex(normal, right)
    ratio = found / scale
    sane = (info == 0)[:, None] & torch.isfinite(ratio) & (ratio > 0.5) & (ratio < 2.0)
    return torch.where(sane.all(1, keepdim=True), found, scale).contiguous()


@dataclass(frozen=True)
class _Problem:
    """One group's weights and Hessian, to be solved on several scales. `upper`: R of the reordered, damped H."""

    weight: Tensor
    hessian: Tensor
    upper: Tensor
    zero: Tensor
    spec: QuantSpec
    order: Tensor | None
    damping: float

    def search(self, scale: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scales, loss by row): the best for each row of `scale` and of as many others as there are rounds."""
        kept: dict[int, _Columns] = {}
        codes, loss = solve(self.weight, self.upper, scale, self.zero, self.spec, self.order, workspaces=kept)
        damped = self.hessian.clone()
        damped.diagonal().add_(self.damping)
        for trial in range(rounds):
            if trial < len(STRETCHES):
                other = scale * STRETCHES[trial]
            else:
                other = refit(self.weight, codes, scale, self.zero, damped, self.spec)
            other = weight_scale(other, self.spec)
            tried, less = solve(self.weight, self.upper, other, self.zero, self.spec, self.order, workspaces=kept)
            won = less < loss
            codes = torch.where(won[:, None], tried, codes)
            scale = torch.where(won[:, None], other, scale)
            loss = torch.where(won, less, loss)
        return codes, scale, loss


def gptq(
    weight: Float[Tensor, "O I"],
    hessian: Float[Tensor, "I I"],
    spec: QuantSpec,
    clips: Float[Tensor, "O G"] | None = None,
    *,
    damping: float = 0.01,
    order: str = "activation",
    rounds: int = 0,
    place: str = "a weight",
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[WeightCodes, Told]:
    """Codes of the (stacked) linears that read one input, from H = Σxxᵀ of that input; see the module's docstring.

    `clips`: fractions that replace the grid's own. `scales`: (scale, zero) that were chosen already. Raises
    `PhaseQuantError` where a weight is not finite.
    """
    weight = weight.to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise PhaseQuantError(f"{place} has {bad} values that are not finite: the model is damaged, or its transform")
    peak = peak_of(weight, spec)
    scale, zero = grid(weight, spec, clips, COARSE if rounds else 1, peak) if scales is None else scales
    scale = weight_scale(scale, spec)
    scaled, dead = normalized(hessian)
    told = Told("gptq", dead=dead)
    upper = None
    permutation = None
    if bool(torch.isfinite(scaled).all()):
        if order == "activation":
            permutation = scaled.diagonal().argsort(descending=True, stable=True)
            upper, told.rung = factor(scaled[permutation][:, permutation], damping)
        else:
            upper, told.rung = factor(scaled, damping)
    else:
        told.rung = "the Hessian is not finite"
    if upper is None:
        told.why, told.rung = told.rung, "rtn"
        return WeightCodes(round_to_codes(weight, scale, zero, spec), scale, zero, peak), told
    if told.rung != "gptq":
        told.why = "the Hessian is close to singular"
    problem = _Problem(weight, scaled, upper, zero, spec, permutation, damping)
    codes, scale, loss = problem.search(scale, rounds if spec.is_int and scales is None else 0)
    size = float(((weight @ scaled) * weight).sum(dtype=torch.float64))
    told.error = float(loss.sum()) / size if size > 0 else 0.0
    return WeightCodes(codes, scale, zero, peak), told


def _grouped(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.unflatten(-1, (scale.shape[1], -1))
