"""The plan of a recipe's surgery, without a teacher's weights."""

from pathlib import Path
from typing import Any

from trihybrid.data.section import load_tokenizer
from trihybrid.models.checkpoint import load_teacher_config
from trihybrid.models.shapes import TeacherConfig, load_shape
from trihybrid.recipe.load import load_conversion
from trihybrid.recipe.schema import Recipe
from trihybrid.surgery.plan import CONTEXTS, config_hash, make_plan


def plan_recipe(
    source: str | Path, overrides: list[str] | None = None, contexts: tuple[int, ...] = CONTEXTS
) -> dict[str, Any]:
    """The plan (see `make_plan`) of a conversion's recipe, a YAML file or a shipped one by its name.

    Raises:
        ValueError: no such recipe, one of another kind, or a teacher and a surgery that do not fit.
    """
    recipe = load_conversion(source, overrides)
    return make_plan(teacher_config(recipe), recipe.surgery, teacher_name(recipe), contexts)


def teacher_config(recipe: Recipe) -> TeacherConfig:
    """The configuration of the teacher: of its folder, of its shape where the folder is not at hand, or of the model
    that the recipe trains.

    Raises:
        ValueError: neither a folder nor a shape is at hand, or the folder has another shape than it must.
    """
    teacher = recipe.teacher
    if teacher.pretrain is not None:
        return teacher.pretrain.configuration(load_tokenizer(recipe.data).vocab_size)
    if teacher.shape is not None and not Path(str(teacher.folder)).is_dir():
        return load_shape(teacher.shape)
    base = load_teacher_config(str(teacher.folder))
    check_shape(recipe, base)
    return base


def check_shape(recipe: Recipe, base: TeacherConfig) -> None:
    """Refuse a teacher that is not what the recipe was written for.

    Raises:
        ValueError: the recipe names a shape, and the teacher has another one.
    """
    shape = recipe.teacher.shape
    if shape is not None and config_hash(base) != config_hash(load_shape(shape)):
        raise ValueError(
            f"{recipe.teacher.folder}: another shape than teacher.shape, {shape}; give the folder of that model, or "
            "change or leave out teacher.shape"
        )


def teacher_name(recipe: Recipe) -> str:
    """What plans call the teacher."""
    return recipe.teacher.folder or f"{recipe.name} teacher"
