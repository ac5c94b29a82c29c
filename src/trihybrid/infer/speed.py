"""How fast the engine runs a model, and what it holds, against context and batch."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trihybrid.infer.engine import Engine, Execution
from trihybrid.infer.weights import Weights

STEPS = 16
Clock = Callable[[], float]


@dataclass(frozen=True)
class SpeedRow:
    """One measurement.

    Attributes:
        model: what it is called.
        context, batch: tokens of every sequence, and how many sequences.
        prefill: prompt tokens a second, of one sequence after the other.
        decode: tokens a second, of all sequences together.
        step_ms: median milliseconds of a decoding step.
        state_bytes: what the sequences hold.
        weight_bytes: what the model holds.
    """

    model: str
    context: int
    batch: int
    prefill: float
    decode: float
    step_ms: float
    state_bytes: int
    weight_bytes: int


def measure_speed(
    name: str,
    model: PreTrainedModel,
    contexts: Sequence[int],
    batches: Sequence[int],
    chunk: int = 512,
    execution: Execution = "eager",
    weights: Weights = "full",
    clock: Clock = time.perf_counter,
) -> list[SpeedRow]:
    """A row for every context and batch, in this order, on random tokens. The first steps, which warm up, do not count.

    Args:
        name: of the model in the rows.
        model: teacher or student; an engine takes it over.
        contexts, batches: each at least 1.
        chunk, execution, weights: of the engine.
        clock: seconds.

    Raises:
        ValueError: a context or a batch below 1, or states that do not fit.
    """
    for what, numbers in (("context", contexts), ("batch", batches)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{what} is {list(numbers)}; give numbers of at least 1")
    # Room for all from the start, so that nothing grows while the clock runs.
    room = max(batches) * (max(contexts) + 2 * STEPS + 64)
    engine = Engine(model, rows=max(batches), tokens=room, chunk=chunk, execution=execution, weights=weights)
    _row(name, engine, min(contexts), 1, clock)
    return [_row(name, engine, context, batch, clock) for context in contexts for batch in batches]


def _row(name: str, engine: Engine, context: int, batch: int, clock: Clock) -> SpeedRow:
    generator = torch.Generator().manual_seed(0)
    reading, sequences = 0.0, []
    snapshots = []
    for _ in range(batch):
        tokens = torch.randint(engine.vocabulary, (context,), generator=generator).tolist()
        sequence = engine.add(tokens, most=1)
        began = clock()
        while not engine.step():
            pass
        reading += clock() - began
        # It waits as a snapshot until all others are there.
        snapshots.append(engine.snapshot(sequence))
        engine.remove(sequence)
    times = []
    for snapshot in snapshots:
        sequences.append(engine.add([*snapshot.tokens, 0], most=STEPS + 1, prefix=snapshot))
    for _ in range(STEPS):
        began = clock()
        engine.step()
        times.append(clock() - began)
    seconds = statistics.median(times[STEPS // 4 :])
    for sequence, snapshot in zip(sequences, snapshots, strict=True):
        engine.remove(sequence)
        engine.release(snapshot)
    state = batch * engine.bytes_of(context)
    rates = batch * context / reading, batch / seconds
    return SpeedRow(name, context, batch, *rates, 1000 * seconds, state, engine.memory()["weights"])
