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

from phasequant.kernels import LinearSpec, Prepared, choose
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


ACTS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Transformers' names of acts → the entrance kernels'."""


class Linear:
    """See the module's docstring. `act`: what stands between gate and up, as Transformers' config names it."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, *, act: str = "silu") -> None:
        self.module, self.act = module, ACTS.get(act, act)
        self.spec: LinearSpec | None = None
        self.kernel: Any = None
        self.weights: Prepared = None
        self.why = ""
        self._fused: dict[str, Any] | None = None
        if isinstance(module, QuantLinear):
            self.spec = replace(module.spec, dtype=dtype)
            self.kernel = choose(self.spec, device)
            self.weights = self.kernel.prepare(module.tensors, self.spec)
            self._fuse(module, self.spec, device, dtype)

    def _fuse(self, module: QuantLinear, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> None:
        """Lay the online map out for the entrance kernels, where they take this linear."""
        if not hasattr(self.kernel, "split"):
            self.why = f"{self.kernel.name} rounds its input itself"
            return
        from phasequant.kernels.gpu.entrance import can_run
        from phasequant.kernels.gpu.entrance_map import map_tiles

        online = None if module.online is None else module.online.map()
        ok, self.why = can_run(spec.input, spec.in_features, dtype, device, linear_map=online)
        if ok:
            assert spec.weight is not None
            self._fused = {
                "linear_map": None if online is None else map_tiles(online, dtype, device),
                "split": self.kernel.split and spec.weight.bits <= 4,
                "down": module.lowrank_down,
                "rounded": module.branch_rounded,
            }

    def release(self, parts: Sequence[nn.Module]) -> None:
        """Let go of the codes that `parts` hold: what the kernel prepared is all that is kept."""
        for module in (*parts, self.module):
            if isinstance(module, QuantLinear) and module.weight_packed is not None:
                module.weight_packed = module.weight_packed.to("meta")

    def describe(self) -> dict[str, str]:
        """The kernel of the product, and how the input gets there."""
        if self.kernel is None:
            return {"kernel": "16-bit", "entrance": "16-bit"}
        return {"kernel": self.kernel.name, "entrance": "fused" if self._fused else f"separate steps: {self.why}"}

    def _product(self, entered: Any) -> Tensor:
        return self.kernel.product(entered.codes, entered.scale, self.weights, self.spec, entered.low)

    def plain(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """W·Q(x·T)."""
        if self.spec is None or not isinstance(self.module, QuantLinear):
            return self.module(x)
        if self._fused is None:
            return self.kernel.linear(self.module.prepare(x), self.weights, self.spec)
        from phasequant.kernels.gpu.entrance import round_rows

        assert self.spec.input is not None
        return self._product(round_rows(x, self.spec.input, **self._fused))

    def after_norm(
        self, h: Float[Tensor, "T D"], added: Float[Tensor, "T D"] | None, norm: Norm
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T O"]]:
        """(h + added, W·Q(norm(h + added)·T))."""
        if self.spec is None or self._fused is None:
            h = h if added is None else h + added
            return h, self.plain(norm(h))
        from phasequant.kernels.gpu.entrance import norm_round

        assert self.spec.input is not None
        entered = norm_round(h, norm.weight, norm.eps, self.spec.input, residual=added, **self._fused)
        return h if entered.total is None else entered.total, self._product(entered)

    def after_gate(self, gate_up: Float[Tensor, "T two_I"], act: Any) -> Float[Tensor, "T O"]:
        """W·Q((act(g)·u)·T), g and u the halves of `gate_up`."""
        gate, up = gate_up.chunk(2, -1)
        if self.spec is None or self._fused is None or self.act not in ACTS.values():
            return self.plain(act(gate) * up)
        from phasequant.kernels.gpu.entrance import gated_round

        assert self.spec.input is not None
        return self._product(gated_round(gate, up, self.act, self.spec.input, **self._fused))
