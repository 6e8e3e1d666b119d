"""One weight's rows on several ranks: each solves its part, and all have the codes of all.

Round to nearest, the search of clips and GPTQ take every row on its own: only H, which all ranks hold, is common. So N
ranks take an N-th of the time of the column loop and of the search; the factorization of H is done by each. The
solve towards the 16-bit model's outputs (`moments.best_weights`) is divided likewise. Grids that look at the whole
weight (NVFP4's second scale) are not.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from phasequant.numerics import QuantSpec
from phasequant.ranks import agreed, everyones, part_of, rows_together, total, world
from phasequant.weight.codes import Told, WeightCodes, peak_of
from phasequant.weight.moments import Moments, best_weights

Solve = Callable[[Tensor, Tensor | None], tuple[WeightCodes, Told]]
"""(rows of W, their clips) → their codes."""


def spread_rows(
    solve: Solve,
    weight: Float[Tensor, "O I"],
    clips: Float[Tensor, "O G"] | None,
    hessian: Float[Tensor, "I I"] | None,
    spec: QuantSpec,
) -> tuple[WeightCodes, Told]:
    """What `solve` makes of all rows. `hessian`: what an error is measured in, where one is."""
    ranks = world().size
    if ranks == 1 or len(weight) < ranks or peak_of(weight[:1], spec) is not None:
        return solve(weight, clips)
    own = part_of(len(weight))
    rows = weight[own.start : own.stop]
    made, told = solve(rows, None if clips is None else clips[own.start : own.stop])
    counts = [len(part_of(len(weight), rank)) for rank in range(ranks)]
    if told.error is not None and hessian is not None:
        size = float(((rows.float() @ hessian) * rows).sum())
        told.error = total(told.error * size) / max(total(size), 1e-30)
    codes, scale, zero = (rows_together(piece, counts) for piece in (made.codes, made.scale, made.zero))
    return WeightCodes(codes, scale, zero), agreed(told)


def spread_best(
    weight: Float[Tensor, "O I"], moments: Moments, damping: float
) -> tuple[Float[Tensor, "O I"], str | None]:
    """`best_weights` of all rows."""
    ranks = world().size
    if ranks == 1 or len(weight) < ranks or moments.cross is None:
        return best_weights(weight, moments, damping)
    own = part_of(len(weight))
    found, why = best_weights(weight[own.start : own.stop], moments, damping)
    why = next((told for told in everyones(why) if told is not None), None)
    if why is not None:  # all rows, or none
        return weight, why
    return rows_together(found, [len(part_of(len(weight), rank)) for rank in range(ranks)]), None
