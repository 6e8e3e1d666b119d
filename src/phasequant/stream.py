"""The decoder, run block by block over a set of sequences: one block on the device at a time.

A first pass replaces every block by a catcher that notes the arguments it is called with and hands the hidden states
on; so each block is later called exactly as the model would (position embeddings, its own mask for sliding windows)
without a line of model code of ours. Then the blocks run one after the other, each over all sequences, while the
hidden states wait in host memory: sequences × length × width × 4 bytes, whatever the depth.

Everything that needs activations stands on this, but for few tokens that go through the whole decoder (`visiting`). A
consumer takes a `Step`, hooks what it wants on `step.block`, and iterates `step.run()`; `step.probe()` runs a block
without consequence (a changed grid, say).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.console import progress
from phasequant.ranks import Dealt


class _Catcher(nn.Module):
    """Stands in for a block during capture; other attributes are the block's own."""

    def __init__(self, block: nn.Module, calls: dict[int, dict[str, Any]], index: int) -> None:
        super().__init__()
        self.block = block
        self.calls = calls
        self.index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "decoder blocks are called with keyword arguments"
        self.calls[self.index] = kwargs
        return hidden_states


class _Captured(Exception):
    """Raised once all blocks were reached: the final norm and head need not run."""


class Lazy(Protocol):
    """What a module whose numbers are made when they are needed has as `lazy` (see `streaming.lazy`)."""

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Make them, on `device`."""

    def drop(self, module: nn.Module) -> None:
        """Let them go."""


def lazy_of(module: nn.Module) -> Any | None:
    """What makes a module's numbers; None where it has them."""
    return module.__dict__.get("lazy")


def finish(block: nn.Module, artifact: Path, prefix: str) -> None:
    """A lazy block is from now on what a file holds, its names without `prefix`; others are as they are."""
    lazy = lazy_of(block)
    if lazy is not None:
        lazy.finish(artifact, prefix)


def home_of(model: nn.Module) -> torch.device:
    """Where a model's own tensors are; of a streamed one, host memory."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def resident(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a block on `device` for a while; whatever then stands in it goes back to where its weights were. A lazy
    block is made for this while, and only its structure stays."""
    lazy: Lazy | None = lazy_of(block)
    if lazy is not None:
        lazy.fill(block, device)
        try:
            yield
        finally:
            lazy.drop(block)
        return
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextmanager
def visiting(model: PreTrainedModel, model_map: ModelMap, device: torch.device | None = None) -> Iterator[None]:
    """Have forward passes of the whole decoder, for a while: each block is on `device` (None: where the model's tensors
    are) from when it is reached to when the next one is, and its output goes home."""
    home = home_of(model)
    place = device or home
    undone: list[Callable[[], None]] = []
    with ExitStack() as here, resident(model.get_submodule(model_map.family.embeddings), home):

        def reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            here.close()
            here.enter_context(resident(block, place))
            return _moved(args, place), _moved(kwargs, place)

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return _moved(output, home)

        for index in model_map.blocks:
            block = model.get_submodule(model_map.block_name(index))
            hooks = block.register_forward_pre_hook(reach, with_kwargs=True), block.register_forward_hook(leave)
            undone.extend(hook.remove for hook in hooks)
        try:
            yield
        finally:
            for undo in undone:
                undo()


class Step:
    """One decoder block, resident, with the inputs of every sequence."""

    def __init__(self, index: int, block: nn.Module, stream: "BlockStream") -> None:
        self.index = index
        self.block = block
        self._stream = stream
        self.outputs: list[Tensor] | None = None

    def run(self) -> Iterator[tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]]:
        """(x, y) for every sequence, on the device; what comes out is what the next block reads."""
        outputs = []
        for hidden, (x, y) in zip(self._stream.hidden, self.probe(), strict=True):
            outputs.append(y.to(hidden.device))
            yield x, y
        self.outputs = outputs

    def drain(self) -> None:
        """Run over all sequences, for hooks or for the outputs alone."""
        for _ in self.run():
            pass

    def probe(self, most: int | None = None) -> Iterator[tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]]:
        """(x, y) for the first `most` sequences (all, if None), of several ranks for this one's of them, without
        consequence for the next block."""
        for hidden in self._stream.hidden[: None if most is None else self._stream.dealt.below(most)]:
            x = hidden.to(self._stream.device)
            with torch.no_grad():
                y = self.block(x[None], **self._stream.arguments[self.index])
            yield x, (y[0] if isinstance(y, tuple) else y)[0]


class BlockStream:
    """Iterates the blocks of `model` over `tokens`; see the module's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        model_map: ModelMap,
        tokens: Int[Tensor, "sequences T"],
        device: torch.device | None = None,
        *,
        spread: bool = False,
    ) -> None:
        """`spread`: the sequences are dealt to the ranks of a run of several processes (`ranks`); `dealt` says which
        are this rank's, and brings together what is found of them."""
        self.dealt = Dealt.of(len(tokens), spread)
        tokens = tokens[self.dealt.mine]
        self.model = model
        self.map = model_map
        self.device = device or home_of(model)
        self._blocks: nn.ModuleList = model.get_submodule(model_map.family.blocks)
        self.hidden: list[Tensor] = []
        self.arguments: dict[int, dict[str, Any]] = {}
        self._capture(tokens)

    @torch.no_grad()
    def _capture(self, tokens: Tensor) -> None:
        decoder = self.model.get_submodule(self.map.family.decoder)
        blocks = list(self._blocks)
        norm = self.model.get_submodule(self.map.family.final_norm)
        home = home_of(self.model)
        embeddings = self.model.get_submodule(self.map.family.embeddings)

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.hidden.append(args[0][0].to("cpu"))
            raise _Captured

        hook = norm.register_forward_pre_hook(stop)
        try:
            for index, block in enumerate(blocks):
                self._blocks[index] = _Catcher(block, self.arguments, index)
            with resident(embeddings, home):
                for row in tokens:
                    with suppress(_Captured):
                        decoder(input_ids=row[None].to(home), use_cache=False)
        finally:
            hook.remove()
            for index, block in enumerate(blocks):
                self._blocks[index] = block
        self.arguments = {i: _moved(kwargs, self.device) for i, kwargs in self.arguments.items()}

    def steps(self, title: str) -> Iterator[Step]:
        """Every block in order, shown as progress. A block that the consumer did not run to the end runs here."""
        with progress(title, len(self._blocks)) as tick:
            for index, block in enumerate(self._blocks):
                step = Step(index, block, self)
                with resident(block, self.device):
                    yield step
                    if step.outputs is None:
                        step.drain()
                assert step.outputs is not None
                self.hidden = step.outputs
                tick()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value
