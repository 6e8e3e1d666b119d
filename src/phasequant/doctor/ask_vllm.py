"""Asks an installed vLLM what it would run, for GPUs that need not be here: a script of its own, for vLLM's own Python.

    stdin   {"questions": [Question.to_dict(), …]}          stdout, last line   {"vllm": …, "answers": [{…}, …]}

vLLM decides from `current_platform`, so one that says what was asked (kind, compute capability) takes its place before
anything of vLLM's is imported. Then vLLM's own code runs as it does when it loads a model: the scheme is chosen, and
the scheme's `create_weights` chooses the kernel (on the meta device: no weights). Where the kernel is Humming's, vLLM's
own rule says to which type the activations fall back. Nothing of vLLM's choice is written here.

A vLLM built for CPUs lacks what the CUDA wheel requires or holds: Humming, FlashInfer, CUTLASS for FP4. Asked about a
GPU it is told that they are there, and the answer says so under "assumed". Imports nothing of this package.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

BROUGHT = {"has_humming": "humming-kernels", "has_flashinfer": "flashinfer", "has_flashinfer_cutedsl": "flashinfer"}


def _platform() -> tuple[Any, bool]:
    """A platform whose kind and capability are set from outside, in the place of the real one; whether that is CUDA."""
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    real = platforms.current_platform

    class Asked(Platform):
        _enum = PlatformEnum.CPU
        device_name = device_type = "cpu"
        dispatch_key = "CPU"
        capability: tuple[int, int] | None = None
        supported_dtypes = real.supported_dtypes

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return None if cls.capability is None else DeviceCapability(*cls.capability)

        def is_zen_cpu(self) -> bool:
            return bool(self._enum == PlatformEnum.CPU and real.is_cpu() and real.is_zen_cpu())

        def turn(self, device: str) -> None:
            """Be another machine from now on."""
            kind = Asked
            kind._enum = PlatformEnum.CPU if device == "cpu" else PlatformEnum.CUDA
            kind.device_name = kind.device_type = "cpu" if device == "cpu" else "cuda"
            kind.dispatch_key = kind.device_name.upper()
            number = int(device.removeprefix("sm_")) if device != "cpu" else 0
            kind.capability = None if device == "cpu" else divmod(number, 10)

    asked = Asked()
    platforms.current_platform = asked
    return asked, real.is_cuda()


def _modules() -> list[Any]:
    """All of vLLM that is imported."""
    return [module for name, module in sys.modules.items() if name.startswith("vllm.")]


def _settings() -> Any:
    """What schemes of FP8 read off vLLM's settings."""
    import torch

    return SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))


def _assume() -> list[str]:
    """Let vLLM believe that what the CUDA wheel brings is here; what that is, and is not."""
    missing = []
    for module in _modules():
        for question, package in BROUGHT.items():
            if hasattr(module, question):
                if importlib.util.find_spec(package.split("-")[0]) is None:
                    missing.append(package)
                setattr(module, question, lambda: True)
        if hasattr(module, "cutlass_scaled_mm_supports_fp4"):
            module.cutlass_scaled_mm_supports_fp4 = lambda capability: capability >= 100
            missing.append("CUTLASS for FP4")
    return sorted(set(missing))


def _wanted(layer: Any, kernel: Any) -> tuple[dict[str, Any], Any]:
    """Weights and inputs as a Humming kernel of vLLM's hands them to its rule (`process_weights_after_loading`)."""
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.model_executor.layers.quantization.utils.humming import quant_key_to_input_schema
    from vllm.utils.humming import BaseInputSchema, HummingInputSchema

    config, name = kernel.config, type(kernel).__name__
    if name == "HummingLinearKernel":
        given = getattr(layer, "_humming_input_quant_config", None)
        inputs = HummingInputSchema() if given is None else BaseInputSchema.from_config(given)
        return {
            "quant_method": "humming", "dtype": f"int{config.weight_type.size_bits}",
            "group_size": max(config.group_size, 0), "has_zero_point": config.zero_points,
        }, inputs  # fmt: skip
    if name == "HummingInt8ScaledMMLinearKernel":
        return {"quant_method": "humming", "dtype": "int8"}, HummingInputSchema()
    if name == "HummingNvFp4LinearKernel":
        key = quant_utils.kNvfp4Dynamic if hasattr(layer, "input_global_scale") else None
        return {
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "type": "float", "num_bits": 4,
            "strategy": "group", "group_size": 16,
        }, quant_key_to_input_schema(key)  # fmt: skip
    if name == "HummingMxFp4LinearKernel":
        return {
            "quant_method": "humming", "dtype": "float4e2m1", "scale_dtype": "float8e8m0", "group_size": 32,
            "weight_scale_type": "group",
        }, quant_key_to_input_schema(config.activation_quant_key)  # fmt: skip
    raise LookupError(f"{name} is not among the kernels that this script knows to ask about")


def _humming(layer: Any, kernel: Any, params: Any, device: str) -> str | None:
    """The type to which Humming rounds activations for this layer, by vLLM's own rule; None: asked in vain."""
    if importlib.util.find_spec("humming") is None:
        return None
    import humming.schema.humming as schemas
    from vllm.model_executor.layers.quantization.utils.humming.schema import check_and_fallback_input_schema
    from vllm.utils.humming import BaseWeightSchema

    schemas.current_device = SimpleNamespace(sm_version=int(device.removeprefix("sm_")))
    try:
        config, inputs = _wanted(layer, kernel)
    except LookupError:
        return None
    weights = BaseWeightSchema.from_config(config).to_humming_schema(params)
    inputs = inputs.to_humming_schema(params)
    if weights.has_zero_point and inputs.a_dtype is not None and weights.b_dtype.num_bits == inputs.a_dtype.num_bits:
        raise ValueError("Humming does not support asymmetric weights where weights and activations have equal bits")
    found = check_and_fallback_input_schema(weight_schema=weights, input_schema=inputs, param_dtype=params)
    return "16-bit" if found.a_dtype is None or found.a_dtype.num_bits == 16 else str(found.a_dtype)


def _answer(question: dict[str, Any], config: Any, torch: Any) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs

    def args(values: dict[str, Any] | None) -> Any:
        return None if values is None else QuantizationArgs.model_validate(values)

    found: dict[str, Any] = {"scheme": None, "kernel": None, "lanes": None, "error": None, "unasked": None}
    params = getattr(torch, question["dtype"])
    try:
        scheme = config._get_scheme_from_parts(
            weight_quant=args(question["weights"]),
            input_quant=args(question["inputs"]),
            output_quant=args(question["outputs"]),
            format=question["format"],
            layer_name="model.layers.0.mlp.down_proj",
        )
        found["scheme"] = type(scheme).__name__
        config._check_scheme_supported(scheme.get_min_capability())
        if found["scheme"].endswith("Fp8"):  # its kernel is chosen by operators that a wheel for CPUs does not have
            return found
        layer = torch.nn.Module()
        width, parts = question["width_in"], question["widths_out"]
        with torch.device("meta"):
            scheme.create_weights(
                layer=layer, input_size=question["width_full"], input_size_per_partition=width,
                output_partition_sizes=parts, output_size=sum(parts), params_dtype=params,
                weight_loader=lambda *a, **k: None, layer_name="down_proj",
            )  # fmt: skip
        kernel = getattr(scheme, "kernel", None)
        found["kernel"] = None if kernel is None else type(kernel).__name__
        if (found["kernel"] or "").startswith("Humming"):
            found["lanes"] = _humming(layer, kernel, params, question["device"])
            found["unasked"] = None if found["lanes"] else "Humming is not installed there"
    except ModuleNotFoundError as error:
        found["unasked"] = f"{error.name} is not installed there"
    except Exception as error:  # whatever stops vLLM here stops it while it loads the model
        found["error"] = f"{type(error).__name__}: {error}".strip()
    return found


def main() -> None:
    """One answer for every question."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    given = json.load(sys.stdin)
    with contextlib.redirect_stdout(io.StringIO()):
        import torch
        import vllm

        asked, cuda = _platform()
        import vllm.model_executor.kernels.linear as linear
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )

        for module in _modules():
            if hasattr(module, "get_tensor_model_parallel_rank"):
                module.get_tensor_model_parallel_rank = lambda: 0
                module.get_tensor_model_parallel_world_size = lambda: 1
            if hasattr(module, "get_current_vllm_config"):
                module.get_current_vllm_config = _settings
        assumed: list[str] = []
        if not cuda and any(question["device"] != "cpu" for question in given["questions"]):
            assumed = _assume()
        answers = []
        for question in given["questions"]:
            asked.turn(question["device"])
            backend = question["backend"]
            per = question["backend_per_quant"]
            linear._get_linear_backend = lambda *, quantization, per=per, backend=backend: (
                per.get(quantization) or backend
            )
            config = CompressedTensorsConfig({}, [], question["format"] or "pack-quantized")
            answers.append(_answer(question, config, torch))
    print(json.dumps({"vllm": vllm.__version__, "assumed": assumed, "answers": answers}))


if __name__ == "__main__":
    main()
