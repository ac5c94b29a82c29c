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


def main() -> int:
    """Rewrite the table between the two marks."""
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
    before, _, rest = page.read_text().partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n{HEAD}{''.join(map(compact, rows))}{END}{after}")
    print(f"{page}: {len(rows)} rows")
    return 0


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
