"""Damaged and hostile artifacts: none may crash the reader, hang it, exhaust its memory, or load as something else.

Half of the mutants are damaged blindly. The other half have all checksums and lengths made right again, so that the
parsers behind them are reached; what such a file holds is then decoded a second time by the slow and simple code below,
and a load that disagrees with it is a violation. All runs in a child process that has a bounded address space and ten
seconds a mutant.

    python benchmarks/fuzz_artifact.py                  100,000 mutants, exit code 1 on any violation
    python benchmarks/fuzz_artifact.py --count 2000 --seed 7
"""

import argparse
import collections
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WATCHDOG_SECONDS = 10
# 16 MiB of values; the address space below is what bounds the rest.
LIMIT_ELEMENTS = 2**22


def fuzz(count: int, seed: int, limit_bytes: int = 256 * 2**20) -> dict[str, Any]:
    """Try `count` mutants in a child process.

    Args:
        count: of mutants.
        seed: which ones.
        limit_bytes: of the child's address space, everything in it included (interpreter, numpy, pydantic: 110 MiB).

    Returns:
        {"count", "outcomes": {what: how often}, "violations": [what happened], "seconds", "peak_bytes"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder, "--count", str(count), "--seed", str(seed)]
        command += ["--limit-bytes", str(limit_bytes)]
        # BLAS and malloc reserve address space for every thread.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if child.returncode == 0:
            return dict(json.loads(child.stdout))
        progress = Path(folder) / "progress"
        number = progress.read_text() if progress.exists() else "none"
    why = "no answer in time" if child.returncode == -signal.SIGALRM else f"exit code {child.returncode}"
    violation = f"mutant {number} of seed {seed}: {why}: {child.stderr[-2000:]}"
    return {"count": count, "outcomes": {}, "violations": [violation], "seconds": 0.0, "peak_bytes": 0}


def run_child(folder: Path, count: int, seed: int, limit_bytes: int) -> dict[str, Any]:
    """What the child process does: `fuzz` without the process around it."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    from artifact_mutants import make_mutant, seed_artifacts

    originals = seed_artifacts()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    outcomes: collections.Counter[str] = collections.Counter()
    violations = []
    began = time.monotonic()
    progress = os.open(folder / "progress", os.O_WRONLY | os.O_CREAT)
    for number in range(count):
        os.pwrite(progress, b"%012d" % number, 0)
        signal.alarm(WATCHDOG_SECONDS)
        kind, original, mutant = make_mutant(originals, seed, number)
        outcome = judge(folder / "mutant.artifact", original, mutant, kind.startswith("repaired"))
        signal.alarm(0)
        outcomes[f"{kind.split()[0]}: {outcome.split(':')[0]}"] += 1
        if outcome not in ("refused", "loads as the original", "loads, valid by itself"):
            violations.append(f"mutant {number} of seed {seed} ({kind}): {outcome}")
    os.close(progress)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmPeak" in line)
    return {
        "count": count,
        "outcomes": dict(sorted(outcomes.items())),
        "violations": violations,
        "seconds": time.monotonic() - began,
        "peak_bytes": int(peak.split()[1]) * 1024,
    }


def judge(path: Path, original: bytes, mutant: bytes, repaired: bool) -> str:
    """What becomes of one mutant: an allowed outcome, or the violation in words."""
    from artifact_by_definition import decode_simply

    from trihybrid.compress.container import read_container
    from trihybrid.compress.ledger import canonical_json

    # Without truncating first, which costs a millisecond on some file systems.
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(file, mutant)
    os.ftruncate(file, len(mutant))
    os.close(file)
    try:
        ledger, arrays = read_container(path, LIMIT_ELEMENTS)
    except ValueError as error:
        message = str(error)
        if "more memory than there is" in message:
            return f"out of memory: {message}"
        return "refused" if message.startswith(f"{path}: ") else f"the file is not named: {message}"
    except Exception as error:  # the point of all this
        return f"{type(error).__name__}: {error}"
    text, wanted = decode_simply(original)
    found = canonical_json(ledger.model_dump())
    if found == text and same(arrays, wanted):
        return "loads as the original"
    if not repaired:
        return "wrong load: the damage was not seen"
    try:
        text, wanted = decode_simply(mutant)
    except Exception as error:
        return f"wrong load: the simple decoder stops with {type(error).__name__}: {error}"
    if found != text or not same(arrays, wanted):
        return "wrong load: the simple decoder gets something else"
    return "loads, valid by itself"


def same(arrays: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether names, order, shapes, dtypes and bits are the same."""
    return list(arrays) == list(wanted) and all(
        array.shape == wanted[name].shape
        and array.dtype == wanted[name].dtype == "float32"
        and array.tobytes() == wanted[name].tobytes()
        for name, array in arrays.items()
    )


def main() -> int:
    """Run, print what happened, and return the exit code."""
    parser = argparse.ArgumentParser(description="Damaged and hostile artifacts against the reader.")
    parser.add_argument("--count", type=int, default=100_000, help="mutants (default 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default 0)")
    parser.add_argument(
        "--limit-bytes", type=int, default=256 * 2**20, help="address space of the child (default 256 MiB)"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count is {arguments.count}; expected at least 1")
    if arguments.child is not None:
        print(json.dumps(run_child(arguments.child, arguments.count, arguments.seed, arguments.limit_bytes)))
        return 0
    result = fuzz(arguments.count, arguments.seed, arguments.limit_bytes)
    print(f"{result['count']:,} mutants of seed {arguments.seed} in {result['seconds']:.0f} s")
    print(
        f"address space at most {result['peak_bytes'] / 2**20:.0f} of {arguments.limit_bytes / 2**20:.0f} MiB"
    )
    for outcome, times in result["outcomes"].items():
        print(f"{times:9,}  {outcome}")
    print(f"{len(result['violations']):9,}  violations")
    for violation in result["violations"][:20]:
        print(violation, file=sys.stderr)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
