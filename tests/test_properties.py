"""What holds for every recipe, plan, packed tensor, manifest and layout, and not only for those of the other tests."""

import contextlib
import json
import string
import time
from dataclasses import replace
from typing import get_args, get_origin

import pytest
import torch
import yaml
from conftest import CONFIGS, make_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mutations import NASTY
from safetensors.torch import save_file

from phasequant.arch import GROUPS, ModelMap
from phasequant.checkpoint import manifest
from phasequant.checkpoint.guard import architecture_hash, stays_inside
from phasequant.errors import PhaseQuantError
from phasequant.nn import KVLayout, LowRank, ModelLayout, PrefixLayout
from phasequant.numerics import QuantSpec, dequantize, pack, packed_width, quantize, unpack
from phasequant.plan import PrecisionPlan, Raised
from phasequant.recipe import Recipe
from phasequant.transform.files import load_rotations, load_transform

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
MAP = ModelMap.from_config(CONFIGS["llama"])
KEYS = [(part, key) for part, info in Recipe.model_fields.items() if part != "seed"
        for key in info.annotation.model_fields]  # fmt: skip
TEXT = st.text(max_size=12)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def _literals(annotation) -> list:
    if "Literal" in str(get_origin(annotation)):
        return list(get_args(annotation))
    return [value for inner in get_args(annotation) for value in _literals(inner)]


@st.composite
def a_value(draw, part: str, key: str):
    """Some value that a key may have, mostly."""
    info = Recipe.model_fields[part].annotation.model_fields[key]
    simple = st.integers(1, 9) | st.floats(0.01, 1.0) | st.booleans() | st.none() | TEXT
    words = _literals(info.annotation)
    if isinstance(info.default, tuple):
        items = st.sampled_from(words) if words else st.integers(0, 500)
        return draw(st.lists(items, max_size=40))
    if isinstance(info.default, dict):
        names = [w for w in words if isinstance(w, str)]
        return draw(st.dictionaries(st.sampled_from(names), st.integers(1, 9) | st.just([8]), max_size=2))
    return draw(st.sampled_from(words) | simple if words else simple)


@st.composite
def recipes(draw) -> Recipe:
    """A recipe that validates, of up to four changes."""
    recipe = Recipe()
    for part, key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        with contextlib.suppress(PhaseQuantError):
            recipe = recipe.with_(**{part: {key: draw(a_value(part, key))}})
    return recipe.with_(f"seed={draw(st.integers(0, 2**63 - 1))}")


HARMLESS = ("!", "\ufeff", "<<: {seed: 3}", "{}", "transform: {method: load, file: /dev/zero}")


@SETTINGS
@given(recipes())
def test_recipes_go_to_yaml_and_back_without_loss(recipe):
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@SETTINGS
@given(st.text(), st.lists(st.integers(0, 2**40), max_size=400))
def test_texts_and_long_lists_survive_the_yaml(text, tokens):
    assume(text.isprintable() or text.encode("utf-8", "ignore").decode() == text)
    recipe = Recipe().with_(calibration={"text": text}, prefix={"method": "tokens", "tokens": [*tokens, 1]})
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@SETTINGS
@given(st.sampled_from(KEYS), st.integers(0, 20), st.sampled_from("zxq"))
def test_a_mistyped_key_names_the_right_one(place, at, letter):
    part, key = place
    wrong = key[: at % (len(key) + 1)] + letter + key[at % (len(key) + 1) :]
    assume(wrong not in Recipe.model_fields[part].annotation.model_fields)
    near = {k for p, k in KEYS if p == part}
    with pytest.raises(PhaseQuantError, match=rf"unknown recipe key '{part}\.{wrong}': did you mean '") as caught:
        Recipe.from_dict({part: {wrong: 1}})
    named = str(caught.value).split("did you mean '")[1].split("'")[0]
    assert named == key or (len(key) < 5 and named in near)


def _edit(values: dict, garbage, rng) -> None:
    """Put garbage in the place of any value, at any depth."""
    inner = values
    while True:
        key = rng.choice(sorted(inner))
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    inner[key] = garbage


def _only_ours(call) -> None:
    start = time.monotonic()
    with contextlib.suppress(PhaseQuantError):
        call()
    assert time.monotonic() - start < 20


@SETTINGS
@given(GARBAGE, st.sampled_from([None, *KEYS]))
def test_garbage_in_a_recipe_raises_nothing_of_pythons(garbage, place):
    values = garbage if place is None else {place[0]: {place[1]: garbage}}
    _only_ours(lambda: Recipe.from_dict(values))
    _only_ours(lambda: Recipe().with_(f"{'.'.join(place or ('seed',))}={garbage!r}"))


@pytest.mark.parametrize("content", [pytest.param(c, id=str(i)) for i, c in enumerate([*NASTY, *"[]{}&*!|>%@`"])])
def test_harmful_yaml_is_refused_at_once(content, tmp_path, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail(command))
    (tmp_path / "recipe.yaml").write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if content in HARMLESS:
        _only_ours(lambda: Recipe.load(tmp_path / "recipe.yaml"))
        return
    start = time.monotonic()
    with pytest.raises(PhaseQuantError) as caught:
        Recipe.load(tmp_path / "recipe.yaml")
    assert time.monotonic() - start < 20 and len(str(caught.value)) < 50_000


# --- plans ---------------------------------------------------------------------------------------------------------


@st.composite
def activations(draw) -> QuantSpec | None:
    bits = draw(st.sampled_from([None, 2, 3, 4, 5, 6, 7, 8]))
    if bits is None:
        return None
    granularity, static = draw(st.sampled_from([("token", False), ("tensor", False), ("tensor", True),
                                                ("column", True)]))  # fmt: skip
    return QuantSpec(bits, draw(st.booleans()), granularity, clip=draw(st.floats(0.01, 1.0)), static=static)


def _weights(bits: int, size: int | None, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits, symmetric, "group" if size else "channel", size)


PLACES = st.tuples(st.sampled_from(MAP.blocks), st.sampled_from(GROUPS))


@st.composite
def plans(draw) -> PrecisionPlan:
    size = draw(st.sampled_from([None, 6, 12, 48]))
    low, weights = draw(activations()), _weights(4, size, draw(st.booleans()))
    kv = QuantSpec(draw(st.integers(2, 8)), False, "group", draw(st.sampled_from([3, 6, 12])))
    return PrecisionPlan(
        draw(TEXT), MAP, weights, kv, low,
        {p: Raised(draw(activations()), draw(TEXT)) for p in draw(st.sets(PLACES, max_size=4))},
        {p: draw(st.floats(0.01, 1.0)) for p in draw(st.sets(PLACES, max_size=4))},
        draw(st.none() | st.floats(1, 100)),
        None,
        {p: Raised(replace(weights, bits=8), "x") for p in draw(st.sets(PLACES, max_size=3))},
        {b: Raised(replace(kv, bits=8), "y") for b in draw(st.sets(st.sampled_from(MAP.blocks)))},
    )  # fmt: skip


@SETTINGS
@given(plans())
def test_plans_go_to_json_and_back(plan):
    again = PrecisionPlan.from_json(plan.to_json(), MAP)
    assert again.to_dict() == plan.to_dict()
    assert again.activations == plan.activations and again.weights_others == plan.weights_others
    assert [again.kv_at(b) for b in MAP.blocks] == [plan.kv_at(b) for b in MAP.blocks]


@SETTINGS
@given(plans(), GARBAGE, st.randoms(use_true_random=False))
def test_an_edited_plan_is_read_or_refused_with_a_reason(plan, garbage, rng):
    values = plan.to_dict()
    _edit(values, garbage, rng)
    try:
        PrecisionPlan.from_dict(values, MAP)
    except PhaseQuantError as error:
        assert len(str(error)) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(low={"bits": 4, "granularity": "group", "group_size": 3}), "quantized per token"),
        (lambda v: v["raised"].update({"9.qkv": {"bits": 8}}), "9.qkv"),
        (lambda v: v["raised"].update({"0.qkv": {"bits": 99}}), "2 to 8 bits"),
        (lambda v: v["clips"].update({"0.qkv": float("nan")}), "fraction"),
        (lambda v: v["clips"].update({"1" * 5000 + ".qkv": 0.5}), "does not have"),
        (lambda v: v.update(raise_=1), "unknown key"),
        (lambda v: v["model"].update(fingerprint="x"), "another model"),
        (lambda v: v.update(weights={"bits": 4, "granularity": "group", "group_size": 7}), "does not divide"),
    ],
)
def test_what_a_plan_may_not_say(change, message):
    values = PrecisionPlan("x", MAP, low=QuantSpec(4)).to_dict()
    change(values)
    with pytest.raises(PhaseQuantError, match=message):
        PrecisionPlan.from_dict(values, MAP)


def test_a_plan_nested_without_end():
    with pytest.raises(PhaseQuantError, match="not valid JSON"):
        PrecisionPlan.from_json("[" * 100_000, MAP)


# --- numbers -------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(2, 8), st.booleans(), st.integers(1, 70), st.integers(0, 5), st.integers(0, 2**31))
def test_packing_is_undone(bits, symmetric, width, rows, seed):
    spec = QuantSpec(bits, symmetric)
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.lowest, spec.highest + 1, (rows, width), generator=dice)
    codes = codes.to(torch.int8 if symmetric else torch.uint8)
    packed = pack(codes, spec)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(width, spec))
    assert torch.equal(unpack(packed, width, spec), codes)


@SETTINGS
@given(st.sampled_from(["nvfp4", "mxfp4"]), st.integers(1, 70), st.integers(0, 2**31))
def test_packing_of_nibbles_is_undone(kind, width, seed):
    codes = torch.randint(0, 16, (3, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    spec = QuantSpec.floating(kind)
    assert torch.equal(unpack(pack(codes, spec), width, spec), codes)


@SETTINGS
@given(st.integers(2, 8), st.booleans(), st.integers(1, 6), st.integers(-30, 30), st.integers(0, 2**31))
def test_a_grid_holds_zero_and_errs_by_half_a_step(bits, symmetric, groups, power, seed):
    spec = QuantSpec(bits, symmetric, "group", 8)
    x = torch.randn(4, 8 * groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0**power
    codes, scale, zero = quantize(x, spec)
    assert bool((scale > 0).all()) and spec.lowest <= int(codes.min()) and int(codes.max()) <= spec.highest
    assert bool((zero >= spec.lowest).all() & (zero <= spec.highest).all())
    error = (dequantize(codes, scale, zero, spec) - x).abs().unflatten(-1, (groups, 8))
    steps = 0.5 if symmetric else 1.0  # a zero point that is rounded moves the ends by half a step
    assert bool((error <= steps * scale[..., None] * (1 + 1e-9)).all())
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 8), spec), spec), torch.zeros(2, 8))


# --- layouts and manifests -----------------------------------------------------------------------------------------


def _map_layout(width: int, a: int, diagonal: bool) -> dict:
    right = [1, width // a]
    return {"kind": "learned", "left": [1, a], "right": right, "blocks": 1, "tail": 1, "diagonal": diagonal,
            "orthogonal": not diagonal}  # fmt: skip


@st.composite
def layouts(draw) -> ModelLayout:
    kv: dict[int, KVLayout] = {}
    if draw(st.booleans()):
        grid = QuantSpec(4, draw(st.booleans()), "group", draw(st.sampled_from([3, 6, 12])))
        qk = draw(st.none() | st.just(_map_layout(12, 3, False)))
        for block in MAP.blocks:
            bits, keys, values = draw(st.tuples(st.integers(2, 8), st.floats(0.1, 1), st.floats(0.1, 1)))
            kv[block] = KVLayout(replace(grid, bits=bits, clip=keys), replace(grid, bits=bits, clip=values), qk)
    weights = draw(st.none() | st.builds(_weights, st.integers(2, 8), st.sampled_from([None, 6, 24]), st.booleans()))
    others = draw(st.sets(PLACES, max_size=3)) if weights is not None else ()
    rows = QuantSpec(4, rows_by="gsr", above=3.5)
    return ModelLayout(
        weights,
        kv,
        {(b, g): draw(activations() | st.just(rows)) for b in MAP.blocks for g in GROUPS},
        {g: _map_layout(MAP.width_in(g), a, d) for g, a, d in draw(st.lists(
            st.tuples(st.sampled_from(GROUPS), st.sampled_from([1, 2, 4, 8]), st.booleans()), max_size=3))},
        draw(st.none() | st.builds(LowRank, st.dictionaries(st.sampled_from(GROUPS), st.integers(1, 40)))),
        draw(st.none() | st.builds(PrefixLayout, st.lists(st.integers(0, 257), min_size=1).map(tuple), TEXT)),
        {p: replace(weights, bits=8) for p in others},
    )  # fmt: skip


@SETTINGS
@given(layouts())
def test_layouts_go_to_json_and_back(layout):
    again = ModelLayout.from_dict(json.loads(json.dumps(layout.to_dict())), MAP)
    assert again == layout and again.to_dict() == layout.to_dict()


@SETTINGS
@given(layouts(), GARBAGE, st.randoms(use_true_random=False))
def test_an_edited_layout_is_read_or_refused(layout, garbage, rng):
    values = layout.to_dict()
    _edit(values, garbage, rng)
    _only_ours(lambda: ModelLayout.from_dict(values, MAP))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["online"].update(down=_map_layout(2**60, 2, False)), "map of width"),
        (lambda v: v["online"].update(mlp=_map_layout(96, 2, False)), "'mlp'"),
        (lambda v: v["weights"].update(granularity="token"), "not one of theirs"),
        (lambda v: v["weights"].update(granularity="group", group_size=7), "does not divide"),
        (lambda v: v["activations"]["base"].update(granularity="channel"), "not one of theirs"),
        (lambda v: v.update(lowrank={"ranks": {"qkv": float("inf")}, "rounded": False, "dtype": "float32"}), "edited"),
        (lambda v: v.update(prefix={"tokens": [2**60], "method": "bos", "dtype": "float32"}), "prefix"),
    ],
)
def test_what_a_layout_may_not_say(change, message):
    values = ModelLayout(_weights(4, None), {}, {(b, g): QuantSpec(4) for b in MAP.blocks for g in GROUPS}).to_dict()
    change(values)
    with pytest.raises(PhaseQuantError, match=message):
        ModelLayout.from_dict(values, MAP)


NAMES = st.text(string.ascii_letters + "._- é", min_size=1, max_size=8).filter(
    lambda n: n.strip(". ") == n and n not in (manifest.NAME, manifest.CARD)
)


@settings(parent=SETTINGS, max_examples=25)
@given(st.dictionaries(NAMES, st.binary(max_size=40), max_size=5), st.data())
def test_manifests_find_every_changed_byte(tmp_path_factory, files, data):
    folder = tmp_path_factory.mktemp("files")
    files = {**files, **dict.fromkeys(manifest.REQUIRED, b"{}")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest.write(folder, {"versions": {"phasequant": "0"}})
    assert set(manifest.check(folder)["files"]) == set(files)
    name = data.draw(st.sampled_from(sorted(files)))
    changed = data.draw(st.binary(max_size=40).filter(lambda b: b != files[name]))
    (folder / name).write_bytes(changed)
    with pytest.raises(PhaseQuantError):
        manifest.check(folder)


@SETTINGS
@given(GARBAGE)
def test_garbage_is_no_manifest(tmp_path_factory, garbage):
    folder = tmp_path_factory.mktemp("garbage")
    for values in (garbage, {"files": garbage, "versions": {"phasequant": "0"}}, {"files": {}, "versions": garbage}):
        (folder / manifest.NAME).write_text(json.dumps(values))
        with pytest.raises(PhaseQuantError):
            manifest.check(folder)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "\0", None, 3, "a/..", "x" * 256])
def test_names_that_leave_a_directory(name):
    assert not stays_inside(name)


@pytest.mark.parametrize("name", ["a", "a/b", "model-00001-of-00002.safetensors", ".gitattributes", "..a"])
def test_names_that_stay(name):
    assert stays_inside(name)


def test_the_architectures_hash_is_of_what_computes():
    config = make_model("llama").config.to_dict()
    same = architecture_hash({**config, "dtype": "float16", "transformers_version": "9", "eos_token_id": [1]})
    assert architecture_hash(config) == same
    assert architecture_hash({**config, "rms_norm_eps": 1e-3}) != same


# --- transforms ----------------------------------------------------------------------------------------------------


def test_a_foreign_pickle_cannot_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    torch.save({"R1": Harm()}, tmp_path / "R.bin")
    with pytest.raises(PhaseQuantError, match="cannot be used"):
        load_rotations(tmp_path / "R.bin", MAP, 0)
    assert not (tmp_path / "harmed").exists()


@settings(parent=SETTINGS, max_examples=30)
@given(GARBAGE, st.sampled_from(["all", "blocks", "residual", "maps"]))
def test_garbage_is_no_transform(tmp_path_factory, garbage, where):
    path = tmp_path_factory.mktemp("transform") / "t.safetensors"
    block = {"maps": {}, "inputs": {}, "kv": None, "notes": {}}
    header = {"method": "x", "model": MAP.fingerprint(), "folds_norms": False, "residual": None, "blocks": [block] * 3}
    if where == "maps":
        header["blocks"] = [{**block, "maps": garbage}] * 3
    elif where != "all":
        header[where] = garbage
    values = garbage if where == "all" else header
    save_file({"x": torch.zeros(1)}, path, {"phasequant": json.dumps(values)})
    _only_ours(lambda: load_transform(path, MAP))


def test_a_transform_with_nan_is_refused(tmp_path):
    save_file({"x": torch.tensor([float("nan")])}, tmp_path / "t.safetensors", {"phasequant": "{}"})
    with pytest.raises(PhaseQuantError, match="NaN"):
        load_transform(tmp_path / "t.safetensors", MAP)
