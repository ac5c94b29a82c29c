"""For all tests of this room, made once: finished runs of a micro recipe, the folder of a small student, and a Python
that has torch and transformers and no trihybrid."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from compact_bundle import micro_recipe, train_micro
from small_student import make_student
from trihybrid.storage.folder import save_folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and validation text, a few kilobytes."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = (f'{{"text": "Document {i}. {"abc def " * (3 + i % 5)}{i * i}"}}' for i in range(120))
    path.write_text("\n".join(documents) + "\n", encoding="ascii")
    return path


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[Path]:
    """Three runs of one recipe with seeds 0, 7 and 42. Copy one to change it."""
    root = tmp_path_factory.mktemp("runs")
    return [train_micro(micro_recipe(text_file, seed), root / f"seed{seed}") for seed in (0, 7, 42)]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student."""
    folder = tmp_path_factory.mktemp("student") / "student"
    save_folder(folder, make_student().save_pretrained)
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Run a script in a Python whose path has everything that is installed here but trihybrid: the standard library and
    a folder of links. No site module, so no `.pth` file brings it back. The script prints one JSON object."""
    root = tmp_path_factory.mktemp("bare")
    packages = root / "packages"
    packages.mkdir()
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            if "trihybrid" not in entry.name and entry.suffix != ".pth":
                link = packages / entry.name
                if not link.exists():
                    link.symlink_to(entry)

    def run(script: str, *arguments: object) -> dict:
        start = (
            f"import sys; sys.path.append({str(packages)!r}); import importlib.util; "
            "assert importlib.util.find_spec('trihybrid') is None\n"
        )
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))
        }
        environment |= {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", start + script, *map(str, arguments)],
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
