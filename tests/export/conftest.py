"""For all tests of this room, made once: finished runs of a micro recipe, and the folder of a small student."""

from pathlib import Path

import pytest

from compact_bundle import micro_recipe, train_micro
from small_student import make_student
from trihybrid.models.checkpoint import save_folder


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
