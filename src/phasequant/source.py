"""MODEL, whatever it is, becomes a Transformers model and its tokenizer.

MODEL is `demo`, a GGUF file, a Hugging Face directory, a PhaseQuant checkpoint, or a Hub id. Weights are dense after
this (a PhaseQuant checkpoint keeps its packed codes). On a CPU everything is computed in float32; on a GPU in the
model's own 16-bit type.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from phasequant.arch import ModelMap
from phasequant.checkpoint import is_checkpoint, load
from phasequant.console import note
from phasequant.demo_model import demo_gguf
from phasequant.errors import PhaseQuantError
from phasequant.isolate import Prefix
from phasequant.nn import is_capped, switch_attention, take_apart
from phasequant.stream import home_of
from phasequant.streaming.opening import open_lazily
from phasequant.surroundings import hushed_transformers, pick_device

DEMO = "demo"


@dataclass
class Source:
    """A model ready to be looked at: `name` is what the user typed, `quantized` whether it holds packed codes, `work`
    the device that its blocks visit one at a time while the model stays in host memory. `prefix`: what the
    pipeline put before every sequence; `cuts`: calibration sequences that were tokenized already.
    `streamed`: names the files that blocks are read from when they are needed; None where the model is in memory."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    map: ModelMap
    quantized: bool = False
    work: torch.device | None = None
    prefix: Prefix | None = None
    cuts: dict[tuple[str, int, int, int], Tensor] = field(default_factory=dict, repr=False)
    streamed: str | None = None

    @property
    def compute(self) -> torch.device:
        """Where blocks are brought to be computed: `work`, or where the model is."""
        return self.work or self.device

    @property
    def origin(self) -> str:
        """The name under which the model is found again from any directory."""
        path = Path(self.name).expanduser()
        return self.name if self.name == DEMO or not path.exists() else str(path.resolve())

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return home_of(self.model)


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that hold NaN or infinity: every later number would be one too."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise PhaseQuantError(
                f"the weight '{name}' holds {bad} values that are NaN or infinite: the model file is damaged, "
                "or was saved in a type too small for it; get it again"
            )


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    try:  # since 5.17 a GGUF loads through a quantizer; older versions always dequantize
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise PhaseQuantError(
            f"the GGUF file {path} could not be loaded ({type(error).__name__}: {error}): it may be truncated, or of "
            "an architecture that this transformers version does not read"
        ) from error
    # The weights are dense now; without this `save_pretrained` refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False
    tokenizer.clean_up_tokenization_spaces = False  # made for WordPiece; Transformers warns at every decode
    _restore_digits(path, tokenizer)
    return model, tokenizer


def _pre_tokenizer_rule(path: Path) -> str:
    """The name a GGUF gives to its tokenizer's splitting rule."""
    try:  # parses only what is asked for: 0.1 s instead of 4
        from transformers.integrations.gguf.reader import read_gguf_metadata

        metadata, _ = read_gguf_metadata(str(path))
        return str(metadata.get("tokenizer.ggml.pre"))
    except (ImportError, TypeError, ValueError):
        import gguf

        field = gguf.GGUFReader(str(path)).fields.get("tokenizer.ggml.pre")
        return str(field.contents()) if field is not None else ""


def _restore_digits(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM's tokenizer splits numbers into digits; a GGUF only names the rule, and Transformers does not apply it."""
    from tokenizers import pre_tokenizers

    if _pre_tokenizer_rule(path) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _config(name: str, device: torch.device) -> tuple[PretrainedConfig, torch.dtype]:
    """A model's config, checked, and the type that it is computed in."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise PhaseQuantError(
            f"the model '{name}' could not be found ({_first_line(error)}): give a Hugging Face directory, a Hub id, "
            f"a GGUF file, a PhaseQuant checkpoint, or '{DEMO}'"
        ) from error
    ModelMap.from_config(config)  # refuse what is not supported before reading its weights
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise PhaseQuantError(
            f"the model '{name}' is already quantized (by '{method}'): start from its 16-bit original"
        )
    return config, torch.float32 if device.type == "cpu" else (config.dtype or torch.bfloat16)


def _load_dense(name: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _, dtype = _config(name, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise PhaseQuantError(
            f"the model '{name}' could not be loaded ({_first_line(error)}): a file may be missing or cut short"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise PhaseQuantError(
            f"the model '{name}' lacks {len(missing)} weights ('{missing[0]}' …): they would be random; "
            "get its files again"
        )
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def open_model(name: str | Path, device: str = "auto", *, stream: bool = False) -> Source:
    """Load MODEL onto `device`; with `stream` into host memory, from where its blocks visit the device one at a time.

    Every failure is a `PhaseQuantError` that says what to do.
    """
    name = str(name)
    where = pick_device(device)
    note(f"opening {name}")
    if name == DEMO:
        gguf = demo_gguf()
        with hushed_transformers():
            return wrap(name, *_load_gguf(gguf), where, stream=stream)
    path = Path(name).expanduser()
    if path.is_dir() and is_checkpoint(path):
        model = load(path, device=device)
        with hushed_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        return Source(name, model, tokenizer, ModelMap.from_config(model.config), quantized=True)
    if path.is_dir() and not (path / "config.json").is_file():
        raise PhaseQuantError(f"the directory {path} has no config.json: it is not a Hugging Face model")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise PhaseQuantError(f"the file {path} is not a GGUF file: give a .gguf or a model directory")
    if not path.exists() and (name.endswith(".gguf") or name.startswith((".", "/", "~"))):
        raise PhaseQuantError(f"the model '{name}' does not exist: give a path that does, a Hub id, or '{DEMO}'")
    with hushed_transformers():
        loaded = _load_gguf(path) if path.is_file() else _load_dense(str(path) if path.is_dir() else name, where)
    return wrap(name, *loaded, where, stream=stream)


def open_streamed(folder: Path, device: str = "auto") -> Source:
    """A directory of safetensors whose blocks are read when they are needed. `NotStreamable` where its files hold it
    otherwise than a model does."""
    where = pick_device(device)
    note(f"opening {folder}, to be read block by block")
    config, dtype = _config(str(folder), where)
    with hushed_transformers():
        opened = open_lazily(folder, config, dtype)
    return Source(str(folder), opened.model, opened.tokenizer, opened.map, work=where, streamed=opened.source.identity)


def wrap(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | None = None,
    *,
    stream: bool = False,
) -> Source:
    """A dense Transformers model in memory as a `Source`, checked; not copied, and moved only without `stream`. Stacked
    experts are taken apart in it, and capped attention is given our function."""
    model_map = ModelMap.from_config(model.config)
    take_apart(model, model_map)
    model_map.check(model)
    check_finite(model)
    model = model.eval().requires_grad_(False)
    if is_capped(model, model_map):
        switch_attention(model, model_map)
    if device is not None and not stream:
        model = model.to(device)
    return Source(name, model, tokenizer, model_map, work=device if stream else None)
