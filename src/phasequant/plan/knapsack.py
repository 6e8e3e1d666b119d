r"""The best plan for a budget: a multiple-choice knapsack, by SciPy's mixed-integer solver (HiGHS).

    minimize Σ_p harm(p, b_p)     subject to     Σ_p price(p, b_p) ≤ budget,      one b_p for every place p

Harm is taken as additive over places. It is not quite (noise of one block is amplified by the next), which is why plans
are then bettered by swaps on the measured KL (`swaps`).
"""

from collections.abc import Mapping

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp

from phasequant.arch import Place
from phasequant.errors import PhaseQuantError

SLACK = 1e-9


def solve(
    harm: Mapping[Place, Mapping[int, float]], price: Mapping[Place, Mapping[int, float]], budget: float
) -> dict[Place, int]:
    """The bits of every place. Every choice of `harm` needs its price; an error where even the cheapest exceed the
    budget."""
    items = [(place, bits) for place, by in harm.items() for bits in by]
    if not items:
        return {}
    costs = numpy.array([price[place][bits] for place, bits in items])
    worth = numpy.array([harm[place][bits] for place, bits in items])
    largest = max(float(numpy.abs(worth).max()), 1e-300)
    one = numpy.zeros((len(harm), len(items)))
    rows = {place: row for row, place in enumerate(harm)}
    for column, (place, _) in enumerate(items):
        one[rows[place], column] = 1.0
    scale = max(float(costs.max()), 1e-300)
    found = milp(
        worth / largest,
        integrality=numpy.ones(len(items)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(costs[None] / scale, -numpy.inf, budget / scale * (1 + SLACK) + SLACK),
        ],
    )
    if found.x is None:
        cheapest = sum(min(price[place][bits] for bits in by) for place, by in harm.items())
        raise PhaseQuantError(
            f"no plan keeps to the budget of {budget:.4g}: the cheapest one costs {cheapest:.4g} ({found.message})"
        )
    return {place: bits for (place, bits), taken in zip(items, found.x, strict=True) if taken > 0.5}
