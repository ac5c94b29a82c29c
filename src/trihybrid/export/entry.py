"""The program of a bundle: train_gpt.py, which trains one compact model and scores what it wrote.

    python train_gpt.py --data FOLDER --out RUN [--tokenizer FILE] [--validation FILE] [--seed N] [--resume]

The archive holds this file as its `__main__.py`, beside the package's modules, `recipe.yaml` and `members.json` (name
-> sha256 of each other member), which is checked before anything else of the archive runs.
"""

import argparse
import hashlib
import json
import logging
import sys
import time
import zipfile
from pathlib import Path

MEMBERS = "members.json"
RECIPE = "recipe.yaml"


def check_members(archive: Path) -> None:
    """Compare each member of a bundle with the list that it carries.

    Raises:
        ValueError: a member is missing, added or changed; names it.
    """
    with zipfile.ZipFile(archive) as bundle:
        wanted = json.loads(bundle.read(MEMBERS))
        found = {
            name: hashlib.sha256(bundle.read(name)).hexdigest()
            for name in bundle.namelist()
            if name != MEMBERS
        }
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{archive}: {', '.join(wrong)} is not what {MEMBERS} says; make the bundle again")


def main(archive: Path, arguments: list[str]) -> int:
    """Run a bundle; returns the exit status: 0, 1 for a target that was missed, 2 for a user's error.

    Args:
        archive: the bundle's own file.
        arguments: of the command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        prog=archive.name, description="Train a compact model; score what it wrote."
    )
    parser.add_argument("--data", help="training text or token shards; needed unless the recipe says builtin")
    parser.add_argument("--validation", help="validation text or shards; needed if the recipe names some")
    parser.add_argument(
        "--tokenizer", help="a SentencePiece .model or tokenizer.json; needed unless the recipe says bytes"
    )
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training, 0 if not given")
    parser.add_argument("--resume", action="store_true", help="go on with what the run directory holds")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_members(archive)
        return train(archive, options)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def train(archive: Path, options: argparse.Namespace) -> int:
    """Train, write the artifact, reload and score it, and print what has been found to the last digit.

    Raises:
        ValueError: an option that does not serve, or a run directory that holds something else.
    """
    import trihybrid
    from trihybrid.recipe.compact import CompactRecipe
    from trihybrid.recipe.execute_compact import execute_compact, missed_targets
    from trihybrid.recipe.fields import parse_fields, validate

    began = time.perf_counter()
    with zipfile.ZipFile(archive) as bundle:
        fields = parse_fields(bundle.read(RECIPE), RECIPE)
    given = {"train": options.data, "validation": options.validation, "tokenizer": options.tokenizer}
    fields["data"] |= {name: value for name, value in given.items() if value is not None}
    fields["train"]["loop"]["seed"] = options.seed
    recipe = validate(CompactRecipe, fields, RECIPE)
    results = execute_compact(recipe, options.out, options.resume, archive.stat().st_size)
    if results is None:  # one of the other processes of torchrun
        return 0
    print(f"package:{trihybrid.__file__}")
    for name in ("parameters", "config_hash", "code_hash", "seed", "steps", "code_bytes", "total_bytes"):
        print(f"{name}:{results[name]}")
    print(f"artifact_bytes:{results['artifact']['bytes']} artifact_sha256:{results['artifact']['sha256']}")
    for name, score in results["bpb"].items():
        if score is not None:
            print(f"final_{name} " + " ".join(f"{field}:{value!r}" for field, value in score.items()))
    missed = missed_targets(recipe, results, time.perf_counter() - began)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, sys.argv[1:]))
