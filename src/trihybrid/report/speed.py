"""The page of `trihybrid bench`: speed and bytes against the context, teacher beside student."""

from collections.abc import Callable, Sequence

from trihybrid.infer.speed import SpeedRow
from trihybrid.report import plots
from trihybrid.report.markup import Table, document, element, figure, figures

HEADS = (
    "Model", "Context", "Batch", "Prefill, tokens/s", "Decode, tokens/s", "Step, ms", "State, MiB", "Weights, MiB",
)  # fmt: skip
FIGURES: dict[str, tuple[str, str, Callable[[SpeedRow], float]]] = {
    "prefill": ("Prefill", "prompt tokens a second", lambda row: row.prefill),
    "decode": ("Decoding", "tokens a second, all sequences", lambda row: row.decode),
    "state": ("State of all sequences", "MiB", lambda row: row.state_bytes / 2**20),
}
"""Name of a file -> title, axis, value."""


def speed_cells(row: SpeedRow) -> list[str]:
    """A row of the table."""
    return [
        row.model,
        f"{row.context:,}",
        f"{row.batch}",
        f"{row.prefill:,.0f}",
        f"{row.decode:,.1f}",
        f"{row.step_ms:,.2f}",
        f"{row.state_bytes / 2**20:,.2f}",
        f"{row.weight_bytes / 2**20:,.1f}",
    ]


def speed_figures(rows: Sequence[SpeedRow]) -> dict[str, bytes]:
    """Name -> PNG: one line for every model and batch, against the context."""
    keys = list(dict.fromkeys((row.model, row.batch) for row in rows))
    many = len({batch for _, batch in keys}) > 1
    drawn = {}
    for name, (title, unit, value) in FIGURES.items():
        lines = {
            f"{model}, batch {batch}" if many else model: [
                (row.context, value(row)) for row in rows if (row.model, row.batch) == (model, batch)
            ]
            for model, batch in keys
        }
        drawn[name] = plots.context_curves(title, unit, lines)
    return drawn


def speed_page(title: str, rows: Sequence[SpeedRow], machine: str) -> str:
    """One page with the table and the figures in it; `machine` says where it was measured."""
    table = Table(HEADS, [speed_cells(row) for row in rows], frozenset(range(1, len(HEADS))))
    parts = [
        figure(png, f"Line chart: {FIGURES[name][0].lower()} against the context.", FIGURES[name][1])
        for name, png in speed_figures(rows).items()
    ]
    sections = [("figures", "Figures", figures(parts)), ("table", "Table", table.html())]
    return document(title, sections, element("p", machine))
