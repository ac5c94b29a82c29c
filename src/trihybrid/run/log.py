"""The log of a run: rows of JSON for machines, and a progress line for whoever watches.

Rows are appended with one write each, so that a kill can tear the last row only; `read_log` forgives that one
and no other. There are two kinds:

    {"kind": "train", "stage", "step", "steps", "loss", "learning_rate", "gradient_norm", "tokens",
     "tokens_per_second", "seconds", "memory_bytes", ...metrics of the task}
    {"kind": "event", "event", "stage", ...fields of the event}

`step` counts from 0; `tokens` and `seconds` count from the stage's first step. JSON has no infinity and no
NaN: such a metric is written as null.
"""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trihybrid.run.directory import write_text
from trihybrid.run.tracking import Tracker, finite_numbers

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """What one training step tells the log.

    Attributes:
        step: index of the step, from 0.
        steps: steps of the whole stage, as far as they are known: a stage that ends by the clock estimates them.
        loss: the loss before this step's update.
        learning_rate: the base learning rate of this step.
        gradient_norm: global norm before clipping.
        tokens: tokens seen by the stage so far, this step included.
        tokens_per_second: of this step.
        seconds: training time of the stage so far, this step included.
        metrics: whatever else the task measured, under names of its own.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class RunLog:
    """Append-only log of one stage; a context manager, whose exit ends the progress bar.

    Args:
        path: the JSONL file, shared by the stages of a run; one writer at a time. A torn last row is cut off.
        stage: name written into each row.
        every: without a terminal, a plain line is printed every that many steps, and at the last one (at
            least 1).
        stream: where progress goes, standard error by default; a terminal gets a bar, anything else plain
            lines.
        trackers: get the numbers of each train row too; whoever opened them closes them.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        path: str | Path,
        stage: str,
        every: int = 1,
        stream: TextIO | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        if every < 1:
            raise ValueError(f"every: {every} is below 1; give the number of steps between printed lines")
        self.path = Path(path)
        self.stage = stage
        self._every = every
        self._trackers = trackers
        self._stream = sys.stderr if stream is None else stream
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._session: tuple[int, float, int] | None = None
        _repair(self.path)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def resume(self, step: int) -> None:
        """Drop this stage's rows whose `step` is `step` or later, so that repeating those steps duplicates
        nothing. Rows without a step, and rows of other stages, stay. The file is rewritten atomically, and
        only if need be.
        """
        rows = read_log(self.path)
        kept = [row for row in rows if row.get("stage") != self.stage or row.get("step", -1) < step]
        if len(kept) == len(rows):
            return
        _logger.info(
            "log: dropped %d rows of stage %s from step %d on", len(rows) - len(kept), self.stage, step
        )
        write_text(self.path, "".join(_line(row) for row in kept))

    def step(self, record: StepRecord) -> None:
        """Write a train row, and show progress.

        Raises:
            ValueError: a metric has the name of one of the row's own fields.
        """
        row: dict[str, Any] = {
            "kind": "train",
            "stage": self.stage,
            "step": record.step,
            "steps": record.steps,
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "gradient_norm": record.gradient_norm,
            "tokens": record.tokens,
            "tokens_per_second": record.tokens_per_second,
            "seconds": record.seconds,
            "memory_bytes": memory_bytes(),
        }
        self._append(row, record.metrics)
        for tracker in self._trackers:
            tracker.numbers(
                self.stage, record.step, finite_numbers({**row, **record.metrics} | {"step": None})
            )
        self._show(record, row["memory_bytes"])

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write an event row. Give the field `step` to an event that belongs to a step (an evaluation), so
        that resuming from before that step drops it.

        Raises:
            ValueError: a field is called kind, event or stage, or is not JSON.
        """
        self._append({"kind": "event", "event": kind, "stage": self.stage}, fields)

    def _append(self, row: dict[str, Any], extra: Mapping[str, Any]) -> None:
        clash = sorted(row.keys() & extra.keys())
        if clash:
            raise ValueError(f"log row: the names {', '.join(clash)} belong to the log; rename these fields")
        line = _line({**row, **extra}).encode("ascii")
        # Unbuffered: one row is one write, so that an interruption never leaves half a row to be flushed
        # later.
        with open(self.path, "ab", buffering=0) as file:
            written = file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: a row was written in part; is the disk full?")

    def _show(self, record: StepRecord, memory: int) -> None:
        done = record.step + 1
        if self._session is None:
            # The first step is left out of the rate where possible: it pays for warming up.
            self._session = (done, record.seconds, record.tokens)
        first_step, first_seconds, first_tokens = self._session
        if done > first_step:
            elapsed = max(record.seconds - first_seconds, 1e-9)
            rate = (record.tokens - first_tokens) / elapsed
            remaining = (record.steps - done) * elapsed / (done - first_step)
        else:
            rate = record.tokens_per_second
            remaining = math.nan
        if self._stream.isatty():
            self._show_bar(record, rate, remaining, memory)
        elif done % self._every == 0 or done == record.steps:
            line = (
                f"{self.stage} {done}/{record.steps}  loss {record.loss:.4f}  {rate:,.0f} tokens/s  "
                f"ETA {_clock(remaining)}  memory {memory / 2**30:.2f} GiB"
            )
            print(line, file=self._stream, flush=True)

    def _show_bar(self, record: StepRecord, rate: float, remaining: float, memory: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
                TextColumn("ETA {task.fields[remaining]}  {task.fields[memory]} GiB"),
                console=Console(file=self._stream),
            )
            self._progress.start()
            self._bar = self._progress.add_task(
                self.stage, total=record.steps, loss="", rate="", remaining="", memory=""
            )
        assert self._bar is not None
        self._progress.update(
            self._bar,
            completed=record.step + 1,
            total=record.steps,
            loss=f"{record.loss:.4f}",
            rate=f"{rate:,.0f}",
            remaining=_clock(remaining),
            memory=f"{memory / 2**30:.2f}",
        )


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a log, in order. A last line that a kill tore (no newline, not a whole row) is left out
    with one log line; a file that does not exist has no rows.

    Raises:
        ValueError: any other line is not a JSON object; names file and line number.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif last:
            _logger.warning("%s: the last line (%d) is torn and is left out", path, number)
        else:
            raise ValueError(f"{path}:{number}: not a JSON object; remove the line, or restore the log")
    return rows


def memory_bytes() -> int:
    """Bytes that this process takes: the peak of torch's allocations on the current CUDA device once CUDA is
    in use, else the resident set (on systems without /proc, its peak).
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    try:
        return json.dumps(finite, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"log row: not plain JSON ({error}); give numbers, strings, lists or dicts"
        ) from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _repair(path: Path) -> None:
    """Cut a torn last row off, or end a whole one with its newline, so that the next row starts a line of its
    own.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    with open(path, "r+b") as file:
        if _parse(content[start:]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            _logger.warning("%s: cut off a torn last row of %d bytes", path, len(content) - start)
            file.truncate(start)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
