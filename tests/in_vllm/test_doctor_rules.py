"""The doctor's written rules against an installed vLLM, which is the oracle: the same scheme, kernel and activations.

Run by the Python that vLLM is installed for. Where humming-kernels is importable there too, its fallbacks are compared
as well; else they are the rules' word alone.
"""

import importlib.util
import sys
from itertools import product

import pytest

from phasequant.doctor import ask, vllm_rules
from phasequant.doctor.question import Question, real

DEVICES = ("cpu", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
HUMMING = importlib.util.find_spec("humming") is not None


def args(bits=4, strategy="channel", size=None, *, symmetric=True, dynamic=False, type="int", **more):
    return {"num_bits": bits, "type": type, "strategy": strategy, "group_size": size, "symmetric": symmetric,
            "dynamic": dynamic, **more}  # fmt: skip


def row(bits, **more):
    return args(bits, "token", dynamic=True, **more)


INTEGERS = {
    f"W{bits} {name}{'' if symmetric else ' asymmetric'}": args(bits, strategy, size, symmetric=symmetric)
    for bits, (name, strategy, size), symmetric in product(
        (3, 4, 8),
        (("channel", "channel", None), ("g128", "group", 128), ("g64", "group", 64), ("g32", "group", 32)),
        (True, False),
    )
}
INPUTS = {
    "A16": None, "A4": row(4), "A8": row(8), "A8 asymmetric": row(8, symmetric=False),
    "A4 g128": args(4, "group", 128, dynamic=True),
    "A8 g128": args(8, "group", 128, dynamic=True), "A8 static": args(8, "tensor"),
}  # fmt: skip
NVFP4 = args(4, "tensor_group", 16, type="float")
MXFP4 = args(4, "group", 32, type="float")
FP8 = args(8, "channel", type="float")
FLOATS = {
    "NVFP4": (NVFP4, NVFP4 | {"dynamic": "local"}, "nvfp4-pack-quantized"),
    "NVFP4 A16": (NVFP4, None, "nvfp4-pack-quantized"),
    "NVFP4 with A8": (NVFP4, row(8), "nvfp4-pack-quantized"),
    "MXFP4": (MXFP4, MXFP4 | {"dynamic": True}, "mxfp4-pack-quantized"),
    "MXFP4 A16": (MXFP4, None, "mxfp4-pack-quantized"),
    "FP8": (FP8, row(8, type="float"), "float-quantized"),
    "FP8 static": (FP8 | {"strategy": "tensor"}, args(8, "tensor", type="float"), "float-quantized"),
}  # fmt: skip
WIDTHS = ((4096, (4096, 1024, 1024)), (576, (576, 192, 192)), (1536, (576,)), (200, (264,)))


def questions():
    """(name, question) of the whole grid."""
    for device, backend in product(DEVICES, ("auto", "humming", "marlin")):
        for (w, weights), (a, inputs), kind in product(INTEGERS.items(), INPUTS.items(), ("pack", "int")):
            for width, out in WIDTHS if device in ("cpu", "sm_89", "sm_90") else WIDTHS[:1]:
                if width % (weights["group_size"] or 1):
                    continue
                told = f"{device} {backend} {w} {a} {kind} {width}"
                yield told, Question(weights, inputs, f"{kind}-quantized", width, out, device, backend=backend)
        for name, (weights, inputs, kind) in FLOATS.items():
            yield f"{device} {backend} {name}", Question(weights, inputs, kind, 4096, (4096,), device, backend=backend)
    for device, quantization in product(DEVICES, ("mixed_precision", "int8_w8a8", "nvfp4_w4a4", "mxfp4")):
        per = {quantization: "humming"}
        for weights, inputs, kind in (
            (args(), row(4), "pack-quantized"), (args(8), row(8), "int-quantized"), *FLOATS.values()
        ):  # fmt: skip
            asked = Question(weights, inputs, kind, 4096, (4096,), device, backend_per_quant=per)
            yield f"{device} {quantization}=humming {kind}", asked
    for weights in (args(), args(4, "group", 128)):
        yield "fp16", Question(weights, None, "pack-quantized", 4096, (4096,), "sm_75", dtype="float16")


@pytest.fixture(scope="module")
def both():
    """(name, question, what vLLM says, what the rules say)."""
    names, asked = zip(*questions(), strict=True)
    told, who = ask.answers(asked, sys.executable)
    assert who.startswith("vLLM ")
    return [(*rest, vllm_rules.answer(one)) for *rest, one in zip(names, asked, told, asked, strict=True)]


def test_scheme_and_kernel_are_vllms(both):
    wrong = [
        f"{name}: rules {ours}; vLLM {theirs}"
        for name, _, theirs, ours in both
        if ours.known and (theirs.error is None, theirs.scheme if theirs.error is None else None, theirs.kernel)
        != (ours.error is None, ours.scheme if ours.error is None else None, ours.kernel)
    ]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(both)}:\n" + "\n".join(line[:300] for line in wrong[:30])


@pytest.mark.skipif(not HUMMING, reason="humming-kernels is not installed beside vLLM")
def test_activations_are_vllms(both):
    wrong = [
        f"{name}: rules {ours}; vLLM {theirs}"
        for name, _, theirs, ours in both
        if ours.known and theirs.error is None and theirs.lanes != ours.lanes
    ]
    assert not wrong, f"{len(wrong)} of {len(both)}:\n" + "\n".join(line[:300] for line in wrong[:30])


def test_the_rules_know_nearly_all(both):
    unknown = [name for name, _, _, ours in both if not ours.known]
    assert len(unknown) < len(both) / 10, unknown[:20]


def test_the_traps(both):
    """What the specification warns of, by the oracle's word."""
    found = {name: real(question, theirs)[1] for name, question, theirs, _ in both}
    for device in ("cpu", "sm_80", "sm_89", "sm_90", "sm_100"):
        assert found[f"{device} auto W4 channel A4 pack 4096"] == "16-bit"
        assert found[f"{device} auto W4 g128 A8 pack 4096"] == "16-bit"
    assert found["sm_90 auto NVFP4"] == "16-bit" and found["sm_100 auto NVFP4"] == "nvfp4"
    assert found["sm_100 auto MXFP4 A16"] == "mxfp4"
    assert found["sm_90 auto W8 channel A8 int 4096"] == "int8 per token"
    if HUMMING:
        assert found["sm_80 humming W4 channel A4 pack 4096"] == "int4 per token"
        assert found["sm_90 humming W4 channel A4 pack 4096"] == "int8 per token"
        assert found["sm_90 humming W4 g128 A8 pack 4096"] == "16-bit"
        assert found["sm_90 humming W4 channel A8 pack 4096"] == "int8 per token"
        assert found["sm_90 humming W8 channel A8 int 4096"] == "16-bit"
