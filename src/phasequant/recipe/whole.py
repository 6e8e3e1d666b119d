"""A recipe says what is wanted: one frozen, validated description of a run.

    YAML ⇄ Recipe ⇄ Python       without loss; unknown keys are errors with the nearest right name

A YAML file may start from presets or small parts with `compose: [a, b]` (one level: what it composes may not compose
further); later ones win over earlier ones, the file's own keys over all, and `--set a.b=c` over the file. `phasequant
recipes NAME` prints the whole of one, with a comment on every key: the descriptions below are that documentation.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from phasequant.errors import PhaseQuantError
from phasequant.presets import check_plain, merge, override, read, resolve
from phasequant.recipe.keys import (
    ActivationsPart,
    CalibrationPart,
    ExcludePart,
    FinetunePart,
    KvPart,
    LearningPart,
    LowRankPart,
    Part,
    PolicyPart,
    PrefixPart,
    RotationPart,
    StoragePart,
    TransformPart,
    WeightsPart,
)
from phasequant.recipe.words import commented, explain

MOST_SAID = 20  # mistakes in one message


class Recipe(Part):
    """The whole recipe. `Recipe()` quantizes nothing."""

    transform: TransformPart = Field(TransformPart(), description="making activations flat")
    rotation: RotationPart = Field(RotationPart(), description="where and how rotations act")
    learning: LearningPart = Field(LearningPart(), description="how transforms and clips are learned from data")
    weights: WeightsPart = Field(WeightsPart(), description="weights of the linears inside the blocks")
    lowrank: LowRankPart = Field(LowRankPart(), description="a 16-bit branch beside the codes")
    activations: ActivationsPart = Field(ActivationsPart(), description="what those linears read")
    kv: KvPart = Field(KvPart(), description="the KV cache")
    policy: PolicyPart = Field(PolicyPart(), description="which groups read more bits than activations.bits")
    prefix: PrefixPart = Field(PrefixPart(), description="tokens kept in 16-bit KV before every sequence")
    exclude: ExcludePart = Field(ExcludePart(), description="modules left unquantized")
    finetune: FinetunePart = Field(FinetunePart(), description="polishing scales, clips, norms and branches")
    calibration: CalibrationPart = Field(CalibrationPart(), description="text that metrics and plans are measured on")
    storage: StoragePart = Field(StoragePart(), description="what is not quantized: embeddings, norms, head")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0,
        description="of every random choice: signs of rotations, order of batches, and which sequences of the "
        "calibration text are taken (0: from its start; others: anywhere, without overlap)",
    )

    @property
    def learned_clips(self) -> frozenset[str]:
        """Which of weights, activations, kv have clips that are learned."""
        parts: dict[str, WeightsPart | ActivationsPart | KvPart] = {
            "weights": self.weights,
            "activations": self.activations,
            "kv": self.kv,
        }
        return frozenset(name for name, part in parts.items() if part.clip == "learned" and part.bits < 16)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        method, learning = self.transform.method, self.learning
        spin = method == "spin"
        if self.lowrank.method != "none" and self.weights.bits == 16:
            raise ValueError("lowrank goes beside codes: set weights.bits below 16")
        if self.finetune.on and self.weights.bits == self.activations.bits == self.kv.bits == 16:
            raise ValueError("finetune polishes a quantized model: set weights.bits, activations.bits or kv.bits")
        if (self.prefix.method == "tokens") != bool(self.prefix.tokens):
            raise ValueError("prefix.tokens goes with prefix.method=tokens, and only with it")
        if self.exclude.method != "none":
            if self.activations.bits == 16:
                raise ValueError("exclude leaves inputs out of a grid: set activations.bits below 16")
            if self.exclude.bits == 8 and self.activations.bits == 8 and self.activations.granularity == "token":
                raise ValueError("exclude.bits=8 changes nothing where all inputs read 8 bits a token: set it to 16")
        if (method == "load") != (self.transform.file is not None):
            raise ValueError("transform.file goes with transform.method=load, and only with it")
        raised = self.policy.format
        if "fp8" in (raised, "fp8" if raised == "auto" and self.activations.format != "int" else "") and (
            self.policy.name != "uniform" and self.policy.bits not in (8, 16)
        ):
            raise ValueError("policy.format=fp8 is 8 bits: set policy.bits=8, or policy.format=int")
        if self.policy.price == "bits" and self.activations.bits >= 8 and self.policy.name == "budget":
            raise ValueError("policy.price=bits counts bits towards 8: it needs activations.bits below 8")
        for kind, spec in (("weights", self.weights), ("kv", self.kv)):
            allowed = self.policy.allow.get(kind)  # type: ignore[call-overload]
            if allowed and (spec.bits == 16 or min(allowed) <= spec.bits or getattr(spec, "format", "int") != "int"):
                raise ValueError(
                    f"policy.allow raises {kind} above {kind}.bits, on integer grids: set {kind}.bits below "
                    f"{min(allowed)}"
                )
        if self.policy.allow and (self.policy.score != "gradient" or self.policy.price != "bytes" or self.policy.swaps):
            raise ValueError(
                "policy.allow has weights, KV and activations share one budget: it needs policy.score=gradient, which "
                "measures all three, policy.price=bytes, which all three have, and policy.swaps=0"
            )
        if set(self.policy.choices) - {8, 16} and (
            raised == "fp8" or (raised == "auto" and self.activations.format != "int")
        ):
            raise ValueError("raised groups read fp8, which is 8 bits: policy.choices can hold 8 and 16 alone")
        learns = method in ("flat", "spin") or self.learned_clips
        for part in (self.activations, self.weights):
            if learns and part.format != "int" and part.bits < 16:
                raise ValueError(f"nothing can be learned through {part.format} grids yet: take integer ones")
        if learning.optimizer in ("cayley", "qr-orth") and not spin:
            raise ValueError(f"learning.optimizer={learning.optimizer} learns rotations: it goes with spin")
        if learning.loss in ("ce", "kl") and not spin:
            raise ValueError(f"learning.loss={learning.loss} is of a whole model: it goes with spin; take mse or token")
        if learning.loss in ("mse", "token") and spin:
            raise ValueError(f"learning.loss={learning.loss} is of one block: spin learns by ce or kl")
        if self.rotation.where == "online" and method in ("none", "smooth", "os-plus", "load"):
            raise ValueError(f"rotation.where=online has no meaning with transform.method={method}: it does not choose")
        if self.rotation.heads == "apart" and method not in ("quarot", "dfrot", "frtq"):
            raise ValueError(f"rotation.heads=apart goes with quarot, dfrot and frtq; {method} decides that itself")
        if not self.rotation.online and (
            method not in ("quarot", "dfrot", "frtq", "spin") or self.rotation.where != "folded"
        ):
            raise ValueError(
                "rotation.online=false leaves folded rotations alone: it goes with quarot, dfrot, frtq or spin, and "
                "rotation.where=folded"
            )
        if self.rotation.block is not None and (method, self.rotation.where) != ("quarot", "online"):
            raise ValueError("rotation.block goes with transform.method=quarot and rotation.where=online")
        if learning.optimizer == "adamw" and spin:
            raise ValueError("learning.optimizer=adamw does not keep rotations orthogonal: use cayley, qr-orth or zeta")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Validated; every problem is a `PhaseQuantError` that names the key and the nearest right one."""
        if not isinstance(values, Mapping):
            raise PhaseQuantError(f"a recipe is a mapping of keys, not a {type(values).__name__}")
        check_plain(values, "the recipe")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = error.errors(include_url=False)
            lines = [explain(problem, cls) for problem in problems[:MOST_SAID]]
            more = [f"and {len(problems) - MOST_SAID} more"] if len(problems) > MOST_SAID else []
            raise PhaseQuantError("\n".join(lines + more)) from error

    @classmethod
    def load(cls, name: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """A preset by name or a YAML file, with `a.b=c` overrides."""
        values = resolve(read(str(name)))
        for text in overrides:
            override(values, text)
        return cls.from_dict(values)

    def with_(self, *overrides: str, **parts: Mapping[str, Any]) -> "Recipe":
        """A changed copy: `recipe.with_("weights.bits=8", kv={"bits": 16})`."""
        values = self.model_dump()
        for part, changes in parts.items():
            merge(values, {part: changes})
        for text in overrides:
            override(values, text)
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The whole recipe, with a comment above every key: meaning, type, default."""
        return "\n".join(commented(type(self), self.model_dump(), "")) + "\n"
