"""A running SHA-256 over text and whole tensors: names what a result was made from, so that it can be kept."""

import hashlib

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


def of_module(module: nn.Module) -> str:
    """The name of a module's tensors."""
    found = Fingerprint()
    found.module(module)
    return found.hex(64)
