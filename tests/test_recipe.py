"""YAML ⇄ Recipe without loss; every mistake named, with the nearest right word."""

import pytest
import yaml

from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec
from phasequant.recipe import Recipe, parts, presets


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_print_themselves(name):
    recipe = Recipe.load(name)
    text = recipe.to_yaml()
    assert Recipe.from_dict(yaml.safe_load(text)) == recipe
    keys = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    comments = [line for line in text.splitlines() if line.strip().startswith("#")]
    assert len(keys) == len(comments)  # one comment above every key
    assert presets()[name] and not presets()[name].startswith("compose")


def test_parts_compose(tmp_path):
    assert Recipe.load("quarot").weights.bits == Recipe.load("quarot").kv.bits == 4
    assert {"w4", "a4", "a8", "kv4"} <= set(parts())
    mine = tmp_path / "mine.yaml"
    mine.write_text("compose: [dynamicptq, a8]\nseed: 7\n")
    recipe = Recipe.load(mine)
    assert (recipe.activations.bits, recipe.policy.name, recipe.seed) == (8, "paper", 7)


def test_overrides_and_copies():
    recipe = Recipe.load("quarot", ["weights.bits=8", "kv.group_size=32", "policy.tau_jr=0.5"])
    assert recipe.weights.spec() == QuantSpec(8, True, "channel", None, "mse")
    assert recipe.kv.spec(64) == QuantSpec(4, False, "group", 32)
    assert recipe.policy.tau_jr == 0.5
    changed = recipe.with_("weights.bits=4", kv={"bits": 16})
    assert changed.weights.bits == 4 and changed.kv.spec(64) is None and recipe.weights.bits == 8


def test_sixteen_bits_switch_a_part_off():
    recipe = Recipe.load("16bit")
    assert recipe == Recipe()
    assert recipe.weights.spec() is recipe.activations.spec() is recipe.kv.spec(64) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weigths.bits=4", r"unknown recipe key 'weigths': did you mean 'weights'"),
        ("weights.bit=4", r"unknown recipe key 'weights.bit': did you mean 'bits'"),
        ("policy.name=papper", r"'policy.name' cannot be 'papper': did you mean 'paper'"),
        ("transform.method=quaort", "did you mean 'quarot'"),
        ("weights.bits=9", "'weights.bits' cannot be 9"),
        ("activations.clip=0", "activations.clip"),
        ("policy.a8_share=1.5", "policy.a8_share"),
        ("calibration.sequences=0", "calibration.sequences"),
        ("weights.granularity=group", "group_size"),
        ("weights=4", "weights"),
        ("seed.x=1", "seed"),
        ("weights.bits", "key=value"),
        ("weights.bits=[", "YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.load("quarot", [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "mapping"),
        ("a: [\n", "YAML"),
        ("compose: quarot\n", "list"),
        ("compose: [nope]\n", "no recipe 'nope'"),
        ("speed: 3\n", "did you mean 'seed'"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.load(path)


def test_unknown_names():
    with pytest.raises(PhaseQuantError, match="did you mean 'quarot'"):
        Recipe.load("quartot")
    with pytest.raises(PhaseQuantError, match="does not exist"):
        Recipe.load("no/such.yaml")


def test_recipes_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Recipe().seed = 3


def test_no_preset_hides_a_part():
    assert not set(parts()) & set(presets())
