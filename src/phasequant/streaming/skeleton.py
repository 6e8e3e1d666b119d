"""A Transformers model without its large tensors: all that constructors leave uninitialized is on the meta device.

What they compute (rotary frequencies, scales of embeddings) is real, as after `from_pretrained`.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` without a device gives meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, its linears and embeddings on the meta device, the rest real but not loaded."""
    with _EmptyOnMeta(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def computed_buffers(module: nn.Module) -> list[str]:
    """Buffers that no file holds."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
        if owner._buffers.get(name) is not None
    ]
