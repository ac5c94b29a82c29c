"""The sections that are tables: quality of each stage, the plan before and after, its layers."""

from trihybrid.report.headline import gap, layer_changed, mixers, plan_sides
from trihybrid.report.markup import (
    Markup,
    Table,
    change,
    decimal,
    element,
    join,
    missing,
    percent,
    stage_name,
)
from trihybrid.report.reading import Row, RunRecord, list_of, number, object_of, rows_of
from trihybrid.report.stages import KNOWN_STAGES, in_stage_order

QUALITY_HEADS = (
    "Stage",
    "Bits per byte",
    "Gap",
    "Bits per raw byte",
    "KL, nats a token",
    "Agreement",
    "Recall",
    "Recall gap, points",
)
QUALITY_NOTE = (
    "Bits per byte count the decoded bytes of the validation text, bits per raw byte the bytes of its file; lower is "
    "better. KL is the divergence from the teacher. Agreement is the share of tokens whose most likely next token is "
    "the teacher's too. Recall is the share of right answers to facts beyond the sliding window. A gap is the student "
    "minus the teacher."
)
PLAN_QUANTITIES = {
    "parameters": "Parameters",
    "global_kv_bytes_per_token": "Global keys and values, bytes a token",
    "recurrent_state_bytes": "Recurrent states, bytes",
    "sliding_cache_bytes": "Sliding-window caches, bytes",
    "score_flops_per_pair": "Score FLOPs a query-key pair",
}
LAYER_HEADS = (
    "Layer",
    "Before",
    "After",
    "Parameters before",
    "Parameters after",
    "Keys and values",
    "Where its tensors come from",
)


def quality_section(run: RunRecord) -> Markup:
    """One row a stage, the stages of a surgery also where they were not measured."""
    if not run.results:
        return missing("Quality (results.json)")
    teacher = run.results.get("teacher", {})
    # A run without a surgery has no student stages to miss.
    surgery = run.plan is not None or any(
        stage in run.results for stage in ("operated", "aligned", "matched")
    )
    stages = in_stage_order({**run.results, **(KNOWN_STAGES if surgery else {})})
    rows = [
        [stage_name(stage), *_quality_cells(stage, run.results.get(stage, {}), teacher)] for stage in stages
    ]
    table = Table(QUALITY_HEADS, rows, frozenset(range(1, len(QUALITY_HEADS))))
    return join([table.html(), element("p", QUALITY_NOTE, "soft")])


def _quality_cells(stage: str, row: Row, teacher: Row) -> list[str]:
    recall_gap = gap(row, teacher, "recall")
    points = None if recall_gap is None else 100 * recall_gap
    return [
        decimal(number(row, "bpb"), 4),
        "" if stage == "teacher" else decimal(gap(row, teacher, "bpb"), 4, signed=True),
        decimal(number(row, "raw_bpb"), 4),
        decimal(number(row, "kl"), 4),
        percent(number(row, "agreement")),
        percent(number(row, "recall")),
        "" if stage == "teacher" else decimal(points, 1, signed=True),
    ]


def plan_section(run: RunRecord) -> Markup:
    """What the surgery changes: sizes and costs, warnings, and every layer."""
    sides = plan_sides(run)
    if run.plan is None or sides is None:
        return missing("Plan (plan.json)")
    before, after = sides
    rows = [
        [label, *change(number(before, name), number(after, name))] for name, label in PLAN_QUANTITIES.items()
    ]
    flops_before, flops_after = (object_of(side, "flops_per_token") for side in sides)
    for context in sorted({*flops_before, *flops_after}, key=_context):
        label = f"FLOPs a token at {_context(context):,} tokens of context"
        rows.append([label, *change(number(flops_before, context), number(flops_after, context))])
    table = Table(("Quantity", "Before", "After", "Change"), rows, frozenset((1, 2, 3)))
    warnings = [element("li", str(text)) for text in list_of(run.plan, "warnings")]
    return join(
        [
            table.html(),
            element("h3", f"Warnings of the plan ({len(warnings)})"),
            element("ul", join(warnings), "warnings") if warnings else element("p", "None."),
            element("h3", "Layer by layer"),
            _layers(rows_of(run.plan, "layers")),
        ]
    )


def _context(key: str) -> int:
    if not key.isdecimal():
        raise ValueError(
            f"plan.json: flops_per_token has the context {key!r}, must be a number of tokens; correct it"
        )
    return int(key)


def _layers(layers: list[Row]) -> Markup:
    if not layers:
        return missing("Layers of the plan")
    rows = []
    for layer in layers:
        before, after = number(layer, "parameters_before"), number(layer, "parameters_after")
        rows.append(
            [
                str(layer.get("index")),
                mixers(layer.get("before")),
                mixers(layer.get("after")),
                decimal(before, 0),
                decimal(after, 0),
                str(layer.get("keys_values") or "none"),
                _sources(layer),
            ]
        )
    changed = frozenset(place for place, layer in enumerate(layers) if layer_changed(layer))
    note = element("p", "Shaded layers change their mixers.", "soft")
    return join([Table(LAYER_HEADS, rows, frozenset((3, 4)), changed).html(), note])


def _sources(layer: Row) -> str:
    sources = object_of(layer, "sources")
    if not sources:
        return "not stated" if layer_changed(layer) else "unchanged"
    items = [
        element("li", join([element("code", name), ": ", str(source)])) for name, source in sources.items()
    ]
    count = f"{len(sources)} tensor{'' if len(sources) == 1 else 's'}"
    return element("details", join([element("summary", count), element("ul", join(items))]))
