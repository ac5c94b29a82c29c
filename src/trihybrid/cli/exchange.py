"""Commands that hand models over and take them in: export, import, vectors."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trihybrid.cli.frame import app, console


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Folder of a converted student.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
) -> None:
    """Write a student as a folder that transformers loads by itself, with its code, hashes and a model card.

    It needs torch and transformers where it is loaded (`trust_remote_code=True`), and uses the kernels of trihybrid
    where that is installed.
    """
    from trihybrid.export.folder.write import export_folder

    made = export_folder(student, out)
    console.print(
        f"{out}: {made.weight_bytes:,} bytes of weights, {made.code_bytes:,} of code in {len(made.code)} files; "
        f"card: {out / 'README.md'}",
        soft_wrap=True,
    )


@app.command(name="import")
def import_command(
    folder: Annotated[
        Path, typer.Argument(help="An exported student, or a published one of the hxa07 family.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the student; it must not exist yet.")],
    revision: Annotated[
        str | None, typer.Option(help="Revision of a published student, as `hxa07c`, if it does not say.")
    ] = None,
) -> None:
    """Read a folder from elsewhere as a student of ours. No code in it is run.

    Every tensor must find its place; one that is missing, does not fit or belongs to nothing is named, and nothing is
    written.
    """
    from trihybrid.export.incoming import import_folder

    made = import_folder(folder, out, revision)
    console.print(f"{out}: read as {made.source}", soft_wrap=True)
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True)


@app.command()
def vectors(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 12,
    steps: Annotated[int, typer.Option(help="Single tokens after it.", min=0)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the tokens.", min=0)] = 0,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids of prompt and steps, as `2,17,5`, in place of random ones.")
    ] = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16"], typer.Option(help="What the model computes in.")
    ] = "float32",
) -> None:
    """Write inputs, outputs and states layer by layer, with a manifest, to hold another engine to.

    A prompt, then single tokens, each with the states before and after it.
    """
    from trihybrid.export.vectors.write import write_vectors

    given = None
    if tokens is not None:
        parts = tokens.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f'--tokens: "{tokens}"; give token ids with commas between them, as 2,17,5')
        given = [int(part) for part in parts]
    manifest = write_vectors(model, out, prompt, steps, seed, given, dtype)
    count = sum(len(step["tensors"]) for step in manifest["steps"])
    console.print(
        f"{out}: {count} tensors of {len(manifest['steps'])} steps; see manifest.json", soft_wrap=True
    )
