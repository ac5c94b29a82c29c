"""Inference at Gemma-4 E2B's true shape: student and teacher in our engine, and the teacher in transformers.

    python benchmarks/inference_e2b.py [--parts student,teacher,peer] [--long] [--json FOLDER]
    python benchmarks/inference_e2b.py --only long                    the student's long context and nothing else
    python benchmarks/inference_e2b.py --parts student --executions fused-graph --weights int8
    python benchmarks/inference_e2b.py --tiny        the same in small, on the CPU: a rehearsal

Weights are random and made on the device; the student is the plan of the model card. One row a measurement, printed as
JSON when it is there: decoding by each execution, at batch 1 behind 4,096 and 131,072 tokens and at batch 64 behind
8,192, in milliseconds a step (medians, the host's share and the choice of a token included); prefill of as many tokens
at batch 1, each length but the longest behind a prompt that is not timed; with --long, 1,000,000 tokens of context.
`extra_GiB` is the peak of memory above what is held before: weights and states. `limit` of a decoding step is what its
bytes alone would take at the rate of a copy in the same run: every weight but the per-layer table once, keys and values
once, recurrences and rings twice. What does not fit into --seconds is left out, with a row that says so. The peer runs
in a process of its own: transformers' static cache and compiled step, and its dynamic cache for prefill. Exits with 1
when a target is met by none of the executions that were measured, or something failed.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from inference_e2b_common import EXTRA_GIB, TINY, TRUE, Row, Run, Scale, build, synchronise, timed
from transformers import PreTrainedModel

from trihybrid.infer.engine import Engine, Execution, Snapshot
from trihybrid.infer.weights import Weights

PARTS = ("student", "teacher", "peer")
STEPS = 48
ROOM = 8192
PEER = Path(__file__).with_name("inference_e2b_peer.py")


def main() -> int:
    """Run the parts and return the exit code."""
    parser = argparse.ArgumentParser(description="Inference at E2B's shape beside its peers.")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--executions", help="some of the ways to decode; all if not given")
    parser.add_argument("--long", action="store_true", help="the long context too")
    parser.add_argument("--only", choices=["long"], help="this measurement alone, in an engine of one row")
    parser.add_argument("--weights", choices=["full", "int8", "int4"], default="full", help="of our engine")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what does not fit is left out")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write inference_e2b.json there")
    given = parser.parse_args()
    scale = TINY if given.tiny else TRUE
    if given.executions:
        scale = replace(scale, executions=tuple(given.executions.split(",")))
    if given.weights != "full" and len(scale.executions) > 1 and not given.only:
        parser.error("an engine quantises its model for good: with --weights give one of --executions")
    run = Run(scale, time.monotonic() + given.seconds, given.json)
    run.note(limits(scale))
    parts = [] if given.only else given.parts.split(",")
    if given.only == "long":
        measure_long(run, given.weights)
    for part in ("student", "teacher"):
        if part in parts:
            measure_engine(run, part, given.weights, given.long)
    if "peer" in parts:
        watch_peer(run, given.tiny)
    print(table(run.rows))
    missed = missed_targets(run.rows)
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed or any("error" in row for row in run.rows) else 0


def limits(scale: Scale) -> Row:
    """Rates of a copy and of a matrix product on this device."""
    device, size = scale.device, 8192 if scale.device != "cpu" else 256
    x = torch.randn(size, size, device=device, dtype=scale.dtype)
    large = torch.empty(2**30 if device != "cpu" else 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    copy = timed(lambda: other.copy_(large), device, 8)
    product = timed(lambda: x @ x, device, 8)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "what": "limits",
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_TBps": float(f"{2 * large.numel() / copy / 1e12:.4g}"),
        "product_TFLOPs": float(f"{2 * size**3 / product / 1e12:.4g}"),
    }


def measure_engine(run: Run, part: str, weights: Weights, long: bool) -> None:
    """All rows of one model in our engine."""
    scale = run.scale
    began = time.perf_counter()
    model = build(scale, part)
    synchronise(scale.device)
    run.note({"model": part, "what": "build", "seconds": round(time.perf_counter() - began, 1)})
    most = max(*scale.contexts, scale.long if long else 0, scale.batch * (scale.batch_context + 128))
    room = most + ROOM
    for execution in scale.executions:
        later = execution != scale.executions[0]
        if later and not run.fits(40 if part == "student" else 60, part, f"decode, {execution}"):
            return
        try:
            bench = EngineBench(run, part, model, execution, scale.batch, room, weights)
            for context in scale.contexts:
                if run.fits(15 if context < 100_000 else 35, part, f"{context} tokens"):
                    bench.alone(context, prefill=not later)
            # The kernels leave so many sequences to the form of `fused-graph`.
            if execution != "kernels" and run.fits(25, part, f"batch {scale.batch}"):
                bench.together()
            if long and not later and part == "student" and run.fits(75, part, f"{scale.long} tokens"):
                bench.alone(scale.long, prefill=True)
        except (RuntimeError, ValueError) as error:
            if scale.device == "cpu":
                raise
            run.note({"model": part, "what": f"failed ({execution})", "error": str(error)[-600:]})
        bench = None  # type: ignore[assignment]
        if scale.device == "cuda":
            torch.cuda.empty_cache()


def measure_long(run: Run, weights: Weights) -> None:
    """Prefill and decoding of the student behind the long context."""
    scale, part = run.scale, "student"
    model = build(scale, part)
    try:
        bench = EngineBench(run, part, model, scale.executions[0], 1, scale.long + ROOM, weights)
        bench.alone(scale.long, prefill=True)
    except (RuntimeError, ValueError) as error:
        if scale.device == "cpu":
            raise
        run.note({"model": part, "what": f"failed ({scale.long} tokens)", "error": str(error)[-600:]})


class EngineBench:
    """A model in an engine with room for what is asked of it.

    Args:
        run: takes the rows.
        part: `student` or `teacher`.
        model: it.
        execution: of decoding steps.
        rows, tokens, weights: of the engine.
    """

    def __init__(
        self,
        run: Run,
        part: str,
        model: PreTrainedModel,
        execution: Execution,
        rows: int,
        tokens: int,
        weights: Weights,
    ) -> None:
        self._run, self._part, self._execution = run, part, execution
        scale = run.scale
        self._engine = Engine(
            model, rows=rows, tokens=tokens, chunk=scale.chunk, execution=execution, weights=weights
        )
        memory = self._engine.memory()
        table = getattr(model.model, "embed_tokens_per_layer", None)
        looked_up = 0 if table is None else table.weight.numel() * table.weight.element_size()
        # The embedding is the head too, and is read whole once.
        self._read = memory["weights"] - looked_up
        self._state, self._token = memory["rows"] // rows, memory["token"]
        self._copy = run.rows[0]["copy_TBps"] * 1e12
        self._rows: Row = {"model": part, "execution": execution, "weights": weights}
        # The first chunks compile kernels.
        self._finish(self._prefill(2 * scale.chunk + 7, 2)[0])

    def _tokens(self, count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self._engine.vocabulary, (count,), generator=generator).tolist()

    def _prefill(self, context: int, most: int) -> tuple[int, float]:
        """A sequence behind its prompt, and the seconds of that."""
        sequence = self._engine.add(self._tokens(context), most=most)
        synchronise(self._run.scale.device)
        began = time.perf_counter()
        while not self._engine.step():
            pass
        synchronise(self._run.scale.device)
        return sequence, time.perf_counter() - began

    def _finish(self, sequence: int) -> None:
        self._engine.remove(sequence)

    def _steps(self) -> float:
        """Milliseconds of a step."""
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times[STEPS // 4 :])

    def alone(self, context: int, prefill: bool) -> None:
        """Rows at batch 1."""
        cuda = self._run.scale.device == "cuda"
        if prefill and context < self._run.scale.long:
            # What the first prompt of a length compiles is no part of its speed.
            self._finish(self._prefill(context, 1)[0])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        sequence, seconds = self._prefill(context, STEPS + 2)
        extra = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
        if prefill:
            self._run.note(
                self._rows
                | {
                    "what": "prefill", "batch": 1, "context": context, "value": round(context / seconds, 1),
                    "unit": "tokens/s", "extra_GiB": round(extra, 3),
                }
            )  # fmt: skip
        value = self._steps()
        self._finish(sequence)
        self._note_decode(1, context, value)

    def together(self) -> None:
        """The row of the batch: the state of one prompt, copied into pages of its own for each."""
        scale, engine = self._run.scale, self._engine
        first, _ = self._prefill(scale.batch_context, 1)
        source = engine.snapshot(first)
        self._finish(first)
        tensors, copies = engine.export(source), [source]
        sequences = []
        for place in range(scale.batch):
            if place:
                copies.append(engine.restore(source.tokens, tensors))
            prompt = [*source.tokens, self._tokens(1, place)[0]]
            sequences.append(engine.add(prompt, most=STEPS + 2, prefix=copies[place]))
        value = self._steps()
        self._clear(sequences, copies)
        self._note_decode(scale.batch, scale.batch_context, value)

    def _clear(self, sequences: list[int], copies: list[Snapshot]) -> None:
        for sequence in sequences:
            self._engine.remove(sequence)
        for copy in copies:
            self._engine.release(copy)

    def _note_decode(self, batch: int, context: int, value: float) -> None:
        # States of recurrences are written too; rings are a tenth of them.
        states = batch * (2 * self._state + context * self._token)
        self._run.note(
            self._rows
            | {
                "what": "decode", "batch": batch, "context": context, "value": round(value, 3), "unit": "ms/step",
                "tokens_per_s": round(1000 * batch / value, 1),
                "limit": round(1000 * (self._read + states) / self._copy, 3),
                "weights_GB": round(self._read / 1e9, 3), "states_GB": round(states / 1e9, 3),
            }
        )  # fmt: skip


def watch_peer(run: Run, tiny: bool) -> None:
    """Run the peer in a process of its own, for as long as there is time; keeps the rows that it prints."""
    if not run.fits(40, "transformers", "all"):
        return
    if run.scale.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    left = run.deadline - time.monotonic()
    command = [
        sys.executable,
        str(PEER),
        "--seconds",
        str(left),
        *(["--tiny"] if tiny else []),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=None if tiny else left)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += "\n" + json.dumps(
            {"model": "transformers", "what": "rest", "left_out": "stopped, no time left"}
        )
    else:
        if process.returncode:
            run.note({"model": "transformers", "what": "failed", "error": f"exit code {process.returncode}"})
    for line in output.splitlines():
        if line.startswith("{"):
            run.note(json.loads(line))


def missed_targets(rows: list[Row]) -> list[str]:
    """What has a target that no row of it meets."""
    met: dict[str, bool] = {}
    for row in rows:
        if "target" in row:
            what = f"{row['what']}, batch {row['batch']}, {row['context']:,} tokens: {row['target']} {row['unit']}"
            if row["what"] == "prefill":
                what += f" in {EXTRA_GIB} GiB"
            met[what] = met.get(what, False) or row["target_met"]
    return [what for what, any_met in met.items() if not any_met]


def table(rows: list[Row]) -> str:
    """The measured rows as a table."""
    lines = [
        "| model | execution | what | batch | context | value | limit | extra GiB | target |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        if "value" in row:
            target = (
                "" if "target" not in row else f"{row['target']} {'met' if row['target_met'] else 'not met'}"
            )
            lines.append(
                f"| {row['model']} | {row['execution']} | {row['what']} | {row['batch']} | {row['context']:,} "
                f"| {row['value']:,} {row['unit']} | {row.get('limit', '')} | {row.get('extra_GiB', '')} | {target} |"
            )
        elif "left_out" in row or "error" in row:
            lines.append(f"| {row['model']} | | {row['what']} | {row.get('left_out', row.get('error'))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
