"""The findings of a report, a sentence each."""

import math

from phasequant.ranges import ranges
from phasequant.report.rows import phase_row
from phasequant.report.sides import FIRST, Json, bits, gaussian_gsr, mean_gsr, planned_side, sides


def summary(report: Json) -> list[str]:
    """The findings, a sentence each."""
    makers = (about_phases, about_prefix, about_jumps, about_gsr, about_noise, about_plan, about_results)
    return [sentence for maker in makers if (sentence := maker(report))]


def about_phases(report: Json) -> str:
    """The strongest phase, and how many more there are."""
    raw = report["observations"]["raw"]
    if not raw["phases"]:
        return "No value of the residual stream stands out: none exceeds 100 and 100 times the median."
    top = raw["phases"][0]
    row = phase_row(top)
    tokens = "the first token of a sequence" if top["first_token"] else f"tokens such as {row['tokens'][0][0]}"
    text = (
        f"Channel {top['channel']} of the residual stream reaches {row['peak']} on {tokens}, {row['times']} times the "
        f"median: written by {row['written']}, taken back by {row['taken_back']}."
    )
    others = sorted({phase["channel"] for phase in raw["phases"]} - {top["channel"]})
    if not others:
        return text
    named = f"Channel {others[0]} stands" if len(others) == 1 else f"{len(others)} other channels stand"
    return f"{text} {named} out too, less far."


def about_prefix(report: Json) -> str:
    """Which tokens stand before every sequence, and what that does to the largest ratio."""
    prefix, behind = report.get("prefix"), report["observations"].get("isolated")
    if not prefix or not behind:
        return ""
    tops = [max(side["groups"], key=lambda g: g["spike_ratio"]) for side in (report["observations"]["raw"], behind)]
    texts = " ".join(map(repr, prefix["texts"]))
    before, after = (f"{top['spike_ratio']:,.1f} (block {top['block']}, {top['group']})" for top in tops)
    return (
        f"A prefix of {len(prefix['tokens'])} tokens ({prefix['method']}: {texts}) with 16-bit keys and values stands "
        f"before every sequence: the largest token of a linear's input is {after} times the median one behind it, "
        f"{before} without."
    )


def about_jumps(report: Json) -> str:
    """Blocks beyond both thresholds."""
    limits = report["thresholds"]
    side = planned_side(report)
    key = FIRST["with" if limits["first_token"] else "without"]
    ratios, snrs = side["jump_ratio"][key], side["snr"]["4"][key]
    found = [b for b, r in enumerate(ratios) if r > limits["jr"] and snrs[b] < limits["snr"]]
    origin = "as given" if limits["given"] else "median and interquartile range of the blocks"
    rule = f"Jump Ratio above {limits['jr']:.2f} and 4-bit SNR below {limits['snr']:.1f} dB ({origin})"
    if not found:
        return f"No block rewrites the stream enough to drown what it held: none has a {rule}."
    top = max(found, key=ratios.__getitem__)
    size = f"{ratios[top]:.3g} times its norm"
    if len(found) == 1:
        return f"Block {top} rewrites the stream ({size}): {rule}."
    return f"{blocks_text(found)} rewrite the stream, block {top} most ({size}): {rule}."


def blocks_text(blocks: list[int]) -> str:
    """As in: Blocks 0, 3-7, 29."""
    return f"{'Block' if len(blocks) == 1 else 'Blocks'} {ranges(blocks)}"


def about_gsr(report: Json) -> str:
    """How coarse the 4-bit grid is, before and after."""
    means = [mean_gsr(side) for side in sides(report)]
    text = f"The 4-bit step of a linear's input is {means[0]:.2f} of its standard deviation on average (GSR)"
    if len(means) > 1:
        text += f" in the raw model and {means[-1]:.2f} {sides(report)[-1]['coordinates']}"
    width = report["model"]["d_model"]
    return f"{text}; a Gaussian row of {width} has {gaussian_gsr(width):.2f}."


def about_noise(report: Json) -> str:
    """The group whose low-bit input hurts most."""
    groups = report["observations"]["transformed"]["groups"]
    if not all("low" in g["noise"] for g in groups):
        return ""
    top = max(groups, key=lambda g: g["noise"]["low"])
    level = f"{10 * math.log10(max(top['noise']['low'], 1e-30)):.1f} dB".replace("-", "−")
    return (
        f"Read in {bits(report['plan']['low'])} bits, the input of {top['group']} in block {top['block']} adds most "
        f"noise to the stream, {level} relative to it."
    )


def about_plan(report: Json) -> str:
    """How many groups were raised."""
    plan, total = report["plan"], len(report["observations"]["raw"]["groups"])
    low = bits(plan["low"])
    if not plan["raised"]:
        return f"The plan ({plan['policy']}) raises nothing: all {total} groups read {low} bits.{_more(plan)}"
    high = " or ".join(map(str, sorted({entry["bits"] for entry in plan["raised"].values()})))
    share = f", {100 * plan['a8_share']:.1f} % of the linear multiply-adds" if high == "8" else ""
    return (
        f"The plan ({plan['policy']}) lets {len(plan['raised'])} of {total} groups read {high} bits{share}; "
        f"the others stay at {low}.{_more(plan)}"
    )


def _more(plan: Json) -> str:
    """What a plan gives more bits beside the inputs of groups; plans of older reports say nothing of it."""
    told = ""
    if plan.get("rows"):
        share, by = 100 * plan["rows"]["share"], plan["rows"]["by"]
        told += f" In those, the {share:g} % of the tokens with the largest {by} on the calibration text read 8 bits."
    for key, what in (
        ("weights_raised", "the weights of {} groups"),
        ("kv_raised", "the keys and values of {} blocks"),
    ):
        if plan.get(key):
            told += f" More bits have {what.format(len(plan[key]))}."
    return told


def about_results(report: Json) -> str:
    """The range of the table."""
    rows = report["results"]
    if len(rows) < 2:
        return ""
    ranked = sorted(rows[1:], key=lambda row: row["ppl"])
    return (
        f"Perplexity is {rows[0]['ppl']:.2f} for {rows[0]['name']}; the other rows lie between {ranked[0]['ppl']:.2f} "
        f"({ranked[0]['name']}) and {ranked[-1]['ppl']:.2f} ({ranked[-1]['name']})."
    )
