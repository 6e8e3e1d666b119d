r"""A linear of the runtime with what stands before it: one kernel for the entrance where it can be, and the product.

    after_norm   h ← h + a,   y = W·Q(norm(h)·T)          before q, k, v and gate, up
    after_gate   y = W·Q((act(g)·u)·T)                    before down
    plain        y = W·Q(x·T)                             before o

Fused (`kernels.gpu.entrance`): one read of the inputs, one write of int8 codes, of a scale a token and of x·Aᵀ where
there is a low-rank branch. Elsewhere the same steps one by one. `describe` says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.kernels import Kernel, LinearSpec, Prepared, choose
from phasequant.nn import QuantLinear


@dataclass
class Norm:
    """x → w·x/√(mean x² + ε), rounded as LLaMA's is: before and after w."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        """From a Transformers module."""
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def after(self, h: Tensor, added: Tensor | None) -> Tensor:
        """Of h + added."""
        return self(h if added is None else h + added)


class Linear:
    """See the module's docstring."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, *, act: str = "silu") -> None:
        self.module, self.act = module, act
        self.spec: LinearSpec | None = None
        self.kernel: Kernel | None = None
        self.weights: Prepared = None
        self.entrances: dict[str, str] = {}
        if isinstance(module, QuantLinear):
            self.spec = replace(module.spec, dtype=dtype)
            self.kernel = choose(self.spec, device)
            self.weights = self.kernel.prepare(module.tensors, self.spec)

    def release(self, parts: Sequence[nn.Module]) -> None:
        """Let go of the codes that `parts` hold: what the kernel prepared is all that is kept."""
        for module in (*parts, self.module):
            if isinstance(module, QuantLinear) and module.weight_packed is not None:
                module.weight_packed = module.weight_packed.to("meta")

    def describe(self, way: str) -> dict[str, str]:
        """The kernel of the product, and how the input gets there."""
        return {
            "kernel": "16-bit" if self.kernel is None else self.kernel.name,
            "entrance": self.entrances.get(way, "separate steps"),
        }

    def plain(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """W·Q(x·T)."""
        if self.kernel is None or self.spec is None or not isinstance(self.module, QuantLinear):
            return self.module(x)
        return self.kernel.linear(self.module.prepare(x), self.weights, self.spec)

    def after_norm(
        self, h: Float[Tensor, "T D"], added: Float[Tensor, "T D"] | None, norm: Norm
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T O"]]:
        """(h + added, W·Q(norm(h + added)·T))."""
        h = h if added is None else h + added
        return h, self.plain(norm(h))

    def after_gate(self, gate_up: Float[Tensor, "T two_I"], act: Any) -> Float[Tensor, "T O"]:
        """W·Q((act(g)·u)·T), g and u the halves of `gate_up`."""
        gate, up = gate_up.chunk(2, -1)
        return self.plain(act(gate) * up)
