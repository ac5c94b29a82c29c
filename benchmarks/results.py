"""Merge the rows that benchmarks left as JSON into docs/results.md.

python benchmarks/results.py [FOLDER]        FOLDER: benchmarks/rows by default
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPACT = (
    "| row | parameters | tokens a step | steps | ms a step (yardstick) | MFU "
    "| bpb chunked | sliding | raw | gap | bytes |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
QUALITY = (
    "| row | teacher | parameters | tokens | bpb (teacher) | KL | agreement | entropy (teacher) "
    "| calibration error (teacher) | recall (teacher) | needle (teacher) | cache MB (teacher) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


COSTS = {
    "distill_e2b": {
        "step": ("part", "{}"),
        "rows": ("rows", "{}"),
        "tokens": ("length", "{:,}"),
        "layers kept": ("kept", "{}"),
        "graph": ("graph", "{}"),
        "tables": ("tables", "{}"),
        "ms": ("ms", "{:.0f}"),
        "tok/s": ("tokens_per_second", "{:,.0f}"),
        "peak GiB": ("peak_gib", "{:.1f}"),
        "MFU": ("mfu", "{:.0%}"),
    },
    "distill_two_gpus": {
        "stage": ("stage", "{}"),
        "form": ("form", "{}"),
        "GPUs": ("gpus", "{}"),
        "rows": ("rows", "{}"),
        "tokens": ("length", "{:,}"),
        "last loss": ("last", "{:.6f}"),
        "largest difference": ("apart", "{:.1e}"),
        "tok/s": ("tokens_per_second", "{:,.0f}"),
        "ratio": ("ratio", "{:.2f}"),
        "at rest GiB": ("rest_gib", "{:.2f}"),
        "peak GiB": ("peak_gib", "{:.2f}"),
    },
    "distill_optimizers": {
        "row": ("row", "{}"),
        "alignment loss": ("alignment_loss", "{:.4f}"),
        **{
            f"{stage}: {name}": (f"{stage} {figure}", form)
            for stage in ("aligned", "matched")
            for name, figure, form in (
                ("bpb", "bpb", "{:.4f}"),
                ("KL", "kl", "{:.4f}"),
                ("recall", "recall", "{:.3f}"),
            )
        },
    },
    "sliding_gradient": {
        "tokens": ("length", "{:,}"),
        "way": ("way", "{}"),
        "ms": ("ms", "{:.2f}"),
        "peak bytes": ("peak_bytes", "{:,}"),
        "error": ("error", "{:.1e}"),
    },
}
"""Benchmark of a cost -> columns, each the field of a row and its format. Its rows lie in distillation/NAME.json."""


def main() -> int:
    """Rewrite the tables between their marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmarks" / "rows")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    given = parser.parse_args()
    tables = {
        "compact": (read(given.folder / "compact"), COMPACT, compact),
        "quality": (read(given.folder / "quality"), QUALITY, quality),
    }
    if not any(rows for rows, _, _ in tables.values()):
        parser.error(
            f"{given.folder} holds no row (*/*.json); benchmarks/compact.py and distill_quality.py leave them there"
        )
    text = given.page.read_text()
    for name, (rows, head, line) in tables.items():
        body = head + "".join(map(line, rows)) if rows else ""
        text = between(text, f"<!-- {name} rows -->", f"<!-- end of {name} rows -->", body)
        print(f"{given.page}: {len(rows)} {name} rows")
    for name, columns in COSTS.items():
        file = given.folder / "distillation" / f"{name}.json"
        if not file.exists():
            print(f"{file}: not there; benchmarks/{name}.py --json leaves it")
            continue
        found = json.loads(file.read_text())
        text = between(text, f"<!-- {name} -->", f"<!-- end of {name} -->", costs(found, columns))
        print(f"{given.page}: {len(found)} rows of {name}")
    given.page.write_text(text)
    return 0


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder, by name."""
    return sorted((json.loads(file.read_text()) for file in folder.glob("*.json")), key=lambda r: r["row"])


def quality(row: dict[str, Any]) -> str:
    """One line of the table of conversions: the last student beside its teacher."""
    teacher, student = row["measured"][0], row["measured"][-1]

    def both(figure: str, places: int) -> str:
        return f"{student[figure]:.{places}f} ({teacher[figure]:.{places}f})"

    def needle(side: dict[str, Any]) -> str:
        return " ".join(f"{100 * found['accuracy']:.0f}" for found in side["needle"])

    # A teacher without a window has no recall beyond one.
    beyond = "recall_overall" if teacher["recall"] is None else "recall"
    held = [row["cache_bytes"][side] for side in ("after", "before")]
    cells = [
        row["row"],
        row["teacher"][:8],
        f"{row['parameters']:,}",
        f"{sum(row['tokens'].values()):,}",
        both("bpb", 4),
        f"{student['kl']:.4f}",
        f"{100 * student['agreement']:.1f} %",
        both("entropy", 3),
        both("calibration_error", 4),
        both(beyond, 3),
        f"{needle(student)} ({needle(teacher)})",
        " ".join(f"({size / 1e6:.2f})" if place else f"{size / 1e6:.2f}" for place, size in enumerate(held)),
    ]
    return f"| {' | '.join(cells)} |\n"


def between(text: str, start: str, end: str, table: str) -> str:
    """The text with another table between two marks."""
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{table}{end}{rest.partition(end)[2]}"


def costs(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """A table with a line a row; what a row does not have stays empty."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        # What was measured behind each stage stands beside the row's own figures.
        row = row | {
            f"{side['stage']} {name}": side[name] for side in row.get("measured", ()) for name in side
        }
        cells = [form.format(row[field]) if field in row else "" for field, form in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compact(row: dict[str, Any]) -> str:
    """One line of the table."""
    bpb = row["bpb"]
    sliding = "" if bpb["sliding"] is None else f"{bpb['sliding']['decoded']:.4f}"
    cells = [
        row["row"],
        f"{row['parameters']:,}",
        f"{row['tokens_per_step']:,}",
        str(row["steps"]),
        f"{row['ms_per_step']:.1f} ({row['yardstick_ms']:.1f})",
        f"{100 * row['model_flops_utilisation']:.0f} %",
        f"{bpb['chunked']['decoded']:.4f}" + (" isolated" if row["isolated"] else ""),
        sliding,
        f"{bpb['chunked']['raw']:.4f}",
        f"{row['gap']:+.4f}",
        f"{row['total_bytes']:,}",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
