"""`ModelMap`: a model as this package sees it. Blocks → groups → linears, with sizes; names and integers only.

Built from a Transformers config alone, so that a plan can be checked or a checkpoint laid out before any weight is
read.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from phasequant.arch.families import FAMILIES
from phasequant.arch.mixtures import REFUSED
from phasequant.arch.names import Family, GroupNames
from phasequant.arch.said import said
from phasequant.errors import PhaseQuantError

Place = tuple[int, str]
"""(block, group)."""
MIXTURE = ("experts", "active", "shared")


@dataclass(frozen=True)
class Shape:
    """The integers of a decoder. `d_head` is not always `d_model / heads`. Of `experts`, the last `shared` are parts of
    the shared one and among the `active` of every token."""

    blocks: int
    d_model: int
    d_ffn: int
    heads: int
    kv_heads: int
    d_head: int
    vocab: int
    experts: int = 0
    active: int = 0
    shared: int = 0

    def to_dict(self) -> dict[str, int]:
        """For JSON; what is not there is left out."""
        return {name: value for name, value in asdict(self).items() if value or name not in MIXTURE}


def _family(config: PretrainedConfig) -> Family:
    """The family of a config, or `PhaseQuantError` with what it lacks."""
    model_type = getattr(config, "model_type", None) or "unknown"
    found = [f for f in FAMILIES if model_type in f.model_types]
    if model_type in REFUSED:
        name, why = REFUSED[model_type]
        raise PhaseQuantError(f"{name} models (of type '{model_type}') are not supported: {why}")
    if not found:
        names: dict[tuple[str, ...], str] = {}
        for one in FAMILIES:  # of several of one type, the shortest name
            names[one.model_types] = min(names.get(one.model_types, one.name), one.name, key=len)
        supported = ", ".join(f"{name} ({', '.join(types)})" for types, name in names.items())
        raise PhaseQuantError(f"models of type '{model_type}' are not supported; supported are: {supported}")
    family = next(f for f in found if all(getattr(config, name, None) == value for name, value in f.when))
    for need in family.needs:
        wanted = need.value if need.same_as is None else getattr(config, need.same_as)
        given = getattr(config, need.attribute, wanted)
        if given != wanted:
            raise PhaseQuantError(
                f"this {family.name} model has {need.attribute}={given}, and only {wanted} is supported: {need.why}"
            )
    return family


def _shared(family: Family, config: PretrainedConfig) -> int:
    """How many experts' widths a shared expert has; 0 where there is none."""
    if family.shared_width is None:
        return 0
    width, one = int(getattr(config, family.shared_width)), int(getattr(config, family.d_ffn))
    if width % one:
        raise PhaseQuantError(
            f"this {family.name} model has {family.shared_width}={width} and {family.d_ffn}={one}: its shared expert "
            "is taken apart into experts of the others' width, and that does not divide it"
        )
    return width // one


def _with_experts(family: Family, experts: int) -> Family:
    """The family with the name of every expert written out; those of one expert stand together."""

    def named(names: tuple[str, ...]) -> tuple[str, ...]:
        own = [name for name in names if "{}" in name]
        return tuple(n for n in names if n not in own) + tuple(n.format(e) for e in range(experts) for n in own)

    groups = tuple(replace(group, linears=named(group.linears)) for group in family.groups)
    return replace(family, groups=groups, ups=named(family.ups), writers=named(family.writers))


@dataclass(frozen=True)
class ModelMap:
    """A family's names with one model's sizes, and what its config says beyond them (`notes`)."""

    family: Family
    shape: Shape
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "ModelMap":
        """The map of a config; `PhaseQuantError` where the architecture is not supported."""
        family = _family(config)
        routed = 0 if family.experts is None else int(getattr(config, family.n_experts))
        shared = _shared(family, config)
        experts = routed + shared
        family = _with_experts(family, experts)
        heads = config.num_attention_heads
        return cls(
            family,
            Shape(
                blocks=config.num_hidden_layers,
                d_model=config.hidden_size,
                d_ffn=getattr(config, family.d_ffn),
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
                vocab=config.vocab_size,
                experts=experts,
                active=int(config.num_experts_per_tok) + shared if experts else 0,
                shared=shared,
            ),
            (*family.notes, *said(family, config)),
        )

    @property
    def blocks(self) -> range:
        """Indices of the decoder blocks, 0-based."""
        return range(self.shape.blocks)

    @property
    def groups(self) -> tuple[GroupNames, ...]:
        """The groups of any block, in order of computation."""
        return self.family.groups

    def group(self, name: str) -> GroupNames:
        """One group by name."""
        return next(g for g in self.groups if g.name == name)

    @property
    def unfoldable(self) -> str | None:
        """Why a rotation of the residual stream cannot be folded into this model's weights; None where it can."""
        family = self.family
        if family.norm == "layer":
            return (
                "its LayerNorms take off the mean over the channels, which are others after a rotation: "
                "n(x·R) is not n(x)·R"
            )
        if family.post_norms:
            return (
                f"the outputs of its sublayers go through norms of their own ({', '.join(family.post_norms)}), whose "
                "gains do not commute with a rotation: what they add to the residual stream cannot be rotated before"
            )
        return None

    @property
    def scaled(self) -> tuple[str, ...]:
        """Groups under whose names scales of inputs are folded: into their norm, or, for down, into up's rows."""
        names = (self.scale_of(group.name) for group in self.groups)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def scale_of(self, group: str) -> str | None:
        """The name under which a group's folded scales stand: of groups that read one norm, the first. None: nothing
        before the group can be scaled (o takes the place `value` instead)."""
        norm = self.group(group).norm
        if norm is None:
            return group if group == "down" and self.family.ups else None
        return next(g.name for g in self.groups if g.norm == norm)

    def sharing(self, group: str) -> tuple[str, ...]:
        """The linears that read what a group reads, those of other groups behind the same norm among them."""
        own = self.group(group)
        if own.norm is None:
            return own.linears
        return tuple(name for g in self.groups if g.norm == own.norm for name in g.linears)

    @property
    def value_rows(self) -> slice:
        """Which rows of the linear `family.value` are values."""
        s = self.shape
        return slice((s.heads + s.kv_heads) * s.d_head, None) if self.family.fused else slice(None)

    @property
    def up_rows(self) -> slice:
        """Which rows of the linears `family.ups` are up's."""
        return slice(self.shape.d_ffn, None) if self.family.fused else slice(None)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies gate and up."""
        return self.family.fused or len(self.parts(self.group("gate_up"))[0].linears) > 1

    def block_name(self, block: int) -> str:
        """Full name of a block's module."""
        return f"{self.family.blocks}.{block}"

    def linears(self) -> Iterator[tuple[int, str, str]]:
        """(block, group, full name) of every linear inside the blocks."""
        for block in self.blocks:
            for group in self.groups:
                for name in group.linears:
                    yield block, group.name, f"{self.block_name(block)}.{name}"

    def width_in(self, group: str) -> int:
        """Width of a group's input."""
        s = self.shape
        return {"qkv": s.d_model, "o": s.heads * s.d_head, "gate_up": s.d_model, "down": s.d_ffn}[group]

    def width_out(self, group: str) -> int:
        """Summed output width of the linears of a group that read one input: of one expert's, where there are many."""
        s = self.shape
        return {
            "qkv": (s.heads + 2 * s.kv_heads) * s.d_head,
            "o": s.d_model,
            "gate_up": (2 if self.gated else 1) * s.d_ffn,
            "down": s.d_model,
        }[group]

    def macs(self, group: str) -> int:
        """Multiply-adds a token of one group of one block."""
        return self.width_in(group) * self.width_out(group) * self.rows(group)

    def rows(self, group: str) -> int:
        """Rows that a group computes a token: one an expert that the token goes to."""
        return self.shape.active if self.group(group).probe is not None else 1

    def rows_seen(self, group: str) -> int:
        """Rows a token at the place where a group's input is seen."""
        own = self.group(group)
        return self.shape.active if own.probe is not None and own.norm is None else 1

    def parts(self, group: GroupNames) -> tuple[GroupNames, ...]:
        """The group by what really reads one input: itself, or each expert's linears of it."""
        if group.probe is None:
            return (group,)
        size = len(group.linears) // self.shape.experts
        chunks = (group.linears[at : at + size] for at in range(0, len(group.linears), size))
        return tuple(replace(group, linears=chunk, expert=e) for e, chunk in enumerate(chunks))

    def shared(self, norm: str) -> bool:
        """Whether a norm's output has readers beyond one group: another group, or a router."""
        groups = [group for group in self.groups if group.norm == norm]
        return len(groups) > 1 or bool(self.routers_behind(norm))

    def routers_behind(self, norm: str) -> tuple[str, ...]:
        """What reads a norm's output in 16 bits: the router, and the gate of a shared expert."""
        named = (self.family.router, self.family.shared_gate)
        return tuple(name for name in named if name is not None and self.group("gate_up").norm == norm)

    @property
    def macs_total(self) -> int:
        """Multiply-adds a token of all linears inside the blocks."""
        return self.shape.blocks * sum(self.macs(g.name) for g in self.groups)

    def describe(self) -> dict[str, Any]:
        """Family and sizes, for JSON."""
        return {
            "family": self.family.name,
            **self.shape.to_dict(),
            "macs_total": self.macs_total,
            "notes": list(self.notes),
        }

    def fingerprint(self) -> str:
        """Names the architecture and sizes in 12 characters: equal where a plan fits."""
        text = json.dumps({"family": self.family.name, **self.shape.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, model: nn.Module) -> None:
        """Raise where the model lacks a module that the map names."""
        present = {name for name, _ in model.named_modules()}
        wanted = [self.family.embeddings, self.family.final_norm, self.family.head]
        wanted += [name for _, _, name in self.linears()]
        missing = [name for name in wanted if name not in present]
        if missing:
            raise PhaseQuantError(
                f"this {self.family.name} model has no module '{missing[0]}' (and {len(missing) - 1} more): "
                "it is not the causal language model that its config describes"
            )
