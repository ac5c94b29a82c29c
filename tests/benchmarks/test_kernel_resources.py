"""Every kernel compiles for every GPU that its operator takes, and a block has the shared memory that it wants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trihybrid
from interpreted import MARKS

pytestmark = MARKS
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
OPS = Path(trihybrid.__file__).parent / "ops"
SPILLING = {
    ("wkv7", "_differentiate"),
    ("mixed_norm", "_backward"),
    ("window_attention", "_backward_keys"),
    ("attention_step", "_head"),
}
"""Kernels that keep something outside of registers; the last two below Hopper only."""


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_every_kernel_fits(tmp_path: Path, architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(trihybrid.__file__).parents[1])}
    options = ["--architecture", str(architecture), "--json", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "kernel_resources.json").read_text())
    wanted = {str(path.parent.relative_to(OPS)) for path in OPS.rglob("triton.py")} | {"wkv7"}
    assert {row["room"] for row in rows} == wanted - ({"squared_mlp"} if architecture < 90 else set())
    assert {(row["room"], row["kernel"]) for row in rows if row["spilled"]} <= SPILLING
    assert all(row["blocks"] >= 1 for row in rows)
    # Tables of any width and chunks of any length are one program, so that none waits for a compiler.
    names = [(row["room"], row["kernel"]) for row in rows]
    assert names.count(("decode_attention", "_part")) == names.count(("decode_attention", "_join")) == 3
    assert names.count(("placed_heads", "_placed")) == 2
