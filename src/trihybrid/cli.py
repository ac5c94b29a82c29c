"""The command line: a thin layer that turns options into calls, and users' errors into one line and exit code 2."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers.utils import logging as transformers_logging

import trihybrid

app = typer.Typer(
    name="trihybrid",
    help="Language models whose layers mix sliding windows, attention and the RWKV-7 recurrence.\n\n"
    "Start with `trihybrid demo`: it trains a small teacher, converts it, distils it and writes a report.",
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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the run directory holds.")]


@app.callback()
def _configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what each part decides.")] = False,
) -> None:
    handler = RichHandler(console=errors, show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler]
    )
    if not verbose:
        transformers_logging.disable_progress_bar()
        # Its report about tensors that do not fit comes before our one line about them.
        transformers_logging.set_verbosity_error()


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
) -> None:
    """Train a small teacher, convert it, distil it, measure it, write a report. Five minutes on two CPU cores.

    A finished or broken run of the demo in the run directory is replaced; `--resume` continues it instead.
    """
    from trihybrid.data import read_documents
    from trihybrid.recipe.execute import check_recipe
    from trihybrid.recipe.load import load_recipe

    recipe = load_recipe("demo", overrides)
    if not dry_run and not resume:
        # An earlier demo goes only for one that can run.
        check_recipe(recipe)
        if recipe.data.source != "builtin":
            read_documents(recipe.data.source)
        _clear_demo(out)
    _run(recipe, out, dry_run, resume)


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; runs/<recipe name> if not given.")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
) -> None:
    """Run a recipe: teacher, surgery, distillation stages, evaluation, report."""
    from trihybrid.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    _run(loaded, out or Path("runs") / loaded.name, dry_run, resume)


@app.command()
def plan(
    teacher: Annotated[
        str, typer.Argument(help="A model folder, or a built-in shape such as `gemma-4-e2b`.")
    ],
    pattern: Annotated[str | None, typer.Option(help='Layout, one letter a layer, as "SSSSR * 7".')] = None,
    share_kv: Annotated[
        str, typer.Option(help="TICA's keys and values: `own`, or shared as the `teacher` does.")
    ] = "own",
    context: Annotated[
        list[int] | None,
        typer.Option(help="Context length for FLOPs; repeat it. 4096, 32768 and 131072 if not given.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Also write the plan to this file, for `convert --plan`.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a conversion would do and cost, layer by layer, before it is done. Needs no weights.

    The defaults are the plan of the model card: every global layer becomes RWKV-7 + TICA.
    """
    from trihybrid.models.checkpoint import load_teacher_config
    from trihybrid.run import write_json
    from trihybrid.surgery.plan import CONTEXTS, make_plan
    from trihybrid.surgery.render import plan_tables

    section = _surgery(pattern, share_kv, overrides)
    made = make_plan(load_teacher_config(teacher), section, teacher, tuple(context or CONTEXTS))
    if save is not None:
        write_json(save, made)
    if as_json:
        sys.stdout.write(json.dumps(made, indent=2) + "\n")
        return
    for part in plan_tables(made):
        console.print(part)


@app.command()
def convert(
    teacher: Annotated[Path, typer.Argument(help="Folder of a Gemma-4 text model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the student; it must not exist yet.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan saved by `trihybrid plan --save`.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help='Layout, one letter a layer, as "SSSSR * 7".')] = None,
    share_kv: Annotated[
        str, typer.Option(help="TICA's keys and values: `own`, or shared as the `teacher` does.")
    ] = "own",
    text: Annotated[
        str, typer.Option(help="Text to fit scales on: `builtin`, a file or a folder.")
    ] = "builtin",
    overrides: Overrides = None,
) -> None:
    """Convert a teacher into a student that inherits its weights. Distil it afterwards: it is only a start."""
    from trihybrid.recipe.convert import convert_folder

    section = None if plan_file is not None else _surgery(pattern, share_kv, overrides)
    if plan_file is not None and (pattern is not None or share_kv != "own" or overrides):
        raise ValueError("--plan says it all; leave --pattern, --share-kv and --set away")
    made = convert_folder(teacher, out, section, plan_file, text)
    converted = [layer["index"] for layer in made["layers"] if layer["before"] != "+".join(layer["after"])]
    console.print(
        f"{out}: layers {converted} converted; {made['after']['parameters']:,} parameters", soft_wrap=True
    )


@app.command(name="eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student.")],
    teacher: Annotated[Path | None, typer.Option(help="Folder of the teacher, for KL and agreement.")] = None,
    text: Annotated[str, typer.Option(help="Validation text: `builtin`, a file or a folder.")] = "builtin",
    tokens: Annotated[int, typer.Option(help="At most this many validation tokens.", min=256)] = 50_000,
    length: Annotated[int, typer.Option(help="Tokens a row.", min=16)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")] = False,
) -> None:
    """Measure a model: bits per byte, KL and agreement with a teacher, recall by distance, loss by position."""
    from trihybrid.recipe.evaluate_folder import evaluate_folder

    row = evaluate_folder(model, teacher, text, tokens, length)
    if as_json:
        sys.stdout.write(json.dumps(row, indent=2) + "\n")
    else:
        console.print(_results_table([{"stage": model.name, **row}]))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student, with its tokenizer.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="At most this many new tokens.", min=1)] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text."""
    from trihybrid.data.tokens import Tokenizer
    from trihybrid.infer.complete import complete
    from trihybrid.models.checkpoint import load_model

    loaded = load_model(model)
    text = complete(loaded, Tokenizer.from_file(model), prompt, tokens, temperature, seed=seed)
    sys.stdout.write(prompt + text + "\n")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")] = Path("runs/demo")) -> None:
    """Write report.html, one self-contained page about a run."""
    from trihybrid.report import build_report

    console.print(f"report: {build_report(run)}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Print versions, devices and the backend of each operator, and check the numerics (about five seconds)."""
    from trihybrid import doctor as examination

    raise typer.Exit(examination.main())


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(trihybrid.__version__ + "\n")


def main() -> None:
    """Entry point: errors of the user become one line and exit code 2."""
    _guarded(app)


def _guarded(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, FloatingPointError, OSError) as error:
        errors.print(
            f"error: {' '.join(str(error).split())}",
            style="bold red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(2) from None


def _surgery(pattern: str | None, share_kv: str, overrides: list[str] | None) -> Any:
    from trihybrid.recipe.load import load_section
    from trihybrid.surgery.section import SurgerySection

    fields: dict[str, Any] = {"pattern": pattern, "share_kv": share_kv}
    return load_section(SurgerySection, fields, overrides, "surgery")


def _clear_demo(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and recipe.read_text().startswith("name: demo\n"):
        console.print(f"replacing the earlier demo in {folder}", soft_wrap=True)
        shutil.rmtree(folder)


def _run(recipe: Any, out: Path, dry_run: bool, resume: bool) -> None:
    from trihybrid.recipe.execute import execute
    from trihybrid.recipe.load import dump_recipe
    from trihybrid.recipe.measure import missed_targets
    from trihybrid.report import build_report

    if dry_run:
        sys.stdout.write(dump_recipe(recipe))
        return
    began = time.perf_counter()
    rows = execute(recipe, out, resume)
    page = build_report(out)
    seconds = time.perf_counter() - began
    console.print(_results_table(rows))
    console.print(f"{seconds:.0f} s; report: {page}; figures: {out / 'results.json'}", soft_wrap=True)
    missed = missed_targets(recipe, rows, seconds)
    for line in missed:
        errors.print(f"missed: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if missed:
        raise typer.Exit(1)


def _results_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Quality on validation text and planted recall")
    for name in ("model", "bits per byte", "KL (nats/token)", "agreement", "recall beyond window"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [row["bpb"], row["kl"], row["agreement"], row["recall"]]
        table.add_row(row["stage"], *("not measured" if cell is None else f"{cell:.4f}" for cell in cells))
    return table
