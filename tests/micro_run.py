"""A whole recipe in seconds, and the command line as tests call it.

The teacher has three layers (sliding, full, full) of 16 channels and a window of 8; its last layer shares keys and
values. Both full layers are converted.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from transformers.utils import logging as transformers_logging

import trihybrid as package
from trihybrid.cli import main

TEXT = "the slow river runs past stone houses and under bridges where children fish in summer"
SCRIPT = "from trihybrid.cli import main; main()"
ALIGN_STEPS = 30


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and both streams."""

    code: int
    stdout: str
    stderr: str


def write_texts(folder: Path) -> Path:
    """Twelve distinct documents of about 500 bytes."""
    folder.mkdir(parents=True)
    known = TEXT.split()
    for page in range(12):
        words = [known[(5 * page + place * (page + 1)) % len(known)] for place in range(90)]
        (folder / f"{page:02d}.txt").write_text(f"{' '.join(words)}. Page {page}.\n")
    return folder


def recipe_fields(source: Path) -> dict[str, Any]:
    """The micro recipe on the texts in `source`."""
    return {
        "name": "micro",
        "data": {
            "source": str(source),
            "validation_fraction": 0.1,
            "recall": {"fraction": 0.3, "pairs": 4, "rounds": 3, "evaluation_documents": 4},
        },
        "teacher": {
            "pretrain": {
                "shape": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "global_head_dim": 16,
                    "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                    "num_kv_shared_layers": 1,
                    "hidden_size_per_layer_input": 8,
                    "final_logit_softcapping": 30.0,
                    "max_position_embeddings": 512,
                    "initializer_range": 0.2,
                },
                "loop": {
                    "steps": 6,
                    "batch_size": 4,
                    "sequence_length": 32,
                    "checkpoint_every": 6,
                    "seed": 1,
                },
                "optimizer": {"learning_rate": 0.01},
            }
        },
        "surgery": {
            "rwkv7": {"head_dim": 8, "decay_rank": 4, "iclr_rank": 4, "gate_rank": 4},
            "tica": {"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 4},
            "calibration_tokens": 256,
        },
        "stages": [
            {
                "kind": "align",
                "loop": {
                    "steps": ALIGN_STEPS,
                    "batch_size": 2,
                    "sequence_length": 16,
                    "checkpoint_every": 2,
                    "seed": 2,
                },
                "optimizer": {"learning_rate": 0.01},
            },
            {
                "kind": "match",
                "loop": {
                    "steps": 4,
                    "batch_size": 2,
                    "sequence_length": 16,
                    "checkpoint_every": 2,
                    "seed": 3,
                },
                "optimizer": {"learning_rate": 0.003},
            },
        ],
        "evaluation": {"sequence_length": 64, "batch_size": 4, "validation_tokens": 400},
        "samples": {"prompts": ["the slow "], "tokens": 8},
    }


def write_recipe(folder: Path) -> Path:
    """`folder`/micro.yaml and the texts that it names in `folder`/texts."""
    source = folder / "texts"
    if not source.exists():
        write_texts(source)
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(source), sort_keys=False))
    return path


def surgery_options() -> list[str]:
    """The micro recipe's surgery as options of `plan` and `convert`."""
    surgery = recipe_fields(Path("texts"))["surgery"]
    return [part for key, value in surgery.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def trihybrid(*arguments: object) -> Result:
    """Run the command in this process. Log lines go where a user sees them, to standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    command = ["trihybrid", *map(str, arguments)]
    with (
        _own_logging(),
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return Result(code, stdout.getvalue(), stderr.getvalue())


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own, on one thread."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(package.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def refusal(result: Result) -> str:
    """The one line by which the command refused its input."""
    assert result.code == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def listing(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of all files under a folder, "" for folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def flip_byte(file: Path, place: int = -1) -> None:
    """Change one byte of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """pytest's handlers would keep the command from installing its own; afterwards all is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    verbosity = transformers_logging.get_verbosity()
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
