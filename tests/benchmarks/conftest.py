"""Fixtures of the benchmarks' tests."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import trihybrid

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def module() -> Callable[[str], ModuleType]:
    """Imports a benchmark by its name, with the files beside it in reach."""

    def module(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(FOLDER)
            return importlib.import_module(name)

    return module


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a benchmark by its name, in a process of its own with one thread."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
        return subprocess.run(command, env=environment, text=True, capture_output=True)

    return run
