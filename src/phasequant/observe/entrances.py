"""What stands at the entrance of a group's linears while a block runs: the input as the quantizer would see it, after
what runs online, before it is rounded. Clips, thresholds of rows and static ranges are all found from it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.nn import prepared

See = Callable[[Float[Tensor, "T n"]], None]


@contextmanager
def at_entrances(block: nn.Module, model_map: ModelMap, seers: Mapping[str, See]) -> Iterator[None]:
    """Show every group's inputs, fp32, to its seer (by the group's name), for a while."""

    def shown(see: See) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(prepared(module, args[0].flatten(0, -2).float()))

        return hook

    hooks = [
        block.get_submodule(group.input).register_forward_pre_hook(shown(seers[group.name]))
        for group in model_map.groups
        if group.name in seers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
