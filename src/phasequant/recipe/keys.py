"""The parts of a recipe: one frozen model for each, every key with its meaning, type and default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


def _start(clip: float | str) -> float:
    """A grid's clip before anything is learned."""
    return 1.0 if clip in ("learned", "searched") else float(clip)


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class TransformPart(Part):
    """Making activations flat."""

    method: Literal["none", "quarot", "smooth", "os-plus", "dfrot", "frtq", "spin", "flat", "wush", "load"] = Field(
        "none",
        description="none; quarot (fixed Hadamard); smooth (scale migration); os-plus (outlying "
        "channels alone); dfrot, frtq (rotations by Procrustes); "
        "spin (rotations learned end to end); flat (Kronecker pairs learned by block); wush (closed form); load",
    )
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None,
        description="smooth: how much is moved into the weights; null: searched. flat: where its scales start (0.3)",
    )
    block: Annotated[int, Field(ge=1)] = Field(128, description="wush: largest order of a block of its online map")
    file: str | None = Field(None, description="load: a transform saved earlier, or SpinQuant's rotations (.bin)")


class RotationPart(Part):
    """Where and how rotations act."""

    where: Literal["folded", "online"] = Field(
        "folded",
        description="folded: one rotation of the residual, in the weights, free; online: after every norm's gain, by "
        "two small products",
    )
    heads: Literal["mixed", "apart"] = Field(
        "mixed",
        description="quarot, dfrot, frtq: heads mixed online before o, or apart: nothing runs there, and only R3, R4 "
        "(and what rotation.where=online adds) are left online",
    )
    online: bool = Field(
        True,
        description="quarot, dfrot, frtq, spin: false: R1 and R2 alone, folded; neither mixed heads nor R3 nor R4, and "
        "nothing runs online, as `phasequant export` needs it",
    )
    block: Annotated[int, Field(ge=2)] | None = Field(
        None, description="quarot online: Hadamards of this order side by side, instead of one of the width (for fp4)"
    )
    down: Literal["hadamard", "learned"] = Field(
        "hadamard", description="dfrot, frtq: the rotation before down: fixed, or refined like the others"
    )
    tail_weight: Annotated[float, Field(gt=0.0)] = Field(
        100.0, description="dfrot, frtq: weight of massive tokens in the Procrustes problem"
    )
    tail_error: Annotated[float, Field(gt=0.0)] = Field(
        0.13,
        description="dfrot, frtq: tokens whose un-rotated 4-bit error is below this (times sqrt of the width) are "
        "massive; the paper's 8.5 at width 4096",
    )
    iterations: Annotated[int, Field(ge=0)] = Field(100, description="dfrot, frtq: alternations, at most")
    preconditioning: Annotated[int, Field(ge=0)] = Field(
        30, description="frtq: steps of uniform preconditioning before them"
    )
    target: Literal["uniform", "sign"] = Field("uniform", description="frtq: what each token's values are pulled to")


class LearningPart(Part):
    """How transforms and clips are learned from data."""

    sequences: Annotated[int, Field(ge=1)] = Field(128, description="how many sequences, at most")
    seqlen: Annotated[int, Field(ge=2)] = Field(2048, description="tokens in each")
    batch: Annotated[int, Field(ge=1)] = Field(4, description="flat: sequences a step. spin: sequences a step")
    epochs: Annotated[int, Field(ge=0)] = Field(15, description="flat and learned clips: passes over the sequences")
    steps: Annotated[int, Field(ge=0)] = Field(100, description="spin: steps")
    optimizer: Literal["auto", "adamw", "zeta", "cayley", "qr-orth"] = Field(
        "auto",
        description="flat: adamw (auto) or zeta. spin: cayley (auto), or qr-orth, by SGD; zeta: qr-orth by Zeta",
    )
    lr: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="of matrices; null: flat 5e-3 (zeta 5e-3), spin 1.5 (qr-orth 0.5, zeta 5e-3)"
    )
    clip_start: Literal["wide", "searched"] = Field(
        "wide", description="where clips of weights begin: 0.98 of the largest, or what the MSE search finds"
    )
    clip_lr: Annotated[float, Field(gt=0.0)] = Field(5e-2, description="of clips")
    start: Literal["hadamard", "random", "wush"] = Field("hadamard", description="flat: where its maps begin")
    scales: bool = Field(True, description="flat: learn a scale for every channel too")
    values: bool = Field(True, description="flat: learn the maps of values and heads too")
    keys: bool = Field(True, description="flat: learn the map of keys too, where the KV cache is quantized")
    through_weights: bool = Field(
        True, description="spin: learn through rounded weights; false: 16-bit ones, where GPTQ follows"
    )
    loss: Literal["auto", "mse", "token", "ce", "kl"] = Field(
        "auto",
        description="by block: mse of its output (auto), or token: the same with every token's error relative to its "
        "own size. spin: ce of the next token (auto), or kl to the 16-bit model",
    )


class WeightsPart(Part):
    """Weights of the linears inside the blocks."""

    method: Literal["rtn", "gptq"] = Field(
        "rtn", description="how codes are chosen: rtn (round to nearest); gptq (errors made up for by later columns)"
    )
    bits: Bits = Field(16, description="2 to 8, or 16: not quantized")
    format: Literal["int", "nvfp4", "mxfp4"] = Field(
        "int", description="int; nvfp4, mxfp4: E2M1 codes of 4 bits with a scale for 16 or 32 inputs"
    )
    granularity: Literal["channel", "group"] = Field(
        "channel", description="one scale per output channel, or per group; of int"
    )
    group_size: int | None = Field(None, description="inputs that share a scale, with granularity group (32, 64, 128)")
    symmetric: bool = Field(True, description="codes around zero; false: with a zero point")
    clip: Literal["none", "mse", "learned"] | Fraction = Field(
        "mse", description="none; mse: searched per scale; learned: with the transform, by block; or a fraction"
    )

    order: Literal["activation", "natural"] = Field(
        "activation",
        description="gptq: columns by falling energy of their input, or as they stand",
    )
    hessian: Literal["full", "rounded", "mixed"] = Field(
        "full", description="gptq: from inputs in 16 bits, as their grid rounds them, or the mean of both"
    )
    target: Literal["weights", "outputs"] = Field(
        "outputs",
        description="gptq: stay near the weights, or give the 16-bit model's outputs (a second pass, a solve)",
    )
    damping: Annotated[float, Field(gt=0.0)] = Field(
        0.01, description="gptq: added to the diagonal, in units of its mean; raised where that does not do"
    )
    rounds: Annotated[int, Field(ge=0)] = Field(
        4, description="gptq: how many other scales are tried for each row: four stretched ones, then refitted ones"
    )
    sequential: bool = Field(
        True, description="gptq: every group sees the block's groups before it quantized; false: one pass a block"
    )
    sequences: Annotated[int, Field(ge=1)] = Field(128, description="gptq: calibration sequences, at most")
    seqlen: Annotated[int, Field(ge=2)] = Field(2048, description="gptq: tokens in each")

    @model_validator(mode="after")
    def _group_size_fits(self) -> "WeightsPart":
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("weights.group_size goes with weights.granularity=group, and only with it")
        if self.format != "int" and (self.bits != 4 or not self.symmetric or self.granularity == "group"):
            raise ValueError(f"weights.format={self.format} is 4 bits, symmetric, with groups of its own: leave those")
        return self

    def spec(self) -> QuantSpec | None:
        """The grid; None at 16 bits."""
        if self.bits == 16:
            return None
        clip = 1.0 if self.clip == "none" or self.clip == "learned" else self.clip
        if self.format != "int":
            return QuantSpec.floating(self.format, clip)
        return QuantSpec(self.bits, self.symmetric, self.granularity, self.group_size, clip)


class LowRankPart(Part):
    """A 16-bit branch of low rank beside the codes of every linear."""

    method: Literal["none", "svd", "loftq", "tsvd"] = Field(
        "none",
        description="none; svd: of the weights; loftq: alternating with what rounding leaves; tsvd: taking each row's "
        "peaks (FRTQ)",
    )
    rank: Annotated[int, Field(ge=1)] = Field(32, description="of every group's branch")
    ranks: dict[Literal["qkv", "o", "gate_up", "down"], Annotated[int, Field(ge=0)]] = Field(
        {}, description="ranks of single groups, as in {down: 64, o: 0}; 0: no branch"
    )
    weighting: Literal["none", "hessian"] = Field(
        "hessian", description="errors of weights as they are, or as the calibration inputs meet them"
    )
    input: Literal["full", "rounded"] = Field(
        "full", description="what the branch reads: the linear's input in 16 bits, or as its grid rounds it"
    )
    iterations: Annotated[int, Field(ge=1)] = Field(60, description="loftq, tsvd: at most; the best one is kept")
    shrink: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.97, description="tsvd: of the rows' peaks, a step")

    def rank_of(self, group: str) -> int:
        """A group's rank; 0 for none."""
        return 0 if self.method == "none" else dict(self.ranks).get(group, self.rank)  # type: ignore[call-overload]


class ActivationsPart(Part):
    """What every linear inside the blocks reads."""

    bits: Bits = Field(16, description="2 to 8, or 16: not quantized; a policy may raise groups above this")
    format: Literal["int", "nvfp4", "mxfp4", "fp8"] = Field(
        "int", description="int; nvfp4, mxfp4 (4 bits, a scale for 16 or 32 values) and fp8 (E4M3, a scale a token)"
    )
    granularity: Literal["token", "tensor", "channel"] = Field(
        "token", description="values that share a scale: a token's, a whole call's, or (static) a channel's"
    )
    scales: Literal["dynamic", "static"] = Field(
        "dynamic", description="dynamic: from the values present; static: calibrated once (tensor or channel)"
    )
    calibrate: Literal["absmax", "percentile", "mse"] = Field(
        "absmax", description="static: the largest value seen, a percentile of them, or what rounds with least error"
    )
    percentile: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        99.99, description="static, percentile: of the magnitudes"
    )
    symmetric: bool = Field(True, description="codes around zero; false: with a zero point")
    clip: Literal["learned", "searched"] | Fraction = Field(
        1.0,
        description="largest magnitude kept, as a fraction of the largest present; searched: by group and block, "
        "for the least error of outputs; learned: with the transform",
    )

    token_policy: Literal["none", "gsr", "absmax"] = Field(
        "none",
        description="single tokens that read 8 bits in groups that read fewer: none; those of the largest grid-to-std "
        "ratio; those of the largest values (free where 4-bit codes travel as int8)",
    )
    token_share: Fraction = Field(
        0.05, description="the share of such tokens in every group, on the calibration text; it is counted elsewhere"
    )

    @model_validator(mode="after")
    def _format_fits(self) -> "ActivationsPart":
        if self.token_policy != "none" and (
            self.format != "int" or self.granularity != "token" or not 2 <= self.bits < 8
        ):
            raise ValueError(
                f"activations.token_policy={self.token_policy} has single tokens read 8 bits: it needs "
                "activations.bits below 8, integer codes and a scale a token"
            )
        bits = {"int": self.bits, "fp8": 8}.get(self.format, 4)
        if self.bits not in (16, bits) or (
            self.format != "int" and (not self.symmetric or self.granularity != "token")
        ):
            raise ValueError(f"activations.format={self.format} is {bits} bits, symmetric, with scales of its own")
        if self.scales == "static" and self.clip == "searched":
            raise ValueError("activations.clip=searched is of dynamic scales; of static ones say calibrate=mse")
        if self.scales == "static" and self.granularity == "token":
            raise ValueError("activations.scales=static needs activations.granularity=tensor or channel")
        if self.scales == "dynamic" and self.granularity == "channel":
            raise ValueError("activations.granularity=channel is calibrated: it needs activations.scales=static")
        return self

    def spec(self) -> QuantSpec | None:
        """The grid; None at 16 bits."""
        if self.bits == 16:
            return None
        if self.format != "int":
            return QuantSpec.floating(self.format, _start(self.clip))
        granularity = "column" if self.granularity == "channel" else self.granularity
        static = self.scales == "static"
        return QuantSpec(self.bits, self.symmetric, granularity, None, _start(self.clip), static=static)


class KvPart(Part):
    """The KV cache."""

    bits: Bits = Field(16, description="2 to 8, or 16: not quantized")
    symmetric: bool = Field(False, description="codes around zero; false: with a zero point")
    group_size: int | None = Field(
        None, description="channels that share a scale; null: the head size (per token, head)"
    )
    clip: Literal["learned"] | Fraction = Field(
        1.0, description="largest magnitude kept, as a fraction of the largest present; learned: by block"
    )

    def spec(self, d_head: int) -> QuantSpec | None:
        """The grid for heads of `d_head` channels; None at 16 bits."""
        if self.bits == 16:
            return None
        size = self.group_size or d_head
        if d_head % size:
            raise PhaseQuantError(
                f"kv.group_size {size} does not divide the head size {d_head}: choose a divisor of it"
            )
        return QuantSpec(self.bits, self.symmetric, "group", size, _start(self.clip))


class PolicyPart(Part):
    """Which groups read more bits than `activations.bits`."""

    name: Literal["uniform", "paper", "threshold", "budget"] = Field(
        "uniform",
        description="uniform: none; paper: DynamicPTQ's blocks 0, 1, 2 and the last; threshold: Jump Ratio and "
        "Historical SNR; budget: where 4 bits add most noise, within a8_share",
    )
    bits: Literal[5, 6, 7, 8, 16] = Field(8, description="what raised groups read")
    format: Literal["auto", "int", "fp8"] = Field(
        "auto", description="their grid: int (auto where activations are), or fp8 (auto where activations are fp4)"
    )
    clip: Fraction = Field(1.0, description="clip of raised groups, which have codes to spare for the largest values")
    score: Literal["noise", "gsr", "ratio", "jr_snr", "local", "fisher", "gradient", "kl", "kl_alone"] = Field(
        "gradient",
        description="budget: how harm is measured: noise in the residual stream; gsr; ratio (QFeM); jr_snr "
        "(DynamicPTQ); local output error; fisher (one backward pass, in 16 bits); gradient (of KL and loss, all low); "
        "kl of the model, raised from all-low or alone",
    )
    choices: tuple[Literal[5, 6, 7, 8, 16], ...] = Field(
        (), description="budget: what groups may be raised to; empty: policy.bits alone"
    )
    price: Literal["macs", "bits", "bytes", "microseconds"] = Field(
        "macs",
        description="budget: what a raised group costs: its multiply-adds; those times its bits above the low grid; "
        "the bytes of its input; the time its linears take longer on this device",
    )
    allow: dict[Literal["weights", "kv"], tuple[Literal[5, 6, 7, 8], ...]] = Field(
        {},
        description="budget, gradient: what weights of a group, or keys and values of a block, may be raised to out of "
        "the same budget, as in {weights: [8], kv: [8]}; priced in bytes",
    )
    context: Annotated[int, Field(ge=1)] = Field(
        2048, description="budget, allow: cached tokens whose keys and values a new token reads"
    )
    tokens: Annotated[int, Field(ge=2)] = Field(
        1024, description="budget: calibration tokens for scores that run the model (local, fisher, gradient, kl)"
    )
    measured: bool = Field(
        False, description="budget: state for every raised group the KL that it saves in the plan (about a minute)"
    )
    check: bool = Field(
        True,
        description="budget, by scores that run the model: measure the KL beside that of DynamicPTQ's fixed set, "
        "where that keeps to the share, and take the lower",
    )
    swaps: Annotated[int, Field(ge=0)] = Field(
        0, description="budget: exchanges of groups tried on the model's measured KL, to better the plan"
    )
    a8_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.125, description="budget: largest share of the linear multiply-adds that may be raised"
    )
    tau_jr: float | None = Field(None, description="threshold: Jump Ratio above this; null: median + IQR of the blocks")
    tau_snr: float | None = Field(None, description="threshold: SNR below this, dB; null: median - IQR of the blocks")
    coordinates: Literal["transformed", "raw"] = Field(
        "transformed", description="threshold: metrics of the transformed residual, or of the original one"
    )
    first_token: bool = Field(False, description="threshold: whether each sequence's first token counts in the means")


class PrefixPart(Part):
    """Tokens whose keys and values stay in 16 bits before every sequence."""

    method: Literal["none", "qfep", "prefixquant", "bos", "tokens"] = Field(
        "none",
        description="none; qfep (begin, a context and a token, searched); prefixquant (frequent outlier tokens, then "
        "begin); bos (begin alone); tokens (those of prefix.tokens)",
    )
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="tokens: their ids")
    candidates: Annotated[int, Field(ge=1)] = Field(3, description="qfep: spiking tokens that are tried")
    contexts: Annotated[int, Field(ge=1)] = Field(200, description="qfep: frequent tokens tried before each")
    eta: Annotated[float, Field(gt=1.0)] = Field(
        64.0, description="prefixquant: an outlier token exceeds this many medians of down's input"
    )


class ExcludePart(Part):
    """Groups of linears whose inputs are left out of the low grid because a few tokens dominate them."""

    method: Literal["none", "qfem"] = Field(
        "none", description="none; qfem: where the largest token exceeds the median one by more than alpha"
    )
    alpha: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="qfem: the threshold; null: searched, the largest that keeps to the budget"
    )
    budget: Annotated[float, Field(ge=0.0)] = Field(
        0.01, description="qfem, searched: perplexity on the calibration text may rise by this fraction of 16 bits'"
    )
    most: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="qfem, searched: at most this fraction of all groups is left out"
    )
    bits: Literal[8, 16] = Field(
        16, description="what excluded inputs are read in: 16, or 8 with a scale for every token"
    )


class FinetunePart(Part):
    """Polishing what stays continuous beside the codes; nothing is added to inference."""

    epochs: Annotated[int, Field(ge=0)] = Field(
        0, description="block reconstruction: passes over the sequences, block after block; 0: none"
    )
    steps: Annotated[int, Field(ge=0)] = Field(0, description="distillation end to end (KL to 16 bits): steps; 0: none")
    minutes: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="distillation ends after so many, whatever steps are left; null: no limit"
    )
    parameters: tuple[Literal["scales", "clips", "norms", "branches"], ...] = Field(
        ("scales", "clips", "norms", "branches"),
        description="what is learned: scales of weights, clips (activations, KV), gains of norms, low-rank branches",
    )
    sequences: Annotated[int, Field(ge=1)] = Field(
        64, description="calibration sequences, at most; an eighth of them is held out to judge by"
    )
    seqlen: Annotated[int, Field(ge=2)] = Field(1024, description="tokens in each")
    batch: Annotated[int, Field(ge=1)] = Field(4, description="sequences a step")
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-3, description="of scales and gains, relative to their size")
    clip_lr: Annotated[float, Field(gt=0.0)] = Field(1e-2, description="of clips")
    branch_lr: Annotated[float, Field(gt=0.0)] = Field(1e-4, description="of low-rank branches")

    @property
    def on(self) -> bool:
        """Whether anything is polished."""
        return bool(self.epochs or self.steps)


class CalibrationPart(Part):
    """The text that metrics and plans are measured on; never the one that is evaluated."""

    text: str = Field("builtin", description="builtin, a UTF-8 file, wikitext2, c4")
    sequences: Annotated[int, Field(ge=1)] = Field(20, description="how many sequences, at most")
    seqlen: Annotated[int, Field(ge=2)] = Field(512, description="tokens in each")


class StoragePart(Part):
    """What is not quantized: embeddings, norms, head."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="their type in the checkpoint; auto: the source model's, bfloat16 if that is float32"
    )
