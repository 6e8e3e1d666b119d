"""The tensors of a Hugging Face directory by name, read one at a time; nothing is held.

`model.safetensors.index.json` names the shards; a name that leaves the directory is refused, as is a file that is cut
short (safetensors compares its header with its size). A file that is gone, or another than at the start, ends the run.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phasequant.errors import PhaseQuantError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER = 100_000_000  # bytes, as safetensors has it
AGAIN = "get the model's files again"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none where it has no such."""
    if not (folder / INDEX).is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PhaseQuantError(f"{folder / INDEX} is not an index of weights ({error}): {AGAIN}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise PhaseQuantError(f"{folder / INDEX} names the file '{name}', which is not in its directory: {AGAIN}")
        if not (folder / name).is_file():
            raise PhaseQuantError(f"the model {folder} lacks '{name}': {AGAIN}")
    return sorted(folder / name for name in names)


class SourceTensors:
    """Names, shapes and files; `read` gives one tensor, or some of its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file: dict[str, Path] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        hasher = hashlib.sha256()
        for path in weight_files(folder):
            try:
                status = path.stat()
                self._stamps[path] = status.st_size, status.st_mtime_ns
                with path.open("rb") as raw:
                    size = int.from_bytes(raw.read(8), "little")
                    hasher.update(raw.read(min(size, MOST_HEADER)))
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118  (not a mapping)
                        if name in self.file:
                            raise PhaseQuantError(f"the tensor '{name}' stands twice in {folder}: {AGAIN}")
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
                        self.file[name] = path
            except (OSError, SafetensorError) as error:
                raise PhaseQuantError(f"'{path.name}' in {folder} cannot be read ({error}): {AGAIN}") from error
            hasher.update(f"{path.name} {self._stamps[path]}".encode())
        self.identity = hasher.hexdigest()
        """Names the files: their names, sizes, times and headers."""

    def __deepcopy__(self, memo: object) -> "SourceTensors":
        return self

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _check(self, path: Path) -> None:
        try:
            status = path.stat()
        except OSError as error:
            raise PhaseQuantError(
                f"the model's file {path} is gone ({error.strerror}): put it back and run the same command again, it "
                "goes on where it was"
            ) from error
        if (status.st_size, status.st_mtime_ns) != self._stamps[path]:
            raise PhaseQuantError(f"the model's file {path} was changed while it was read: start anew")

    def read(self, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) for every key and tensor name, in the file's type, each gone with the next. NaN and infinity
        are refused."""
        for path in sorted({self.file[name] for name in names.values()}):
            self._check(path)
            try:
                with safe_open(path, "pt") as file:
                    for key, name in names.items():
                        if self.file[name] == path:
                            tensor = file.get_tensor(name)
                            _check_values(name, tensor)
                            yield key, tensor
                            del tensor
            except (OSError, SafetensorError) as error:
                raise PhaseQuantError(f"'{path.name}' in {self.folder} cannot be read ({error}): {AGAIN}") from error

    def rows(self, name: str, most: int) -> Iterator[Tensor]:
        """A matrix, `most` rows at a time, in the file's type. NaN and infinity are refused."""
        path = self.file[name]
        for start in range(0, self.shapes[name][0], most):
            self._check(path)
            try:
                with safe_open(path, "pt") as file:  # opened anew, so that pages read before are let go
                    rows = file.get_slice(name)[start : start + most]
                _check_values(name, rows)
                yield rows
                del rows
            except (OSError, SafetensorError) as error:
                raise PhaseQuantError(f"'{path.name}' in {self.folder} cannot be read ({error}): {AGAIN}") from error


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise PhaseQuantError(
            f"the weight '{name}' holds {bad} values that are NaN or infinite: the model file is damaged, "
            "or was saved in a type too small for it; get it again"
        )
