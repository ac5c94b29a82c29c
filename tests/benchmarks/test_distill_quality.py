"""The experiment's script, from a teacher to a line in a page of results, in small."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trihybrid.recipe.load import load_conversion
from trihybrid.run import hash_folder

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import distill_quality
        import results
    finally:
        sys.path.pop(0)
    return {"distill_quality": distill_quality, "results": results}


@pytest.fixture
def call(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(name: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return modules[name].main()

    return call


def test_every_row_is_a_recipe_that_differs_from_the_others(modules: dict[str, ModuleType]) -> None:
    quality = modules["distill_quality"]
    recipes = {}
    for name, row in quality.ROWS.items():
        recipe = load_conversion(str(quality.RECIPE), list(row.changes))
        recipes[name] = (recipe.model_dump_json(), row.stages, row.teacher)
    assert len(recipes) == 16 and len(set(recipes.values())) == 16


@pytest.mark.long
def test_a_teacher_and_a_row_end_in_the_page(
    call: Callable[..., int], micro_texts: Path, tmp_path: Path
) -> None:
    options = ["--out", tmp_path / "runs", "--tiny", "--set", f"data.source={micro_texts}"]
    call("distill_quality", "teacher", "teacher", *options)
    call("distill_quality", "row", "two-global", *options, "--rows", tmp_path / "rows" / "quality")
    row = json.loads((tmp_path / "rows" / "quality" / "two-global.json").read_text())
    assert row["teacher"] == hash_folder(tmp_path / "runs" / "teacher" / "teacher")
    assert [side["stage"] for side in row["measured"]] == ["teacher", "operated", "aligned", "matched"]
    assert row["tokens"] == {"aligned": 2 * 2 * 32, "matched": 2 * 2 * 32}
    assert [found["length"] for found in row["measured"][-1]["needle"]] == [32, 64]
    assert row["cache_bytes"]["after"] < row["cache_bytes"]["before"]
    page = tmp_path / "page.md"
    page.write_text(
        "Above.\n<!-- compact rows -->\n<!-- end of compact rows -->\nBetween.\n<!-- quality rows -->\nold\n"
        "<!-- end of quality rows -->\nBelow.\n"
    )
    call("results", tmp_path / "rows", "--page", page)
    lines = page.read_text().splitlines()
    assert lines[0] == "Above." and lines[3] == "Between." and lines[-1] == "Below." and "old" not in lines
    (line,) = [line for line in lines if line.startswith("| two-global |")]
    assert line.count("|") == 13 and f"{row['measured'][-1]['bpb']:.4f}" in line
