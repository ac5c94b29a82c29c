"""Every plan that ships, to the last number, beside the one that was looked at.

After a change that is meant to change plans, renew the files, and read the difference before it is committed:

    for plan in tests/surgery/golden/*.json; do
        python -m trihybrid.cli plan "$(basename "$plan" .json)" --json > "$plan"
    done
"""

import json
import re
from pathlib import Path

import pytest

from trihybrid.models.shapes import load_shape, shape_names
from trihybrid.recipe.load import load_conversion, shipped_recipes
from trihybrid.recipe.planned import plan_recipe
from trihybrid.recipe.schema import Recipe
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import SurgerySection

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
NAMES = [path.stem for path in GOLDEN]
# Recipe -> converted layers, bytes of keys and values a token, bytes of recurrent state, is the fast prefill kept?
RECIPES = {
    "e2b-card": ([4, 9, 14, 19, 24, 29, 34], 7 * 1_024, 7 * 2_097_152, False),
    "e2b-shared": ([4, 9, 14, 19, 24, 29, 34], 3 * 1_024, 7 * 2_097_152, False),
    "e2b-long": ([4, 9, 14, 19, 24, 29, 34], 3 * 1_024, 7 * 2_097_152, False),
    "e2b-rwkv7": ([4, 9, 14, 19, 24, 29, 34], 0, 7 * 2_097_152, False),
    "e2b-prefill": ([4, 9], 2_048, 2 * 2_097_152, True),
    "e4b-shared": ([5, 11, 17, 23, 29, 35, 41], 4 * 1_024, 7 * 2_097_152, False),
    "e4b-prefill": ([5, 11, 17], 4_096, 3 * 2_097_152, True),
}
# Recipe of another family -> converted layers, bytes of keys and values a token before and after, of recurrent state,
# of sliding windows.
OTHERS = {
    "qwen3-hybrid": (
        [layer for layer in range(28) if layer % 7 != 6],
        (28 * 4_096, 4 * 4_096),
        24 * 16 * 128 * 128 * 4,
        0,
    ),
    "llama-windows": (
        list(range(1, 16, 2)),
        (16 * 2_048, 4 * 512),
        8 * 32 * 64 * 64 * 4,
        8 * 1_023 * 2_048,
    ),
}


def of_a_built_in_shape() -> list[str]:
    """Shipped conversions whose teacher is a published model."""
    recipes = [name for name, path in shipped_recipes().items() if "kind: compact\n" not in path.read_text()]
    return [name for name in recipes if load_conversion(name).teacher.shape is not None]


@pytest.mark.parametrize("path", GOLDEN, ids=NAMES)
def test_a_plan_is_the_golden_one(path: Path) -> None:
    if path.stem in shape_names():
        plan = make_plan(load_shape(path.stem), SurgerySection(), path.stem)
    else:
        plan = plan_recipe(path.stem)
    assert plan == json.loads(path.read_text())


def test_the_command_prints_the_golden_plan(micro) -> None:
    for name in ("e2b-prefill", "gemma-4-26b-a4b"):
        result = micro.trihybrid("plan", name, "--json")
        assert (result.code, result.stderr) == (0, "")
        assert result.stdout == (Path(__file__).parent / "golden" / f"{name}.json").read_text()


def test_every_recipe_and_every_size_of_gemma_4_has_one() -> None:
    sizes = [name for name in shape_names() if name.startswith("gemma-4")]
    # The plan of E2B without options is that of e2b-card, whose one difference is the start of keys and values.
    assert {*of_a_built_in_shape(), *sizes} - {*NAMES} == {"gemma-4-e2b"}
    assert {*of_a_built_in_shape()} == {*RECIPES, *OTHERS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_what_its_comment_says(name: str) -> None:
    converted, growing, recurrent, prefill = RECIPES[name]
    plan = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    assert [layer["index"] for layer in plan["layers"] if layer["sources"]] == converted
    assert plan["after"]["global_kv_bytes_per_token"] == growing
    assert plan["after"]["recurrent_state_bytes"] == recurrent
    assert plan["after"]["sliding_cache_bytes"] == plan["before"]["sliding_cache_bytes"]
    given_up = [line for line in plan["warnings"] if "gives up that fast prefill" in line]
    kept = [line for line in plan["warnings"] if "keeps that fast prefill" in line]
    assert (len(given_up), len(kept)) == ((0, 1) if prefill else (1, 0))
    first = {"gemma-4-E2B-it": 15, "gemma-4-E4B-it": 24}[plan["teacher"]]
    assert (given_up + kept)[0].startswith(f"layers {first} to {len(plan['layers']) - 1} of the teacher ")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_family_does_what_its_comment_says(name: str) -> None:
    converted, growing, recurrent, windows = OTHERS[name]
    plan = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    before, after = plan["before"], plan["after"]
    assert [layer["index"] for layer in plan["layers"] if layer["sources"]] == converted
    assert (before["global_kv_bytes_per_token"], after["global_kv_bytes_per_token"]) == growing
    assert (before["recurrent_state_bytes"], after["recurrent_state_bytes"]) == (0, recurrent)
    assert (before["sliding_cache_bytes"], after["sliding_cache_bytes"]) == (0, windows)
    assert all("one to one" in plan["layers"][index]["sources"]["rwkv7.output"] for index in converted)
    narrowed = [
        row["index"] for row in plan["layers"] if row["before"] == "full" and row["after"] == ["sliding"]
    ]
    notes = [line for line in plan["warnings"] if "keep their weights and see 1,024 tokens" in line]
    assert len(notes) == (1 if narrowed else 0)
    assert narrowed == ([] if name == "qwen3-hybrid" else list(range(0, 16, 2)))


DOCUMENT = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
ROWS = re.findall(r"^\| `([a-z0-9.-]+)` \|(.*)\|$", DOCUMENT, re.MULTILINE)
PRINTED = [
    (name, re.findall(r"[0-9][0-9,]*", cells)) for name, cells in ROWS if "," in cells.partition("|")[2]
]


@pytest.mark.parametrize(("name", "numbers"), [row for row in PRINTED if row[0] in {*OTHERS, *shape_names()}])
def test_the_document_says_what_the_plan_says(name: str, numbers: list[str]) -> None:
    plan = plan_recipe(name) if name in OTHERS else make_plan(load_shape(name), SurgerySection(), name)
    after, growing = plan["after"], "global_kv_bytes_per_token"
    if name in OTHERS:
        expected = [
            after[key] for key in ("parameters", growing, "recurrent_state_bytes", "sliding_cache_bytes")
        ]
        numbers = numbers[-4:]
    else:
        before = plan["before"]
        expected = [before["parameters"], before[growing], after[growing], after["recurrent_state_bytes"]]
    assert [int(number.replace(",", "")) for number in numbers] == expected


def test_the_document_has_every_shape_and_recipe_of_another_family() -> None:
    others = {name for name in shape_names() if not name.startswith("gemma")}
    assert others | {*OTHERS, "gemma-3-4b"} <= {name for name, _ in PRINTED}


def test_kept_layers_cost_what_they_cost_the_teacher() -> None:
    """All that a prefill leaves out above layer 14 is to the byte what the teacher has there."""
    plan = json.loads((Path(__file__).parent / "golden" / "e2b-prefill.json").read_text())
    before, after = plan["before"]["layers"], plan["after"]["layers"]
    assert [row["index"] for row in after if row != before[row["index"]]] == [4, 9]
    assert [row["keys_values"] for row in after if row["index"] in (14, 19, 34)] == [
        "own",
        "layer 14",
        "layer 14",
    ]


def test_a_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    for size in ("e2b", "e4b"):
        (tmp_path / size).mkdir()
        (tmp_path / size / "config.json").write_text(json.dumps(load_shape(f"gemma-4-{size}").to_dict()))
    assert (
        plan_recipe("e2b-card", [f"teacher.folder={tmp_path / 'e2b'}"])["after"]["parameters"]
        == 4_683_544_320
    )
    with pytest.raises(ValueError, match=r"e4b: another shape than teacher\.shape, gemma-4-e2b"):
        plan_recipe("e2b-card", [f"teacher.folder={tmp_path / 'e4b'}"])
    with pytest.raises(ValueError, match="no built-in shape"):
        plan_recipe("e2b-card", ["teacher.shape=null"])


def test_a_shape_alone_is_no_teacher(micro_recipe: Path) -> None:
    with pytest.raises(ValueError, match="a pretrained teacher gives its own"):
        load_conversion(micro_recipe, ["teacher.shape=gemma-4-e2b"])
    with pytest.raises(ValueError, match="give exactly one of folder and pretrain"):
        Recipe.model_validate({"name": "a", "teacher": {"shape": "gemma-4-e2b"}, "stages": []})


def test_the_plan_of_a_recipe_that_trains_its_teacher(micro_recipe: Path, micro_run: Path) -> None:
    made = json.loads((micro_run / "plan.json").read_text())
    assert plan_recipe(micro_recipe) == made


def test_a_recipe_leaves_no_room_for_options(micro) -> None:
    result = micro.trihybrid("plan", "e2b-card", "--share-kv", "teacher")
    assert result.code != 0 and "a recipe has a surgery of its own" in result.stderr
