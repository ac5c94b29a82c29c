"""Commands that make compact models: train, data, budget, submit."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from trihybrid.cli.frame import (
    DryRun,
    Overrides,
    RecipeName,
    RecipeOut,
    Resume,
    app,
    complain,
    console,
    score_table,
)


@app.command()
def train(
    recipe: RecipeName,
    out: RecipeOut = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
) -> None:
    """Train a compact model from scratch, pack it into one file, reload that file and measure it.

    Under `torchrun` all processes train one model, and the first of them does the rest.
    """
    from trihybrid.recipe.fields import dump_recipe
    from trihybrid.recipe.load import load_compact

    loaded = load_compact(recipe, overrides)
    text = dump_recipe(loaded)
    if dry_run:
        sys.stdout.write(text)
        return
    from trihybrid.export.bundle import bundle_size
    from trihybrid.recipe.execute_compact import execute_compact, missed_targets
    from trihybrid.report import build_report

    folder = out or Path("runs") / loaded.name
    began = time.perf_counter()
    results = execute_compact(loaded, folder, resume, bundle_size(text))
    if results is None:  # one of the other processes of torchrun
        return
    page = build_report(folder)
    seconds = time.perf_counter() - began
    console.print(_summary_table(results))
    console.print(score_table(results["artifact"]["file"], results))
    console.print(f"{seconds:.0f} s; report: {page}; figures: {folder / 'results.json'}", soft_wrap=True)
    missed = missed_targets(loaded, results, seconds)
    for line in missed:
        complain(f"missed: {line}")
    if missed:
        raise typer.Exit(1)


@app.command()
def data(
    source: Annotated[
        str,
        typer.Argument(
            help="Training text: `builtin`, a file, a folder of text or shards, or datasets:NAME[:SPLIT]."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    tokenizer: Annotated[
        str, typer.Option(help="`bytes`, a tokenizer.json or a SentencePiece .model.")
    ] = "bytes",
    validation: Annotated[
        str | None, typer.Option(help="Validation text; a part of the training text if not given.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that tokenize.", min=1)] = 1,
    layout: Annotated[
        Literal["trihybrid", "challenge"],
        typer.Option(
            "--format", help="`challenge` also writes the challenge's files, in the folder `challenge`."
        ),
    ] = "trihybrid",
) -> None:
    """Turn text into token shards, whose bytes are checked against the text, with the tokenizer beside them.

    What was interrupted goes on behind its finished shards when the same command is given again.
    """
    from trihybrid.data.challenge import export_challenge
    from trihybrid.data.corpus import CorpusSection, prepare_corpus
    from trihybrid.recipe.fields import load_section

    fields = {"train": source, "validation": validation, "tokenizer": tokenizer}
    corpus = prepare_corpus(load_section(CorpusSection, fields, None, "data"), out, processes)
    corpus.tokenizer.save(out)
    for name, shards in (("train", corpus.train), ("validation", corpus.validation)):
        console.print(
            f"{name}: {shards.manifest.documents:,} documents, {len(shards):,} tokens, {shards.text_bytes:,} bytes of "
            f"text in {shards.folder}",
            soft_wrap=True,
        )
    if layout == "challenge":
        files = export_challenge(corpus.train, out / "challenge", "train")
        files += export_challenge(corpus.validation, out / "challenge", "val")
        console.print(f"challenge: {len(files)} files in {out / 'challenge'}", soft_wrap=True)


@app.command()
def budget(
    recipe: RecipeName,
    field: Annotated[
        Literal["hidden_size", "mlp_ratio", "pattern"], typer.Option(help="The field of the model to vary.")
    ] = "hidden_size",
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            help="A value to try; repeat it. Multiples of the recipe's own, up to twice, if not given.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Estimate which of the tried shapes fit into the byte limit. Needs no training."""
    from trihybrid.export.bundle import bundle_size
    from trihybrid.recipe.budget import budget_rows
    from trihybrid.recipe.fields import dump_recipe
    from trihybrid.recipe.load import load_compact

    loaded = load_compact(recipe, overrides)
    code = bundle_size(dump_recipe(loaded))
    rows = budget_rows(loaded, field, candidates, code)
    limit = loaded.compress.limit_bytes
    table = Table(title=f"{limit:,} bytes, {code:,} of them code; estimated for Gaussian weights")
    for title in (field, "parameters", "bytes", "left", "of these"):
        table.add_column(title, justify="left" if title == field else "right")
    for row in rows:
        mark = "largest that fits" if row.chosen else "" if row.fits else "too large"
        table.add_row(str(row.value), f"{row.parameters:,}", f"{row.bytes:,}", f"{row.margin:,}", mark)
    console.print(table)
    largest = max(rows, key=lambda row: row.parameters)
    if largest.fits:
        console.print(
            f"{field} {largest.value}, the largest of these, fits; larger ones were not tried: name some with --try",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


@app.command()
def submit(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, one a seed.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the submission; it must not exist yet.")],
    author: Annotated[str, typer.Option(help="Who submits.")],
    name: Annotated[str, typer.Option(help="Title of the submission.")],
    github: Annotated[str | None, typer.Option(help="The author's account; the author if not given.")] = None,
    blurb: Annotated[
        str | None, typer.Option(help="What it is, in a sentence or two; made from the recipe if not given.")
    ] = None,
    baseline: Annotated[
        list[float] | None,
        typer.Option(help="Bits per byte to be compared with; repeat it for several seeds."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Fewest runs.", min=1)] = 3,
    further: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that scoring needs and that counts, as a tokenizer of one's own; repeat it."
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Do not measure the artifacts again; submission.json says so.")
    ] = False,
) -> None:
    """Collect finished runs into the challenge's submission folder, or say what does not fit together."""
    from trihybrid.export.submission import write_submission

    made = write_submission(
        runs,
        out,
        author,
        name,
        github,
        blurb,
        baseline=baseline or (),
        seeds=seeds,
        further=further or (),
        rescore=not trust,
    )
    console.print(
        f"submission: {made.path}; {made.size.total:,} of {made.size.limit:,} bytes; "
        f"{made.fields['val_bpb']:.4f} bits per byte",
        soft_wrap=True,
    )


def _summary_table(results: dict[str, Any]) -> Table:
    total, limit = results["total_bytes"], results["limit_bytes"]
    artifact, code = results["artifact"]["bytes"], results["code_bytes"]
    rows = [
        ("parameters", f"{results['parameters']:,}"),
        ("steps, tokens", f"{results['steps']:,}, {results['tokens']:,}"),
        ("training", f"{results['train_seconds']:.0f} s, {results['ms_per_step']:.1f} ms a step"),
        ("artifact, code", f"{artifact:,} + {code:,} = {total:,} bytes"),
        ("limit", f"{limit:,} bytes, {abs(limit - total):,} {'left' if total <= limit else 'TOO MANY'}"),
        ("quantisation gap", f"{results['gap']:+.4f} bits per byte"),
    ]
    table = Table(title=results["name"], show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
