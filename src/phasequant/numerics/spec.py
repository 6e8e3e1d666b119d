"""`QuantSpec`: one grid, described. Everything that rounds a tensor is told how by one of these."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phasequant.errors import PhaseQuantError, did_you_mean

GRANULARITIES = ("tensor", "token", "channel", "group")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One integer grid.

    - `bits`: 2 to 8.
    - `symmetric`: codes -2^(b-1) … 2^(b-1)-1 around zero; else 0 … 2^b-1 with a zero point.
    - `granularity`: how many values share a scale. `tensor`: all of them; `token` and `channel`: one row of the last
      axis (the same geometry, named for activations and for weights); `group`: `group_size` neighbours of a row.
    - `clip`: the largest magnitude kept, as a fraction of the largest present; `"mse"` searches it (weights only).
    """

    bits: int = 4
    symmetric: bool = True
    granularity: str = "token"
    group_size: int | None = None
    clip: float | Literal["mse"] = 1.0

    def __post_init__(self) -> None:
        for name, value, kind in (("bits", self.bits, int), ("symmetric", self.symmetric, bool)):
            if type(value) is not kind:
                raise PhaseQuantError(
                    f"{name} must be {'a whole number' if kind is int else 'true or false'}: {value!r}"
                )
        if self.group_size is not None and type(self.group_size) is not int:
            raise PhaseQuantError(f"group_size must be a whole number, not {self.group_size!r}")
        if self.clip != "mse" and not isinstance(self.clip, (int, float)):
            raise PhaseQuantError(f"clip must be a number or 'mse', not {self.clip!r}")
        if not 2 <= self.bits <= 8:
            raise PhaseQuantError(f"a grid has 2 to 8 bits, not {self.bits} (16 bits means: no grid at all)")
        if self.granularity not in GRANULARITIES:
            raise PhaseQuantError(
                f"unknown granularity '{self.granularity}': {did_you_mean(self.granularity, GRANULARITIES)}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise PhaseQuantError("group_size goes with granularity 'group', and only with it")
        if self.group_size is not None and self.group_size < 1:
            raise PhaseQuantError(f"group_size must be positive, not {self.group_size}")
        if self.clip != "mse" and not 0.0 < float(self.clip) <= 1.0:
            raise PhaseQuantError(f"clip is a fraction in (0, 1], not {self.clip}")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def reach(self) -> int:
        """The largest |code - zero point|: bounds the integers that a product of two grids can reach."""
        return -self.lowest if self.symmetric else self.highest

    def groups(self, width: int) -> int:
        """How many scales a row of `width` values has; an error where the groups do not fit."""
        if self.granularity != "group":
            return 1
        assert self.group_size is not None
        if width % self.group_size:
            raise PhaseQuantError(
                f"group_size {self.group_size} does not divide the width {width}: choose a divisor of it"
            )
        return width // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantSpec":
        """The inverse of `to_dict`; unknown keys are errors."""
        known = set(cls.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise PhaseQuantError(f"unknown key '{key}' in a quantization spec: {did_you_mean(key, known)}")
        return cls(**values)

    def __str__(self) -> str:
        shape = self.granularity if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} per {shape}, clip {self.clip}"
