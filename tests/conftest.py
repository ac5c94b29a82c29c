"""Every test starts from the same seed, on one thread, with fresh memory full of NaN; one small run for all rooms."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

import interpreted
import micro_run as micro_commands

load = interpreted.load  # a fixture for all rooms

settings.register_profile("trihybrid", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("trihybrid")
# One thread a process: the suite runs in two processes, and threads that wait for each other only burn the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch, and let `torch.empty` hand out NaN (the largest number for integers), so that a kernel which
    leaves memory unwritten is found. That comes with torch's deterministic algorithms, which not every CUDA
    operator has, so tests marked gpu go without."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms("gpu" not in request.keywords)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def micro() -> ModuleType:
    """The module with the micro recipe and the helpers that run commands."""
    return micro_commands


@pytest.fixture(scope="session")
def micro_recipe(micro: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the micro recipe, beside its folder of texts."""
    return micro.write_recipe(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="session")
def micro_texts(micro_recipe: Path) -> Path:
    """The folder of texts of the micro recipe."""
    return micro_recipe.parent / "texts"


@pytest.fixture(scope="session")
def micro_run(micro: ModuleType, micro_recipe: Path) -> Path:
    """The directory of a finished run of the micro recipe, shared by all tests: read it, or copy it to change it."""
    folder = micro_recipe.parent / "run"
    result = micro.trihybrid("distill", micro_recipe, "--out", folder)
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def compact_recipe(micro_recipe: Path) -> Path:
    """The file of the micro recipe of a compact model, on the same texts."""
    import compact_bundle
    from trihybrid.recipe.fields import dump_recipe

    recipe = compact_bundle.micro_recipe(micro_recipe.parent / "texts").model_copy(deep=True)
    recipe.samples.prompts, recipe.samples.tokens = ["the slow "], 8
    path = micro_recipe.parent / "compact.yaml"
    path.write_text(dump_recipe(recipe))
    return path


@pytest.fixture(scope="session")
def compact_run(micro: ModuleType, compact_recipe: Path) -> Path:
    """The directory of a finished compact run, shared by all tests: read it, or copy it to change it."""
    folder = compact_recipe.parent / "compact"
    result = micro.trihybrid("train", compact_recipe, "--out", folder)
    assert result.code == 0, result.stderr
    return folder
