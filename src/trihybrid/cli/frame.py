"""What all commands share: the application, its two consoles, common options, and how errors end it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

app = typer.Typer(
    name="trihybrid",
    help="Language models whose layers mix sliding windows, attention and the RWKV-7 recurrence.\n\n"
    "Start with `trihybrid demo`: it trains a small teacher, converts it, distils it and writes a report. "
    "`trihybrid train compact-cpu` trains a small model from scratch and packs it into a file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field, as `stages.0.loop.steps=50`; repeat it.")
]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]
RecipeName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
RecipeOut = Annotated[
    Path | None, typer.Option("--out", help="Run directory; `runs/<recipe name>` if not given.")
]
WeightsName = Annotated[
    Literal["full", "int8", "int4"],
    typer.Option(
        "--weights",
        help="How linear maps are kept: full, or int8 or int4 (pip install 'trihybrid[quantize]').",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the run directory holds.")]


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what each part decides.")] = False,
) -> None:
    """Set up logging."""
    from transformers.utils import logging as transformers_logging

    handler = RichHandler(console=errors, show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler]
    )
    if not verbose:
        transformers_logging.disable_progress_bar()
        # Its report about tensors that do not fit comes before our one line about them.
        transformers_logging.set_verbosity_error()


def guarded(call: Callable[[], Any]) -> None:
    """Run a call; errors of the user become one line and exit code 2."""
    try:
        call()
    except (ValueError, FloatingPointError, OSError) as error:
        complain(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2) from None


def complain(line: str) -> None:
    """One red line on standard error, as it stands."""
    errors.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Quality of the models of a conversion, one row each."""
    table = Table(title="Quality on validation text and planted recall")
    for name in ("model", "bits per byte", "KL (nats/token)", "agreement", "recall beyond window"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [row["bpb"], row["kl"], row["agreement"], row["recall"]]
        table.add_row(row["stage"], *("not measured" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def score_table(name: str, row: dict[str, Any]) -> Table:
    """Bits per byte of a compact model, one line a way of measuring.

    Args:
        name: of the model.
        row: a way of measuring -> {"decoded", "raw", "tokens", "bytes"}; None where it was not asked for.
    """
    table = Table(title=f"Bits per byte of {name}")
    for title in ("measured", "decoded bytes", "raw bytes", "tokens", "bytes"):
        table.add_column(title, justify="left" if title == "measured" else "right")
    for measure, score in row["bpb"].items():
        if score is not None:
            raw = "not measured" if score["raw"] is None else f"{score['raw']:.4f}"
            counts = (f"{score[field]:,}" for field in ("tokens", "bytes"))
            table.add_row(measure.replace("_", " "), f"{score['decoded']:.4f}", raw, *counts)
    return table
