"""`transformers serve` for students: python -m trihybrid.infer.transformers_serve serve FOLDER --device cpu

It looks for a model's class by its name among transformers' own names, where a class of ours is not, and
`--trust-remote-code` does not reach that place either. So the names are put there before its command starts; all
arguments are transformers' own. `--continuous-batching` stores keys and values alone and cannot serve a student.
Seen with transformers 5.17 to 5.24.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from trihybrid.models.families import FAMILIES, register

# Of transformers' extra `serving`, and what its command imports beside.
NEEDED = {"openai": "openai", "uvicorn": "uvicorn", "fastapi": "fastapi", "requests": "requests"}


def check(arguments: Sequence[str]) -> None:
    """ValueError for a package that is not there, or `--continuous-batching`."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"transformers serve needs {', '.join(missing)}: pip install 'trihybrid[transformers-serving]'"
        )
    if "--continuous-batching" in arguments:
        raise ValueError(
            "--continuous-batching: it pages keys and values and has no place for a recurrence; leave it away, or use "
            "trihybrid serve"
        )


def main() -> None:
    """Run transformers' command with the arguments of this process; what `check` refuses ends it with one line."""
    try:
        check(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    register()
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main as command

    for family in FAMILIES:
        # The module that it looks in: the name `transformers` is bound anew by later imports.
        setattr(model_manager.transformers, family.student.__name__, family.student)
    sys.argv[0] = "transformers"
    command()


if __name__ == "__main__":
    main()
