"""Commands about models and runs that exist: eval, generate, report, doctor, version."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import trihybrid
from trihybrid.cli.frame import WeightsName, app, console, results_table, score_table

TOKENIZER = (
    "Tokenizer of an artifact: `bytes`, a tokenizer.json or a .model file. Looked for beside it if not given."
)


@app.command(name="eval")
def evaluate_command(
    model: Annotated[
        Path, typer.Argument(help="Folder of a teacher or student, or the file of an artifact.")
    ],
    teacher: Annotated[Path | None, typer.Option(help="Folder of the teacher, for KL and agreement.")] = None,
    text: Annotated[
        str,
        typer.Option(
            help="Validation text: `builtin`, a file or a folder; for an artifact token shards too."
        ),
    ] = "builtin",
    tokens: Annotated[
        int | None,
        typer.Option(
            help="At most this many validation tokens; 50,000 for a folder, all for an artifact.", min=256
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens a row; 256 for a folder, 1,024 for an artifact. Memory grows with its square.",
            min=16,
            max=1_048_576,
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER)] = None,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="Score with overlapping windows too (artifact).")
    ] = False,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between overlapping windows, 64 if not given (--sliding).", min=1),
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Start anew at every document (artifact).")
    ] = False,
    stateful: Annotated[
        bool, typer.Option("--stateful", help="Score with states carried between windows too (artifact).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON object.")] = False,
) -> None:
    """Measure a model: bits per byte; of a folder also KL and agreement with a teacher, recall, loss by position."""
    if model.is_file():
        if teacher is not None:
            raise ValueError("--teacher: an artifact has none; leave it away")
        if stride is not None and not sliding:
            raise ValueError("--stride is for --sliding; give that too, or leave it away")
        from trihybrid.recipe.artifact import evaluate_artifact
        from trihybrid.recipe.compact import CompactEvaluationSection
        from trihybrid.recipe.fields import load_section

        fields = {
            "length": length or 1024, "sliding": sliding, "isolated": isolated, "stateful": stateful,
            "validation_tokens": tokens, **({} if stride is None else {"stride": stride}),
        }  # fmt: skip
        section = load_section(CompactEvaluationSection, fields, None, "eval")
        row = evaluate_artifact(model, text, section, tokenizer)
        table = score_table(model.name, row)
    else:
        if tokenizer is not None or stride is not None or sliding or isolated or stateful:
            raise ValueError(
                f"{model}: --tokenizer, --sliding, --stride, --isolated and --stateful are for the file of an "
                "artifact; give one, or leave them away"
            )
        from trihybrid.recipe.evaluate_folder import evaluate_folder

        row = evaluate_folder(model, teacher, text, tokens or 50_000, length or 256)
        table = results_table([{"stage": model.name, **row}])
    if as_json:
        sys.stdout.write(json.dumps(row, indent=2) + "\n")
    else:
        console.print(table)


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a teacher or student with its tokenizer, or the file of an artifact."),
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="At most this many new tokens.", min=1)] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    top_k: Annotated[
        int, typer.Option(help="Sample among the k likeliest tokens; 0 for all (folder).", min=0)
    ] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens up to this probability (folder).")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens below this share of the likeliest one (folder).")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides logits of tokens that are there already; 1 for none (folder).")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string before which the text ends (folder); repeat it.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER)] = None,
    weights: WeightsName = "full",
) -> None:
    """Continue a text. Of a folder it is written as it comes."""
    if model.is_file():
        if top_p != 1 or min_p != 0 or repetition_penalty != 1 or stop or weights != "full":
            raise ValueError(
                f"{model}: --top-p, --min-p, --repetition-penalty, --stop and --weights are for a folder; give one, "
                "or leave them away"
            )
        from trihybrid.infer.sample import sample
        from trihybrid.recipe.artifact import find_tokenizer, load_artifact

        artifact = load_artifact(model)
        _, opened = find_tokenizer(artifact, tokenizer)
        text = sample(artifact.model, opened, prompt, tokens, temperature, top_k, seed)
        sys.stdout.write(prompt + text + "\n")
    else:
        if tokenizer is not None:
            raise ValueError(f"{model}: --tokenizer is for the file of an artifact; leave it away")
        from trihybrid.data.tokens import Tokenizer
        from trihybrid.infer.complete import pieces
        from trihybrid.infer.engine import Engine
        from trihybrid.infer.sampling import Sampling
        from trihybrid.models.checkpoint import load_model

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        loaded = load_model(model)
        opened = Tokenizer.from_file(model)
        engine = Engine(loaded, weights=weights)
        parts = pieces(engine, opened, prompt, tokens, sampling, stop or ())
        sys.stdout.write(prompt)
        for part in parts:
            sys.stdout.write(part)
            sys.stdout.flush()
        sys.stdout.write("\n")


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
