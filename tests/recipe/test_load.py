"""Recipes are read whole or refused in one line that names the place; shipped ones hold what they promise."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trihybrid.recipe.compact import CompactRecipe
from trihybrid.recipe.execute import check_recipe
from trihybrid.recipe.load import (
    dump_recipe,
    find_recipe,
    load_compact,
    load_conversion,
    load_recipe,
    load_section,
    shipped_recipes,
)
from trihybrid.recipe.planned import teacher_config
from trihybrid.recipe.schema import Recipe
from trihybrid.surgery.layout import settle
from trihybrid.surgery.plan import check_plan, make_plan
from trihybrid.surgery.section import SurgerySection

SHIPPED = sorted(Path(__file__).parents[2].joinpath("recipes").glob("*.yaml"))
CONVERSIONS = [path for path in SHIPPED if "kind: compact\n" not in path.read_text()]


def sections(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every mapping inside a recipe."""
    if isinstance(value, dict):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from sections(item, (*path, key))


def written(folder: Path, fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return path


def refused(source: str | Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_recipe(source, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONVERSIONS, ids=lambda path: path.stem)
def test_a_shipped_conversion_loads_plans_and_dry_runs(micro: ModuleType, path: Path) -> None:
    recipe = load_conversion(path)
    assert recipe.name == path.stem
    assert load_recipe(path.stem) == recipe
    # The weights of a published teacher are not at hand.
    base = teacher_config(recipe) if recipe.teacher.shape else check_recipe(recipe)
    planned = check_plan(make_plan(base, recipe.surgery, recipe.name), base)
    assert planned == settle(base, recipe.surgery)
    left = {"calibration_tokens": recipe.surgery.calibration_tokens}
    assert planned.model_copy(update=left) == recipe.surgery
    result = micro.trihybrid("distill", path, "--dry-run")
    assert (result.code, result.stdout, result.stderr) == (0, dump_recipe(recipe), "")


@pytest.mark.parametrize("path", sorted({*SHIPPED} - {*CONVERSIONS}), ids=lambda path: path.stem)
def test_a_shipped_compact_recipe_loads_and_dry_runs(micro: ModuleType, path: Path) -> None:
    recipe = load_compact(path)
    assert recipe.name == path.stem
    assert load_recipe(path.stem) == recipe
    result = micro.trihybrid("train", path, "--dry-run")
    assert (result.code, result.stdout, result.stderr) == (0, dump_recipe(recipe), "")


def test_a_recipe_is_of_the_kind_that_it_says(tmp_path: Path, micro_recipe: Path) -> None:
    assert isinstance(load_recipe(micro_recipe), Recipe)
    compact = {"kind": "compact", "name": "a", "train": {"loop": {"steps": 1}}}
    path = written(tmp_path, compact)
    assert isinstance(load_recipe(path), CompactRecipe)
    with pytest.raises(ValueError, match="trains a compact model; use `trihybrid train`"):
        load_conversion(path)
    with pytest.raises(ValueError, match="converts a teacher; use `trihybrid distill`"):
        load_compact(micro_recipe)
    path = written(tmp_path, compact | {"kind": "distill"})
    assert refused(path) == f"{path}: kind: must be compact, or left out for a conversion (got 'distill')"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_dumped_is_what_was_loaded(tmp_path: Path, path: Path) -> None:
    recipe = load_recipe(path)
    text = dump_recipe(recipe)
    assert text.isascii()
    again = load_recipe(written(tmp_path, text))
    assert again == recipe
    assert dump_recipe(again) == text


def test_shipped_recipes_are_found_by_name() -> None:
    assert set(shipped_recipes()) == {path.stem for path in SHIPPED} >= {"demo"}
    assert (
        find_recipe("demo").read_bytes()
        == SHIPPED[[path.stem for path in SHIPPED].index("demo")].read_bytes()
    )
    names = ", ".join(sorted(path.stem for path in SHIPPED))
    assert refused("no-such") == f"no-such: no such recipe file; shipped recipes are {names}"


def test_an_unknown_key_is_refused_at_every_level(micro_recipe: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(dump_recipe(load_recipe(micro_recipe)))
    places = list(sections(fields))
    assert len(places) >= 22
    for place in places:
        changed = copy.deepcopy(fields)
        inner = changed
        for key in place:
            inner = inner[key]
        inner["surplus"] = 1
        path = written(tmp_path, changed)
        if place[-1:] == ("shape",):  # transformers' own fields, which the teacher's configuration knows
            with pytest.raises(ValueError, match=r"shape: unknown fields \['surplus'\]"):
                check_recipe(load_recipe(path))
        else:
            assert "surplus" in refused(path), place


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=Big Run", "name: String should match pattern"),
        ("data.validation_fraction=1", "data.validation_fraction: Input should be less than 1 (got 1)"),
        ("data.recall.pairs=27", "data.recall.pairs: Input should be less than or equal to 26 (got 27)"),
        ("data.recall.fewest_pairs=9", "recall.fewest_pairs is 9, must not exceed recall.pairs (4)"),
        ("stages.0.loop.steps=0", "stages.0.align.loop.steps: Input should be greater than or equal to 1"),
        ("stages.0.loop.steps=2.5", "stages.0.align.loop.steps: Input should be a valid integer"),
        ("stages.0.optimizer.learning_rate=-1", "learning_rate: Input should be greater than 0 (got -1)"),
        ("stages.0.optimizer.learning_rate=.nan", "learning_rate: Input should be"),
        ("stages.1.kind=merge", "stages.1: Input tag 'merge'"),
        ("stages.1.kind=align", "['align', 'align'] names a kind twice"),
        ("stages.1.schedule.warmup_steps=9", "exceed loop.steps 4"),
        ("surgery.ridge=.inf", "surgery.ridge: Input should be a finite number"),
        ("surgery.legend.R=7", "surgery.legend.R"),
        ("targets.seconds=.inf", "targets.seconds: Input should be a finite number"),
        ("teacher.folder=elsewhere", "give exactly one of folder and pretrain"),
        ("teacher.pretrain=null", "give exactly one of folder and pretrain"),
        ("evaluation=7", "evaluation: Input should be a valid dictionary"),
        ("stages=null", "stages: Input should be a valid list"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(
    micro_recipe: Path, override: str, message: str
) -> None:
    line = refused(micro_recipe, [override])
    assert line.startswith(f"{micro_recipe}: ")
    assert message in line


def test_every_fault_is_counted(micro_recipe: Path) -> None:
    line = refused(micro_recipe, ["stages.0.loop.steps=0", "evaluation.batch_size=0", "samples.tokens=0"])
    assert line.endswith("; and 2 more")


def test_exponents_without_a_point_are_numbers(tmp_path: Path, micro_recipe: Path) -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    by_option = load_recipe(micro_recipe, ["stages.0.optimizer.learning_rate=1e-4", "surgery.ridge=1E-2"])
    text = micro_recipe.read_text()
    assert text.count("learning_rate: 0.003") == 1
    by_file = load_recipe(written(tmp_path, text.replace("learning_rate: 0.003", "learning_rate: 3e-3")))
    assert by_option.stages[0].optimizer.learning_rate == 1e-4
    assert by_option.surgery.ridge == 1e-2
    assert by_file == load_recipe(micro_recipe)


def test_set_changes_lists_and_sections_that_the_file_does_not_have(micro_recipe: Path) -> None:
    plain = load_recipe(micro_recipe)
    changed = load_recipe(
        micro_recipe,
        [
            "stages.1.loop.steps=5",
            "stages.1.temperature=2",
            "targets.bpb_gap=0.5",
            "samples.prompts.0=New",
            "stages.0.train=[model.layers.*.self_attn.rwkv7.*]",
        ],
    )
    assert [stage.loop.steps for stage in changed.stages] == [plain.stages[0].loop.steps, 5]
    assert (changed.stages[1].temperature, changed.targets.bpb_gap) == (2.0, 0.5)
    assert changed.samples.prompts == ["New"]
    assert changed.stages[0].train == ["model.layers.*.self_attn.rwkv7.*"]
    assert plain.targets.bpb_gap is None


def test_the_last_of_two_overrides_counts(micro_recipe: Path) -> None:
    assert load_recipe(micro_recipe, ["name=a", "name=b"]).name == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages", '--set stages: write it as "a.b=value"'),
        ("=5", '--set =5: write it as "a.b=value"'),
        ("name=[", "--set name=[: the value is not YAML"),
        ("name=2024-13-45", "--set name=2024-13-45: the value is not YAML"),
        ("stages.2.loop.steps=5", "--set stages.2.loop.steps=5: 2 must be a position from 0 to 1"),
        ("stages.first.loop=5", "first must be a position from 0 to 1"),
        ("stages.-1.loop=5", "-1 must be a position from 0 to 1"),
        ("name.deep=5", "--set name.deep=5: name holds a value, not a section"),
        ("stages.0.loop.steps.x=5", "steps holds a value, not a section"),
        ("no.such.section=5", "no: Extra inputs are not permitted"),
        ("data..source=5", "data.: Extra inputs are not permitted"),
    ],
)
def test_a_malformed_override_is_quoted(micro_recipe: Path, override: str, message: str) -> None:
    assert message in refused(micro_recipe, [override])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(override=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20))
def test_an_override_without_an_equals_sign_or_of_an_unknown_key_is_refused(
    micro_recipe: Path, override: str
) -> None:
    known = set(Recipe.model_fields)
    assume(override.partition("=")[0].split(".")[0] not in known)
    assert refused(micro_recipe, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a recipe is a YAML mapping, this is NoneType"),
        (b"- a\n", "a recipe is a YAML mapping, this is list"),
        (b"demo\n", "a recipe is a YAML mapping, this is str"),
        (b"a: [1\nb: 2", "not YAML"),
        (b"a: !!python/object:os.system {}\n", "not YAML"),
        (b"name: \xff\n", "not YAML"),
        (b"when: 2024-13-45\n", "not YAML"),
        (b"[" * 1000, "not YAML"),
        (b"1: 2\n", "Field required"),
        (b"name: demo\n", "teacher: Field required; and 1 more"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert message in line


def test_a_section_alone_takes_overrides_too() -> None:
    section = load_section(SurgerySection, {"pattern": "SR"}, ["ridge=1e-2", "tica.heads=6"], "surgery")
    assert (section.pattern, section.ridge, section.tica.heads) == ("SR", 1e-2, 6)
    with pytest.raises(
        ValueError, match=r"^surgery: tica\.heads: Input should be greater than or equal to 1"
    ):
        load_section(SurgerySection, {}, ["tica.heads=0"], "surgery")
