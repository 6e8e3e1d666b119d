"""Ways to damage a checkpoint, and what may come of it: for `test_fuzz.py`, and by thousands for `benchmarks/fuzz.py`.

A mutation changes files of a copied checkpoint; after it the manifest is left as it was, made to fit (an attacker's
way), or taken away. What then loads must give the logits of the original. One kind is apart: `content` writes other
numbers of the right kind into tensors, which with a manifest that fits is another well-formed checkpoint.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import phasequant
from phasequant.checkpoint import manifest
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe

IDS = torch.randint(0, 250, (1, 12), generator=torch.Generator().manual_seed(1))
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 2**31, 2**60, -(2**60), 1e-9, 0.5, 1e308, float("inf"), float("nan"), "",
    "x", "../../x", "/etc/passwd", "a" * 5000, [], {}, [1], [[[]]], {"bits": 4}, "int8", "float64", "gelu", "silu",
]  # fmt: skip
SIGNED = ("as it was", "made to fit", "taken away")


def sign(folder: Path) -> None:
    """Make the manifest fit the files."""
    path = folder / manifest.NAME
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text())
        entries = manifest.file_entries(folder)
        values["files"] = {n: entries.get(n, e) for n, e in {**values["files"], **entries}.items()}
        path.write_text(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def _files(folder: Path, *endings: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(endings or ("",)))


def flipped(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Some bytes of any file."""
    path = rng.choice(_files(folder))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path.name


def header_flipped(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Some bytes of a weight file's header."""
    path = rng.choice(_files(folder, ".safetensors"))
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path.name


def truncated(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Any file cut short, to nothing at times."""
    path = rng.choice(_files(folder))
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 1, 7, 8, len(data) - 1, rng.randrange(len(data))])])
    return path.name


def header_length(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A header that says it is another length."""
    path = rng.choice(_files(folder, ".safetensors"))
    data = path.read_bytes()
    size = rng.choice([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, len(data), 100_000_000])
    path.write_bytes(struct.pack("<Q", size) + data[8:])
    return f"{path.name}: {size}"


def header_edited(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Types, shapes, offsets, names of a header; the data stays."""
    path = rng.choice(_files(folder, ".safetensors"))
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(["dtype", "shape", "offsets", "swap", "twice", "metadata", "rename"])
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(["F32", "F16", "BF16", "U8", "I8", "F64", "F8_E4M3", "BOOL", "X"])
    elif kind == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([[*shape, 1], shape[::-1], [2**40, 2**40], [-1], [], [2**63 + 1], [0]])
    elif kind == "offsets":
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = rng.choice([[end, begin], [0, 2**60], [begin, end + 1], [begin + 1, end], [-1]])
    elif kind == "swap":
        other = rng.choice(names)
        mine, theirs = header[name]["data_offsets"], header[other]["data_offsets"]
        header[name]["data_offsets"], header[other]["data_offsets"] = theirs, mine
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {"format": 3}, "x", None, {}])
    elif kind == "rename":
        header[rng.choice(["x", "../x", name + ".weight", ""])] = header.pop(name)
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(header[rng.choice(names)])}' + "}"
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])
    return f"{path.name}: {kind} of {name}"


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, below in inner for place in [(*at, key), *_places(below, (*at, key))]]


def json_edited(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A value of config, plan, manifest or index replaced, taken away, or added."""
    path = rng.choice([
        folder / "config.json", folder / "config.json", folder / "plan.json", folder / "manifest.json",
        *_files(folder, ".json"),
    ])  # fmt: skip
    values = json.loads(path.read_text())
    *parents, leaf = rng.choice(_places(values)[:400])
    inner = values
    for key in parents:
        inner = inner[key]
    kind = rng.choice(["replace", "replace", "nudge", "delete", "add"])
    if kind == "delete":
        del inner[leaf]
    elif kind == "add" and isinstance(inner, dict):
        inner[rng.choice(["bitz", "x", "", "num_hidden_layers", "auto_map", "0.qkv"])] = rng.choice(JUNK)
    elif kind == "nudge" and isinstance(inner[leaf], (int, float)) and not isinstance(inner[leaf], bool):
        inner[leaf] = inner[leaf] * 2 if rng.random() < 0.5 else inner[leaf] + 1
    else:
        inner[leaf] = rng.choice(JUNK)
    path.write_text(json.dumps(values))
    return f"{path.name}: {kind} {'.'.join(map(str, (*parents, leaf)))[:80]}"


def json_garbage(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A file of JSON that is something else."""
    path = rng.choice(_files(folder, ".json"))
    garbage = ["[" * 100_000, "{}", "[]", "null", "1" * 5000, '"x"', "\ufeff{}", "{", "NaN", '{"a":' * 50_000]
    path.write_text(rng.choice(garbage))
    return path.name


def exchanged(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A file of another checkpoint in the place of this one's."""
    other = rng.choice(others)
    names = [p.name for p in _files(folder) if (other / p.name).is_file()]
    name = rng.choice([n for n in names if n in ("config.json", "plan.json", "model.safetensors")] or names)
    shutil.copy(other / name, folder / name)
    return f"{name} of {other.name}"


def _retensor(rng: random.Random, folder: Path, change: Callable[[dict[str, torch.Tensor]], str]) -> str:
    path = rng.choice(_files(folder, ".safetensors"))
    tensors = load_file(path)
    said = change(tensors)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, {"format": "pt"})
    return f"{path.name}: {said}"


def retensored(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Tensors removed, added, doubled, reshaped, of another type."""

    def change(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        kind = rng.choice(["remove", "add", "rename", "flatten", "transpose", "grow", "type", "empty"])
        if kind == "remove":
            del tensors[name]
        elif kind == "add":
            tensors[name + rng.choice([".x", "2", ".weight"])] = tensor
        elif kind == "rename":
            tensors[rng.choice(["x", name.replace("0", "1"), name.replace("layers", "layer")])] = tensors.pop(name)
        elif kind == "flatten":
            tensors[name] = tensor.flatten()[None]
        elif kind == "transpose":
            tensors[name] = tensor.T if tensor.ndim == 2 else tensor[None]
        elif kind == "grow":
            tensors[name] = torch.cat([tensor, tensor])
        elif kind == "type":
            types = [torch.float64, torch.int64, torch.int8, torch.float8_e4m3fn, torch.bool]
            tensors[name] = tensor.to(rng.choice(types))
        else:
            tensors[name] = tensor[:0]
        return f"{kind} {name}"

    return _retensor(rng, folder, change)


def senseless(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """NaN, infinity, zero or a negative number where none can be."""

    def change(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel()))
        bad = [float("nan"), float("inf"), -float("inf")]
        if name.endswith("weight_scale"):
            bad += [0.0, -1.0]
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = (value := rng.choice(bad))
        return f"{value} in {name}"

    return _retensor(rng, folder, change)


def content(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Another number of the right kind: only hashes can tell."""

    def change(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(n for n, t in tensors.items() if t.numel()))
        flat = tensors[name].view(-1)
        at = rng.randrange(len(flat))
        flat[at] = flat[at] * 1.25 if flat.is_floating_point() else (int(flat[at]) ^ 1)
        return name

    return _retensor(rng, folder, change)


PLACES = ["../../x", "../other/model.safetensors", "/etc/passwd", "/dev/zero", "a/../../x", ".", "", "\0", "x" * 300]


def misdirected(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """An index or a manifest that names files elsewhere; links."""
    other = rng.choice(others)
    target = str(rng.choice([*PLACES, str(other / "model.safetensors"), f"../{other.name}/model.safetensors"]))
    index = folder / "model.safetensors.index.json"
    kind = rng.choice(["index", "index", "manifest", "link"])
    if kind == "index":
        weights = _files(folder, ".safetensors")
        names = {n: path.name for path in weights for n in load_file(path)}
        wrong = rng.sample(sorted(names), rng.choice([1, len(names)]))
        whole = {"metadata": {"total_size": 1}, "weight_map": {**names, **dict.fromkeys(wrong, target)}}
        index.write_text(json.dumps(whole))
        if len(weights) == 1 and rng.random() < 0.5:  # Transformers prefers a single file to an index
            weights[0].rename(folder / "model-00001-of-00001.safetensors")
    elif kind == "manifest":
        path = folder / manifest.NAME
        values = json.loads(path.read_text())
        values["files"][target] = {"bytes": rng.choice([1, -1, 2**60, "x"]), "sha256": "0" * 64}
        path.write_text(json.dumps(values))
    else:
        path = rng.choice(_files(folder))
        path.unlink()
        path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", path.name, str(other / path.name), "nowhere"]))
        target = f"{path.name} → {path.readlink()}"
    return f"{kind}: {target[:80]}"


def odd_file(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A file that is gone, a directory or a pipe."""
    path = rng.choice(_files(folder))
    path.unlink()
    kind = rng.choice(["gone", "directory", "pipe"])
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return f"{path.name}: {kind}"


def tokenizer_damaged(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Bytes of the tokenizer's files."""
    path = rng.choice([p for p in _files(folder) if p.name.startswith("tokenizer")])
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + rng.choice([0, 1, 50])] = rng.choice([b"", b"\xff", b"{", b"]" * 9, b"null", b"9" * 5000])
    path.write_bytes(data)
    return path.name


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
NASTY = [
    ALIASES, "weights: &a {bits: *a}\n", "&a [*a]\n", "weights: &a\n  bits: [*a, *a]\n", "seed: " + "9" * 6000,
    "seed: 0x" + "f" * 9000, "[" * 50_000, "{a: " * 20_000, "seed: !!python/object/apply:os.system [id]",
    "!!python/name:os.system", "seed: 2001-99-99", "seed: !!int ''", "seed: !!float x", "seed: !!bool x",
    "? [a]\n: b", "seed: " + ":".join(["59"] * 5000), "compose: [" + "quarot, " * 5000 + "]", "compose: [recipe.yaml]",
    "compose: [[a]]", "\x00", "seed: .nan", "seed: -.inf", "policy: {tau_jr: .nan}", "- 1", "\ufeff", "a: b: c",
    "weights:\n" + "".join(f"  k{i}: 1\n" for i in range(5000)), "<<: *x", "<<: {seed: 3}", "1: 2",
    "null: {null: null}",
    "seed: !!timestamp x", "seed: !!binary x", "seed: !!set {a}", "seed: !!omap [a]", "x" * 300_000, "compose: {a: 1}",
    "transform: {method: load, file: /dev/zero}", "compose: [/dev/zero]", "compose: [null]", "weights: {clip: [1]}",
]  # fmt: skip


def recipe_edited(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A recipe that is damaged, or made to harm."""
    path = folder / "recipe.yaml"
    text = path.read_text()
    if rng.random() < 0.5:
        path.write_text(rng.choice(NASTY), encoding="utf-8", errors="replace")
        return "nasty"
    at = rng.randrange(len(text))
    bits = ["&a ", "*a", "!!python/tuple ", "{", "[", "9" * 500, ": ", "\n", "\t", "-", "'", "\ud7ff", "%", "!", "? "]
    path.write_text(text[:at] + rng.choice(bits) + text[at + rng.choice([0, 1, 20]) :], encoding="utf-8")
    return f"at {at}"


MUTATIONS = [
    flipped, header_flipped, truncated, header_length, header_edited, json_edited, json_edited, json_edited,
    json_garbage, exchanged, retensored, retensored, senseless, content, misdirected, odd_file, tokenizer_damaged,
    recipe_edited, recipe_edited,
]  # fmt: skip
RECIPES = (recipe_edited,)


def mutate(seed: int, base: Path, others: list[Path], folder: Path) -> tuple[str, str, str]:
    """Copy `base` to `folder` and damage it; (mutation, what it did, what became of the manifest)."""
    rng = random.Random(seed)
    shutil.copytree(base, folder, symlinks=True)
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    said = mutation(rng, folder, [other for other in others if other != base])
    signed = rng.choice(SIGNED[:2] if mutation in RECIPES else SIGNED)
    if signed == "made to fit":
        sign(folder)
    elif signed == "taken away":
        (folder / manifest.NAME).unlink(missing_ok=True)
    return mutation.__name__, said, signed


def _by_load(folder: Path) -> Any:
    return phasequant.load(folder, device="cpu")(input_ids=IDS, use_cache=False).logits


def _by_transformers(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _by_tokenizer(folder: Path) -> Any:
    AutoTokenizer.from_pretrained(folder)("words")


DOORS: dict[str, Callable[[Path], Any]] = {
    "load": _by_load,
    "transformers": _by_transformers,
    "doctor": lambda folder: phasequant.doctor(folder, gpu="cpu") and None,
    "recipe": lambda folder: Recipe.load(folder / "recipe.yaml") and None,
    "tokenizer": _by_tokenizer,
}
OURS = ("load", "doctor", "recipe")  # where nothing but a PhaseQuantError may be raised


def outcome(door: str, folder: Path, wanted: torch.Tensor) -> tuple[str, str]:
    """(what came of it, the error's text): same, fine, OTHER, refused, raised, and in capitals what may not be."""
    try:
        found = DOORS[door](folder)
    except PhaseQuantError as error:
        return ("MEMORY" if "MemoryError" in str(error) else "refused"), str(error)
    except MemoryError as error:
        return "MEMORY", str(error)
    except Exception as error:
        return ("RAISED" if door in OURS else "raised"), f"{type(error).__name__}: {error}"
    except BaseException as error:
        return "PANIC", f"{type(error).__name__}: {error}"
    if found is None:
        return "fine", ""
    return ("same" if torch.equal(found, wanted) else "OTHER"), ""


def judged(found: str, said: str, signed: str) -> str:
    """`OTHER` where weights were changed to others of the right kind, and no hash is left to tell, is `forged`."""
    return "forged" if found == "OTHER" and ".safetensors" in said and signed != "as it was" else found
