r"""What raising a group costs, in the unit of `policy.price`:

    macs           its multiply-adds, whatever it is raised to: what the A8 share counts, and what hardware with 4- and
                   8-bit units pays
    bits           its multiply-adds times (bits - low) / (8 - low): so that 5 to 7 bits are cheaper than 8
    bytes          what its input takes more, a token: width · (bits - low) / 8; of weights (`policy.allow`) what a
                   token reads more of them; of keys and values what it reads more of `policy.context` cached tokens
    microseconds   what its linears take longer on this device with the kernels that run here (`bench.linears`); a
                   difference below 3 % is noise, and counts as nothing

The budget is `a8_share` of the price of raising every group to 8 bits (or to the highest choice, where 8 is none). On
Hopper, and on every CPU with int8 units, 4-bit codes travel in 8-bit lanes, and raising a group costs no time in the
product at all: the planner then says so, and raises everything. Take W4A8 there (`activations.bits=8`).
"""

from collections.abc import Mapping, Sequence

from phasequant.arch import ModelMap, Place
from phasequant.console import note
from phasequant.recipe import PolicyPart
from phasequant.sensitivity import KV, WEIGHTS

NOISE = 0.03
Timings = Mapping[str, Mapping[int, float]]
"""Group → bits → microseconds a call."""


class Prices:
    """The price of every group at every number of bits, and what may be spent."""

    def __init__(
        self, policy: PolicyPart, model_map: ModelMap, low: int, choices: Sequence[int], timings: Timings | None = None,
        base: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`timings`: for `microseconds`. `base`: the bits that weights and KV have, where they may be raised."""
        self.policy, self.map, self.low = policy, model_map, low
        self._timings = timings
        allow: Mapping[str, Sequence[int]] = {str(kind): bits for kind, bits in policy.allow.items()}
        self._base = dict(base or {})
        assert policy.price != "microseconds" or timings is not None, "microseconds are measured before plans are made"
        self.unit = {"macs": "multiply-adds", "bits": "multiply-adds by bits"}.get(policy.price, policy.price)
        self.top = 8 if 8 in choices else max(choices)
        everything = sum(self(group.name, self.top) for group in model_map.groups)
        if "weights" in allow:
            everything += sum(self(WEIGHTS + group.name, max(allow["weights"])) for group in model_map.groups)
        if "kv" in allow:
            everything += self(KV, max(allow["kv"]))
        everything *= model_map.shape.blocks
        self.budget = policy.a8_share * everything
        if not everything:
            note(
                f"plan: raising a group to {self.top} bits costs no {self.unit} on this device: every group that gains "
                f"is raised. {self.top}-bit activations are free here (activations.bits={self.top})"
            )

    def __call__(self, group: str, bits: int) -> float:
        """What one block's group (its weights; the block's KV) costs at `bits` more than at the low grid."""
        if group == KV:
            shape = self.map.shape
            numbers = 2 * shape.kv_heads * shape.d_head * self.policy.context
            return numbers * (bits - self._base["kv"]) / 8
        if group.startswith(WEIGHTS):
            return self.map.macs(group.removeprefix(WEIGHTS)) * (bits - self._base["weights"]) / 8
        if bits == self.low:
            return 0.0
        macs = float(self.map.macs(group))
        match self.policy.price:
            case "macs":
                return macs
            case "bits":
                return macs * (bits - self.low) / (8 - self.low)
            case "bytes":
                return self.map.width_in(group) * self.map.rows(group) * (bits - self.low) / 8
        assert self._timings is not None
        took = self._timings[group]
        more = took[bits] - took[self.low]
        return more if more > NOISE * took[self.low] else 0.0

    def of(self, place: Place, bits: int) -> float:
        """The price at a place."""
        return self(place[1], bits)
