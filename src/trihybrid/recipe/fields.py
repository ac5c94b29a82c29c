"""Recipes as YAML: where they lie, overrides, dumping, and errors in one line. Knows no recipe's sections."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Section = TypeVar("Section", bound=BaseModel)


def read_fields(source: str | Path, overrides: list[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe (a path, or a shipped recipe's name) and its fields, `a.b=value` overrides applied.

    Raises:
        ValueError: no such file, not YAML, no mapping, or an override of nothing.
    """
    path = find_recipe(source)
    return path, parse_fields(path.read_bytes(), str(path), overrides)


def parse_fields(content: bytes, name: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """The fields of a recipe's text (UTF-8), `a.b=value` overrides applied; `name` is what errors call it.

    Raises:
        ValueError: not YAML, no mapping, or an override of nothing.
    """
    try:
        fields = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: a recipe is a YAML mapping, this is {type(fields).__name__}")
    for override in overrides or []:
        _override(fields, override)
    return fields


def load_section(
    section: type[Section], fields: dict[str, Any], overrides: list[str] | None, name: str
) -> Section:
    """One section from fields and overrides, outside a recipe; `name` is what errors call it.

    Raises:
        ValueError: an unknown key, an impossible value, or an override of nothing.
    """
    for override in overrides or []:
        _override(fields, override)
    return validate(section, fields, name)


def validate(section: type[Section], fields: dict[str, Any], name: str) -> Section:
    """A section, or a whole recipe, from its fields; `name` is what errors call it.

    Raises:
        ValueError: an unknown key or an impossible value, in one line.
    """
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error)}") from None


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a recipe that ships with the package.

    Raises:
        ValueError: neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    raise ValueError(
        f"{source}: no such recipe file; shipped recipes are {', '.join(sorted(shipped)) or 'none'}"
    )


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package (in a checkout, its `recipes` folder)."""
    installed = Path(str(files("trihybrid"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(
        json.loads(recipe.model_dump_json()), sort_keys=False, allow_unicode=False, width=110
    )


def explain(error: ValidationError) -> str:
    """The first fault of a pydantic error in one line: field, value, what is allowed; and how many more there are."""
    first, *rest = error.errors()
    place = ".".join(str(part) for part in first["loc"]) or "recipe"
    given = first["input"]
    value = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    more = f"; and {len(rest)} more" if rest else ""
    return f"{place}: {first['msg']}{value}{more}"


def _override(fields: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f'--set {override}: write it as "a.b=value"')
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"--set {override}: the value is not YAML") from None
    *path, last = key.split(".")
    place: Any = fields
    for part in path:
        in_list = isinstance(place, list)
        place = place[_position(place, part, override)] if in_list else place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise ValueError(f"--set {override}: {part} holds a value, not a section")
    if isinstance(place, list):
        place[_position(place, last, override)] = value
    else:
        place[last] = value


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ValueError(f"--set {override}: {part} must be a position from 0 to {len(items) - 1}")
    return int(part)
