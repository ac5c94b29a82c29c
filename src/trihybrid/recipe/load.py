"""Reading recipes of every kind."""

from pathlib import Path

from trihybrid.recipe.compact import KIND, CompactRecipe
from trihybrid.recipe.fields import (
    dump_recipe,
    find_recipe,
    load_section,
    read_fields,
    shipped_recipes,
    validate,
)
from trihybrid.recipe.schema import Recipe

__all__ = [
    "dump_recipe",
    "find_recipe",
    "load_compact",
    "load_conversion",
    "load_recipe",
    "load_section",
    "shipped_recipes",
]


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe | CompactRecipe:
    """The recipe of a YAML file, or of a shipped one by its name, with `a.b=value` overrides applied.

    `kind: compact` makes it a `CompactRecipe`; without a kind it is a conversion.

    Raises:
        ValueError: no such file, not YAML, another kind, an unknown key, an impossible value, or an override of
            nothing.
    """
    path, fields = read_fields(source, overrides)
    if "kind" not in fields:
        return validate(Recipe, fields, str(path))
    if fields["kind"] != KIND:
        raise ValueError(
            f"{path}: kind: must be {KIND}, or left out for a conversion (got {fields['kind']!r})"
        )
    return validate(CompactRecipe, fields, str(path))


def load_conversion(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """`load_recipe`, for a conversion only.

    Raises:
        ValueError: as there, or the recipe is of another kind.
    """
    recipe = load_recipe(source, overrides)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{source}: trains a compact model; use `trihybrid train`")
    return recipe


def load_compact(source: str | Path, overrides: list[str] | None = None) -> CompactRecipe:
    """`load_recipe`, for a compact model only.

    Raises:
        ValueError: as there, or the recipe is of another kind.
    """
    recipe = load_recipe(source, overrides)
    if not isinstance(recipe, CompactRecipe):
        raise ValueError(f"{source}: converts a teacher; use `trihybrid distill`")
    return recipe
