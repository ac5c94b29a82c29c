"""Fixtures of the benchmarks' tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trihybrid


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a benchmark by its name, in a process of its own with one thread."""
    folder = Path(__file__).parents[2] / "benchmarks"
    environment = os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / f"{name}.py"), *options]
        return subprocess.run(command, env=environment, text=True, capture_output=True)

    return run
