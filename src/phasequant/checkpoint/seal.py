"""The seal: 32 bytes in every checkpoint, under the name of a weight that it does not have.

    <first linear of block 0>.weight = SHA-256 of the layout, the stored type and the architecture        (32,), uint8

It does two things. A loader that does not know PhaseQuant looks for that linear's weight, finds one of another shape
and raises, where it would else leave all linears random and only warn. And a loader that does know compares it with
the hash of config.json: grids, online maps and plan of another checkpoint of the same model, whose tensors have the
same names and shapes, are found without a manifest. Being a tensor it survives sharding, `save_pretrained` and the Hub.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from phasequant.arch import ModelMap

BYTES = 32
SEALED_SINCE = 6  # the first format that has it


def seal_name(model_map: ModelMap) -> str:
    """The tensor's name."""
    _, _, linear = next(iter(model_map.linears()))
    return f"{linear}.weight"


def layout_hash(layout: Mapping[str, Any], dtype: str, architecture: str | None = None) -> str:
    """SHA-256 in hex of `ModelLayout.to_dict()`, the type of what is not quantized, and (since format 7) the hash of
    the rest of config.json (`guard.architecture_hash`)."""
    sealed = {"dtype": dtype, "layout": layout, **({} if architecture is None else {"architecture": architecture})}
    text = json.dumps(sealed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seal_of(layout: Mapping[str, Any], dtype: str, architecture: str | None = None) -> UInt8[Tensor, "32"]:
    """The tensor."""
    return torch.frombuffer(bytearray.fromhex(layout_hash(layout, dtype, architecture)), dtype=torch.uint8)
