"""Which shapes fit, by a recipe's own rules."""

from pathlib import Path

import pytest

from trihybrid.recipe.budget import FACTORS, budget_rows
from trihybrid.recipe.load import load_compact


def test_wider_is_larger_until_it_does_not_fit(compact_recipe: Path) -> None:
    recipe = load_compact(compact_recipe, ["compress.limit_bytes=60000"])
    rows = budget_rows(recipe, "hidden_size", None, code_bytes=10_000)
    assert [row.value for row in rows] == [round(32 * factor) for factor in FACTORS]
    assert [row.parameters for row in rows] == sorted(row.parameters for row in rows)
    assert all(row.margin == 60_000 - row.bytes for row in rows)
    fitting = [row for row in rows if row.fits]
    assert 0 < len(fitting) < len(rows)
    assert [row.value for row in rows if row.chosen] == [fitting[-1].value]
    without = budget_rows(recipe, "hidden_size", None)
    assert {row.bytes - other.bytes for row, other in zip(rows, without, strict=True)} == {10_000}


def test_the_estimate_is_near_what_training_left(compact_run: Path) -> None:
    """Within a tenth: the weights are not quite Gaussian, and a thousand coded symbols need tables."""
    recipe = load_compact(compact_run / "recipe.yaml")
    (row,) = budget_rows(recipe, "mlp_ratio", ["2.0"])
    assert row.bytes == pytest.approx((compact_run / "model.artifact").stat().st_size, rel=0.25)


def test_candidates_are_values_of_the_field(compact_recipe: Path) -> None:
    recipe = load_compact(compact_recipe)
    rows = budget_rows(recipe, "pattern", ["TFF", "TF * 2"])
    assert [row.value for row in rows] == ["TFF", "TF * 2"] and rows[0].parameters < rows[1].parameters
    assert budget_rows(recipe, "mlp_ratio", ["2", "3.5"])[1].value == 3.5
    for field, values, message in (
        ("pattern", None, '--field pattern: name patterns to try, as --try "TTTF'),
        ("hidden_size", ["["], r"--try \[: not values of hidden_size"),
        (
            "hidden_size",
            ["wide"],
            "model with another hidden_size: hidden_size: Input should be a valid integer",
        ),
        ("pattern", ["TF"], "model with another pattern: .*value_embedding_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            budget_rows(recipe, field, values)
