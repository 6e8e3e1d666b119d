r"""What a stock checkpoint's inputs are read on, by profile.

    ct-w4a16    weights int4, inputs in 16 bits
    ct-w4a8     weights int4, inputs int8: one symmetric scale a token, from the values present
    ct-w4a4     the same with int4 inputs; groups that the plan raised read int8, those it left out 16 bits
    ct-nvfp4    NVFP4 weights and inputs, groups that the plan raised in 16 bits        ct-mxfp4   likewise MXFP4

compressed-tensors divides the largest magnitude of a token by half of all steps, 2^(b-1) - ½; this package by the
largest code, 2^(b-1) - 1, after its clip c. Both keep the codes -2^(b-1) … 2^(b-1)-1, so they are one grid at

    c = (2^(b-1) - 1) / (2^(b-1) - ½)           14/15 in 4 bits, 254/255 in 8

The largest magnitude then lies half a step beyond the last code: which way it is rounded may differ between machines.

Of NVFP4 inputs the second scale is one number, calibrated, where this package takes one from every token: see
`measure.peaks_of`.
"""

from dataclasses import dataclass, replace

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.nn import Activations
from phasequant.numerics import QuantSpec

LEAST_CLIP_8 = 0.99  # of 8-bit inputs: above it grids differ by less than a step at the largest value


def ct_clip(bits: int) -> float:
    """The clip at which an integer grid of this package is compressed-tensors'."""
    return (2 ** (bits - 1) - 1) / (2 ** (bits - 1) - 0.5)


@dataclass(frozen=True)
class Profile:
    """`kind`: of weights (and FP4 inputs); `bits`: of inputs; `format`: compressed-tensors' word for the layout."""

    name: str
    kind: str
    bits: int
    format: str

    @property
    def low(self) -> QuantSpec | None:
        """The grid of most inputs; None at 16 bits."""
        if self.bits == 16:
            return None
        return int_grid(self.bits) if self.kind == "int" else QuantSpec.floating(self.kind)

    def reads(self, own: QuantSpec | None) -> QuantSpec | None:
        """What an input is read on that a checkpoint reads on `own`."""
        if own is None or self.bits == 16:
            return None
        if self.kind != "int":
            return self.low if own.kind == self.kind else None
        if own.kind != "int":
            return None
        return int_grid(4 if self.bits == 4 and own.bits <= 4 else 8)

    def inputs(self, activations: Activations, model_map: ModelMap) -> Activations:
        """What every group's input is read on."""
        places = ((block, group.name) for block in model_map.blocks for group in model_map.groups)
        return {place: self.reads(activations[place]) for place in places}


def int_grid(bits: int) -> QuantSpec:
    """compressed-tensors' dynamic symmetric grid of a token."""
    return QuantSpec(bits, True, "token", clip=ct_clip(bits))


def same_grid(own: QuantSpec | None, read: QuantSpec | None) -> bool:
    """Whether values come out alike."""
    if own is None or read is None:
        return own is read
    if own.kind != read.kind or own.bits != read.bits or own.mixed or own.static:
        return False
    if not own.is_int:
        return float(own.clip) == float(read.clip)
    near = float(own.clip) >= LEAST_CLIP_8 if own.bits == 8 else abs(float(own.clip) - float(read.clip)) < 1e-6
    return own.symmetric and own.granularity == "token" and near


def finer(own: QuantSpec | None, read: QuantSpec | None) -> bool:
    """Whether an input is read in more bits than its checkpoint reads it in."""
    return own is not None and (read is None or read.bits > own.bits)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("ct-w4a16", "int", 16, "pack-quantized"),
        Profile("ct-w4a8", "int", 8, "pack-quantized"),
        Profile("ct-w4a4", "int", 4, "pack-quantized"),
        Profile("ct-nvfp4", "nvfp4", 4, "nvfp4-pack-quantized"),
        Profile("ct-mxfp4", "mxfp4", 4, "mxfp4-pack-quantized"),
    )
}


def find_profile(name: str) -> Profile:
    """A profile by name."""
    if name not in PROFILES:
        raise PhaseQuantError(f"there is no profile '{name}': {did_you_mean(name, PROFILES)}")
    return PROFILES[name]


def short(spec: QuantSpec | None) -> str:
    """int4, nvfp4, 16 bits."""
    if spec is None:
        return "16 bits"
    return f"int{spec.bits}" if spec.is_int else spec.kind


def plain(spec: QuantSpec) -> QuantSpec:
    """A grid of weights without how it was found."""
    return replace(spec, clip=1.0)
