"""A compact recipe: which of its fields make an experiment another one, and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from trihybrid.recipe.compact import CompactRecipe, config_hash, read_compact
from trihybrid.recipe.fields import load_section

FIELDS: dict[str, Any] = {
    "kind": "compact",
    "name": "a",
    "data": {
        "train": "/somewhere/shards",
        "validation": "/somewhere/val.jsonl",
        "tokenizer": "/somewhere/1024.model",
    },
    "train": {"loop": {"steps": 10}},
}


def recipe_of(*overrides: str) -> CompactRecipe:
    return load_section(CompactRecipe, copy.deepcopy(FIELDS), list(overrides), "recipe")


@pytest.mark.parametrize(
    "override",
    [
        "name=b",
        "train.loop.seed=7",
        "train.loop.keep=5",
        "train.loop.log_every=1",
        "train.loop.checkpoint_every=3",
        "samples.prompts=[a]",
        "targets.bpb=1.2",
        "data.train=/elsewhere/shards",
        "data.validation=val.jsonl",
        "data.tokenizer=/elsewhere/1024.model",
    ],
)
def test_a_repetition_is_the_same_experiment(override: str) -> None:
    assert config_hash(recipe_of(override)) == config_hash(recipe_of())


@pytest.mark.parametrize(
    "override",
    [
        "train.loop.steps=11",
        "train.loop.batch_size=4",
        "train.optimizer.learning_rate=1e-3",
        "train.quantise_from=0.9",
        "train.leak=true",
        "model.hidden_size=256",
        "compress.clip=12.85",
        "compress.limit_bytes=15000000",
        "evaluation.stride=32",
        "evaluation.isolated=true",
        "data.train=/somewhere/other",
        "data.validation=null",
        "data.seed=1",
    ],
)
def test_what_decides_the_result_makes_another_experiment(override: str) -> None:
    assert config_hash(recipe_of(override)) != config_hash(recipe_of())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=distill", "kind: Input should be 'compact'"),
        ("evaluation.stride=2000", "evaluation: Value error, stride is 2000, must not exceed length"),
        ("evaluation.adaptation={stride: 2000}", "adaptation.stride is 2000, must not exceed length"),
        ("train.quantise_from=1.5", "train.quantise_from: Input should be less than or equal to 1"),
        ("train.precision=float16", "train.precision: Input should be 'auto', 'float32' or 'bfloat16'"),
        ("model.depth=3", "model.depth: Extra inputs are not permitted"),
        ("model.pattern=TQ", "model: Value error, pattern"),
        ("compress.bits.matrix=4", "compress.bits.matrix: Input should be 5, 6, 7, 8 or 16"),
        ("targets.bpb=.inf", "targets.bpb: Input should be a finite number"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe_of(override)
    assert message in str(error.value)


def test_a_file_is_read_whole_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(FIELDS))
    assert read_compact(path, ["train.loop.steps=3"]) == recipe_of("train.loop.steps=3")
    path.write_text(yaml.safe_dump(FIELDS | {"stages": []}))
    with pytest.raises(ValueError, match=r"recipe\.yaml: stages: Extra inputs are not permitted"):
        read_compact(path)
