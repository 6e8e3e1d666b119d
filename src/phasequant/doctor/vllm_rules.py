"""How vLLM 0.32 chooses scheme, kernel and activations for compressed-tensors: its rules, written down.

    1  scheme       `CompressedTensorsConfig._get_scheme_from_parts`, from grids and format
    2  kernel       the first of a list that can: by weights, widths and GPU, never by the bits of the activations
    3  lanes        where that is Humming: the type to which it rounds activations, by its own list of fallbacks

For where no vLLM can be asked (`ask`). `tests/in_vllm/test_doctor_rules.py` holds them to an installed vLLM; they were
last compared with `CHECKED`. FlashInfer and Humming count as installed, which vLLM's CUDA wheel requires.
"""

from phasequant.doctor.question import SIXTEEN, Answer, Args, Question

CHECKED = "0.32.0"
ACTIVATIONS = ("int-quantized", "float-quantized", "naive-quantized")
LEAST = {"WNA16": 75, "WNA4Int": 75, "WNA8Int": 75, "W8A8Int8": 75, "W4A4Fp4": 75, "W4A4Mxfp4": 80, "W4A8Int": 1,
         "W8A8Fp8": 89}  # fmt: skip
PACKED, BLACKWELL, BEYOND = "pack-quantized", 100, 120
MP = ("Machete", "Marlin", "Exllama", "TritonW4A16", "Humming")
MP_BACKENDS = {"humming": "Humming", "marlin": "Marlin", "machete": "Machete", "triton": "TritonW4A16",
               "exllama": "Exllama"}  # fmt: skip
NAME = "CompressedTensors"


def answer(question: Question) -> Answer:
    """What vLLM answers."""
    scheme, error = _scheme(question)
    if scheme is None:
        return Answer(error=error, known=error is not None)
    capability = question.capability
    if capability is not None and capability < LEAST.get(scheme, 0):
        return Answer(NAME + scheme, error=f"RuntimeError: {scheme} needs compute capability {LEAST[scheme]}")
    if scheme.startswith("WN") or scheme == "W4A8Int":
        return _mixed(question, scheme)
    if scheme == "W8A8Int8":
        return _int8(question)
    if scheme == "W4A4Fp4":
        return _nvfp4(question)
    if scheme == "W4A4Mxfp4":
        return _mxfp4(question)
    return Answer(NAME + scheme)


def _is(args: Args | None, type: str, bits: int, strategy: str, size: int | None) -> bool:
    return args is not None and bool(args["symmetric"]) and (
        (args["type"], args["num_bits"], args["strategy"], args.get("group_size")) == (type, bits, strategy, size)
    )  # fmt: skip


def _scheme(q: Question) -> tuple[str | None, str | None]:
    """Its name, or why there is none; neither where these rules do not know."""
    w, a = q.weights, q.inputs
    if q.outputs is not None:
        return None, None
    if _is(w, "float", 4, "tensor_group", 16):
        if a is None or _is(a, "float", 4, "tensor_group", 16):
            return "W4A4Fp4", None
        return None, "ValueError: for NVFP4 weights, inputs must be NVFP4 too, or none"
    if _is(w, "float", 4, "group", 32):
        return (None, None) if a is not None and a["num_bits"] == 8 else ("W4A4Mxfp4", None)
    if w["type"] == "float":
        return _fp8(q)
    return _integers(q)


def _fp8(q: Question) -> tuple[str | None, str | None]:
    w, a = q.weights, q.inputs
    known = w["num_bits"] == 8 and w["strategy"] in ("tensor", "channel", "block") and w["symmetric"]
    if not known or q.format not in ACTIVATIONS or (a is not None and a["type"] != "float"):
        return None, None
    fine = a is not None and (a["dynamic"] or (a["symmetric"] and a["strategy"] == "tensor"))
    return ("W8A8Fp8" if fine and (q.capability or 89) >= 89 else "W8A16Fp8"), None


def _integers(q: Question) -> tuple[str | None, str | None]:
    w, a, packed = q.weights, q.inputs, q.format == PACKED
    if a is not None and a["type"] != "int":
        return None, None  # W4A8 with fp8: exactly compute capability 9.0, and rare
    cut = w["strategy"] in ("channel", "group") and not w["dynamic"]
    if a is None:
        if packed and cut:
            return "WNA16", None
        if q.format in ACTIVATIONS:
            return None, "AttributeError: vLLM asks for the activations' grid, and there is none"
    elif packed and cut and a["symmetric"] and a["dynamic"] and a["strategy"] in ("token", "group"):
        if a["num_bits"] in (4, 8):
            return f"WNA{a['num_bits']}Int", None
    elif q.format in ACTIVATIONS and w["symmetric"]:
        bits = (w["num_bits"], a["num_bits"])
        token, whole = a["strategy"] == "token" and a["dynamic"], a["strategy"] == "tensor" and not a["dynamic"]
        if bits == (8, 8) and w["strategy"] in ("tensor", "channel") and (token or whole):
            return "W8A8Int8", None
        if bits == (4, 8) and cut and token:
            return "W4A8Int", None
    return None, "NotImplementedError: no compressed-tensors scheme of vLLM's fits these grids in this format"


def _mixed(q: Question, scheme: str) -> Answer:
    """Packed integers: the first kernel that takes the weights."""
    plain = scheme == "W4A8Int"
    if q.device == "cpu":
        if plain:
            return Answer(NAME + scheme, "Dynamic4bitLinearKernel")
        fits = q.weights["num_bits"] == 4 and q.width_in % 32 == 0 and sum(q.widths_out) % 32 == 0
        error = None if fits else "ValueError: the CPU kernel takes 4 bits and widths that are multiples of 32"
        return Answer(NAME + scheme, "CPUWNA16LinearKernel" if fits else None, error=error)
    order = list(MP)
    if q.capability == 90:
        order = ["Machete", "Humming", "Marlin", "Exllama", "TritonW4A16"]
    asked = q.backend_of("mixed_precision")
    if asked == "cutlass":
        return Answer(NAME + scheme, error="ValueError: CUTLASS W4A8 takes FP8 activations only")
    if asked in MP_BACKENDS:
        order = [MP_BACKENDS[asked]]
    kernel = next((name for name in order if _takes(name, q, plain)), None)
    if kernel is None:
        return Answer(NAME + scheme, error=f"ValueError: none of {', '.join(order)} takes these weights")
    if kernel == "Humming":
        return _by_humming(scheme, "HummingLinearKernel", _sixteen(q) if plain else _lanes(q))
    return Answer(NAME + scheme, f"{kernel}LinearKernel")


def _by_humming(scheme: str, kernel: str, lanes: tuple[str | None, str | None]) -> Answer:
    return Answer(NAME + scheme, kernel, *lanes)


def _sixteen(q: Question) -> tuple[str | None, str | None]:
    """16 bits, where Humming has them."""
    if q.dtype == "bfloat16" and (q.capability or 0) < 80:
        return None, "ValueError: Humming has no type for these inputs (bfloat16 needs compute capability 8.0)"
    return SIXTEEN, None


def _takes(kernel: str, q: Question, plain: bool) -> bool:
    w, out, capability = q.weights, sum(q.widths_out), q.capability or 0
    size = int(w["group_size"] or -1) if w["strategy"] == "group" else -1
    if kernel == "Humming":
        return capability >= 75
    if plain:  # 4-bit integers, one to a byte: no type of the others'
        return False
    bits, full = w["num_bits"], q.width_full or q.width_in
    if kernel == "Machete":
        fits = q.width_in % 64 == 0 and out % 128 == 0
        return capability == 90 and bits in (4, 8) and size in (-1, 64, 128) and fits
    if kernel == "Marlin":
        whole = size == -1 or size >= full or q.width_in % size == 0
        return capability >= 75 and bits in ((4, 8) if w["symmetric"] else (4,)) and size in (-1, 32, 64, 128) and whole
    if kernel == "Exllama":
        return q.dtype == "float16" and w["symmetric"] and size > 0 and full % size == 0 and bits in (4, 8)
    return (
        bits == 4 and out % 8 == 0 and size in (-1, 32, 64, 128, 256, full) and (size == -1 or q.width_in % size == 0)
    )


def _deprecated(lanes: str, capability: int) -> bool:
    """Types that Humming finds slow on a GPU."""
    if lanes == SIXTEEN:
        return False
    return (lanes == "int4" and capability >= 90) or BLACKWELL <= capability < BEYOND


def _lanes(q: Question) -> tuple[str | None, str | None]:
    """Of integer weights by Humming: the type of the inputs, or why it refuses."""
    w, a, capability = q.weights, q.inputs, q.capability or 0
    if a is None:
        return _sixteen(q)
    bits, wanted, zero = w["num_bits"], a["num_bits"], not w["symmetric"]
    size = w["group_size"] if w["strategy"] == "group" else 0
    own = a["group_size"] if a["strategy"] == "group" else 0
    if zero and bits == wanted:
        return None, "ValueError: Humming does not support asymmetric weights of as many bits as the inputs"

    def fits(lanes: int, group: int) -> bool:
        least = 64 if lanes == 4 else 32
        return (
            bits <= lanes and not (zero and bits == lanes) and (size == 0 or size >= least)
            and (group == 0 or group >= least) and (group == 0 or size == 0 or group == size)
        )  # fmt: skip

    if fits(wanted, own) and not _deprecated(f"int{wanted}", capability):
        return (SIXTEEN if wanted == 8 and (size or own) else f"int{wanted}"), None
    for lanes in (wanted, *([8] if wanted == 4 else [])):
        if fits(lanes, 0) and not _deprecated(f"int{lanes}", capability):
            return f"int{lanes}", None
    if capability >= 89 and bits <= 4 and not _deprecated("float8e4m3", capability) and (size == 0 or size >= 32):
        return "float8e4m3", None
    return _sixteen(q)


def _int8(q: Question) -> Answer:
    if q.device == "cpu":
        return Answer(NAME + "W8A8Int8", "CPUInt8ScaledMMLinearKernel")
    asked = {"humming": "Humming", "triton": "Triton"}.get(q.backend_of("int8_w8a8"), "Cutlass")
    kernel = f"{asked}Int8ScaledMMLinearKernel"
    if asked == "Humming":  # it is told nothing of the activations
        return _by_humming("W8A8Int8", kernel, _sixteen(q))
    return Answer(NAME + "W8A8Int8", kernel)


def _nvfp4(q: Question) -> Answer:
    scheme, capability, alone = NAME + "W4A4Fp4", q.capability, q.inputs is None
    if capability is None:
        return Answer(scheme, error="ValueError: vLLM has no NVFP4 kernel for CPUs")
    asked = q.backend_of("nvfp4_w4a16" if alone else "nvfp4_w4a4")
    if asked == "marlin":
        return Answer(scheme, "MarlinNvFp4LinearKernel")
    if asked == "humming" or (asked == "auto" and capability == 90):
        lanes = ("float4e2m1", None) if not alone and capability >= BEYOND else _sixteen(q)
        return _by_humming("W4A4Fp4", "HummingNvFp4LinearKernel", lanes)
    if asked != "auto":
        return Answer(scheme, known=False)
    if capability < BLACKWELL or alone:
        return Answer(scheme, "MarlinNvFp4LinearKernel")
    name = "CuteDsl" if capability < 110 else "Cutlass"
    return Answer(scheme, f"FlashInfer{name}NvFp4LinearKernel")


def _mxfp4(q: Question) -> Answer:
    """vLLM's scheme asks for MXFP4 inputs whether the checkpoint declares them or not."""
    scheme, capability = NAME + "W4A4Mxfp4", q.capability
    if capability is None:
        return Answer(scheme, error="ValueError: vLLM has no MXFP4 kernel for CPUs")
    asked = q.backend_of("mxfp4")
    if asked == "humming" or (asked == "auto" and capability == 90):
        lanes = "float4e2m1" if capability >= BEYOND else SIXTEEN if capability >= BLACKWELL else "float8e4m3"
        return Answer(scheme, "HummingMxFp4LinearKernel", "int8" if capability < 89 else lanes)
    if asked not in ("auto", "marlin"):
        return Answer(scheme, known=False)
    name = "FlashInfer" if capability >= BLACKWELL and asked == "auto" else "Marlin"
    return Answer(scheme, f"{name}MxFp4LinearKernel")
