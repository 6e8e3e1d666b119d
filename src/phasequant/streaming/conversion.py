"""Which tensors of its files a model's parameters are made of: as Transformers' own loading has it, some at a time.

Files name and shape parameters otherwise than models do: the experts of a mixture stand one by one (Mixtral's
`block_sparse_moe.experts.3.w1.weight`) and are stacked in a model, heads and norms had other names. Transformers keeps
renamings and conversions by model type and applies them to all tensors of a model at once. Here its renamings are
applied to names alone, which gives `Piece`s: tensors that are read and converted together, and the parameters that come
of them. So a block can be made of its own pieces, and only these are read. What was renamed at reading Transformers
names back at saving (`saved_names`).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from phasequant.errors import PhaseQuantError

Shape = tuple[int, ...]


class NotStreamable(PhaseQuantError):
    """This model cannot be read block by block; the message says why."""


@dataclass
class Piece:
    """`sources`: a converter's pattern → tensors of the files that match it, in their natural order (expert 9 before
    10). `target`: the parameter they are for, the first of several; without a converter it is the one tensor."""

    target: str
    converter: WeightConverter | None = None
    sources: dict[str, list[str]] = field(default_factory=dict)
    makes: dict[str, Shape] = field(default_factory=dict)
    """Parameter → shape."""

    @property
    def names(self) -> list[str]:
        """All tensors that it is made of."""
        return [name for names in self.sources.values() for name in names]

    def made(self, found: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
        """Parameter → tensor, of the tensors of the files, which are let go (`found` is emptied)."""
        if self.converter is None:
            (name,) = self.names
            return {self.target: found.pop(name)}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, found.pop(name))
        made: dict[str, Any] = converter.convert(self.target, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Pieces:
    """What a model is made of: its parameter → piece; `extra`: tensors of the files that no parameter is made of."""

    of: Mapping[str, Piece]
    extra: tuple[str, ...]

    def needed(self, parameters: Iterable[str]) -> list[Piece]:
        """The pieces that some parameters are made of, each once; all that a piece makes must be among them."""
        found: dict[int, Piece] = {}
        wanted = set(parameters)
        for name in wanted:
            found[id(self.of[name])] = self.of[name]
        for piece in found.values():
            if not piece.makes.keys() <= wanted:
                raise NotStreamable(
                    f"'{sorted(piece.makes.keys() - wanted)[0]}' and '{piece.target}' of another block stand in one "
                    f"tensor ('{piece.names[0]}')"
                )
        return sorted(found.values(), key=lambda piece: piece.target)

    def only(self, parameter: str) -> str | None:
        """The tensor that a parameter is, where it is one as it stands."""
        piece = self.of[parameter]
        return piece.names[0] if piece.converter is None else None


def find_pieces(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Pieces:
    """What a model (without numbers) is made of, from the names and shapes of its files' tensors. Conversions are tried
    on shapes alone; one that fails is an error that names a tensor."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix

    def renamed(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # was not to be renamed
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    pieces: dict[str, Piece] = {}
    extra = []
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = renamed(name)
        if target not in known:
            extra.append(name)
            continue
        piece = pieces.setdefault(target, Piece(target, None if pattern is None else by_pattern[pattern]))
        piece.sources.setdefault(pattern or name, []).append(name)
    of = {}
    for piece in pieces.values():
        piece.makes.update(_shapes(piece, shapes, model.config))
        of.update(dict.fromkeys(piece.makes, piece))
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # as `from_pretrained` leaves it
    return Pieces(of, tuple(extra))


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in a quantized model → name that `save_pretrained` gives it: as in the files that it was read from."""
    tokens = {name: torch.empty(0, device="meta") for name in names}
    saved = {id(token): name for name, token in revert_weight_conversion(model, tokens).items()}
    return {name: saved[id(token)] for name, token in tokens.items()}


def _shapes(piece: Piece, shapes: Mapping[str, Shape], config: PretrainedConfig) -> dict[str, Shape]:
    names = piece.names
    if piece.converter is None and len(names) > 1:
        raise PhaseQuantError(f"'{names[0]}' and '{names[1]}' are both '{piece.target}': get the model's files again")
    try:
        made = piece.made({name: torch.empty(shapes[name], device="meta") for name in names}, config)
    except Exception as error:
        numbers = sum(math.prod(shapes[name]) for name in names)
        raise PhaseQuantError(
            f"'{piece.target}' cannot be made of '{names[0]}' and {len(names) - 1} more tensors ({numbers} numbers; "
            f"{type(error).__name__}: {error}): config and weights are not of one model; get its files again"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in made.items()}


Read = Callable[[dict[str, str]], Iterable[tuple[str, Tensor]]]


def make(pieces: Sequence[Piece], read: Read, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """(parameter, tensor) of some pieces in the files' type; what is one tensor as it stands comes first. `read`:
    key → name of a tensor gives (key, tensor)."""
    plain = {piece.target: piece.names[0] for piece in pieces if piece.converter is None}
    yield from read(plain)
    for piece in pieces:
        if piece.converter is not None:
            found = dict(read({name: name for name in piece.names}))
            yield from piece.made(found, config).items()
