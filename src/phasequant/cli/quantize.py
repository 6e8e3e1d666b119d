"""`phasequant quantize`: a model into a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from phasequant.cli.options import (
    Allow,
    Calib,
    Device,
    Json,
    Model,
    PlanFile,
    Policy,
    Quiet,
    RecipeName,
    Seed,
    Sets,
    Share,
    emit,
    overrides_of,
)
from phasequant.console import out, set_quiet
from phasequant.errors import PhaseQuantError


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the checkpoint")],
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    plan: PlanFile = None,
    allow: Allow = None,
    keep: Annotated[
        Path | None, typer.Option("--save-transform", help="keep the transform too, for transform.method=load")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="read and write MODEL block by block; default: where it must"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="try the first blocks; tell peak memory, time and size of the output")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL by a recipe (default: quarot) and write a checkpoint."""
    import phasequant
    from phasequant.evaluate import weight_bytes
    from phasequant.nn import kv_bytes_per_token

    set_quiet(quiet)
    overrides = overrides_of(sets, policy, a8_share, calib, seed, plan, allow)
    if dry_run:
        if plan is not None or keep is not None:
            raise PhaseQuantError("--dry-run tries the first blocks only: leave --plan and --save-transform away")
        from phasequant.api import predict

        found = predict(model, recipe or "quarot", overrides=overrides, output=output, device=device, stream=stream)
        out.print(str(found), soft_wrap=True, markup=False)
        emit(found.to_dict(), as_json)
        return
    result = phasequant.quantize(
        model, recipe or "quarot", overrides=overrides, plan=plan, output=output, device=device, stream=stream
    )
    if keep is not None:
        result.save_transform(keep)
    size = weight_bytes(result.model)
    kv_bytes = kv_bytes_per_token(result.model, result.map)
    out.print(
        f"{output}: weights {size / 2**20:.1f} MiB, KV {kv_bytes:,} bytes a token, "
        f"A8 share {100 * result.plan.a8_share:.1f} %, inputs of {result.plan.input_bits:.2f} bits on average"
        + _more_bits(result.plan),
        soft_wrap=True,
        markup=False,
    )
    summary = {
        "checkpoint": str(output),
        "policy": result.plan.policy,
        "a8_share": result.plan.a8_share,
        "input_bits": result.plan.input_bits,
        "raised": list(result.plan.to_dict()["raised"]),
        "weights_raised": list(result.plan.to_dict()["weights_raised"]),
        "kv_raised": list(result.plan.to_dict()["kv_raised"]),
        "weight_bytes": size,
        "kv_bytes_per_token": kv_bytes,
    }
    emit(summary, as_json)


def _more_bits(plan: Any) -> str:
    """What a plan gives more bits beside activations."""
    groups, blocks = len(plan.weights_raised), len(plan.kv_raised)
    told = [f"weights of {groups} groups"] if groups else []
    told += [f"KV of {blocks} blocks"] if blocks else []
    return f", more bits for {' and '.join(told)}" if told else ""
