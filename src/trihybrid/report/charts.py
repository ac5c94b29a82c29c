"""The sections that are figures: training, alignment, recall, loss by position, cache; each with how to read it."""

from trihybrid.report import plots
from trihybrid.report.cache_bytes import cache_bytes, compare
from trihybrid.report.headline import plan_sides
from trihybrid.report.markup import (
    Markup,
    Table,
    change,
    decimal,
    duration,
    element,
    figure,
    figures,
    join,
    missing,
    percent,
    stage_name,
)
from trihybrid.report.reading import Row, RunRecord, finite, number, rows_of
from trihybrid.report.stages import in_stage_order, stage_style

Points = list[tuple[float, float]]

TRAINING_HEADS = (
    "Stage",
    "Steps done",
    "Planned",
    "First loss",
    "Last loss",
    "Tokens",
    "Tokens/s",
    "Time",
    "Memory, MiB",
)
TRAINING_NOTE = "Tokens/s is the median over the logged steps, memory the most that a logged step reports."
CACHE_CONTEXTS = (512, 4096, 32768, 131072)


def training_section(run: RunRecord) -> Markup:
    """A row and a loss curve for every stage that trained."""
    if not run.training:
        return missing("Training (log.jsonl)")
    stages = in_stage_order(run.training)
    rows = [[stage_name(stage, training=True), *_training_cells(run.training[stage])] for stage in stages]
    table = Table(TRAINING_HEADS, rows, frozenset(range(1, len(TRAINING_HEADS))))
    curves = [_loss_figure(stage, run.training[stage]) for stage in stages]
    return join([table.html(), element("p", TRAINING_NOTE, "soft"), figures(curves)])


def _training_cells(rows: list[Row]) -> list[str]:
    last = rows[-1]
    memory = [size for row in rows if (size := finite(row, "memory_bytes")) is not None]
    speeds = sorted(speed for row in rows if (speed := finite(row, "tokens_per_second")) is not None)
    return [
        decimal(last["step"] + 1, 0),
        decimal(number(last, "steps"), 0),
        decimal(number(rows[0], "loss"), 4),
        decimal(number(last, "loss"), 4),
        decimal(number(last, "tokens"), 0),
        decimal(speeds[len(speeds) // 2] if speeds else None, 0),
        duration(number(last, "seconds")),
        decimal(max(memory) / 2**20 if memory else None, 0),
    ]


def _loss_figure(stage: str, rows: list[Row]) -> Markup:
    style = stage_style(stage)
    points, divergence = _points(rows, "loss"), _points(rows, "kl")
    if not points:
        return missing(f"Finite loss of {style.training}")
    caption = f"Training loss of each logged step, {style.unit}; lower is better."
    if len(points) >= plots.FEWEST_TO_SMOOTH:
        caption += " Pale: single steps. Full colour: their running mean."
    if len(points) < len(rows):
        caption += f" {len(rows) - len(points)} logged steps have no finite loss and are not drawn."
    ends = [f"{value:.4g} at step {step:,}" for step, value in (points[0], points[-1])]
    alternative = f"Line chart, {style.training}: loss {ends[0]}, {ends[1]}."
    return figure(plots.loss_curve(stage, points, divergence), alternative, caption)


def _points(rows: list[Row], key: str) -> Points:
    return [(row["step"], value) for row in rows if (value := finite(row, key)) is not None]


def alignment_section(run: RunRecord) -> Markup:
    """The alignment error of each converted layer, for every stage that logged it."""
    parts = []
    for stage in in_stage_order(run.training):
        layers = _alignment_by_layer(run.training[stage])
        if layers:
            parts.append(_alignment_figure(stage, layers))
    return figures(parts) if parts else missing("Alignment by layer (alignment/<layer> in log.jsonl)")


def _alignment_by_layer(rows: list[Row]) -> dict[int, Points]:
    prefix = "alignment/"
    names = {name for row in rows for name in row if name.startswith(prefix)}
    numbered = {
        int(name.removeprefix(prefix)): name for name in names if name.removeprefix(prefix).isdecimal()
    }
    return {layer: points for layer, name in sorted(numbered.items()) if (points := _points(rows, name))}


def _alignment_figure(stage: str, layers: dict[int, Points]) -> Markup:
    worst = max(layers, key=lambda layer: layers[layer][-1][1])
    ending = f"At the end layer {worst} is the worst, with {layers[worst][-1][1]:.4g}."
    caption = (
        "One line a converted layer: the squared distance of its output from the teacher's, over the squared norm of "
        "the teacher's. 0 is a perfect copy, 1 as far as no output at all. The paler the line, the "
        f"deeper the layer. {ending}"
    )
    alternative = f"Line chart of the alignment error of {len(layers)} layers over the steps. {ending}"
    return figure(plots.alignment_curves(stage, layers), alternative, caption)


def recall_section(run: RunRecord) -> Markup:
    """Recall against the distance of the fact, as a figure and as a table with the number of answers."""
    by_stage = {}
    for stage, row in run.results.items():
        bins = [_recall_bin(entry) for entry in rows_of(row, "recall_by_distance")]
        if any(entry.count for entry in bins):
            by_stage[stage] = [entry for entry in bins if entry.count]
    if not by_stage:
        return missing("Recall by distance (recall_by_distance in results.json)")
    stages = in_stage_order(by_stage)
    caption = (
        "Share of right answers against how far back the fact stands; higher is better. Pale bars: 95 % interval "
        f"(Wilson). {_window_note(run)}"
    )
    farthest = [max(by_stage[stage], key=lambda entry: entry.distance).accuracy for stage in stages]
    ends = [
        f"{stage_style(stage).title} {percent(value)}" for stage, value in zip(stages, farthest, strict=True)
    ]
    alternative = f"Line chart of recall by distance. At the longest distance: {'; '.join(ends)}."
    picture = figure(plots.recall_curves(by_stage, _window(run)), alternative, caption)
    return join([figures([picture]), _recall_table(stages, by_stage)])


def _recall_bin(entry: Row) -> plots.RecallBin:
    low, high, count = (finite(entry, name) for name in ("low", "high", "count"))
    accuracy = finite(entry, "accuracy") if count else 0.0
    if low is None or high is None or count is None or accuracy is None or not 0 <= accuracy <= 1:
        raise ValueError(
            f"results.json: recall_by_distance entry {entry} needs finite low, high and count, and accuracy in [0, 1]; "
            "correct it"
        )
    return plots.RecallBin(int(low), int(high), accuracy, int(count))


def _recall_table(stages: list[str], by_stage: dict[str, list[plots.RecallBin]]) -> Markup:
    cells = {
        (stage, entry.low, entry.high): f"{percent(entry.accuracy)} of {entry.count:,}"
        for stage in stages
        for entry in by_stage[stage]
    }
    rows = [
        [f"{low:,} to {high - 1:,}", *(cells.get((stage, low, high), decimal(None, 1)) for stage in stages)]
        for low, high in sorted({(low, high) for _, low, high in cells})
    ]
    heads = ("Distance, tokens", *(stage_name(stage) for stage in stages))
    return Table(heads, rows, frozenset(range(1, len(heads)))).html()


def position_section(run: RunRecord) -> Markup:
    """Loss against the position in the document."""
    by_stage = {}
    for stage, row in run.results.items():
        points: Points = []
        for entry in rows_of(row, "loss_by_position"):
            position, loss = finite(entry, "position"), finite(entry, "loss")
            if position is not None and loss is not None:
                points.append((position, loss))
        if points:
            by_stage[stage] = points
    if not by_stage:
        return missing("Loss by position (loss_by_position in results.json)")
    caption = (
        "Mean loss of the tokens from each position to the next one; lower is better. A line that keeps falling "
        f"makes use of a longer context. {_window_note(run)}"
    )
    ends = [f"{stage_style(stage).title} {max(by_stage[stage])[1]:.3f}" for stage in in_stage_order(by_stage)]
    alternative = (
        f"Line chart of the loss by position. At the last position, in nats per token: {'; '.join(ends)}."
    )
    return figures([figure(plots.position_curves(by_stage, _window(run)), alternative, caption)])


def _window(run: RunRecord) -> int | None:
    window = finite(run.summary, "window")
    return int(window) if window is not None and window >= 1 else None


def _window_note(run: RunRecord) -> str:
    window = _window(run)
    if window is None:
        return "No sliding window is recorded, so none is marked."
    return (
        f"The dashed line is the sliding window, {window:,} tokens: no sliding layer alone sees further back."
    )


def cache_section(run: RunRecord) -> Markup:
    """Cache bytes of teacher and student against the context, computed from the plan."""
    sides = plan_sides(run)
    teacher, student = (cache_bytes(sides[0]), cache_bytes(sides[1])) if sides else (None, None)
    if teacher is None or student is None:
        return missing("Cache against context (the three cache sizes of before and after in plan.json)")
    if not (teacher.at(1) or student.at(1)):
        return element("p", "Neither the teacher nor the student keeps any bytes.")
    outcome = compare(teacher, student)
    caption = (
        "Bytes that one sequence keeps: global keys and values times the context, plus recurrent states, plus full "
        f"sliding windows. Computed from the plan, not measured; lower is better. {outcome}"
    )
    alternative = f"Line chart of cache bytes against context for teacher and student. {outcome}"
    rows = [[f"{context:,}", *change(teacher.at(context), student.at(context))] for context in CACHE_CONTEXTS]
    heads = ("Context, tokens", "Teacher, bytes", "Student, bytes", "Change")
    table = Table(heads, rows, frozenset((1, 2, 3)))
    return join([figures([figure(plots.cache_curves(teacher, student), alternative, caption)]), table.html()])
