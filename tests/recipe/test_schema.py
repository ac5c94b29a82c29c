"""What a recipe may hold: every section refuses surplus keys, and every field says what it is and how far it goes."""

import types
import typing
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trihybrid.recipe.compact import CompactRecipe
from trihybrid.recipe.schema import NAMES, Recipe, Stage, TargetsSection, TeacherSection

LOOP = {"steps": 1}
TEACHER = {"folder": "model"}


def models(kind: Any) -> set[type[BaseModel]]:
    """A model and all models inside it."""
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
        inner = (models(field.annotation) for field in kind.model_fields.values())
        return {kind}.union(*inner)
    return set().union(*(models(part) for part in typing.get_args(kind)))


SECTIONS = sorted(models(Recipe) | models(CompactRecipe), key=lambda section: section.__name__)
OTHERWISE_BOUND = {"bigram_scale", "smear_start", "value_embedding_scale", "value_embedding_layers"}
"""Numbers that may be negative, since a learned factor starts there, and layers, which the pattern bounds."""


def test_the_walk_finds_every_section() -> None:
    names = {section.__name__ for section in SECTIONS}
    assert {
        "Recipe",
        "RecallSection",
        "PretrainSection",
        "AlignSection",
        "MatchSection",
        "TicaSection",
        "CompactSection",
        "CompressSection",
        "AdaptationSection",
        "MuonSection",
    } <= names
    assert len(SECTIONS) >= 28


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_section_refuses_surplus_keys_and_describes_itself(section: type[BaseModel]) -> None:
    assert section.model_config.get("extra") == "forbid"
    assert section.__doc__
    undescribed = [name for name, field in section.model_fields.items() if not field.description]
    assert undescribed == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_has_a_lower_bound(section: type[BaseModel]) -> None:
    unbounded = [
        name
        for name, field in section.model_fields.items()
        if name not in OTHERWISE_BOUND
        and {int, float} & {field.annotation, *typing.get_args(field.annotation)}
        and not any(hasattr(bound, "ge") or hasattr(bound, "gt") for bound in field.metadata)
    ]
    assert unbounded == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_infinity_is_no_value(section: type[BaseModel]) -> None:
    """JSON, in which recipes are kept, has none."""
    for name, field in section.model_fields.items():
        if float in {field.annotation, *typing.get_args(field.annotation)}:
            with pytest.raises(ValidationError) as error:
                section.model_validate({name: float("inf")})
            assert any(
                fault["loc"] == (name,) and fault["type"] != "missing" for fault in error.value.errors()
            )


def test_a_stage_is_told_by_its_kind() -> None:
    parts = [
        part for part in models(Stage) if part.__name__ in ("AlignSection", "ExtendSection", "MatchSection")
    ]
    kinds = {typing.get_args(part.model_fields["kind"].annotation)[0] for part in parts}
    assert kinds == set(NAMES) == {"align", "match", "extend"}
    recipe = Recipe.model_validate(
        {"name": "a", "teacher": TEACHER, "stages": [{"kind": "match", "loop": LOOP}]}
    )
    assert type(recipe.stages[0]).__name__ == "MatchSection"
    with pytest.raises(ValidationError, match="Unable to extract tag using discriminator 'kind'"):
        Recipe.model_validate({"name": "a", "teacher": TEACHER, "stages": [{"loop": LOOP}]})


@pytest.mark.parametrize("order", [["align", "match"], ["match", "align"], ["match"], []])
def test_stages_stand_in_any_order(order: list[str]) -> None:
    stages = [{"kind": kind, "loop": LOOP} for kind in order]
    recipe = Recipe.model_validate({"name": "a", "teacher": TEACHER, "stages": stages})
    assert [stage.kind for stage in recipe.stages] == order


def test_a_kind_stands_once() -> None:
    stages = [{"kind": kind, "loop": LOOP} for kind in ("align", "match", "align")]
    with pytest.raises(ValidationError, match=r"\['align', 'match', 'align'\] names a kind twice"):
        Recipe.model_validate({"name": "a", "teacher": TEACHER, "stages": stages})


@pytest.mark.parametrize("fields", [{}, {"folder": "a", "pretrain": {"shape": {}, "loop": LOOP}}])
def test_a_teacher_has_one_source(fields: dict) -> None:
    with pytest.raises(ValidationError, match="give exactly one of folder and pretrain"):
        TeacherSection.model_validate(fields)


def test_nothing_is_promised_unless_it_is_written() -> None:
    assert TargetsSection().model_dump() == {
        "bpb_gap": None,
        "teacher_recall": None,
        "improvement": False,
        "seconds": None,
    }


@pytest.mark.parametrize("name", ["", "Demo", "-a", "a/b", "..", "a b", "a\n"])
def test_a_name_is_a_folder_name(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        Recipe.model_validate({"name": name, "teacher": TEACHER, "stages": []})
