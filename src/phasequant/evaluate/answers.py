"""Answers to requests, kept as they are given: a run of tasks that was stopped goes on where it was.

One file for each model (its name is a hash of all that its answers depend on), one line for each answer: the hash of
the request's tokens, and what was answered. A line that was cut off by the end of a run is left out.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phasequant.demo_model import cache_folder
from phasequant.fingerprint import Fingerprint, of_code
from phasequant.nn import KVQuantizer, OnlineMap, QuantLinear
from phasequant.ranks import world

FOLDER = "answers"


def name_of(model: PreTrainedModel, versions: Mapping[str, str]) -> str:
    """A hash of a model: its tensors, grids and config, where it runs and, if it is quantized, this package's code."""
    found = Fingerprint()
    like = next(model.parameters())
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    found.text(json.dumps([config, dict(versions), like.device.type, str(like.dtype)], sort_keys=True, default=str))
    found.text(torch.cuda.get_device_name(like.device) if like.device.type == "cuda" else "")
    found.module(model)
    ours = False
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found.text(f"{name} {module.spec} {module.kernel(like.device, like.dtype).name}")
        elif isinstance(module, KVQuantizer):
            found.text(f"{name} {module.layout} {module.enabled}")
        elif isinstance(module, OnlineMap):
            found.text(f"{name} {json.dumps(module.layout(), sort_keys=True, default=str)}")
        else:
            continue
        ours = True
    found.text(of_code() if ours else "")
    return found.hex(32)


class Answers:
    """What one model answered: request → answer, in memory and on disk, a file for each rank."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        folder = cache_folder() / FOLDER if folder is None else folder
        rank = world().rank
        self.path = folder / (f"{name}-{rank}.jsonl" if rank else f"{name}.jsonl")
        self._known: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self._known[key] = value

    @staticmethod
    def key(*parts: Any) -> str:
        """The name of a request."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Add answers, and write them at once."""
        found = list(pairs)
        self._known.update(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        broken = self.path.is_file() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + "".join(json.dumps(pair) + "\n" for pair in found))
