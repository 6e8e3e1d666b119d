"""Files of tensors that are whole or not there, and outlive a crash: written under another name, synced, renamed.

The format is safetensors, its header made here, so that tensors go to the file one by one, without the second copy of
all of them that a serializer makes. Beside `NAME.safetensors` a finished artifact has `NAME.json`: the hash of what it
depends on, the hash of the file, and what its maker tells. It is written last; without it there is no artifact.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phasequant.errors import PhaseQuantError

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8
PIECE = 2**24  # bytes copied at once


def full_disk(error: OSError, path: Path) -> PhaseQuantError:
    """What is said where a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PhaseQuantError(
            f"the disk of {path.parent} is full: finished blocks are kept there; free some space and run the same "
            "command again, it goes on where it was"
        )
    return PhaseQuantError(
        f"{path} could not be written ({error.strerror or error}): run the same command again, it goes on where it was"
    )


def sync_folder(folder: Path) -> None:
    """Have renames in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    at = 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write; what is written is at `path` once all of it is on the disk, and nothing before."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise full_disk(error, path) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all, widest types first; its SHA-256 in hex."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    hasher = hashlib.sha256()
    with _whole(path) as file:

        def put(data: Any) -> None:
            hasher.update(data)
            file.write(data)

        put(_header(ordered))
        for tensor in ordered.values():
            flat = tensor.detach().cpu().contiguous().flatten()
            if flat.numel():
                data = flat.view(torch.uint8).numpy().data
                for start in range(0, len(data), PIECE):
                    put(data[start : start + PIECE])
    return hasher.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    with _whole(path) as file:
        file.write(text.encode())


def write_artifact(path: Path, key: str, tensors: Mapping[str, Tensor], told: Any) -> None:
    """Keep `tensors`, and what their maker tells (plain values), under a hash of what they depend on."""
    beside = path.with_suffix(".json")
    beside.unlink(missing_ok=True)
    digest = write_tensors(path, tensors)
    write_text(beside, json.dumps({"key": key, "sha256": digest, "told": told}))


def told_of(path: Path, key: str) -> Any | None:
    """What the maker of a finished artifact told; None where there is none of this key, or its file is damaged."""
    try:
        entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if entry["key"] != key:
            return None
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        return entry["told"] if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PhaseQuantError(f"{path} cannot be read ({error}): run the same command again") from error
