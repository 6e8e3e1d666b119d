"""What our optimizers share: groups that are checked when they are added, and `step(closure)` as torch has it."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch

from phasequant.errors import PhaseQuantError


class CheckedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that refuses options and parameters which its step is not made for."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options and parameters that the step is not made for are refused."""
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except PhaseQuantError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where given, computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    @abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Raise `PhaseQuantError` for a group that cannot be trained."""

    @abstractmethod
    def move(self) -> None:
        """Move every parameter that has a gradient; without a gradient graph."""
