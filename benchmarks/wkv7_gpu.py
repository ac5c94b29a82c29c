"""WKV-7 on a GPU beside its peers: time, memory and error, forward, backward and one decoded token.

    python benchmarks/wkv7_gpu.py [--part ours] [--measure speed,grouped,errors,decode] [--kinds random,...]
        [--headline] [--json FOLDER]
    python benchmarks/wkv7_gpu.py --part fla --fla 0.6.0=FOLDER --fla 0.4.1=FOLDER [--modes "lower_bound"]
        [--peer-widths 128,64] [--headline] [--json FOLDER]

Without --part both run. Each version of fla-core runs in a process of its own, in all of its modes (or in those whose
name holds what --modes says) and with its whole lists of configurations for the tuner, some 300 a mode and width (the
first three of each where errors alone are measured).
FOLDER is its unpacked wheel (python -m zipfile -e FILE FOLDER); without one a version is left out, with a line.
bfloat16 throughout. Times are medians of GPU time from a cold cache, the host well ahead; a copy of the bytes that have
to move is timed alike. "With the host" is forward+backward by the clock, one after the other, in ms: where it is more
than the GPU's time, the host is slower. Errors are relative and rms, against the float64 recurrence (beyond 2,048
tokens its chunked form), the worst over lengths, widths, with and without a state, and packed documents. "grouped"
times 32 heads that share the keys and values of 4, beside the same with keys and values repeated and what is made of
them written down, in float32 where the rwkv7 mixer has it so.
--json writes the rows as wkv7_gpu.json into FOLDER, as they come. Rows that another call left there are kept where they
are not measured anew, and are in the tables: so one part may run after the other. Exits with 1 when a target is missed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wkv7_gpu_worker import LENGTHS, OURS

from trihybrid.testing.wkv7_cases import KINDS, NAMES, SHARP

Row = dict[str, Any]

HEADLINE = (1, 4096, 32, 128)
SHAPES = (
    HEADLINE,
    (8, 4096, 32, 128),
    (1, 32_768, 32, 128),
    (1, 131_072, 32, 128),
    (1, 4096, 32, 64),
    (8, 4096, 32, 64),
)
LONG = (1, 131_072, 2, 128)
LONG_KINDS = ("random", "slow_decay", "repeated_keys")
GROUPED_SHAPES = (HEADLINE, (8, 4096, 32, 128), (1, 4096, 32, 64))
BATCHES = (1, 32, 256)
WIDTHS = (64, 128)
RIGHT = (
    0.1  # a mode with a worst error below this counts as right; decays that RWKV-7 cannot make do not count
)
FLA = ("0.6.0", "0.4.1")
MEASURES = ("speed", "grouped", "errors", "decode")
PARTS = ("ours", "fla")

FORWARD_MS, BOTH_MS, BATCHED_MS = 0.25, 0.80, 4.5
FORWARD_RATIO, BOTH_RATIO, DECODE_RATIO, GROUPED_RATIO = 3.0, 2.7, 2.0, 1.3
PER_TOKEN = 1.02  # of the time per token at 4,096 that a long sequence may take
ERROR, SHARP_ERROR, DECAY_ERROR, SHARP_GRADIENT_ERROR = 5e-3, 2e-2, 1e-2, 4e-2


def main() -> int:
    """Run every worker, print the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description="WKV-7 on a GPU beside its peers.")
    parser.add_argument("--fla", action="append", default=[], metavar="VERSION=FOLDER", help="a peer")
    parser.add_argument("--part", choices=PARTS, help="our kernels alone, or their peers; both if not given")
    parser.add_argument("--measure", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--modes", default="", help="peers' modes whose name holds this; all if not given")
    parser.add_argument("--peer-widths", default="128", help="head widths of the peers; each is tuned anew")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"inputs of the errors: some of {','.join(KINDS)}"
    )
    parser.add_argument("--headline", action="store_true", help=f"time {HEADLINE} alone, and no other shape")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write wkv7_gpu.json into this folder")
    arguments = parser.parse_args()
    measures = arguments.measure.split(",")
    peer_widths = [int(width) for width in arguments.peer_widths.split(",")]
    folders = dict(peer.partition("=")[::2] for peer in arguments.fla)
    for version, folder in folders.items():
        if not (Path(folder) / "fla").is_dir():
            parser.error(
                f"--fla {version}={folder}: no folder 'fla' in there; give the unpacked wheel of fla-core"
            )
    if wrong := set(measures) - set(MEASURES):
        parser.error(f"--measure has {', '.join(wrong)}; expected some of {', '.join(MEASURES)}")
    kinds = arguments.kinds.split(",")
    if wrong := set(kinds) - set(KINDS):
        parser.error(f"--kinds has {', '.join(wrong)}; expected some of {', '.join(KINDS)}")
    workers = {} if arguments.part == "fla" else {"ours": ""}
    if arguments.part != "ours":
        for version in FLA:
            if version not in folders:
                print(f"fla-core {version}: left out, since no --fla {version}=FOLDER was given")
        workers |= {f"fla-{version}": str(Path(folder).resolve()) for version, folder in folders.items()}
    kept = None if arguments.json is None else arguments.json / "wkv7_gpu.json"
    rows: list[Row] = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    rows = [
        row for row in rows if "failed" not in row or row["worker"] not in workers
    ]  # these are tried again
    for name, folder in workers.items():
        widths = WIDTHS if name == "ours" else peer_widths
        waiting = list(tasks(name, measures, widths, kinds))
        if arguments.headline:
            waiting = [task for task in waiting if task.get("shape", HEADLINE) == HEADLINE]
        for row in work(name, folder, waiting, arguments.modes):
            rows = [other for other in rows if identity(other) != identity(row)] + [row]
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(rows, indent=2) + "\n")
    tables = {"speed": speed_table, "grouped": grouped_table, "errors": error_table, "decode": decode_table}
    for measure, table in tables.items():
        if measure in measures:
            print(f"\n{measure}")
            table(rows)
    missed = list(targets(rows))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def tasks(name: str, measures: list[str], widths: Sequence[int], kinds: Sequence[str]) -> Iterator[Row]:
    """What a worker does, what may end its process last."""
    ours = name == "ours"
    if "speed" in measures:
        for shape in (shape for shape in SHAPES if shape[3] in widths):
            if ours:
                yield {"task": "copy", "shape": shape}
            yield {
                "task": "speed",
                "shape": shape,
                "only": OURS if ours and shape != HEADLINE else None,
            }
    if "decode" in measures:
        for width in widths:
            for batch in BATCHES:
                yield {"task": "decode", "batch": batch, "width": width}
    if "grouped" in measures and ours:
        for shape in GROUPED_SHAPES:
            yield {"task": "grouped", "shape": shape}
    if "errors" in measures:
        for kind in kinds:
            yield {"task": "errors", "kind": kind, "lengths": LENGTHS, "widths": list(widths), "only": None}
        # Our chunked form is not compared there: it is what answers.
        for kind in (kind for kind in LONG_KINDS if kind in kinds):
            only = OURS if ours else None
            yield {"task": "errors", "kind": kind, "lengths": LONG[1:2], "widths": LONG[3:], "only": only}


def identity(row: Row) -> str:
    """What a row is of: a call that measures it anew replaces it."""
    named = ("worker", "mode", "task", "shape", "kind", "lengths", "widths", "batch", "width")
    return json.dumps([row.get(name) for name in named])


def work(name: str, folder: str, waiting: list[Row], modes: str) -> Iterator[Row]:
    """The rows of a worker. When it dies, the task that it was at is a row that says so, and another worker goes on."""
    while waiting:
        print(f"{name}: {len(waiting)} tasks", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("wkv7_gpu_worker.py")), name, folder, modes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        with process.stdin:
            json.dump(waiting, process.stdin)
        at = None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            if "started" in row:
                at = waiting.pop(0)
                print(f"{name}: {at}", file=sys.stderr, flush=True)
            elif "tuned" in row:
                listed = ", ".join(f"{kernel} {count}" for kernel, count in row["tuned"].items()) or "none"
                print(f"{name}: {row['versions']}; configurations tried by the tuners: {listed}")
            else:
                yield row
        if process.wait():
            if at is None:
                print(f"{name} did not start: {process.returncode}; {len(waiting)} tasks were left out")
                return
            yield at | {"worker": name, "mode": "-", "failed": f"the process died ({process.returncode})"}


def key(row: Row) -> tuple[int, ...]:
    """The shape of a row of the speed table."""
    return tuple(row["shape"])


def speed_table(rows: list[Row]) -> None:
    """Milliseconds, nanoseconds a token and head, and ratios to our kernel."""
    print(
        "| B, T, H, D | who | forward ms | ratio | forward+backward ms | ratio | ns a token and head | with the host "
        "| peak GiB | error of o |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for shape in SHAPES:
        ours = our_speed(rows, shape)
        for row in rows:
            if row["task"] not in ("speed", "copy") or key(row) != shape:
                continue
            who = f"{row['worker']} {row['mode']}" if row["task"] == "speed" else "copy of the same bytes"
            cells = [
                str(shape)[1:-1],
                who,
                number(row, "forward_ms", "{:.3f}"),
                ratio(row, ours, "forward_ms"),
                number(row, "both_ms", "{:.3f}"),
                ratio(row, ours, "both_ms"),
                number(row, "both_ms", "{:.2f}", 1e6 / (shape[0] * shape[1] * shape[2])),
                number(row, "wall_ms", "{:.3f}"),
                number(row, "peak_bytes", "{:.2f}", 2**-30),
                row.get("failed") or number(row, "error", "{:.1e}"),
            ]
            print(f"| {' | '.join(cells)} |")
    for version in FLA:
        for right in (True, False):
            if best := fastest(rows, f"fla-{version}", right):
                print(
                    f"fla-core {version}, fastest {'right' if right else 'wrong'} mode at {HEADLINE}: {best['mode']}, "
                    f"forward+backward {best['both_ms']:.3f} ms"
                )


def grouped_table(rows: list[Row]) -> None:
    """Milliseconds with keys and values shared and repeated, and how much longer the latter takes."""
    print("| B, T, H, D | keys and values | forward ms | ratio | forward+backward ms | ratio | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for shape, shared, row in grouped_rows(rows):
        cells = [
            str(shape)[1:-1],
            row["mode"],
            number(row, "forward_ms", "{:.3f}"),
            ratio(row, shared, "forward_ms"),
            number(row, "both_ms", "{:.3f}"),
            ratio(row, shared, "both_ms"),
            number(row, "peak_bytes", "{:.2f}", 2**-30),
        ]
        print(f"| {' | '.join(cells)} |")


def grouped_rows(rows: list[Row]) -> Iterator[tuple[tuple[int, ...], Row | None, Row]]:
    """Each row of the grouped table with its shape and the row of the shared form at that shape."""
    for shape in GROUPED_SHAPES:
        found = [row for row in rows if row["task"] == "grouped" and key(row) == shape]
        shared = next((row for row in found if row["mode"] == "shared"), None)
        yield from ((shape, shared, row) for row in found)


def error_table(rows: list[Row]) -> None:
    """The worst error by kind of input, and where it was."""
    print(
        f"| who | inputs | tokens | {' | '.join(NAMES)} | worst |\n|---|---|---|{'---|' * (len(NAMES) + 1)}"
    )
    for row in rows:
        if row["task"] == "errors":
            tokens = f"{min(row['lengths']):,} .. {max(row['lengths']):,}"
            found = row.get("errors", {})
            cells = [f"{found[name]:.1e}" if name in found else "" for name in NAMES]
            worst = row.get("failed") or row["where"]
            print(
                f"| {row['worker']} {row['mode']} | {row['kind']} | {tokens} | {' | '.join(cells)} | {worst} |"
            )


def decode_table(rows: list[Row]) -> None:
    """Microseconds of one token, and how many times those of its bytes at the speed of a large copy."""
    print("| batch, width | who | us a step | us of its bytes | ratio |\n|---|---|---|---|---|")
    for row in rows:
        if row["task"] == "decode":
            who, size = f"{row['worker']} {row['mode']}", f"{row['batch']}, {row['width']}"
            if "failed" in row:
                print(f"| {size} | {who} | {row['failed']} | | |")
                continue
            times = row["microseconds"], row["floor_us"]
            print(f"| {size} | {who} | {times[0]:.1f} | {times[1]:.1f} | {times[0] / times[1]:.2f} |")


def number(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    """A cell, empty for what was not measured."""
    return form.format(row[name] * factor) if name in row else ""


def ratio(row: Row, ours: Row | None, name: str) -> str:
    """How many times our time a row takes."""
    return f"{row[name] / ours[name]:.2f}" if ours and name in row and name in ours else ""


def our_speed(rows: list[Row], shape: tuple[int, ...]) -> Row | None:
    """Our kernel's row at a shape, if it ran."""
    found = (r for r in rows if r["task"] == "speed" and r["worker"] == "ours" and r["mode"] == OURS)
    return next((row for row in found if key(row) == shape), None)


def worst_error(rows: list[Row], worker: str, mode: str) -> float | None:
    """Over all inputs that RWKV-7 can make; None when errors were not measured."""
    found = [
        max(row["errors"].values())
        for row in rows
        if row["task"] == "errors"
        and "errors" in row
        and (row["worker"], row["mode"]) == (worker, mode)
        and row["kind"] != "extreme_decay"
    ]
    return max(found, default=None)


def fastest(rows: list[Row], worker: str, right: bool) -> Row | None:
    """The quickest mode of a peer forwards and backwards at the headline shape, among the right or the wrong ones."""
    found = []
    for row in rows:
        if row["task"] == "speed" and row["worker"] == worker and key(row) == HEADLINE and "both_ms" in row:
            error = worst_error(rows, worker, row["mode"])
            if error is not None and (error <= RIGHT) == right:
                found.append(row)
    return min(found, key=lambda row: row["both_ms"], default=None)


def limit(kind: str, name: str) -> float:
    """The largest error that our kernel may have."""
    if kind in SHARP:
        return SHARP_ERROR if name in ("o", "final") else SHARP_GRADIENT_ERROR
    return DECAY_ERROR if name == "log_w" else ERROR


def targets(rows: list[Row]) -> Iterator[str]:
    """A line for every target that our rows miss."""
    head = our_speed(rows, HEADLINE)

    def over(
        row: Row | None, name: str, most: float, what: str, form: Callable[[float], str]
    ) -> Iterator[str]:
        if row and name in row and row[name] > most:
            yield f"{what}: {form(row[name])}, the target is {form(most)}"

    def ms(x: float) -> str:
        return f"{x:.3f} ms"

    yield from over(head, "forward_ms", FORWARD_MS, f"forward at {HEADLINE}", ms)
    yield from over(head, "both_ms", BOTH_MS, f"forward+backward at {HEADLINE}", ms)
    batched = our_speed(rows, SHAPES[1])
    yield from over(batched, "both_ms", BATCHED_MS, f"forward+backward at {SHAPES[1]}", ms)
    for shape in SHAPES[2:4]:
        for name in ("forward_ms", "both_ms"):
            if head and name in head:
                most = head[name] * shape[1] / HEADLINE[1] * PER_TOKEN
                yield from over(our_speed(rows, shape), name, most, f"{name} at {shape}", ms)
    peers = [r for r in rows if r["task"] == "speed" and r["worker"] == "fla-0.6.0" and key(r) == HEADLINE]
    for name, times in (("forward_ms", FORWARD_RATIO), ("both_ms", BOTH_RATIO)):
        best = min((row[name] for row in peers if name in row), default=None)
        if best is not None:
            yield from over(head, name, best / times, f"{name} for a ratio of {times} to fla-core 0.6.0", ms)
    memory = min((row["peak_bytes"] for row in peers if "peak_bytes" in row), default=None)
    if memory is not None:
        yield from over(head, "peak_bytes", memory, "peak memory", lambda x: f"{x / 2**30:.2f} GiB")
    for shape, shared, row in grouped_rows(rows):
        if shared and row is not shared and "both_ms" in row and "both_ms" in shared:
            found = row["both_ms"] / shared["both_ms"]
            if found < GROUPED_RATIO:
                yield f"repeated over shared at {shape}: {found:.2f}, the target is {GROUPED_RATIO}"
    for row in rows:
        if row["worker"] != "ours":
            continue
        if "failed" in row:
            yield f"{row['task']}: {row['failed']}"
        if row["task"] == "errors" and row["mode"] == OURS and "errors" in row:
            for name, error in row["errors"].items():
                if not error <= limit(row["kind"], name):
                    yield f"error of {name} on {row['kind']}: {error:.1e}, at most {limit(row['kind'], name):.0e}"
        if row["task"] == "decode" and row["mode"] == "in place" and "microseconds" in row:
            most = DECODE_RATIO * row["floor_us"]
            what = f"decode of batch {row['batch']}, width {row['width']}"
            yield from over(row, "microseconds", most, what, lambda x: f"{x:.1f} us")


if __name__ == "__main__":
    sys.exit(main())
