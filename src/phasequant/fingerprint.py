"""A running SHA-256 over text and whole tensors: names what a result was made from, so that it can be kept."""

import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn


class Fingerprint:
    """Feed it all that a result depends on; `hex()` then names the result."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256()

    def text(self, text: str) -> None:
        """Add text."""
        self._hasher.update(f"{len(text)}:{text}".encode())

    def tensor(self, tensor: Tensor) -> None:
        """Add a tensor of any type and device: its type, its shape, every byte."""
        self.text(f"{tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().contiguous().cpu().flatten()
        self._hasher.update(flat.view(torch.uint8).numpy().data)

    def module(self, module: nn.Module) -> None:
        """Add a module's parameters and buffers, by name."""
        for name, tensor in module.state_dict().items():
            self.text(name)
            self.tensor(tensor)

    def copy(self) -> "Fingerprint":
        """A fork: what is added to one does not reach the other."""
        twin = Fingerprint()
        twin._hasher = self._hasher.copy()
        return twin

    def hex(self, length: int = 32) -> str:
        """The name so far."""
        return self._hasher.hexdigest()[:length]


@cache
def of_code() -> str:
    """The name of this package's code, as it is on this machine: what is kept was made by it."""
    found = Fingerprint()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.text(path.relative_to(root).as_posix())
        found.text(path.read_text(encoding="utf-8"))
    return found.hex()


def of_module(module: nn.Module) -> str:
    """The name of a module's tensors."""
    found = Fingerprint()
    found.module(module)
    return found.hex(64)
