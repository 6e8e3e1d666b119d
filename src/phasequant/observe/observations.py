"""`Observations`: the numbers of one sweep, in plain lists. They stand in report.json under `observations`, so that
plans and reports can be remade without the model (`from_dict`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from phasequant.errors import PhaseQuantError
from phasequant.observe.massive import Outlier, Phase


@dataclass
class Curve:
    """A value a block: mean over tokens, with and without the first token of each sequence."""

    all_tokens: list[float] = field(default_factory=list)
    without_first: list[float] = field(default_factory=list)

    def pick(self, first_token: bool) -> list[float]:
        """With the first token, or without."""
        return self.all_tokens if first_token else self.without_first


@dataclass
class Residual:
    """The residual stream by depth. Index 0 is the embedding, index ℓ+1 what block ℓ leaves; updates are by block."""

    norm: Curve = field(default_factory=Curve)
    absmax: list[float] = field(default_factory=list)
    absmax_channel: list[int] = field(default_factory=list)
    update_absmax: list[float] = field(default_factory=list)


@dataclass
class GroupStats:
    """One group's input, over all tokens. `gsr_weight` is a mean over output channels. `noise` by bits, if measured."""

    block: int
    group: str
    gsr: float
    gsr_p99: float
    gsr_weight: float
    absmax: float
    spike_ratio: float
    noise: dict[str, float] = field(default_factory=dict)


@dataclass
class TokenMap:
    """Tokens that stand out, by depth: absmax of the residual, rows as in `Residual`, one column a token."""

    tokens: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    absmax: list[list[float]] = field(default_factory=list)


@dataclass
class SpikeRow:
    """One group's input: the channel of its largest value, and each token's largest magnitude in medians of its
    sequence."""

    block: int
    group: str
    channel: int
    times: list[float]


@dataclass
class SpikeMap:
    """Tokens that dominate linear inputs: a column a token, a row a group."""

    tokens: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    rows: list[SpikeRow] = field(default_factory=list)

    def row(self, block: int, group: str) -> SpikeRow:
        """One group's row."""
        return next(r for r in self.rows if (r.block, r.group) == (block, group))


@dataclass
class Observations:
    """One sweep of one model. `coordinates`: raw, or after which transform; `snr`: by bits ("4", "8"). Of phases and
    outliers only the strongest are kept."""

    coordinates: str
    blocks: int
    sequences: int
    length: int
    jump_ratio: Curve = field(default_factory=Curve)
    snr: dict[str, Curve] = field(default_factory=dict)
    residual: Residual = field(default_factory=Residual)
    groups: list[GroupStats] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    token_map: TokenMap = field(default_factory=TokenMap)
    spikes: SpikeMap = field(default_factory=SpikeMap)

    def group(self, block: int, group: str) -> GroupStats:
        """One group's numbers."""
        return next(g for g in self.groups if (g.block, g.group) == (block, group))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Observations":
        """The inverse of `to_dict`."""
        try:
            rest = dict(values)
            return cls(
                jump_ratio=Curve(**rest.pop("jump_ratio")),
                snr={bits: Curve(**curve) for bits, curve in rest.pop("snr").items()},
                residual=Residual(**{**(r := rest.pop("residual")), "norm": Curve(**r["norm"])}),
                groups=[GroupStats(**g) for g in rest.pop("groups")],
                outliers=[Outlier(**m) for m in rest.pop("outliers")],
                phases=[_phase(p) for p in rest.pop("phases")],
                token_map=TokenMap(**rest.pop("token_map")),
                spikes=SpikeMap(
                    **{**(s := rest.pop("spikes", {})), "rows": [SpikeRow(**r) for r in s.get("rows", [])]}
                ),
                **rest,
            )
        except (KeyError, TypeError) as error:
            raise PhaseQuantError(f"these are not observations of a PhaseQuant run ({error})") from error


def _phase(values: Mapping[str, Any]) -> Phase:
    """A phase from JSON, whose lists were tuples."""
    return Phase(
        **{
            **values,
            "written_by": tuple(values["written_by"]),
            "taken_back_by": tuple(values["taken_back_by"]),
            "tokens": tuple((str(token), int(count)) for token, count in values["tokens"]),
        }
    )
