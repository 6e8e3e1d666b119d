"""`QuantSpec`: one grid, described. Everything that rounds a tensor is told how by one of these."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from phasequant.errors import PhaseQuantError, did_you_mean

GRANULARITIES = ("tensor", "token", "channel", "group", "column")
FLOATS = {"nvfp4": (4, "group", 16), "mxfp4": (4, "group", 32), "fp8": (8, "token", None)}
"""Floating-point kinds: bits, granularity, group size."""
KINDS = ("int", *FLOATS)
ROW_RULES = ("gsr", "absmax")
WIDE_BITS = 8


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One grid: integers, or the floating-point codes of `numerics.floating`, whose geometry is fixed by their kind.

    - `kind`: int, nvfp4, mxfp4 or fp8.
    - `bits`: 2 to 8.
    - `symmetric`: codes -2^(b-1) … 2^(b-1)-1 around zero; else 0 … 2^b-1 with a zero point.
    - `granularity`: how many values share a scale. `tensor`: all of them; `token` and `channel`: one row of the last
      axis (the same geometry, named for activations and for weights); `group`: `group_size` neighbours of a row;
      `column`: one position of the last axis over all rows (a channel of activations).
    - `clip`: the largest magnitude kept, as a fraction of the largest present; `"mse"` searches it (weights only).
    - `static`: the largest present is not looked for in each call; it was calibrated and stands beside the
      weights. Activations per tensor or column.
    - `rows_by`, `above`: rows whose `rows_by` (`numerics.rows`) exceeds `above` are read on `wide` instead. Activations
      per token.
    """

    bits: int = 4
    symmetric: bool = True
    granularity: str = "token"
    group_size: int | None = None
    clip: float | Literal["mse"] = 1.0
    kind: str = "int"
    static: bool = False
    rows_by: str | None = None
    above: float | None = None

    @classmethod
    def floating(cls, kind: str, clip: float | Literal["mse"] = 1.0) -> "QuantSpec":
        """The grid of a floating-point kind."""
        bits, granularity, size = FLOATS[kind]
        return cls(bits, True, granularity, size, clip, kind)

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("bits", self.bits, int),
            ("symmetric", self.symmetric, bool),
            ("static", self.static, bool),
        ):
            if type(value) is not kind:
                raise PhaseQuantError(
                    f"{name} must be {'a whole number' if kind is int else 'true or false'}: {value!r}"
                )
        if self.group_size is not None and type(self.group_size) is not int:
            raise PhaseQuantError(f"group_size must be a whole number, not {self.group_size!r}")
        if self.clip != "mse" and not isinstance(self.clip, (int, float)):
            raise PhaseQuantError(f"clip must be a number or 'mse', not {self.clip!r}")
        if self.kind not in KINDS:
            raise PhaseQuantError(f"unknown kind of grid '{self.kind}': {did_you_mean(self.kind, KINDS)}")
        if self.kind in FLOATS and (self.bits, self.granularity, self.group_size, self.symmetric) != (
            *FLOATS[self.kind],
            True,
        ):
            bits, granularity, size = FLOATS[self.kind]
            raise PhaseQuantError(f"{self.kind} is {bits} bits, symmetric, per {granularity} {size or ''}".rstrip())
        if not 2 <= self.bits <= 8:
            raise PhaseQuantError(f"a grid has 2 to 8 bits, not {self.bits} (16 bits means: no grid at all)")
        if self.granularity not in GRANULARITIES:
            raise PhaseQuantError(
                f"unknown granularity '{self.granularity}': {did_you_mean(self.granularity, GRANULARITIES)}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise PhaseQuantError("group_size goes with granularity 'group', and only with it")
        if self.static and self.granularity not in ("tensor", "column"):
            raise PhaseQuantError(f"static scales are per tensor or column, not per {self.granularity}")
        if (self.rows_by is None) != (self.above is None):
            raise PhaseQuantError("rows_by (which rows read 8 bits) goes with above (from where on), and only with it")
        if self.rows_by is not None:
            if self.rows_by not in ROW_RULES:
                raise PhaseQuantError(f"unknown rows_by '{self.rows_by}': {did_you_mean(self.rows_by, ROW_RULES)}")
            if not isinstance(self.above, (int, float)) or not self.above >= 0:
                raise PhaseQuantError(f"above is a number of 0 or more, not {self.above!r}")
            if self.kind != "int" or self.granularity != "token" or self.bits >= WIDE_BITS:
                raise PhaseQuantError(
                    f"single rows read {WIDE_BITS} bits where the others read fewer, on integer grids with a scale a "
                    f"token; this is {self.kind}{self.bits} per {self.granularity}"
                )
        if self.group_size is not None and self.group_size < 1:
            raise PhaseQuantError(f"group_size must be positive, not {self.group_size}")
        if self.clip != "mse" and not 0.0 < float(self.clip) <= 1.0:
            raise PhaseQuantError(f"clip is a fraction in (0, 1], not {self.clip}")

    @property
    def dynamic(self) -> "QuantSpec":
        """The same grid with its range taken from the values that pass: what stands in for a static one where nothing
        is calibrated yet (learning, searching)."""
        return replace(self, static=False) if self.static else self

    @property
    def mixed(self) -> bool:
        """Whether single rows are read on a wider grid."""
        return self.rows_by is not None

    @property
    def narrow(self) -> "QuantSpec":
        """The grid of most rows of a mixed one; any other itself."""
        return replace(self, rows_by=None, above=None) if self.mixed else self

    @property
    def wide(self) -> "QuantSpec":
        """The grid of the rows of a mixed one that exceed `above`: 8 bits, with codes to spare for the largest."""
        return replace(self.narrow, bits=WIDE_BITS, clip=1.0)

    @property
    def is_int(self) -> bool:
        """Whether codes are integers."""
        return self.kind == "int"

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
        if self.mixed:
            return self.wide.reach
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
        if self.kind in FLOATS:
            return f"{self.kind}, clip {self.clip}"
        shape = self.granularity if self.group_size is None else f"group {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        rows = f", rows of {self.rows_by} > {self.above:.4g} int{WIDE_BITS}" if self.mixed else ""
        return f"int{self.bits} {'static ' if self.static else ''}{kind} per {shape}, clip {self.clip}{rows}"
