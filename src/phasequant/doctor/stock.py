"""A compressed-tensors checkpoint as its config.json has it: grids by linear, online transforms, KV. No weights."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from phasequant.arch import ModelMap
from phasequant.doctor.question import Args
from phasequant.errors import PhaseQuantError
from phasequant.surroundings import hushed_transformers

KEYS = (
    "num_bits",
    "type",
    "strategy",
    "group_size",
    "symmetric",
    "dynamic",
    "block_structure",
    "scale_dtype",
    "actorder",
)
GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "query_key_value": "qkv",
          "o_proj": "o", "dense": "o", "out_proj": "o", "gate_proj": "gate_up", "up_proj": "gate_up",
          "gate_up_proj": "gate_up", "fc1": "gate_up", "down_proj": "down", "fc2": "down"}  # fmt: skip
ONLINE, IN_ATTENTION = ("input", "output"), ("q_attn", "k_cache")


@dataclass(frozen=True)
class Grids:
    """What a config group gives a linear; all None where it is in 16 bits."""

    weights: Args | None = None
    inputs: Args | None = None
    outputs: Args | None = None
    format: str | None = None


@dataclass(frozen=True)
class Linear:
    """One linear of the model as Transformers has it."""

    name: str
    block: int | None
    group: str
    width_in: int
    width_out: int
    bias: bool
    grids: Grids


@dataclass(frozen=True)
class Online:
    """A transform that runs at inference: where, of which kind, of which size (None: the whole width)."""

    name: str
    location: str
    kind: str
    size: int | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def at(self, linear: Linear) -> bool:
        """Whether it stands at a linear."""
        return self.location in ONLINE and matches(linear.name, self.targets) and not matches(linear.name, self.ignore)


@dataclass(frozen=True)
class Stock:
    """All that decides what runs. `folded`: transforms of which nothing is left to run; `dtype`: of what is dense."""

    linears: tuple[Linear, ...]
    online: tuple[Online, ...]
    folded: tuple[str, ...]
    kv: Args | None
    dtype: str
    blocks: int
    experts: bool = False


def matches(name: str, targets: Iterable[str], kind: str = "Linear") -> bool:
    """As compressed-tensors and vLLM match: a name, `re:` a pattern from its start, or the class."""
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target in (name, kind)
        for target in targets
    )


def is_stock(folder: Path) -> bool:
    """Whether a directory is a compressed-tensors checkpoint."""
    return _quantization(folder).get("quant_method") == "compressed-tensors"


def _quantization(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PhaseQuantError(
            f"{folder / 'config.json'} cannot be read ({error}): name a checkpoint's folder"
        ) from error
    found = config.get("quantization_config") or config.get("compression_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _args(values: Mapping[str, Any] | None) -> Args | None:
    """With what compressed-tensors fills in."""
    from compressed_tensors.quantization import QuantizationArgs

    if values is None:
        return None
    try:
        full = QuantizationArgs.model_validate(dict(values)).model_dump(mode="json")
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise PhaseQuantError(f"compressed-tensors refuses a grid of config.json ({first}): get it again") from error
    return {key: full[key] for key in KEYS if full.get(key) is not None or key in KEYS[:6]}


def read(folder: Path) -> Stock:
    """The checkpoint; `PhaseQuantError` where its config is not one."""
    given = _quantization(folder)
    entries = given.get("config_groups")
    if not isinstance(entries, dict) or not entries:
        raise PhaseQuantError(f"{folder} has no config_groups in its quantization_config: get the checkpoint again")
    groups = []
    for entry in entries.values():
        if not isinstance(entry, dict):
            raise PhaseQuantError(f"a config group of {folder} is the preset '{entry}': save it written out")
        grids = Grids(
            _args(entry.get("weights")), _args(entry.get("input_activations")), _args(entry.get("output_activations")),
            entry.get("format") or given.get("format"),
        )  # fmt: skip
        groups.append((tuple(entry.get("targets") or ()), grids))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PhaseQuantError(f"Transformers cannot read {folder / 'config.json'}: {error}") from error
    online, folded = _transforms(given.get("transform_config") or {})
    experts = any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return Stock(
        tuple(_linears(config, groups, tuple(given.get("ignore") or ()))), online, folded,
        _args(given.get("kv_cache_scheme")), str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch."),
        config.num_hidden_layers, bool(experts),
    )  # fmt: skip


def _transforms(config: Mapping[str, Any]) -> tuple[tuple[Online, ...], tuple[str, ...]]:
    online, folded = [], []
    for name, scheme in (config.get("config_groups") or {}).items():
        for entry in scheme.get("apply") or ():
            location = str(entry["location"])
            if location in (*ONLINE, *IN_ATTENTION):
                targets, ignore = (entry.get(key) or () for key in ("targets", "ignore"))
                targets, ignore = ((x,) if isinstance(x, str) else tuple(x) for x in (targets, ignore))
                online.append(Online(name, location, scheme["type"], scheme.get("head_dim"), targets, ignore))
            else:
                folded.append(f"{name} ({location} of {', '.join(entry.get('targets') or ())}): {scheme['type']}")
    return tuple(online), tuple(folded)


def _linears(config: Any, groups: list[tuple[tuple[str, ...], Grids]], ignore: tuple[str, ...]) -> list[Linear]:
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"), hushed_transformers():
        model = AutoModelForCausalLM.from_config(plain)
    try:
        places = {name: (block, group) for block, group, name in ModelMap.from_config(config).linears()}
    except PhaseQuantError:  # a family that PhaseQuant does not quantize: by the names that most have
        places = {}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        number, leaf = re.search(r"\.(\d+)\.", name), name.rpartition(".")[2]
        block, group = places.get(name, (int(number[1]) if number else None, GROUPS.get(leaf, leaf)))
        grids = Grids()
        if not matches(name, ignore):
            named = (g for targets, g in groups if matches(name, targets, ""))
            grids = next(named, None) or next((g for targets, g in groups if matches(name, targets)), Grids())
        found.append(Linear(
            name, block, group, module.in_features, module.out_features, module.bias is not None, grids
        ))  # fmt: skip
    return found
