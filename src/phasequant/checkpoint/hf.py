"""PhaseQuant as a quantization method of Transformers: registered on import, no model patched.

`config.json` carries `quantization_config = {"quant_method": "phasequant", "format": 5, "layout": {…}}`. Loading lays
out empty `QuantLinear`s and KV quantizers on the meta device and lets Transformers fill them. A layout of a newer
format is refused. Saving hands over codes as they are and dense tensors in the checkpoint's 16-bit type.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import ModelLayout, lay_out, quant_linears

METHOD = "phasequant"
FORMAT = 5
READS = (2, 3, 4, 5)  # 3 added branches and floating-point grids; 4 static grids, a prefix; 5 rows of their own


class PhaseQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` block of a checkpoint."""

    def __init__(self, layout: dict[str, Any], dtype: str, format: int = FORMAT, **unknown: Any) -> None:
        """`layout`: `ModelLayout.to_dict()`; `dtype`: of what is not quantized."""
        unknown.pop("quant_method", None)
        if format not in READS:
            raise PhaseQuantError(
                f"the checkpoint has format {format}, and this phasequant reads formats {READS[0]} to {READS[-1]}: "
                "install the version that wrote it (its manifest.json says which)"
            )
        if unknown:
            raise PhaseQuantError(f"unknown key '{next(iter(unknown))}' in quantization_config: config.json was edited")
        self.quant_method = METHOD
        self.format = format
        self.dtype = dtype
        self.layout = layout


class PhaseQuantQuantizer(HfQuantizer):
    """Lays out a model for loading, and its state dict for saving."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model_map = ModelMap.from_config(model.config)
        layout = ModelLayout.from_dict(self.quantization_config.layout, model_map)
        # The type asked for does not reach a quantizer; the model was made in it.
        lay_out(model, model_map, layout, model.get_submodule(model_map.family.embeddings).weight.dtype)
        self._laid_out = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in quant_linears(model):
            module.check(name)
        for name, parameter in model.named_parameters():
            dtype = self._laid_out.get(name, parameter.dtype)
            if parameter.dtype != dtype:  # Transformers leaves what it renames in the type of the file
                parameter.data = parameter.data.to(dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Parameters in the checkpoint's type, tied ones still one tensor; buffers (codes, scales, factors) as they
        are."""
        dtype = getattr(torch, self.quantization_config.dtype)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        made: dict[tuple[int, torch.Size], Tensor] = {}
        state = model.state_dict()
        for name, tensor in state.items():
            if name in parameters:
                key = tensor.data_ptr() or id(tensor), tensor.shape
                if key not in made:
                    made[key] = tensor.to(dtype)
                state[name] = made[key]
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
