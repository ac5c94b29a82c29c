"""A decoding step of E2B's shape by each execution: how far its logits are off, how long it takes, and its kernels.

    python benchmarks/decode_step.py [--parts errors,times,profile] [--executions graph,kernels] [--json FOLDER]
    python benchmarks/decode_step.py --parts sizes [--batches 1,8]      blocks of the products: what would be faster
    python benchmarks/decode_step.py --tiny        the errors in small on a CPU, where kernels are torch's operators

One GPU, bfloat16, random weights; norms of retained queries and keys are small, so that scores are about one and logits
differ by rounding alone. `errors`: 1 and 4 sequences behind 700 tokens and less, three tokens each; relative rms of the
logits, and the worst of the states that are left, against float32 on the same states. `times`: milliseconds of a
replay, and of a step with the host's share, behind 4,096 and, of a sequence alone, 131,072 tokens; --batches says of
how many sequences. `profile`: of one replayed step at 4,096 by the last execution, kernels by name; those that begin
early overlap, so that their times add up to more than the step. `sizes`: from the blocks in
`ops/decode_product/sizes.py` on, for each kind of product, to whichever neighbour makes a replay at 4,096 faster, until
none does. --json writes the rows as decode_step.json into FOLDER. Exits with 1 where the logits of an execution are
more than 1.5 times as far off as those of the first.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inference_e2b_common import TINY, TRUE, build
from torch import Tensor

from trihybrid.infer.execution import Decoder, EagerDecoder, GraphDecoder, make_decoder
from trihybrid.infer.kernels import KernelStep
from trihybrid.infer.network import Network
from trihybrid.ops.decode_product import MOST_ROWS, sizes
from trihybrid.testing import relative_error

Row = dict[str, Any]

PARTS = ("errors", "times", "profile")
PAGE, STEPS, BATCHES, SEEN = 64, 3, (1, 4), 700
CONTEXTS = (4096, 131_072)
MILD = 0.25  # of the norms of queries and keys
WALLS, REPLAYS, ROUNDS = 30, 20, 7
FURTHER = 1.5
MOST_WARPS = 16
BETTER = 0.999  # of the time: less is noise


class KernelsHere:
    """The kernels' step without a recording, for a CPU."""

    def __init__(self, network: Network) -> None:
        self._step = KernelStep(network)

    def __call__(self, ids: list[int], positions: list[int], pages: list[list[int]]) -> Tensor:
        return self._step(torch.tensor(ids), torch.tensor(positions), torch.tensor(pages))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)},sizes")
    parser.add_argument("--batches", default="1", help="sequences of all parts but `errors`, with commas")
    parser.add_argument("--executions", default="graph,kernels", help="ways to decode, the definition first")
    parser.add_argument("--tiny", action="store_true", help="in small, on a CPU")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    parts, names = given.parts.split(","), given.executions.split(",")
    batches = [int(batch) for batch in given.batches.split(",")]
    if "sizes" in parts and max(batches) > MOST_ROWS:
        parser.error(f"--batches: the kernels take at most {MOST_ROWS} sequences")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny runs in small on a CPU")
    rows: list[Row] = []
    with torch.inference_mode():
        model = build(TINY if given.tiny else TRUE, "student").requires_grad_(False)
        make_mild(model)
        wide_model = copy.deepcopy(model).float() if "errors" in parts else None
        network = Network(model, rows=max(*BATCHES, *batches), length=PAGE)
        if given.tiny:
            decoders: dict[str, Any] = {"graph": EagerDecoder(network), "kernels": KernelsHere(network)}
            parts = ["errors"]
        else:
            decoders = {name: make_decoder(network, name) for name in names}
        if wide_model is not None:
            seen = SEEN // 10 if given.tiny else SEEN
            wide = Network(wide_model, rows=network.states.rows, length=PAGE)
            for each in (network, wide):
                each.states.grow(max(BATCHES) * (seen // PAGE + 2))
            rows += note(error_rows(network, wide, decoders, seen))
            del wide, wide_model
        if {"times", "profile", "sizes"} & set(parts):
            network.states.grow(max(max(CONTEXTS), max(batches) * (CONTEXTS[0] + PAGE)) // PAGE + 2)
            for tensor in stores(network):
                tensor.normal_(std=0.5)
        if "times" in parts:
            rows += note(row for name, own in decoders.items() for row in time_rows(name, own, batches))
        if "profile" in parts:
            for batch in batches:
                rows += profile_rows(names[-1], decoders[names[-1]], batch)
        if "sizes" in parts:
            step = KernelStep(network)
            rows += note(row for batch in batches for row in size_rows(network, step, batch))
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "decode_step.json").write_text(json.dumps(rows, indent=2) + "\n")
    errors = [row for row in rows if "logits" in row]
    first = {row["batch"]: max(row["logits"]) for row in errors if row["execution"] == names[0]}
    missed = [row for row in errors if not max(row["logits"]) <= FURTHER * first[row["batch"]] + 1e-5]
    for row in missed:
        print(f"missed: {row['execution']} at batch {row['batch']} is {max(row['logits']):.4f} off")
    return 1 if missed else 0


def note(rows: Iterator[Row]) -> list[Row]:
    """The rows, printed as they come."""
    found = []
    for row in rows:
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def make_mild(model: torch.nn.Module) -> None:
    """Let scores of the retained attention be about one."""
    for name, parameter in model.named_parameters():
        if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
            parameter.fill_(MILD)


def stores(network: Network) -> Iterator[Tensor]:
    """All tensors that sequences leave something in."""
    states = network.states
    for part in (states.rings, states.pages):
        for stored in part.values():
            yield stored.keys
            yield stored.values
    yield from states.matrices.values()


def put(network: Network, kept: list[Tensor]) -> None:
    """Bring all states back."""
    for tensor, value in zip(stores(network), kept, strict=True):
        tensor.copy_(value)


def error_rows(network: Network, wide: Network, decoders: dict[str, Decoder], seen: int) -> Iterator[Row]:
    """Every execution against float32, from the same states on."""
    generator = torch.Generator().manual_seed(3)
    for batch in BATCHES:
        count = -(-(seen + STEPS) // PAGE)
        pages = [[1 + row + batch * place for place in range(count)] for row in range(batch)]
        text = torch.randint(3, network.vocabulary, (batch, seen + STEPS), generator=generator)
        # Sequences of different lengths.
        positions = [seen - row for row in range(batch)]
        for row, position in enumerate(positions):
            network.prefill(text[row, :position].tolist(), row, 0, pages[row], logits=False)
        kept = [tensor.clone() for tensor in stores(network)]
        put(wide, kept)
        wanted = steps(EagerDecoder(wide), text, positions, pages)
        after = [tensor.clone() for tensor in stores(wide)]
        for name, decoder in decoders.items():
            put(network, kept)
            found = steps(decoder, text, positions, pages)
            yield {
                "benchmark": "decode_step",
                "execution": name,
                "batch": batch,
                "logits": [relative_error(own, right) for own, right in zip(found, wanted, strict=True)],
                "states": max(
                    relative_error(own, right) for own, right in zip(stores(network), after, strict=True)
                ),
            }


def steps(decoder: Decoder, text: Tensor, positions: list[int], pages: list[list[int]]) -> list[Tensor]:
    """Logits of STEPS tokens of each sequence."""
    found = []
    for step in range(STEPS):
        ids = [int(own[position + step]) for own, position in zip(text, positions, strict=True)]
        # A decoder takes lists that it knows for those of before.
        lists = [list(own) for own in pages]
        found.append(decoder(ids, [position + step for position in positions], lists).clone())
    return found


def time_rows(name: str, decoder: GraphDecoder, batches: list[int]) -> Iterator[Row]:
    """Milliseconds of a step."""
    for batch in batches:
        for context in CONTEXTS if batch == 1 else CONTEXTS[:1]:
            pages = own_pages(context, batch)
            walls = []
            for step in range(WALLS):
                torch.cuda.synchronize()
                began = time.perf_counter()
                decoder([5] * batch, [context + step] * batch, pages).argmax(-1).tolist()
                walls.append(1000 * (time.perf_counter() - began))
            yield {
                "benchmark": "decode_step",
                "execution": name,
                "batch": batch,
                "context": context,
                "replay_ms": replay_ms(decoder.last_graph),
                "step_ms": statistics.median(walls[WALLS // 3 :]),
            }


def own_pages(context: int, batch: int) -> list[list[int]]:
    """Of each sequence, behind so many tokens."""
    count = context // PAGE + 1
    return [list(range(1 + row * count, 1 + (row + 1) * count)) for row in range(batch)]


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Median over rounds of replays that follow each other."""
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


def size_rows(network: Network, step: KernelStep, batch: int) -> Iterator[Row]:
    """Every try, from the blocks that are there to the fastest found."""

    def measured() -> float:
        decoder = GraphDecoder(network, step)
        decoder([5] * batch, [CONTEXTS[0]] * batch, own_pages(CONTEXTS[0], batch))
        return replay_ms(decoder.last_graph)

    best = measured()
    tables = {"SEVERAL": sizes.SEVERAL} if batch > 1 else {"PRODUCT": sizes.PRODUCT, "NORMED": sizes.NORMED}
    for name, table in tables.items():
        before = dict(table)
        for kind in before:
            found = True
            while found:
                held, found = table[kind], False
                for candidate in neighbours(held, sizes.FEWEST if name == "SEVERAL" else 1):
                    table[kind] = candidate
                    row = {"benchmark": "decode_step", "batch": batch, "table": name, "kind": kind}
                    try:
                        took = measured()
                    except triton_errors() as error:
                        yield row | dataclasses.asdict(candidate) | {"error": str(error)[:100]}
                        continue
                    yield row | dataclasses.asdict(candidate) | {"replay_ms": took, "best_ms": best}
                    if took < BETTER * best:
                        best, held, found = took, candidate, True
                        break
                table[kind] = held
        table.update(before)


def triton_errors() -> tuple[type[Exception], ...]:
    """What a block that is too large raises."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def neighbours(held: sizes.Sizes, fewest: int) -> Iterator[sizes.Sizes]:
    """Half and double of each field; outputs and inputs of a block are at least `fewest`."""
    for field, value in dataclasses.asdict(held).items():
        least = fewest if field in ("block", "step") else 1
        for other in (value // 2, value * 2):
            if other >= least and (field != "warps" or other <= MOST_WARPS):
                yield dataclasses.replace(held, **{field: other})


def profile_rows(name: str, decoder: GraphDecoder, batch: int) -> list[Row]:
    """The kernels of a replayed step, printed as a table."""
    decoder([5] * batch, [CONTEXTS[0]] * batch, own_pages(CONTEXTS[0], batch))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        decoder.last_graph.replay()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        print("profile: the profiler saw no kernel")
        return []
    span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    print(f"profile: {len(kernels)} kernels in {span:.0f} us, {batch} sequences")
    rows: list[Row] = []
    for kernel in sorted({e.name for e in kernels}):
        own = [e.time_range.elapsed_us() for e in kernels if e.name == kernel]
        print(f"{sum(own):9.1f} us {len(own):5d} x {statistics.mean(own):8.2f}  {kernel[:90]}")
        row = {"kernel": kernel, "launches": len(own), "microseconds": sum(own), "step_microseconds": span}
        rows.append({"benchmark": "decode_step", "execution": name, "batch": batch} | row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
