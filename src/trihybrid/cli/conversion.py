"""Commands that convert a teacher: demo, distill, plan, convert."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from trihybrid.cli.frame import (
    DryRun,
    Out,
    Overrides,
    RecipeName,
    RecipeOut,
    Resume,
    app,
    complain,
    console,
    results_table,
)


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
    from trihybrid.recipe.load import load_conversion

    recipe = load_conversion("demo", overrides)
    if not dry_run and not resume:
        # An earlier demo goes only for one that can run.
        check_recipe(recipe)
        if recipe.data.source != "builtin":
            read_documents(recipe.data.source)
        _clear_demo(out)
    _run(recipe, out, dry_run, resume)


@app.command()
def distill(
    recipe: RecipeName,
    out: RecipeOut = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
) -> None:
    """Run a recipe: teacher, surgery, distillation stages, evaluation, report.

    Under `torchrun` all processes train one model, and the first of them does the rest.
    """
    from trihybrid.recipe.load import load_conversion

    loaded = load_conversion(recipe, overrides)
    _run(loaded, out or Path("runs") / loaded.name, dry_run, resume)


@app.command()
def plan(
    teacher: Annotated[
        str,
        typer.Argument(
            help="A model folder, a built-in shape such as `gemma-4-e2b`, or the recipe of a conversion."
        ),
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
    from trihybrid.recipe.load import shipped_recipes
    from trihybrid.recipe.planned import plan_recipe
    from trihybrid.run import write_json
    from trihybrid.surgery.plan import CONTEXTS, make_plan
    from trihybrid.surgery.render import plan_tables

    contexts = tuple(context or CONTEXTS)
    if teacher in shipped_recipes() or Path(teacher).suffix in (".yaml", ".yml"):
        if pattern is not None or share_kv != "own":
            raise ValueError(
                "a recipe has a surgery of its own; change it with --set surgery.pattern=... and the like"
            )
        made = plan_recipe(teacher, overrides, contexts)
    else:
        section = _surgery(pattern, share_kv, overrides)
        made = make_plan(load_teacher_config(teacher), section, teacher, contexts)
    if save is not None:
        write_json(save, made)
    if as_json:
        sys.stdout.write(json.dumps(made, indent=2) + "\n")
        return
    for part in plan_tables(made):
        console.print(part)


@app.command()
def convert(
    teacher: Annotated[
        str,
        typer.Argument(
            help="Folder of a Gemma, Llama, Mistral or Qwen, as published or text only, or its name on the hub."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the student; it must not exist yet.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan saved by `trihybrid plan --save`.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help='Layout, one letter a layer, as "SSSSR * 7".')] = None,
    share_kv: Annotated[
        str, typer.Option(help="TICA's keys and values: `own`, or shared as the `teacher` does.")
    ] = "own",
    text: Annotated[
        str,
        typer.Option(
            help="Text to fit scales on, where `--set calibration_tokens=...` asks for some: `builtin`, a file "
            "or a folder."
        ),
    ] = "builtin",
    towers: Annotated[
        bool, typer.Option(help="Carry a multimodal teacher's towers for images and sound along, untouched.")
    ] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    overrides: Overrides = None,
) -> None:
    """Convert a teacher into a student that inherits its weights. Distil it afterwards: it is only a start.

    The teacher is read and the student written as a stream, never whole in memory.
    """
    from trihybrid.storage.read_ahead import read_ahead

    read_ahead(Path(teacher))
    from trihybrid.recipe.convert import convert_folder

    section = None if plan_file is not None else _surgery(pattern, share_kv, overrides)
    if plan_file is not None and (pattern is not None or share_kv != "own" or overrides):
        raise ValueError("--plan says it all; leave --pattern, --share-kv and --set away")
    made, report = convert_folder(teacher, out, section, plan_file, text, towers, revision)
    converted = [layer["index"] for layer in made["layers"] if layer["before"] != "+".join(layer["after"])]
    console.print(
        f"{out}: layers {converted} converted; {made['after']['parameters']:,} parameters", soft_wrap=True
    )
    for line in report.lines():
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
    if rows is None:  # one of the other processes of torchrun
        return
    page = build_report(out)
    seconds = time.perf_counter() - began
    console.print(results_table(rows))
    console.print(f"{seconds:.0f} s; report: {page}; figures: {out / 'results.json'}", soft_wrap=True)
    missed = missed_targets(recipe, rows, seconds)
    for line in missed:
        complain(f"missed: {line}")
    if missed:
        raise typer.Exit(1)
