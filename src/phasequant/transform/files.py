"""Transforms on disk: safetensors with the maps' factors, and all else in its header as JSON.

Saved by `save_transform`, found again with `transform: {method: load, file: …}`. SpinQuant's own files (`R.bin`: R1 and
one R2 a block, as torch pickles) are read too, with `weights_only=True`: nothing in them can run.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.numerics import LinearMap, QuantSpec, polar
from phasequant.transform.contract import MAPS, BlockTransform, Task, Transform
from phasequant.transform.quarot import fixed_rotations

HEADER = "phasequant"
DAMAGED = (
    OSError, SafetensorError, PhaseQuantError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError,
    RecursionError, RuntimeError,
)  # fmt: skip
"""What a file that is none of ours, or no longer, makes the code below raise."""
STORED_WITHIN = 1e-2  # of orthogonal: what rounding to 16 bits can do


def _flatten(block: BlockTransform, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    for name in MAPS:
        found: LinearMap | None = getattr(block, name)
        if found is not None:
            layouts[name] = found.layout()
            tensors |= {f"{prefix}{name}.{part}": t for part, t in found.tensors().items()}
    tensors |= {f"{prefix}scales.{group}": t for group, t in block.scales.items()}
    tensors |= {f"{prefix}weight_clips.{name}": t for name, t in block.weight_clips.items()}
    return tensors, {
        "maps": layouts,
        "inputs": {group: spec.to_dict() for group, spec in block.inputs.items()},
        "kv": [spec.to_dict() for spec in block.kv] if block.kv is not None else None,
        "notes": dict(block.notes),
    }


def _block(tensors: Mapping[str, Tensor], header: Mapping[str, Any], prefix: str) -> BlockTransform:
    def under(what: str) -> dict[str, Tensor]:
        start = f"{prefix}{what}."
        return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

    maps = {name: LinearMap.from_layout(layout, under(name)) for name, layout in header["maps"].items()}
    if not set(maps) <= set(MAPS):
        raise PhaseQuantError(f"unknown place among {sorted(maps)}")
    kv = header["kv"]
    return BlockTransform(
        **maps,
        scales=under("scales"),
        weight_clips=under("weight_clips"),
        inputs={group: QuantSpec.from_dict(spec) for group, spec in header["inputs"].items()},
        kv=None if kv is None else (QuantSpec.from_dict(kv[0]), QuantSpec.from_dict(kv[1])),
        notes=header["notes"],
    )


def _smallest(tensor: Tensor) -> Tensor:
    """In fp32 where that holds every value exactly, as it does for what was learned in fp32."""
    narrow = tensor.to(torch.float32)
    exact = tensor.dtype == torch.float64 and torch.equal(narrow.to(torch.float64), tensor)
    return (narrow if exact else tensor).contiguous().clone()


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        save_file({n: _smallest(t) for n, t in tensors.items()}, partial, {HEADER: json.dumps(header)})
        partial.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(HEADER)
        if header is None:
            raise PhaseQuantError("it has no PhaseQuant header")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PhaseQuantError(f"its '{name}' holds values that are NaN or infinite")
    return tensors, json.loads(header)


def write_block(path: Path, block: BlockTransform) -> None:
    """Keep one learned block."""
    _write(path, *_flatten(block, ""))


def read_block(path: Path) -> BlockTransform | None:
    """A kept block; None where there is none, or it cannot be read (it is then learned again)."""
    if not path.is_file():
        return None
    try:
        return _block(*_read(path), "")
    except DAMAGED:
        return None


def save_transform(path: str | Path, transform: Transform, model_map: ModelMap) -> Path:
    """Write a transform as one file."""
    tensors: dict[str, Tensor] = {}
    blocks = []
    for index, block in enumerate(transform.blocks):
        own, header = _flatten(block, f"{index}.")
        tensors |= own
        blocks.append(header)
    residual = transform.residual
    if residual is not None:
        tensors |= {f"residual.{part}": t for part, t in residual.tensors().items()}
    header = {
        "method": transform.method,
        "model": model_map.fingerprint(),
        "folds_norms": transform.folds_norms,
        "residual": residual.layout() if residual is not None else None,
        "blocks": blocks,
    }
    target = Path(path).expanduser()
    _write(target, tensors, header)
    return target


def load_transform(path: str | Path, model_map: ModelMap) -> Transform:
    """Read what `save_transform` wrote; refused where it was made for another architecture or size."""
    source = Path(path).expanduser()
    try:
        tensors, header = _read(source)
        if header["model"] != model_map.fingerprint():
            raise PhaseQuantError("it was made for a model of another architecture or size")
        residual = None
        if header["residual"] is not None:
            own = {n.removeprefix("residual."): t for n, t in tensors.items() if n.startswith("residual.")}
            residual = LinearMap.from_layout(header["residual"], own)
        blocks = tuple(_block(tensors, entry, f"{index}.") for index, entry in enumerate(header["blocks"]))
        if len(blocks) not in (0, model_map.shape.blocks):
            raise PhaseQuantError(f"it has {len(blocks)} blocks, and the model {model_map.shape.blocks}")
        return Transform(str(header["method"]), bool(header["folds_norms"]), residual, blocks)
    except DAMAGED as error:
        raise PhaseQuantError(f"the transform {source} cannot be used: {error}") from error


def _cleaned(matrix: Tensor) -> LinearMap:
    """A rotation that was stored in a narrow type, orthogonal again."""
    exact = matrix.detach().to(torch.float64)
    nearest = polar(exact)
    if float((nearest - exact).abs().max()) > STORED_WITHIN:
        raise ValueError("its matrices are not orthogonal: folding them would change the model")
    return LinearMap.dense(nearest, "learned")


def load_rotations(path: str | Path, model_map: ModelMap, seed: int) -> Transform:
    """SpinQuant's `R.bin`: R1 (D, D) and `model.layers.N.self_attn.R2` (H, H); the rest as QuaRot."""
    source = Path(path).expanduser()
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
        shape = model_map.shape
        first = _cleaned(found["R1"])
        seconds = [_cleaned(found[f"model.layers.{i}.self_attn.R2"]) for i in model_map.blocks]
    except Exception as error:
        raise PhaseQuantError(
            f"the rotations {source} cannot be used ({type(error).__name__}: {error}): a file of SpinQuant holds 'R1' "
            "and 'model.layers.N.self_attn.R2' for every block"
        ) from error
    sizes = {first.size, *(second.size for second in seconds)}
    if first.size != shape.d_model or sizes != {shape.d_model, shape.d_head}:
        raise PhaseQuantError(
            f"the rotations {source} are of width {first.size} and {seconds[0].size}, and the model of "
            f"{shape.d_model} with heads of {shape.d_head}: they were made for another model"
        )
    base = fixed_rotations(model_map, seed, method="spin")
    own = [replace(second, blocks=shape.kv_heads) for second in seconds]
    return replace(base, residual=first).changed(lambda i, block: replace(block, value=own[i], heads=None))


def load(task: Task) -> Transform:
    """`transform.method: load`."""
    assert task.part.file is not None
    if Path(task.part.file).suffix in (".bin", ".pt", ".pth"):
        return load_rotations(task.part.file, task.map, task.seed)
    return load_transform(task.part.file, task.map)
