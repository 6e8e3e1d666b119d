"""PhaseQuant as a quantization method of Transformers: registered on import, no class patched.

`config.json` carries `quantization_config = {"quant_method": "phasequant", "format": 7, "layout": {…}}`. Loading lays
out empty `QuantLinear`s and KV quantizers on the meta device, compares the files with them (manifest where there is
one, seal, names, shapes), and lets Transformers fill them. A layout of a newer format is refused. Saving hands over
codes as they are, dense tensors in the checkpoint's 16-bit type, and the seal.
"""

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest
from phasequant.checkpoint.guard import architecture_hash, check_architecture, check_extent, check_names, check_values
from phasequant.checkpoint.saving import give_shim
from phasequant.checkpoint.seal import BYTES, SEALED_SINCE, layout_hash, seal_name, seal_of
from phasequant.checkpoint.tensors import Entry, check_tensors, headers, read_bytes
from phasequant.errors import PhaseQuantError
from phasequant.nn import ModelLayout, lay_out, quant_linears

METHOD = "phasequant"
FORMAT = 7
READS = (2, 3, 4, 5, 6, 7)
"""3: branches, floating-point grids; 4: static grids, a prefix; 5: rows of their own; 6: a seal; 7: it covers the
architecture."""
DTYPES = ("bfloat16", "float16", "float32")
SEAL = Entry((BYTES,), "U8")
_hashes = ContextVar("hashes", default=True)


@contextmanager
def without_hashes() -> Iterator[None]:
    """Loads inside do not compare files with the manifest: that was done, or is not wanted."""
    token = _hashes.set(False)
    try:
        yield
    finally:
        _hashes.reset(token)


class PhaseQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` block of a checkpoint."""

    def __init__(
        self,
        layout: dict[str, Any] | None = None,
        dtype: str | None = None,
        format: int = FORMAT,
        architecture: str | None = None,
        **unknown: Any,
    ) -> None:
        """`layout`: `ModelLayout.to_dict()`; `dtype`: of what is not quantized; `architecture`: hash of the rest of
        config.json, once it is saved."""
        unknown.pop("quant_method", None)
        if type(format) is not int or format not in READS:
            raise PhaseQuantError(
                f"the checkpoint has format {format}, and this phasequant reads formats {READS[0]} to {READS[-1]}: "
                "install the version that wrote it (its manifest.json says which), or a newer one"
            )
        if unknown:
            raise PhaseQuantError(f"unknown key '{next(iter(unknown))}' in quantization_config: config.json was edited")
        if not isinstance(layout, dict) or dtype not in DTYPES or not isinstance(architecture, (str, type(None))):
            raise PhaseQuantError("quantization_config lacks its layout or its dtype: config.json was edited")
        self.quant_method = METHOD
        self.format = format
        self.dtype = dtype
        self.layout = layout
        self.architecture = architecture

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`: what is written has today's format, whichever was read."""
        written = {**super().to_dict(), "format": FORMAT}
        return {key: value for key, value in written.items() if key != "architecture" or value is not None}


class PhaseQuantQuantizer(HfQuantizer):
    """Lays out a model for loading, and its state dict for saving."""

    requires_calibration = True

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        """Nothing of it; but it is where Transformers shows the config before it builds the model."""
        folder = Path(getattr(config, "_name_or_path", None) or "")
        if self.pre_quantized and (folder / "config.json").is_file():
            check_extent(folder)
        return super().update_tp_plan(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        model_map = ModelMap.from_config(model.config)
        layout = ModelLayout.from_dict(self.quantization_config.layout, model_map)
        # The type asked for does not reach a quantizer; the model was made in it.
        lay_out(model, model_map, layout, model.get_submodule(model_map.family.embeddings).weight.dtype)
        if checkpoint_files:
            self._check_files([Path(name) for name in checkpoint_files], model, model_map)
        self._laid_out = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in quant_linears(model):
            module.check(name)
        check_values(model)
        for name, parameter in model.named_parameters():
            dtype = self._laid_out.get(name, parameter.dtype)
            if parameter.dtype != dtype:  # Transformers leaves what it renames in the type of the file
                parameter.data = parameter.data.to(dtype)
        return model

    def _check_files(self, files: list[Path], model: PreTrainedModel, model_map: ModelMap) -> None:
        """Manifest, seal, names and shapes; the seal's tensor is nobody's, and Transformers is told so."""
        folder, config = files[0].parent, self.quantization_config
        check_names(folder, files, getattr(model.config, "_name_or_path", None) or None)
        if _hashes.get() and (folder / manifest.NAME).is_file():
            manifest.check(folder, weights_only=True)
        found = headers(files)
        name = seal_name(model_map)
        if config.format >= SEALED_SINCE:
            if found.get(name) != SEAL:
                raise PhaseQuantError(f"the weights in {folder} lack their seal '{name}': get the checkpoint again")
            if read_bytes(files, name).hex() != layout_hash(config.layout, config.dtype, config.architecture):
                raise PhaseQuantError(
                    f"config.json in {folder} is not the one that the weights were saved with (the layout's hash "
                    "differs): it was edited, or is of another plan; get the checkpoint again"
                )
            check_architecture(folder, config.architecture)
            del found[name]
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{re.escape(name)}$"}
        check_tensors(folder, found, model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Parameters in the checkpoint's type, tied ones still one tensor; buffers (codes, scales, factors) as they
        are; the seal. The shim is written beside them."""
        frame = inspect.currentframe()
        give_shim(model, frame and frame.f_back)
        dtype = getattr(torch, self.quantization_config.dtype)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        made: dict[tuple[int, torch.Size], Tensor] = {}
        streamed = any(tensor.is_meta for tensor in model.parameters())  # its weights are in files (`streaming.shards`)
        state = {} if streamed else model.state_dict()
        for name, tensor in state.items():
            if name in parameters:
                key = tensor.data_ptr() or id(tensor), tensor.shape
                if key not in made:
                    made[key] = tensor.to(dtype)
                state[name] = made[key]
        config = self.quantization_config
        config.architecture = architecture_hash(json.loads(model.config.to_json_string()))
        seal = seal_of(config.layout, config.dtype, config.architecture)
        state[seal_name(ModelMap.from_config(model.config))] = seal
        return state, {}

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes have no gradient."""
        return False


def register() -> None:
    """Make Transformers know the method; harmless when called twice."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PhaseQuantConfig)
        register_quantizer(METHOD)(PhaseQuantQuantizer)


def mark_quantized(model: PreTrainedModel, layout: ModelLayout, dtype: str) -> None:
    """Give an in-memory model the config and quantizer that a loaded one has."""
    config = PhaseQuantConfig(layout.to_dict(), dtype)
    model.config.quantization_config = config
    model.hf_quantizer = PhaseQuantQuantizer(config)
    model.is_quantized = True
    model.quantization_method = METHOD
