"""Measuring every model of a run: results.json, samples.json, summary.json."""

import os
import platform
from itertools import pairwise
from typing import Any

import torch
import transformers

from trihybrid.data import PreparedData
from trihybrid.evaluate import evaluate
from trihybrid.infer.complete import complete
from trihybrid.models.checkpoint import load_model
from trihybrid.recipe.schema import Recipe
from trihybrid.run import RunDirectory, write_json
from trihybrid.surgery.layout import window_of

Row = dict[str, Any]


def measure(
    recipe: Recipe, directory: RunDirectory, data: PreparedData, names: list[str], seconds: float
) -> list[Row]:
    """Evaluate the models `names` (the teacher first), write samples of the first and the last, and the summary.

    Returns:
        The rows of results.json: {"stage", "bpb", "raw_bpb", "kl", "agreement", "recall", ...}.
    """
    teacher = load_model(directory.model("teacher"))
    window = window_of(teacher.config, recipe.surgery)
    rows: list[Row] = []
    samples = []
    for name in names:
        model = teacher if name == "teacher" else load_model(directory.model(name))
        rows.append({"stage": name, **evaluate(model, teacher, data, recipe.evaluation, window)})
        if name in (names[0], names[-1]):
            section = recipe.samples
            samples += [
                {
                    "stage": name,
                    "prompt": p,
                    "text": complete(model, data.tokenizer, p, section.tokens, section.temperature),
                }
                for p in section.prompts
            ]
    write_json(directory.results, rows)
    write_json(directory.samples, samples)
    write_json(directory.path / "summary.json", summarise(recipe, window, seconds))
    return rows


def summarise(recipe: Recipe, window: int | None, seconds: float) -> Row:
    """What the run was made on and what it promised, for the report. `seconds` is the time up to the measurement."""
    targets = recipe.targets
    promised = {"bpb_gap": targets.bpb_gap, "seconds": targets.seconds}
    return {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "devices": f"{os.cpu_count()} CPUs, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "window": window,
        "targets": {name: bound for name, bound in promised.items() if bound is not None},
    }


def missed_targets(recipe: Recipe, rows: list[Row], seconds: float) -> list[str]:
    """One line for each promise of the recipe that these results break."""
    targets, missed = recipe.targets, []
    teacher, last = rows[0], rows[-1]
    # Without a window there is nothing beyond it, and every distance counts.
    beyond, where = teacher["recall"], "beyond its window"
    if beyond is None:
        beyond, where = teacher["recall_overall"], "at all distances"
    if targets.teacher_recall is not None and beyond < targets.teacher_recall:
        missed.append(
            f"the teacher's recall {where} is {beyond:.2f}, wanted {targets.teacher_recall:.2f}: it has not learned "
            "what the student should keep"
        )
    if targets.bpb_gap is not None and last["bpb"] - teacher["bpb"] > targets.bpb_gap:
        missed.append(
            f"{last['stage']} is {last['bpb'] - teacher['bpb']:.4f} bpb above the teacher, wanted {targets.bpb_gap}"
        )
    if targets.improvement:
        for before, after in pairwise(rows[1:]):
            for figure in ("bpb", "kl"):
                if not after[figure] < before[figure]:
                    missed.append(
                        f"{after['stage']} is not better than {before['stage']} in {figure}: "
                        f"{after[figure]:.4f} against {before[figure]:.4f}"
                    )
    if targets.seconds is not None and seconds > targets.seconds:
        missed.append(f"the run took {seconds:.0f} s, wanted at most {targets.seconds:.0f}")
    return missed
