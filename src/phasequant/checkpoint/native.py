"""Saving and loading PhaseQuant's own checkpoints.

config.json            the architecture, with quantization_config.quant_method = "phasequant"
model*.safetensors     packed codes, scales, online factors, KV factors; embeddings, norms and head in 16 bits
tokenizer …            the source's
recipe.yaml, plan.json what was asked for, and which group reads which bits, and why
phasequant_shim.py     what `trust_remote_code=True` runs: it imports phasequant
manifest.json          source, versions, calibration, and the hash of every file above
README.md              the model card, from the run's own figures
"""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest
from phasequant.checkpoint.card import model_card
from phasequant.checkpoint.folder import new_folder
from phasequant.checkpoint.guard import check_extent, read_json
from phasequant.checkpoint.hf import READS, register, without_hashes
from phasequant.console import warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate.size import weight_bytes
from phasequant.nn import ModelLayout
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.surroundings import hushed_transformers, pick_device

SLACK = 64 * 2**20  # tokenizer, JSON


def versions() -> dict[str, str]:
    """Of the libraries that decide what a run computes."""
    found = {}
    for name in ("phasequant", "torch", "transformers", "compressed-tensors", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    plan: PrecisionPlan,
    origin: dict[str, Any],
    weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint; `origin` goes into the manifest. The directory appears whole or not at all. `weights`: writes
    the weight files of a model that has its structure only."""
    target = Path(path)
    needed = SLACK if weights is not None else weight_bytes(model) + SLACK
    with new_folder(target, manifest.is_ours, needed) as folder:
        _mend_generation_config(model)
        with hushed_transformers():
            model.save_pretrained(folder)
            if weights is not None:
                weights(folder)
            tokenizer.save_pretrained(folder)
        _forget_this_machine(folder, model.config.quantization_config.dtype)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        content = {"versions": versions(), **origin}
        manifest.write(folder, content)
        (folder / manifest.CARD).write_text(model_card(model, recipe, plan, content), encoding="utf-8")
    return target


def _forget_this_machine(folder: Path, dtype: str) -> None:
    """What Transformers writes of the model in memory and not of the checkpoint: the type that it computes in here, and
    whether its tokenizer came from a directory."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in values.items() if key not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Sampling settings without `do_sample` load with a warning, and then refuse to be saved: switch sampling on."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = True
        warn(
            f"the model's generation config sets sampling options without do_sample; do_sample=True is saved ({error})"
        )


def load(
    path: str | Path, device: str = "auto", dtype: torch.dtype | None = None, verify: bool = True
) -> PreTrainedModel:
    """A checkpoint as a Transformers model, with packed weights and a packed KV cache in `generate`.

    - `device`: auto, cpu, cuda, cuda:N.
    - `dtype`: of what is not quantized, and of activations between layers; float32 on a CPU, else the checkpoint's.
    - `verify`: compare every file with the manifest's hashes first.

    The plan beside the weights is held against what they were laid out for, too, where `verify` is on.
    Raises `PhaseQuantError` where anything is missing, damaged, edited, or of another format.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise PhaseQuantError(f"the checkpoint {folder} does not exist")
    if verify:
        _check_format(folder, manifest.check(folder))
    if not manifest.is_checkpoint(folder):
        raise PhaseQuantError(f"{folder} is not a PhaseQuant checkpoint (no quant_method 'phasequant' in config.json)")
    check_extent(folder)
    register()
    where = pick_device(device)
    if dtype is None and where.type == "cpu":
        dtype = torch.float32
    try:
        with hushed_transformers(), without_hashes():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype or "auto", output_loading_info=True
            )
    except PhaseQuantError:
        raise
    except Exception as error:
        raise PhaseQuantError(
            f"the checkpoint {folder} could not be loaded ({type(error).__name__}: {error}): get it again"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            first = sorted(map(str, report[kind]))[0]
            raise PhaseQuantError(
                f"the checkpoint {folder} does not fit its own config: {len(report[kind])} "
                f"{kind.replace('_', ' ')}, first '{first}'; get it again"
            )
    if verify:
        check_plan_fits(folder, model)
    return model.eval().requires_grad_(False).to(where)


def read_plan(folder: Path, model_map: Any) -> PrecisionPlan:
    """The plan of a checkpoint."""
    return PrecisionPlan.from_dict(read_json(folder / "plan.json"), model_map)


def _check_format(folder: Path, made: dict[str, Any]) -> None:
    """Refuse a newer format with the name of the version that wrote it."""
    config = read_json(folder / "config.json")
    block = config.get("quantization_config") if isinstance(config, dict) else None
    found = block.get("format", READS[-1]) if isinstance(block, dict) else None
    if isinstance(found, int) and found > READS[-1]:
        here, there = versions()["phasequant"], made["versions"]["phasequant"]
        raise PhaseQuantError(
            f"the checkpoint {folder} has format {found}, and this phasequant {here} reads formats {READS[0]} to "
            f"{READS[-1]}: install phasequant {there}, which wrote it, or a newer one"
        )


def check_plan_fits(folder: Path, model: PreTrainedModel) -> None:
    """Raise where plan.json is not the plan that the model was quantized by."""
    model_map = ModelMap.from_config(model.config)
    plan = read_plan(folder, model_map)
    layout = ModelLayout.from_dict(model.config.quantization_config.layout, model_map)
    told = ModelLayout(plan.weights, {}, plan.activations, weights_others=plan.weights_others).to_dict()
    real = layout.to_dict()
    wrong = [part for part in ("weights", "weights_others", "activations") if told[part] != real[part]]
    kv = {block: grid.keys.bits for block, grid in layout.kv.items()}
    if kv != {block: spec.bits for block in model_map.blocks if (spec := plan.kv_at(block)) is not None}:
        wrong.append("kv")
    if wrong:
        raise PhaseQuantError(
            f"plan.json in {folder} gives other {wrong[0].replace('_', ' ')} than the weights have: it is of another "
            "checkpoint, or was edited; get it again"
        )
