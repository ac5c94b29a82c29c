"""Measuring one model folder on any text."""

import tempfile
from pathlib import Path
from typing import Any

from trihybrid.data import DataSection, RecallSection, prepare, prepare_held_out
from trihybrid.evaluate import EvaluationSection, evaluate
from trihybrid.models.checkpoint import load_model

PAIRS, CHARACTERS = 8, 3
"""Pairs of a recall document, and characters that one takes (space, key, value)."""


def evaluate_folder(model: Path, teacher: Path | None, text: str, tokens: int, length: int) -> dict[str, Any]:
    """One row of results for the model in a folder, on text that the tokenizer beside it reads.

    All of the text is scored, up to `tokens`; of the builtin text the part that recipes keep for validation. Rows are
    no longer than it.

    The recall probe is the demo's, 8 pairs of one letter each; where a round of pairs does not reach beyond the
    model's window, filler between the rounds does. Of a model without a window no recall beyond it is measured.

    Raises:
        ValueError: a folder, tokenizer or text that does not serve.
    """
    loaded = load_model(model)
    reference = None if teacher is None else load_model(teacher)
    window = getattr(loaded.config, "sliding_window", None)
    section = DataSection(
        source=text,
        tokenizer=str(model),
        validation_fraction=0.05,
        recall=RecallSection(
            fraction=0.0,
            pairs=PAIRS,
            rounds=5,
            gap=4 * window if window and window > PAIRS * CHARACTERS else 0,
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        data = (prepare if text == "builtin" else prepare_held_out)(section, folder)
        longest = min(length, tokens, len(data.validation))
        settings = EvaluationSection(sequence_length=longest, validation_tokens=tokens)
        return evaluate(loaded, reference, data, settings, window)
