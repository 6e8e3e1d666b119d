"""What an export costs in accuracy: the checkpoint, the profile by this package, and the written directory by stock
Transformers, which rounds activations as the config says. The last two must agree.

    checkpoint     as it is: its own grids, KV and prefix
    profile        the same codes, inputs on the profile's grids, KV in 16 bits, no prefix
    weights alone  the same with inputs in 16 bits: what servers run that ignore the inputs' grid
    stock          the directory, loaded by Transformers and compressed-tensors

All run on the device's own type: fp32 on a CPU. In bfloat16 stock loaders round the product of code and scale too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import score
from phasequant.nn import Activations, QuantLinear, in_16_bits, kv_in_16_bits, without_prefix
from phasequant.numerics import QuantSpec, dequantize, quantize
from phasequant.surroundings import hushed_transformers

Peaks = Mapping[Place, float]
"""(block, group) → the largest magnitude of its input in calibration, from which NVFP4's second scale is made."""
AGREE = 5e-3


def stock_values(x: Float[Tensor, "*rows I"], spec: QuantSpec, peak: float | None = None) -> Float[Tensor, "*rows I"]:
    """An input as stock loaders round it, in its own type. `peak`: of an NVFP4 input.

    Of integers s = max|x| / (2^(b-1) - ½): the largest magnitude is a tie between two codes, and goes to the one that
    the last bit of s decides, so s is computed as they do. Where tokens hang on one massive value that matters: SmolLM2
    with folded rotations alone, W4A4 with blocks 0, 1, 2 and the last in A8, 2 x 2048 tokens of the builtin text:
    perplexity 114.6, and 97.8 with the scale of our own grid at the same clip.
    """
    if spec.is_int:
        scale = x.abs().amax(-1, keepdim=True) / (spec.highest + 0.5)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return torch.round((x / scale).clamp(spec.lowest, spec.highest)) * scale
    wide = x.to(torch.float32)
    codes, scale, zero = quantize(wide, spec, peak=None if peak is None else torch.tensor(peak, device=x.device))
    return dequantize(codes, scale, zero, spec).to(x.dtype)


Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _rounding(spec: QuantSpec, peak: float | None) -> Hook:
    return lambda module, args: (stock_values(args[0], spec, peak), *args[1:])


def _with_rounded_weights(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(module, QuantLinear)
    return nn.functional.linear(args[0], module.dense_weight().to(torch.bfloat16).to(args[0].dtype), module.bias)


@contextmanager
def as_profile(
    model: PreTrainedModel,
    model_map: ModelMap,
    inputs: Activations,
    peaks: Peaks | None = None,
    *,
    rounded: bool = False,
) -> Iterator[PreTrainedModel]:
    """A quantized model computing as stock loaders would, for a while. `peaks`: of NVFP4 inputs. `rounded`: weights as
    Transformers decompresses FP4, to bfloat16 (kernels multiply the codes)."""
    with ExitStack() as stack:
        stack.enter_context(in_16_bits(model))
        stack.enter_context(kv_in_16_bits(model))
        stack.enter_context(without_prefix(model, model_map))
        for block, group, name in model_map.linears():
            spec = inputs[block, group]
            if spec is not None:
                hook = _rounding(spec, (peaks or {}).get((block, group)))
                stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
            if rounded:
                stack.callback(model.get_submodule(name).register_forward_hook(_with_rounded_weights).remove)
        yield model


@torch.no_grad()
def peaks_of(model: PreTrainedModel, model_map: ModelMap, tokens: Int[Tensor, "sequences T"]) -> dict[Place, float]:
    """The largest magnitude of every group's input, in 16 bits, without prefix."""
    found: dict[Place, float] = {}
    device = next(model.parameters()).device

    def seeing(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[place] = max(found.get(place, 0.0), float(args[0].abs().amax()))

        return hook

    with ExitStack() as stack:
        stack.enter_context(in_16_bits(model))
        stack.enter_context(kv_in_16_bits(model))
        stack.enter_context(without_prefix(model, model_map))
        for block in model_map.blocks:
            for group in model_map.groups:
                first = model.get_submodule(f"{model_map.block_name(block)}.{group.linears[0]}")
                stack.callback(first.register_forward_pre_hook(seeing((block, group.name))).remove)
        for row in tokens:
            model(input_ids=row[None].to(device), use_cache=False)
    return found


def open_stock(folder: Path, like: PreTrainedModel, kind: str = "int") -> PreTrainedModel:
    """The directory as Transformers alone loads it, in the type and on the device of `like`.

    `kind`: of weights. FP4 ones decompress to bfloat16 whatever is asked for, so such a model is loaded in it.
    """
    first = next(like.parameters())
    dtype = first.dtype if kind == "int" else torch.bfloat16
    with hushed_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, output_loading_info=True)
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(keys):
            raise PhaseQuantError(
                f"Transformers does not load what was exported: {keys.replace('_', ' ')} "
                f"{', '.join(sorted(map(str, report[keys]))[:3])}; please report this with the model's config.json"
            )
    found: PreTrainedModel = model.eval().requires_grad_(False).to(first.device)
    with torch.no_grad(), redirect_stderr(StringIO()):  # the first forward decompresses, with a bar of its own
        found(input_ids=torch.zeros(1, 1, dtype=torch.long, device=first.device), use_cache=False)
    return found.to(first.dtype)


def ppl(model: PreTrainedModel, chunks: Int[Tensor, "chunks T"]) -> float:
    """Perplexity of a model as it is now."""
    found, _ = score({"model": model}, chunks)
    return found["model"].ppl


def check_agreement(ours: float, stock: float) -> None:
    """Refuse an export that stock Transformers computes otherwise than was measured."""
    if abs(stock / ours - 1) > AGREE:
        raise PhaseQuantError(
            f"stock Transformers gives perplexity {stock:.4f} on the exported directory, and this package {ours:.4f} "
            f"on the same grids: they should agree within {100 * AGREE:g} %; nothing was written, please report this"
        )
