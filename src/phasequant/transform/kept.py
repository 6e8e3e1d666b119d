"""Finished blocks on disk, each under a hash of all that it depends on.

An interrupted run goes on where it was, and a plan that raises some blocks learns only those anew. A block's name has
seen: the tokens, the embeddings, every block up to its own, the residual rotation, the block's start, grids and
options, the versions that compute it and the kind of device. What makes a start from the block's own inputs (WUSH,
scales) is a function of these and of the recipe's parts, which are in the name too.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.console import note
from phasequant.fingerprint import Fingerprint
from phasequant.numerics import LinearMap
from phasequant.stream import home_of, resident
from phasequant.transform.contract import MAPS, BlockTransform, Task, Transform
from phasequant.transform.files import read_block, write_block

VERSION = 4  # of what a kept block means


def fingerprint_of(transform: Transform) -> str:
    """Names a transform: its maps, scales and clips."""
    found = Fingerprint()
    found.text(f"{transform.method} {transform.folds_norms}")
    _add_map(found, transform.residual)
    seen: dict[int, BlockTransform] = {}
    for block in transform.blocks:
        if id(block) not in seen:  # the same in all blocks, or each its own
            seen[id(block)] = block
            for place in MAPS:
                _add_map(found, getattr(block, place))
            for named in (block.scales, block.weight_clips):
                for name, tensor in named.items():
                    found.text(name)
                    found.tensor(tensor)
            found.text(f"{dict(block.inputs)} {block.kv}")
    found.text(str(len(transform.blocks)))
    return found.hex(64)


def _add_map(to: Fingerprint, found: LinearMap | None) -> None:
    to.text(json.dumps(None if found is None else found.layout(), sort_keys=True))
    for tensor in () if found is None else found.tensors().values():
        to.tensor(tensor)


class KeptBlocks:
    """The kept blocks of one task; call `see` with every block in order, then `read`, then perhaps `write`."""

    def __init__(self, task: Task, start: Transform) -> None:
        assert task.tokens is not None
        self.task, self.taken, self.asked = task, 0, 0
        self._past, self._name = Fingerprint(), ""
        if task.kept is None:
            return
        self._past.tensor(task.tokens)
        embeddings = task.model.get_submodule(task.map.family.embeddings)
        with resident(embeddings, home_of(embeddings)):
            self._past.module(embeddings)
        self._past.text(f"{VERSION} {torch.__version__} {task.device.type} {start.folds_norms}")
        _add_map(self._past, start.residual)

    def see(self, block: nn.Module) -> None:
        """The next 16-bit block, whose inputs those before it made."""
        if self.task.kept is not None:
            self._past.module(block)

    def read(self, start: BlockTransform, asked: dict[str, Any]) -> BlockTransform | None:
        """The block that was seen last, if it was learned earlier from `start` with all of `asked` (plain values)."""
        task = self.task
        if task.kept is None:
            return None
        name = self._past.copy()
        name.text(json.dumps({**asked, "learning": task.learning.model_dump(), "seed": task.seed}, sort_keys=True))
        name.text(task.part.model_dump_json())
        for place in MAPS:
            _add_map(name, getattr(start, place))
        scales: dict[str, Tensor] = dict(start.scales)
        for group, scale in scales.items():
            name.text(group)
            name.tensor(scale)
        self._name = f"{name.hex()}.safetensors"
        found = read_block(task.kept / self._name)
        self.asked += 1
        self.taken += found is not None
        return found

    def write(self, block: BlockTransform) -> None:
        """Keep the block that `read` did not find."""
        if self.task.kept is not None:
            write_block(self.task.kept / self._name, block)

    def tell(self) -> None:
        """Say how many were taken."""
        if self.taken:
            note(f"{self.taken} of {self.asked} blocks were learned in an earlier run, taken from {self.task.kept}")
