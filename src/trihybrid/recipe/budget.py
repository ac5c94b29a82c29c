"""Which of several shapes fit into a recipe's byte limit, before anything is trained."""

import yaml
from pydantic import ValidationError

from trihybrid.compress.budget import BudgetRow, largest_that_fits
from trihybrid.data.sentencepiece import open_tokenizer
from trihybrid.models.compact.section import CompactSection
from trihybrid.recipe.compact import CompactRecipe
from trihybrid.recipe.fields import explain

FACTORS = (0.5, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5, 2.0)
"""What the recipe's own value is multiplied with where no candidates are given."""


def budget_rows(
    recipe: CompactRecipe, field: str, candidates: list[str] | None, code_bytes: int = 0
) -> list[BudgetRow]:
    """Parameters and estimated bytes for several values of one field of the model.

    Args:
        recipe: gives the other fields, the tokenizer, what is quantised and the limit.
        field: hidden_size, mlp_ratio or pattern.
        candidates: values as text (YAML); None takes `FACTORS` of the recipe's own and tries nothing beyond
            them; a pattern has no multiples.
        code_bytes: what the code takes from the limit.

    Raises:
        ValueError: no candidates for a pattern, or one that the model cannot have.
    """
    vocabulary = open_tokenizer(recipe.data.tokenizer).vocab_size
    values = _values(recipe.model, field, candidates)
    try:
        return largest_that_fits(
            recipe.model,
            vocabulary,
            field,
            values,
            recipe.compress.limit_bytes,
            compress=recipe.compress,
            code_bytes=code_bytes,
        )
    except ValidationError as error:
        raise ValueError(f"model with another {field}: {explain(error)}") from None


def _values(section: CompactSection, field: str, candidates: list[str] | None) -> list[object]:
    if candidates:
        try:
            return [text if field == "pattern" else yaml.safe_load(text) for text in candidates]
        except yaml.YAMLError:
            raise ValueError(f"--try {' '.join(candidates)}: not values of {field}") from None
    if field == "pattern":
        raise ValueError('--field pattern: name patterns to try, as --try "TTTF * 2" --try "TTTF * 3"')
    own = getattr(section, field)
    values = [own * factor for factor in FACTORS]
    return list(dict.fromkeys(round(value) for value in values)) if isinstance(own, int) else values
