"""WKV-7 over several processes is WKV-7 in one: outputs, final state, and all gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trihybrid
from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.context import wkv7_context
from trihybrid.testing.compare import TOLERANCE, relative_error
from wkv7_cases import NAMES, make, results, two_layers

sys.path.insert(0, str(Path(__file__).parent))
try:
    from wkv7_context_worker import CASES
finally:
    sys.path.pop(0)

TIME = ["o", "r", "log_w", "k", "v", "a", "b"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what three processes on the CPU left."""
    folder = tmp_path_factory.mktemp("workers")
    script = Path(__file__).with_name("wkv7_context_worker.py")
    sources = os.pathsep.join([str(Path(trihybrid.__file__).parents[1]), str(script.parents[1])])
    environment = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(script), str(folder), "3"]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_processes_together_are_one(workers: Path, name: str) -> None:
    case = CASES[name]
    tensors, reset, dfinals, do = case.inputs()
    wide = [x.double() for x in tensors]
    dresults = (do.double(), sum(x.double() for x in dfinals))
    operator = wkv7 if case.layers == 1 else two_layers(wkv7)
    expected = results(operator, wide, dresults, reset_BT=reset, backend="reference")
    found = [load_file(workers / f"{name}-{rank}.safetensors") for rank in range(len(case.lengths))]
    for key, reference in zip(NAMES, expected, strict=False):
        pieces = [part[key] for part in found]
        if key in TIME:
            whole = torch.cat(pieces, 1)
        else:
            whole = pieces[0]
            assert all(torch.equal(piece, whole) for piece in pieces)
        assert whole.dtype == case.dtype
        assert (error := relative_error(whole, reference)) <= TOLERANCE[case.dtype], f"{key}: {error:.1e}"
    assert ("state" in found[0]) == case.state


def test_a_group_of_one_is_the_plain_operator_to_the_bit(workers: Path) -> None:
    tensors, _, dfinals, do = CASES["alone"].inputs()
    expected = results(wkv7, tensors, (do, dfinals[0]))
    found = load_file(workers / "alone-0.safetensors")
    assert all(torch.equal(found[name], x) for name, x in zip(NAMES, expected, strict=True))


def test_a_process_outside_of_the_group_is_refused(workers: Path) -> None:
    message = (workers / "refusal.txt").read_text(encoding="utf-8")
    assert message.startswith("group: process 2 is not in it")


def test_without_a_process_group_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group: torch\.distributed has no process group"):
        wkv7_context(*make(1, 2, 1, 2, 2, torch.float32))
