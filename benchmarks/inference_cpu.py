"""The demo's student on a CPU: our engine beside transformers' generate.

    python benchmarks/inference_cpu.py [--threads 1] [--tokens 128] [--runs 5] [--json FOLDER] [--without-compiled]
                                       [--cold]

The model is the student of the demo's recipe with random weights, which cost the same. Every way writes as many tokens
greedily behind a prompt of 64, in turns, and the median of the runs counts; the prompt is part of it. Engine rows are
`eager` and `compiled`; what compiling took stands beside it and is not part of the speed. torch keeps what it has
compiled in a folder, and the next run only traces; --cold compiles anew. Exits with 1 when no row of
ours reaches 3 times generate and 50 tokens/s.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trihybrid.infer.engine import Engine, Execution
from trihybrid.models.families import family_of
from trihybrid.recipe.load import load_conversion
from trihybrid.recipe.planned import teacher_config
from trihybrid.surgery.layout import student_config

PROMPT = 64
RATIO, LEAST = 3.0, 50.0


def main() -> int:
    """Measure, print a table and return the exit code."""
    parser = argparse.ArgumentParser(description="The engine on a CPU beside generate.")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; a small model gains nothing by more"
    )
    parser.add_argument("--tokens", type=int, default=128, help="to write")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write inference_cpu.json there")
    parser.add_argument("--without-compiled", action="store_true", help="leave the compiled row out")
    parser.add_argument("--cold", action="store_true", help="compile although torch has done so before")
    given = parser.parse_args()
    torch.compiler.config.force_disable_caches = given.cold
    torch.set_num_threads(given.threads)
    recipe = load_conversion("demo", None)
    base = teacher_config(recipe)
    torch.manual_seed(0)
    model = family_of(base).student(student_config(base, recipe.surgery)).eval().requires_grad_(False)
    prompt = torch.randint(4, base.vocab_size, (PROMPT,)).tolist()

    def generate() -> list[int]:
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=given.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return ids[0, PROMPT:].tolist()

    ways: dict[str, Callable[[], list[int]]] = {"generate": generate}
    executions: list[Execution] = ["eager"] if given.without_compiled else ["eager", "compiled"]
    began: dict[str, float] = {}
    for execution in executions:
        started = time.perf_counter()
        ways[execution] = engine_way(model, execution, prompt, given.tokens)
        ways[execution]()
        began[execution] = time.perf_counter() - started
    texts = {name: way() for name, way in ways.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            speeds[name].append(given.tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    rows = [
        {
            "way": name,
            "tokens_per_s": round(value, 1),
            "ratio": round(value / medians["generate"], 2),
            "same_tokens": texts[name] == texts["generate"],
            "first_run_s": round(began.get(name, 0.0), 1),
            "threads": given.threads,
            "torch": torch.__version__,
        }
        for name, value in medians.items()
    ]
    print("| way | tokens/s | times generate | same tokens | first run, s |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['tokens_per_s']} | {row['ratio']} | {row['same_tokens']} | {row['first_run_s']} |"
        )
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "inference_cpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    best = max(value for name, value in medians.items() if name != "generate")
    return 0 if best >= LEAST and best >= RATIO * medians["generate"] else 1


def engine_way(
    model: torch.nn.Module, execution: Execution, prompt: list[int], tokens: int
) -> Callable[[], list[int]]:
    """A function that writes so many tokens with the engine, all of whose room is there from the start."""
    engine = Engine(model, tokens=2048, execution=execution)  # type: ignore[arg-type]

    def write() -> list[int]:
        sequence = engine.add(prompt, most=tokens)
        while engine.busy:
            engine.step()
        text = engine.tokens_of(sequence)[len(prompt) :]
        engine.remove(sequence)
        return text

    return write


if __name__ == "__main__":
    sys.exit(main())
