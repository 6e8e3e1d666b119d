"""What a checkpoint's files may say: held against each other before anything is built, and against sense after.

A checkpoint is data from somewhere. Names stay inside its directory; `config.json` may not ask for more blocks or
experts than there are tensors (building empty ones is what would take the time); the architecture is the one that the
seal was made over; and no scale, factor, norm or embedding is NaN, infinite, or of a sign that a grid does not have.
The last costs one pass over what is not codes: a sum in fp32, which is finite only where every value is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear, quant_linears
from phasequant.numerics import read_scales

LONGEST = 255  # bytes of a name
AGAIN = "get the checkpoint again"
UNSEALED = frozenset({
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config",
    "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
})  # fmt: skip
"""Keys of `config.json` on which no logit turns: a user or a newer Transformers may write others."""


def read_json(path: Path) -> Any:
    """A file's JSON; `PhaseQuantError` where it is none."""
    if path.exists() and not path.is_file():
        raise PhaseQuantError(f"{path} is not a file: {AGAIN}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PhaseQuantError(f"{path} cannot be read ({error}): {AGAIN}") from error


def stays_inside(name: Any) -> bool:
    """Whether a name in a manifest or an index means a file of the directory itself."""
    if (
        not isinstance(name, str)
        or not name
        or "\\" in name
        or "\0" in name
        or len(name.encode("utf-8", "replace")) > LONGEST
    ):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def check_names(folder: Path, files: Sequence[Path], root: str | None = None) -> None:
    """Raise where weight files, as an index named them, are not all in one directory: that of `root`, where it is one
    of this machine."""
    parents = {path.parent for path in files}
    inside = root is None or not Path(root).is_dir()
    for parent in parents:
        steps = parent.relative_to(Path(root)).parts if root and parent.is_relative_to(root) else None
        inside = inside or (steps is not None and ".." not in steps)
    if len(parents) != 1 or not inside:
        raise PhaseQuantError(f"the index of the weights in {root or folder} names files of other places: {AGAIN}")


def _tensors_in(folder: Path) -> int:
    """How many tensors the weight files hold."""
    count = 0
    for path in folder.glob("*.safetensors"):
        if not path.is_file():  # a pipe would never end
            raise PhaseQuantError(f"'{path.name}' in {folder} is not a file: {AGAIN}")
        try:
            with safe_open(path, "pt") as file:
                count += len(file.keys())
        except (OSError, SafetensorError) as error:
            raise PhaseQuantError(
                f"'{path.name}' in {folder} cannot be read ({error}): it was cut short or damaged; {AGAIN}"
            ) from error
    return count


def check_extent(folder: Path) -> None:
    """Raise where config.json asks for more of anything than the weight files can hold."""
    config = read_json(folder / "config.json")
    counts = {
        key: value
        for key, value in (config.items() if isinstance(config, dict) else ())
        if key.startswith(("num_", "n_")) and isinstance(value, int) and not isinstance(value, bool)
    }
    held = _tensors_in(folder)
    for key, value in counts.items():
        few = ("layers", "experts", "layer")
        if value < 0 or (key.endswith(few) and value > held):
            raise PhaseQuantError(
                f"config.json in {folder} says {key}={value}, and its files hold {held} tensors: it was edited; {AGAIN}"
            )


def architecture_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 in hex of what `config.json` says of the architecture."""
    kept = {key: value for key, value in config.items() if key not in UNSEALED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_architecture(folder: Path, sealed: str | None) -> None:
    """Raise where config.json is not what the weights were saved with; `sealed` None: of a format that does not say."""
    if sealed is None or not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or architecture_hash(config) != sealed:
        raise PhaseQuantError(
            f"config.json in {folder} is not the one that the weights were saved with (the architecture's hash "
            "differs): it was edited, or is of another model; get the checkpoint again, or pass what shall be other "
            "to `from_pretrained`"
        )


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def check_values(model: nn.Module) -> None:
    """Raise where a loaded number cannot be one that was saved."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(tensor):
            raise PhaseQuantError(f"'{name}' holds values that are NaN or infinite: {AGAIN}")
    for name, linear in quant_linears(model):
        wrong = _wrong_grid(linear)
        if wrong is not None:
            raise PhaseQuantError(f"'{name}' has {wrong}: {AGAIN}")


def _wrong_grid(linear: QuantLinear) -> str | None:
    spec, stored = linear.weight_spec, linear.weight_scale
    if spec is not None and stored is not None and not stored.is_meta:
        scale = read_scales(stored, spec, linear.weight_global)
        if not bool(torch.isfinite(scale).all() & (scale > 0).all()):
            return "scales of weights that are not positive numbers"
        if linear.weight_zero is not None and int(linear.weight_zero.max()) > spec.highest:
            return f"zero points of weights that are no code of {spec.bits} bits"
    calibrated = linear.input_range
    if calibrated is not None and not calibrated.is_meta and bool((calibrated[0] > calibrated[1]).any()):
        return "a calibrated range whose lowest value is above its highest"
    return None
