"""What more GPUs give, from measured points: tokens a second, bytes a step, GPU-hours.

    python benchmarks/scaling.py --trained PARAMETERS --tokens TOKENS --point 1:RATE --point 2:RATE [--gpus 1 2 4 8]
    python benchmarks/scaling.py --trained PARAMETERS --tokens TOKENS --run 1:RUN --run 2:RUN --stage matched
        [--gathered BYTES]

PARAMETERS are those that train, TOKENS those of one GPU in a step, RATE the tokens a second of all GPUs together; BYTES
those of the weights that a step gathers where several GPUs share them out (`parallel: shard`); --run takes the median
rate of a stage from a run's log, without its first 10 steps. The formula is in docs/scaling.md. The last table compares
it with the points: with more than two, they check it.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from trihybrid.run import read_log

WARM = 10
FLOAT32 = 4
BUDGETS = (100e6, 500e6, 5e9)


@dataclass(frozen=True)
class Model:
    """The fitted formula.

    alone: tokens a second of one GPU.
    tokens: of one GPU in a step.
    trained: parameters whose gradients are exchanged.
    seconds_a_byte: that a step waits for each byte that a GPU sends; 0 where nothing is waited for.
    gathered: bytes of weights that a step gathers, each as often as it does; 0 where every GPU holds all.
    """

    alone: float
    tokens: int
    trained: int
    seconds_a_byte: float
    gathered: int = 0

    def bytes_sent(self, gpus: int) -> float:
        """By each GPU in a step: a ring adds up float32 gradients, and hands the sums around; where weights are shared
        out, it hands around these, as each GPU needs the sums of its own only."""
        gradients = FLOAT32 * self.trained
        return (gpus - 1) / gpus * (gradients + (self.gathered or gradients))

    def step_seconds(self, gpus: int) -> float:
        """Of a step in which each GPU has its own tokens."""
        return self.tokens / self.alone + self.seconds_a_byte * self.bytes_sent(gpus)

    def rate(self, gpus: int) -> float:
        """Tokens a second of all GPUs together."""
        return gpus * self.tokens / self.step_seconds(gpus)

    def gpu_hours(self, gpus: int, budget: float) -> float:
        """For so many tokens."""
        return budget / self.rate(gpus) * gpus / 3600


def fit(points: dict[int, float], tokens: int, trained: int, gathered: int = 0) -> Model:
    """Least squares of the waiting time over the bytes sent, through the measured rate of one GPU.

    ValueError without a point of one GPU, or for numbers that are not above 0.
    """
    if 1 not in points or min([*points.values(), tokens, trained]) <= 0 or min(points) < 1:
        raise ValueError(
            f"points are {points}, tokens {tokens}, trained {trained}; give one point of 1 GPU, and numbers above 0"
        )
    bare = Model(points[1], tokens, trained, 0.0, gathered)
    sent = {gpus: bare.bytes_sent(gpus) for gpus in points if gpus > 1}
    waited = {gpus: gpus * tokens / points[gpus] - bare.step_seconds(gpus) for gpus in sent}
    squares = sum(size**2 for size in sent.values())
    slope = sum(sent[gpus] * waited[gpus] for gpus in sent) / squares if squares else 0.0
    return Model(points[1], tokens, trained, max(0.0, slope), gathered)


def main() -> int:
    """Fit and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trained", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--gathered", type=int, default=0, metavar="BYTES")
    parser.add_argument("--point", action="append", default=[], metavar="GPUS:RATE")
    parser.add_argument("--run", action="append", default=[], metavar="GPUS:FOLDER")
    parser.add_argument("--stage", default="matched")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args()
    points = {int(count): float(rate) for count, rate in (point.split(":", 1) for point in given.point)}
    points |= {
        int(count): measured_rate(Path(folder), given.stage)
        for count, folder in (run.split(":", 1) for run in given.run)
    }
    try:
        model = fit(points, given.tokens, given.trained, given.gathered)
    except ValueError as error:
        parser.error(str(error))
    budgets = "".join(f" | GPU-hours for {budget / 1e6:,.0f} M tokens" for budget in BUDGETS)
    print(f"| GPUs | tokens/s | MB sent by each in a step | ms a step{budgets} |")
    print("|" + "---|" * (4 + len(BUDGETS)))
    for gpus in given.gpus:
        hours = "".join(f" | {model.gpu_hours(gpus, budget):,.2f}" for budget in BUDGETS)
        sent, step = model.bytes_sent(gpus) / 1e6, 1000 * model.step_seconds(gpus)
        print(f"| {gpus} | {model.rate(gpus):,.0f} | {sent:,.0f} | {step:,.1f}{hours} |")
    print("\n| GPUs | measured tokens/s | by the formula |\n|---|---|---|")
    for gpus, rate in sorted(points.items()):
        print(f"| {gpus} | {rate:,.0f} | {model.rate(gpus):,.0f} ({model.rate(gpus) / rate - 1:+.1%}) |")
    return 0


def measured_rate(run: Path, stage: str) -> float:
    """The median tokens a second of a stage."""
    rows = [row for row in read_log(run / "log.jsonl") if row["kind"] == "train" and row["stage"] == stage]
    if len(rows) <= WARM:
        raise SystemExit(
            f"{run}: stage {stage!r} has {len(rows)} steps in its log, needed are more than {WARM}"
        )
    return statistics.median(row["tokens_per_second"] for row in rows[WARM:])


if __name__ == "__main__":
    sys.exit(main())
