"""Parts of the report page: the picture of a block, the error budget, kernels and bytes, and axes."""

import math
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from test_report import BLOCKS, GROUPS, make_report

from phasequant import pipeline
from phasequant.arch import ModelMap
from phasequant.nn import QuantLinear
from phasequant.nn.attention import kv_bytes_per_token
from phasequant.plan import make_plan
from phasequant.ranges import ranges
from phasequant.recipe import Recipe
from phasequant.report import budget, what_runs
from phasequant.report.figures import linear_ticks, log_axis, log_ticks
from phasequant.report.page import render
from phasequant.report.picture import picture


def test_ranges() -> None:
    assert ranges([9, 3, 4, 5, 4]) == "3-5, 9"
    assert ranges([0, 1]) == "0-1"
    assert ranges([]) == ""


def test_picture_shows_where_maps_stand() -> None:
    folded = {"name": "R1", "place": "residual stream", "where": "folded", "matrix": "hadamard 8", "rung": "hadamard"}
    report = make_report()
    report["transform"] = [{**folded, "macs": 0}, *report["transform"]]
    attention, mlp, ends = ([(step["kind"], step["name"]) for step in part["steps"]] for part in picture(report))
    assert ("cache", "KV cache") in attention and "online" not in dict(attention)
    assert mlp[-3:] == [("online", "R4"), ("linear", "down"), ("op", "+")]
    assert ends[0] == ("linear", "embedding")
    steps = {step["name"]: step for part in picture(report) for step in part["steps"]}
    assert steps["down"]["folded"] == ["R1", "R4⁻¹"] and steps["q, k, v"]["folded"] == ["R1⁻¹"]
    assert steps["down"]["lines"][0] == "inputs 4 bits; 8 in blocks 0"
    assert steps["q, k, v"]["lines"][0] == "inputs 4 bits; 16 in blocks 2"
    assert "27,648 multiply-adds a token" in steps["R4"]["lines"][-1]


def test_budget_is_what_the_plan_was_made_by() -> None:
    harm = {f"{b}.{g}": {"4": 0.1, "8": 0.01} for b in range(BLOCKS) for g in GROUPS}
    report = make_report(sensitivity={"name": "gradient", "seconds": 1.0, "notes": {}, "harm": harm})
    rows = {row["name"]: row for row in budget.rows(report)["+ budget, same share"]}
    assert rows["down"]["values"] == pytest.approx([0.3, 0.21])  # block 0 reads 8 bits
    assert rows["qkv"]["values"] == pytest.approx([0.3, 0.2])  # block 2 reads 16
    assert rows["o"]["values"] == pytest.approx([0.3, 0.3])
    assert rows["all"]["values"] == pytest.approx([1.2, 1.01]) and rows["all"]["less"] == "−15.8 %"
    assert "Measured by gradient" in render(report)
    own = {row["name"]: row for row in budget.rows(make_report())["+ budget, same share"]}
    assert own["down"]["values"] == pytest.approx([1e-3, 1e-3 / 256])


def test_kernels_and_bytes_are_those_of_the_model(tiny: Any) -> None:
    made = pipeline.run(tiny(), Recipe.load("quarot", ["policy.name=paper", "weights.clip=none"]))
    model, plan = made.model, made.plan
    found = what_runs(plan.model, plan, torch.device("cpu"), torch.float32)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    buffers = sum(t.nbytes for linear in linears for n, t in linear.named_buffers(recurse=False) if n != "input_range")
    assert sum(entry["bytes"] for entry in found["linears"]) == buffers
    assert found["kv"]["bytes"] == kv_bytes_per_token(model, plan.model)
    kernels = {linear.kernel(torch.device("cpu"), torch.float32).name for linear in linears}
    assert {entry["kernel"] for entry in found["linears"]} == kernels
    blocks = [(block, entry["group"]) for entry in found["linears"] for block in entry["blocks"]]
    assert sorted(blocks) == sorted((b, g) for b in plan.model.blocks for g in GROUPS)
    html = render(make_report(runs=found))
    assert 'id="runs"' in html and all(f"<code>{name}</code>" in html for name in kernels)


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.2, 20.0), (1.0, 1.3), (1e-9, 3e-9), (3.0, 27347.0), (-13.6, 42.2)):
        ticks = linear_ticks(low, high) if low < 0 else log_ticks(low, high)
        assert 2 <= len(ticks) <= 24 and all(low <= value <= high for value, _ in ticks)
    assert [text for _, text in log_ticks(8.0, 27347.0)] == ["10", "100", "1,000", "10,000"]
    axis = log_axis([[math.nan, None, 0.0, 5.0]], "x")
    assert axis["range"][0] < 5 < axis["range"][1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_its_picture(name: str) -> None:
    model_map = ModelMap.from_config(CONFIGS[name])
    plan = make_plan(Recipe.load("quarot"), model_map, None)
    found = what_runs(model_map, plan, torch.device("cpu"), torch.float32)
    experts = model_map.shape.experts
    assert {entry["copies"] for entry in found["linears"]} == ({1, experts} if experts else {1})
    if not experts:
        macs = sum(len(entry["blocks"]) * entry["in"] * entry["out"] for entry in found["linears"])
        assert macs == model_map.macs_total
    attention, mlp, _ = picture(make_report(runs=found, plan=plan.to_dict()))
    names = [step["name"] for step in mlp["steps"]]
    assert ("act(gate) · up" in names) == model_map.gated
    shared = "one norm" in " ".join(model_map.notes)
    assert ("attention reads, too" in " ".join(mlp["steps"][0]["lines"])) == shared
    assert ("sublayers' outputs" in " ".join(model_map.notes)) == (mlp["steps"][-2]["name"] == "norm")
    assert len(attention["steps"]) == 5 + len(found["norms"])
