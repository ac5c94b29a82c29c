"""Merge the rows that benchmarks left as JSON into docs/results.md.

python benchmarks/results.py [FOLDER]        FOLDER: benchmarks/rows by default
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- compact rows -->", "<!-- end of compact rows -->"
HEAD = (
    "| row | parameters | tokens a step | steps | ms a step (yardstick) | MFU "
    "| bpb chunked | sliding | raw | gap | bytes |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


COSTS = {
    "distill_e2b": {
        "step": ("part", "{}"),
        "rows": ("rows", "{}"),
        "tokens": ("length", "{:,}"),
        "layers kept": ("kept", "{}"),
        "graph": ("graph", "{}"),
        "ms": ("ms", "{:.0f}"),
        "tok/s": ("tokens_per_second", "{:,.0f}"),
        "peak GiB": ("peak_gib", "{:.1f}"),
        "MFU": ("mfu", "{:.0%}"),
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
    folder = parser.parse_args().folder / "compact"
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if not rows:
        parser.error(f"{folder} holds no row (*.json); benchmarks/compact.py leaves them there")
    rows.sort(key=lambda row: row["row"])
    page = ROOT / "docs" / "results.md"
    text = between(page.read_text(), START, END, HEAD + "".join(map(compact, rows)))
    print(f"{page}: {len(rows)} rows of compact models")
    for name, columns in COSTS.items():
        file = folder.parent / "distillation" / f"{name}.json"
        if not file.exists():
            print(f"{file}: not there; benchmarks/{name}.py --json leaves it")
            continue
        found = json.loads(file.read_text())
        text = between(text, f"<!-- {name} -->", f"<!-- end of {name} -->", costs(found, columns))
        print(f"{page}: {len(found)} rows of {name}")
    page.write_text(text)
    return 0


def between(text: str, start: str, end: str, table: str) -> str:
    """The text with another table between two marks."""
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{table}{end}{rest.partition(end)[2]}"


def costs(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """A table with a line a row; what a row does not have stays empty."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
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
