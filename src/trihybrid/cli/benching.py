"""`trihybrid bench`: how fast a model runs here, teacher beside student."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trihybrid.cli.frame import WeightsName, app, console


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student.")],
    teacher: Annotated[Path | None, typer.Option(help="Folder of a model to stand beside it.")] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of context; repeat it. 128, 512 and 2048 if not given.", min=1),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at a time; repeat it. 1 and 4 if not given.", min=1)
    ] = None,
    execution: Annotated[
        str, typer.Option(help="How a step runs: eager, compiled (CPU), graph, fused-graph or kernels (GPU).")
    ] = "eager",
    weights: WeightsName = "full",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Write speed.html, figures and speed.json into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Measure prefill and decoding in the engine, and what the states hold, against context and batch."""
    import torch

    from trihybrid.infer.speed import measure_speed
    from trihybrid.models.checkpoint import load_model
    from trihybrid.models.device import present_device
    from trihybrid.report.speed import HEADS, speed_cells, speed_figures, speed_page
    from trihybrid.run import write_json

    # Measuring takes minutes, so all that could end the command behind it is looked at before.
    if out is not None:
        _check_out(out)
    if teacher is not None and not (teacher / "config.json").is_file():
        raise ValueError(f"--teacher {teacher}: no config.json there; name the folder of a model")
    place = present_device(device)
    rows = []
    for folder in (model, *((teacher,) if teacher is not None else ())):
        loaded = load_model(folder).to(place)
        rows += measure_speed(
            folder.name,
            loaded,
            context or [128, 512, 2048],
            batch or [1, 4],
            execution=execution,  # type: ignore[arg-type]
            weights=weights,
        )
        del loaded
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {execution}"
        machine += f", weights {weights}"
        (out / "speed.html").write_text(speed_page(f"Speed of {model.name}", rows, machine), encoding="utf-8")
        for name, png in speed_figures(rows).items():
            (out / f"{name}.png").write_bytes(png)
        write_json(out / "speed.json", [asdict(row) for row in rows])
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    table = Table(title=f"Speed of {model.name}")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "Model" else "right")
    for row in rows:
        table.add_row(*speed_cells(row))
    console.print(table)


def _check_out(out: Path) -> None:
    """Raise ValueError where no folder can be made, or written into, at a path."""
    nearest = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(
            f"--out {out}: {nearest} is a file; name a folder, or a path that does not exist yet"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {nearest} may not be written into; name another folder")
