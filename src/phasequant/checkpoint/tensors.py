"""What the weight files hold against what the config lays out, from their headers: before anything is loaded.

Transformers only warns of tensors that are missing, and fills them with random numbers. Here every difference of names,
shapes, or types of codes and scales ends the load, also one by `AutoModelForCausalLM`, and also where the caller
ignores mismatched sizes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from phasequant.errors import PhaseQuantError

AGAIN = "get the checkpoint again"
TYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class Entry(NamedTuple):
    """Shape and safetensors type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


def headers(files: Sequence[Path]) -> dict[str, Entry]:
    """Every tensor of the files, by name."""
    found: dict[str, Entry] = {}
    for path in files:
        if not path.is_file():
            raise PhaseQuantError(f"the checkpoint {path.parent} lacks '{path.name}': {AGAIN}")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    if name in found:
                        raise PhaseQuantError(f"'{name}' stands in more than one file in {path.parent}: {AGAIN}")
                    piece = file.get_slice(name)
                    found[name] = Entry(tuple(piece.get_shape()), str(piece.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise PhaseQuantError(f"'{path.name}' in {path.parent} cannot be read ({error}): {AGAIN}") from error
    return found


def read_bytes(files: Sequence[Path], name: str) -> bytes:
    """A small uint8 tensor; it must be in one of the files."""
    for path in files:
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return bytes(file.get_tensor(name).tolist())
    raise KeyError(name)


def check_tensors(folder: Path, found: dict[str, Entry], model: nn.Module) -> None:
    """Raise where the files' tensors are not those of the laid-out `model`.

    Tied tensors may be absent. What neither side knows by name was renamed by Transformers, which keeps the shape.
    """
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    exact = {name for name, _ in model.named_buffers()}
    for name in sorted(found.keys() & expected.keys()):
        shape, dtype = tuple(expected[name].shape), TYPES.get(expected[name].dtype)
        if found[name].shape != shape:
            raise PhaseQuantError(
                f"'{name}' in {folder} has shape {found[name].shape}, and its config says {shape}: "
                f"config and weights are not of one checkpoint; {AGAIN}"
            )
        if name in exact and dtype is not None and found[name].dtype != dtype:
            raise PhaseQuantError(
                f"'{name}' in {folder} is of type {found[name].dtype}, and its config says {dtype}: "
                f"config and weights are not of one checkpoint; {AGAIN}"
            )
    missing = {name: tuple(expected[name].shape) for name in expected.keys() - found.keys() - tied}
    extra = {name: found[name].shape for name in found.keys() - expected.keys()}
    counts = Counter(missing.values())
    counts.subtract(Counter(extra.values()))
    sides = (
        ("missing", sorted(name for name, shape in missing.items() if counts[shape] > 0)),
        ("unexpected", sorted(name for name, shape in extra.items() if counts[shape] < 0)),
    )
    for kind, names in sides:
        if names:
            raise PhaseQuantError(
                f"the weights in {folder} do not fit their config: {kind} keys, first '{names[0]}'; {AGAIN}"
            )
