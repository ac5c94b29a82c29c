"""The paragraph at the top of the report, made from the numbers alone, and the verdict on the targets of the run.

summary.json may hold "targets", an object of names from TARGETS and bounds. What a run did not promise it can neither
meet nor miss; what it promised and did not measure counts as missed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from trihybrid.report.cache_bytes import cache_bytes, compare
from trihybrid.report.markup import Markup, decimal, duration, element, join, percent
from trihybrid.report.reading import Row, RunRecord, finite, number, object_of, rows_of
from trihybrid.report.stages import KNOWN_STAGES, LATER_STAGES, in_stage_order, stage_style

STUDENT_STAGES = ("operated", "aligned", "matched", *LATER_STAGES)


@dataclass(frozen=True)
class Target:
    """What a run may promise of its last student.

    describe: the quantity in words. at_most: whether its bound is an upper one. text: prints a value of it. value:
    the quantity, of the student's row, the teacher's row and the summary; None when it was not measured.
    """

    describe: str
    at_most: bool
    text: Callable[[float | None], str]
    value: Callable[[Row, Row, Row], float | None]


def gap(row: Row, teacher: Row, key: str) -> float | None:
    """`row[key] - teacher[key]`; None when either is absent or not finite."""
    here, there = finite(row, key), finite(teacher, key)
    return None if here is None or there is None else here - there


def _four(value: float | None) -> str:
    return decimal(value, 4)


def _measured(key: str) -> Callable[[Row, Row, Row], float | None]:
    return lambda student, teacher, summary: finite(student, key)


TARGETS: dict[str, Target] = {
    "bpb": Target("bits per byte", True, _four, _measured("bpb")),
    "bpb_gap": Target(
        "bits per byte above the teacher",
        True,
        _four,
        lambda student, teacher, _: gap(student, teacher, "bpb"),
    ),
    "kl": Target("KL to the teacher, nats a token", True, _four, _measured("kl")),
    "agreement": Target("agreement with the teacher", False, percent, _measured("agreement")),
    "recall": Target("recall beyond the window", False, percent, _measured("recall")),
    "recall_gap": Target(
        "recall beyond the window that the teacher has and the student has not",
        True,
        percent,
        lambda student, teacher, _: gap(teacher, student, "recall"),
    ),
    "seconds": Target(
        "time of the run", True, duration, lambda student, teacher, summary: finite(summary, "seconds")
    ),
}


def final_stage(run: RunRecord) -> str | None:
    """The last student stage that has a results row, else the last stage of another name, else None."""
    students = [stage for stage in STUDENT_STAGES if stage in run.results]
    others = [stage for stage in run.results if stage not in KNOWN_STAGES]
    candidates = students or others
    return candidates[-1] if candidates else None


def headline(run: RunRecord) -> Markup:
    """What was done and what came of it, one paragraph."""
    sentences = [*_surgery(run), *_training(run), *_quality(run), *_cache(run)]
    if not sentences:
        sentences = ["This run has recorded neither a plan, nor training, nor results yet."]
    return element("p", " ".join(sentences), "lead")


def verdict(run: RunRecord) -> Markup:
    """Each target with the value reached, the missed ones first; or that none was set.

    Raises ValueError on a target that TARGETS does not hold, or a bound that is no finite number.
    """
    targets = object_of(run.summary, "targets")
    if not targets:
        return element(
            "p", "No target was set for this run, so none is called met or missed.", "verdict none"
        )
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(
            f"summary.json: targets {unknown} are unknown, must be among {sorted(TARGETS)}; correct them"
        )
    missed: list[Markup] = []
    met: list[Markup] = []
    for name in targets:
        kept, line = _target(name, targets, run)
        (met if kept else missed).append(line)
    title = (
        f"{len(missed)} of {len(targets)} targets missed" if missed else f"All targets met ({len(targets)})"
    )
    content = join([element("strong", title), element("ul", join([*missed, *met]))])
    return element("div", content, "verdict" if missed else "verdict met")


def _target(name: str, targets: Row, run: RunRecord) -> tuple[bool, Markup]:
    target, bound = TARGETS[name], number(targets, name)
    if bound is None or not math.isfinite(bound):
        raise ValueError(f"summary.json: target {name} is {bound}, must be a finite number; correct it")
    student, teacher = run.results.get(final_stage(run) or "", {}), run.results.get("teacher", {})
    value = target.value(student, teacher, run.summary)
    kept = value is not None and (value <= bound if target.at_most else value >= bound)
    limit = join(["at most " if target.at_most else "at least ", target.text(bound)])
    word = element("strong", "met" if kept else "missed")
    return kept, element(
        "li", join([word, f": {target.describe} ", target.text(value), ", promised ", limit])
    )


def _surgery(run: RunRecord) -> list[str]:
    if run.plan is None:
        return []
    layers = rows_of(run.plan, "layers")
    changed = [layer for layer in layers if layer_changed(layer)]
    teacher = run.plan.get("teacher") or "a teacher without a name"
    if not changed:
        return [f"The plan converts no layer of {teacher}."]
    kinds = {f"from {mixers(layer.get('before'))} to {mixers(layer.get('after'))}": None for layer in changed}
    return [f"The plan converts {len(changed)} of {len(layers)} layers of {teacher}, {' and '.join(kinds)}."]


def _training(run: RunRecord) -> list[str]:
    parts = []
    for stage in in_stage_order(run.training):
        last = run.training[stage][-1]
        done, planned, tokens = last["step"] + 1, finite(last, "steps"), finite(last, "tokens")
        text = f"{stage_style(stage).training}, {done:,} steps"
        if planned is not None and planned > done:
            text += f" of {planned:,.0f} (unfinished)"
        if tokens is not None:
            text += f" and {tokens:,.0f} tokens"
        parts.append(text)
    return [f"Trained: {'; '.join(parts)}."] if parts else []


def _quality(run: RunRecord) -> list[str]:
    final = final_stage(run)
    if final is None:
        return ["No student has been measured."] if run.training or run.plan else []
    row, teacher = run.results[final], run.results.get("teacher", {})
    sentences = [f"{stage_style(final).title}: {_bits(row, teacher)}, {_recall(row, teacher)}."]
    lost, damage = gap(row, teacher, "bpb"), gap(run.results.get("operated", {}), teacher, "bpb")
    if final != "operated" and lost is not None and damage is not None and damage > 0:
        share = 100 * (1 - lost / damage)
        sentences.append(
            f"The surgery alone cost {damage:.4f} bits per byte; training won back {share:.1f} % of that."
        )
    return [*sentences, *_setbacks(run)]


def _bits(row: Row, teacher: Row) -> str:
    bits, difference = finite(row, "bpb"), gap(row, teacher, "bpb")
    if bits is None:
        return "bits per byte not measured"
    if difference is None:
        return f"{bits:.4f} bits per byte (teacher not measured)"
    if difference == 0:
        return f"{bits:.4f} bits per byte, as the teacher"
    return f"{bits:.4f} bits per byte, {abs(difference):.4f} {'above' if difference > 0 else 'below'} the teacher"


def _recall(row: Row, teacher: Row) -> str:
    recall, reference = finite(row, "recall"), finite(teacher, "recall")
    if recall is None:
        return "recall beyond the window not measured"
    compared = "not measured" if reference is None else f"{100 * reference:.1f} %"
    return f"{100 * recall:.1f} % recall beyond the window (teacher {compared})"


def _setbacks(run: RunRecord) -> list[str]:
    """A stage that ended with more bits per byte than the one before it is said aloud."""
    sentences = []
    for earlier, later in pairwise([stage for stage in STUDENT_STAGES if stage in run.results]):
        loss = gap(run.results[later], run.results[earlier], "bpb")
        if loss is not None and loss > 0:
            sentences.append(
                f"{stage_style(later).title} the model is worse than before, by {loss:.4f} bits per byte."
            )
    return sentences


def _cache(run: RunRecord) -> list[str]:
    sides = plan_sides(run)
    teacher, student = (cache_bytes(sides[0]), cache_bytes(sides[1])) if sides else (None, None)
    return [] if teacher is None or student is None else [compare(teacher, student)]


def plan_sides(run: RunRecord) -> tuple[Row, Row] | None:
    """The teacher's and the student's side of the plan, empty where missing; None without a plan."""
    return None if run.plan is None else (object_of(run.plan, "before"), object_of(run.plan, "after"))


def mixers(value: object) -> str:
    """The mixers of one slot as text: "rwkv7 + tica"."""
    return " + ".join(str(name) for name in value) if isinstance(value, list) else str(value)


def layer_changed(layer: Row) -> bool:
    """Whether the surgery changes the mixers of this layer."""
    return mixers(layer.get("before")) != mixers(layer.get("after"))
