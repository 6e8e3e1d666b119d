"""What decides how vLLM runs a linear of a compressed-tensors checkpoint, and what it answers.

`vllm_rules` answers from rules written here, `ask` from an installed vLLM; `real` says what an answer means for the
activations.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Args = Mapping[str, Any]
"""`QuantizationArgs` of compressed-tensors, as plain values."""

SIXTEEN = "16-bit"
INSTALLED = frozenset({"humming", "flashinfer"})
"""What vLLM's CUDA wheel requires."""


@dataclass(frozen=True)
class Question:
    """One linear as vLLM has it (q, k, v are one): grids, format, widths on one GPU, machine and flags.

    `device`: cpu or sm_NN. `backend`: of --linear-backend; `backend_per_quant`: of linear_backend_per_quant.
    `amx`: whether a CPU has it.
    """

    weights: Args
    inputs: Args | None
    format: str | None
    width_in: int
    widths_out: tuple[int, ...]
    device: str
    outputs: Args | None = None
    width_full: int = 0
    backend: str = "auto"
    backend_per_quant: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"
    amx: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the script that asks vLLM."""
        return {**asdict(self), "widths_out": list(self.widths_out), "width_full": self.width_full or self.width_in}

    @property
    def capability(self) -> int | None:
        """Like 90; None on a CPU."""
        return None if self.device == "cpu" else int(self.device.removeprefix("sm_"))

    def backend_of(self, quantization: str) -> str:
        """The backend asked for, for one of vLLM's kinds of quantization."""
        return self.backend_per_quant.get(quantization) or self.backend


@dataclass(frozen=True)
class Answer:
    """`scheme`, `kernel`: vLLM's classes. `lanes`: to which type Humming rounds the input. `error`: why the model is
    not loaded. `known`: whether anyone could say."""

    scheme: str | None = None
    kernel: str | None = None
    lanes: str | None = None
    error: str | None = None
    known: bool = True


def words(args: Args | None, *, calibrated: bool = False) -> str:
    """A grid of compressed-tensors in few words. `calibrated`: one that is not dynamic is static (weights have no
    other)."""
    if args is None:
        return SIXTEEN
    bits, strategy, size = args["num_bits"], args["strategy"], args.get("group_size")
    if args["type"] == "float" and bits == 4:
        return "nvfp4" if strategy == "tensor_group" else "mxfp4" if size == 32 else f"fp4 per {strategy} {size}"
    name = "int" if args["type"] == "int" else "fp"
    static = "static" if calibrated and not args["dynamic"] else ""
    shape = f"per {strategy}" + (f" {size}" if strategy == "group" else "")
    told = [f"{name}{bits}", static, "" if args["symmetric"] else "asym", shape]
    return " ".join(word for word in told if word)


def promised(weights: Args | None, inputs: Args | None) -> tuple[str, str]:
    """Weights and inputs as a checkpoint declares them."""
    return words(weights), words(inputs, calibrated=True)


LANES = {"int4": "int4", "int8": "int8 per token", "float8e4m3": "fp8 per token", "float4e2m1": None, SIXTEEN: SIXTEEN}


def real(question: Question, answer: Answer) -> tuple[str, str, str]:
    """Weights, inputs as they will be, and why the inputs are as they are."""
    weights, inputs = promised(question.weights, question.inputs)
    if answer.error is not None:
        return "none", "none", answer.error
    if not answer.known or (answer.kernel is None and answer.scheme is None):
        return weights, "unknown", "no one could be asked"
    kernel, scheme = answer.kernel or "", answer.scheme or ""
    if answer.lanes is not None or kernel.startswith("Humming"):
        return _humming(question, answer, weights, inputs)
    if scheme.endswith("A16Fp8"):
        return weights, SIXTEEN, "fp8 activations need compute capability 8.9"
    if scheme.endswith(("W8A8Int8", "W8A8Fp8", "W4A8Fp8")) or kernel.startswith("Dynamic4bit"):
        return weights, inputs, "as declared"
    if scheme.endswith("W4A4Fp4"):
        weights_alone = kernel.startswith("Marlin") or "W4A16" in kernel
        return weights, SIXTEEN if weights_alone else inputs, "weights alone" if weights_alone else "native FP4"
    if scheme.endswith("Mxfp4"):
        if kernel.startswith("Marlin"):
            return weights, SIXTEEN, "weights alone"
        return weights, "mxfp4", "vLLM's MXFP4 scheme rounds inputs, declared or not"
    if kernel.startswith("CPUWNA16") and question.amx and question.dtype == "bfloat16":
        return weights, "int8 per token", "CPUs with AMX: VLLM_CPU_INT4_W4A8=0 keeps 16 bits"
    return weights, SIXTEEN, "the kernel was chosen by the weights alone, and reads 16 bits"


def _humming(question: Question, answer: Answer, weights: str, inputs: str) -> tuple[str, str, str]:
    lanes = answer.lanes
    if lanes is None:
        return weights, "unknown", "no one could be asked"
    if (answer.scheme or "").endswith("W4A8Int"):
        why = "Humming is told nothing of the activations, and expects packed weights: whether it loads was not tried"
        return weights, SIXTEEN, why
    told = LANES.get(lanes, lanes)
    if lanes == "float4e2m1":
        told = "nvfp4" if (answer.scheme or "").endswith("Fp4") and weights == "nvfp4" else "mxfp4"
    if lanes == SIXTEEN:
        return weights, SIXTEEN, "Humming falls back to 16 bits here"
    if question.inputs is not None and lanes.startswith("int") and question.inputs["num_bits"] == int(lanes[3:]):
        told = inputs
    if question.weights["type"] == "int" and question.weights["strategy"] == "group" and lanes.startswith("int"):
        weights += ", scales rounded to 1/1024 of the largest"
    why = "as declared" if told == inputs else f"Humming's fallback for {inputs} on this GPU"
    return weights, str(told), why
