"""How each stage of a run is named and drawn: one colour, marker and line style a stage, the same in every figure.

The colours are from Okabe and Ito's palette (Color Universal Design, 2008), which stays apart under the common forms of
colour blindness; the marker and the line style say the same a second time.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStyle:
    """title: for tables and legends. training: what its training is called. unit: of its training loss, for an axis.
    colour: #rrggbb. marker, line: matplotlib's codes."""

    title: str
    training: str
    unit: str
    colour: str
    marker: str
    line: str


KNOWN_STAGES: dict[str, StageStyle] = {
    "teacher": StageStyle(
        "Teacher", "Teacher pretraining", "cross-entropy (nats per token)", "#222222", "o", "-"
    ),
    "operated": StageStyle("Just operated", "Just operated", "loss", "#d55e00", "X", ":"),
    "aligned": StageStyle(
        "After stage 1 (aligned)", "Stage 1 (alignment)", "relative squared error", "#56b4e9", "s", "--"
    ),
    "matched": StageStyle(
        "After stage 2 (matched)",
        "Stage 2 (matching)",
        "KL + alignment (nats per token)",
        "#0072b2",
        "D",
        "-",
    ),
}
LATER_STAGES: dict[str, StageStyle] = {
    "extended": StageStyle(
        "After stage 3 (extended)", "Stage 3 (longer contexts)", "loss (nats per token)", "#009e73", "v", "-"
    ),
}
"""Of runs that have them: no run misses one."""
COMPACT_STAGES: dict[str, StageStyle] = {
    "train": StageStyle("Trained", "Training", "cross-entropy (nats per token)", "#0072b2", "D", "-"),
    "artifact": StageStyle("Artifact, reloaded", "Artifact", "loss", "#009e73", "s", "-"),
}
"""Of a run that trains a compact model, which has no teacher and no stages to compare."""
OTHER_COLOURS = ("#009e73", "#cc79a7", "#e69f00")


def stage_style(stage: str) -> StageStyle:
    """The style of `stage`; a stage that nobody knows goes by its own name in a colour fixed by that name."""
    known = {**KNOWN_STAGES, **LATER_STAGES, **COMPACT_STAGES}
    if stage in known:
        return known[stage]
    colour = OTHER_COLOURS[sum(stage.encode()) % len(OTHER_COLOURS)]
    return StageStyle(stage, stage, "loss", colour, "^", "-.")


def in_stage_order(stages: Iterable[str]) -> list[str]:
    """The known stages first, in the order in which a run goes through them; others after, in the order given."""
    given = list(stages)
    return [stage for stage in KNOWN_STAGES if stage in given] + [
        stage for stage in given if stage not in KNOWN_STAGES
    ]
