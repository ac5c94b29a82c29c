"""What the compiler makes of every Triton kernel, for GPUs that need not be here: registers, spills, shared memory.

    python benchmarks/kernel_resources.py [--architecture 80] [--only wkv7] [--json FOLDER]

Needs Triton, whose own ptxas and cuobjdump it runs, and no GPU: kernels are compiled for the shapes of the models that
call them, and nothing is launched. Architectures are 80 (A100), 86 and 89 (RTX 30 and 40), and 90 (H100, H200); without
one, all. Prints a row a program: warps, registers a thread, spilled bytes a thread, shared memory a block, and how many
blocks a multiprocessor holds by these. Exits with 1 where one needs more shared memory than a block may have.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.library import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KIB = 1024
BLOCK = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}
"""Shared memory that a block may ask for, and (below) that a multiprocessor has; CUDA programming guide, compute
capabilities."""
WHOLE = {80: 164 * KIB, 86: 100 * KIB, 89: 100 * KIB, 90: 228 * KIB}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048}
REGISTERS, RESERVED = 65_536, KIB
PROCESSORS = 132


class Absent:
    """A GPU that is not here."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_device(self) -> int:
        # Kernels remember by device what they were compiled for.
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)


@contextmanager
def compiling(architecture: int) -> Iterator[list[Any]]:
    """A list of all programs that kernels need while it is open; they are compiled and not launched."""
    programs: list[Any] = []
    launch = JITFunction.run

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        program = launch(self, *arguments, grid=grid, warmup=True, **options)
        if all(program.hash != other.hash for other in programs):
            programs.append(program)
        return program

    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    driver.set_active(Absent(architecture))
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(architecture, 10)),
    ):
        yield programs


def room(name: str) -> ModuleType:
    """A module of operators, which run their kernels for CPU tensors from now on."""
    module = importlib.import_module(f"trihybrid.ops.{name}")
    for operator in vars(module).values():
        if isinstance(operator, CustomOpDef):
            operator.register_kernel("cpu")(operator._init_fn)
    for condition in {"fusable", "fits"} & set(vars(module)):
        setattr(module, condition, lambda *given: True)
    return module


def leaf(*shape: int) -> Tensor:
    """bfloat16 that wants a gradient."""
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def wkv7(width: int, grouped: bool) -> None:
    """8 of the converted slots' heads, 4 of which share keys and values, with resets, in both directions."""
    from trihybrid.ops.wkv7.triton import wkv7_triton, wkv7_triton_grouped

    room("wkv7.triton")
    heads, groups = 8, 2 if grouped else 8
    log_w = (-torch.rand(1, 256, heads, width)).requires_grad_()
    own = [leaf(1, 256, heads, width) for _ in range(2)]
    shared = [leaf(1, 256, groups, width) for _ in range(3)]
    state, reset = torch.zeros(1, heads, width, width).requires_grad_(), torch.zeros(1, 256, dtype=torch.bool)
    operator = wkv7_triton_grouped if grouped else wkv7_triton
    o, last = operator(own[0], log_w, shared[0], shared[1], shared[2], own[1], state, reset)
    (o.float().sum() + last.sum()).backward()


def wkv7_step() -> None:
    """E2B's heads, one sequence and many."""
    launch = importlib.import_module("trihybrid.ops.wkv7.decode.triton").launch
    for batch in (1, 32):
        tokens = [torch.randn(batch, 1, 32, 128, dtype=torch.bfloat16) for _ in range(6)]
        state = torch.zeros(batch, 32, 128, 128)
        launch(tuple(tokens), state, state, None)


def divergence() -> None:
    """Blocks of E2B's vocabulary."""
    module = importlib.import_module("trihybrid.ops.divergence.triton")
    tables = importlib.import_module("trihybrid.ops.divergence.tables")
    student, teacher = torch.randn(4, 32_768), torch.randn(4, 32_768)
    norms = torch.zeros(4), torch.ones(4)
    sums = tables.Sums(4, student.device, torch.float32)
    for other, its_norms in ((teacher, norms), (None, None)):
        module.add_block(sums, student.clone(), other, 30.0, 1.0, 0)
        module.block_error(student.clone(), other, norms, its_norms, 30.0, 1.0, torch.bfloat16)


def gated_gelu() -> None:
    """E2B's MLP."""
    module = importlib.import_module("trihybrid.ops.gated_gelu.triton")
    x = torch.randn(2, 6144, dtype=torch.bfloat16)
    module.forward(x, x)
    module.backward(x, x, x)


def rates() -> None:
    """E2B's recurrences."""
    forward = importlib.import_module("trihybrid.ops.rates.triton").forward
    x, offset = torch.randn(1, 64, 4096, dtype=torch.bfloat16), torch.zeros(4096)
    forward(x, x, offset, offset)


def placed_heads() -> None:
    """E2B's two widths, in chunks of any length."""
    forward = importlib.import_module("trihybrid.ops.placed_heads.triton").forward
    for width in (256, 512):
        for length in (64, 41):
            x, table = torch.randn(1, length, 8, width, dtype=torch.bfloat16), torch.ones(1, length, 1, width)
            forward(x, torch.ones(width), 1e-6, table.bfloat16(), table.bfloat16())


def decode_attention() -> None:
    """E2B's heads, and TICA's, over tables of any width: which needs no program of its own."""
    launch = importlib.import_module("trihybrid.ops.decode_attention.triton").launch
    for batch in (1, 64):
        for heads, groups, width in ((8, 1, 256), (8, 1, 512), (16, 4, 64)):
            keys = torch.randn(8, 64, groups, width, dtype=torch.bfloat16)
            q = torch.randn(batch, heads, width, dtype=torch.bfloat16)
            for pages in (1, 64, 129):
                table = torch.zeros(batch, pages, dtype=torch.int64)
                launch(q, keys, keys, table, torch.ones(batch, dtype=torch.int64), 1.0)


def decode_product() -> None:
    """E2B's stream, MLPs, low ranks and head, one sequence and many."""
    module = importlib.import_module("trihybrid.ops.decode_product")
    launches = importlib.import_module("trihybrid.ops.decode_product.triton")
    for rows, width in ((1, 1536), (8, 1536), (1, module.WIDEST)):
        gain = module.Gain(torch.ones(width), 1e-6)
        x, y, other = (torch.randn(rows, size, dtype=torch.bfloat16) for size in (width, width, 256))
        before = module.Before(y, gain, torch.ones(1), gain)
        for finish, outputs in (
            (module.Finish(), 2560),
            (module.Finish("gated"), 2 * 6144),
            (module.Finish("times", other_BO=other), 256),
            (module.Finish("ranks", borders=(600, 800)), 1024),
            (module.Finish("logits", cap=30.0), 4096),
        ):
            launches.launch_normed(x, torch.zeros(outputs, width, dtype=torch.bfloat16), before, finish)
        for inputs in (256, 2048, 6144):
            wide = torch.zeros(rows, inputs, dtype=torch.bfloat16)
            launches.launch_product(wide, torch.zeros(1536, inputs, dtype=torch.bfloat16))
        ranks = torch.zeros(rows, 6656, dtype=torch.bfloat16)
        ups = [torch.zeros(rank, rank * 4, dtype=torch.bfloat16) for rank in (256, 256, 256, 128)]
        launches.launch_raised(ranks, 5760, ups)


def recurrence_step() -> None:
    """E2B's heads, one sequence and several."""
    module = importlib.import_module("trihybrid.ops.recurrence_step")
    launch = importlib.import_module("trihybrid.ops.recurrence_step.triton").launch
    gain = importlib.import_module("trihybrid.ops.decode_product").Gain(torch.ones(128), 1e-6)
    recurrence = module.Recurrence(32, 4, 128, torch.ones(4096), torch.ones(4096), gain, gain, True, None)
    for rows in (1, 8):
        x, raised, o = (torch.zeros(rows, size, dtype=torch.bfloat16) for size in (6656, 12_800, 4608))
        launch(x, raised, recurrence, torch.zeros(rows, 32, 128, 128), o[:, :4096])


def attention_step() -> None:
    """E2B's heads over a ring and over pages, and TICA's, with few parts and with many."""
    module = importlib.import_module("trihybrid.ops.attention_step")
    launch = importlib.import_module("trihybrid.ops.attention_step.triton").launch
    gain_of = importlib.import_module("trihybrid.ops.decode_product").Gain
    for heads, groups, width, gated in ((8, 1, 256, False), (8, 1, 512, False), (4, 2, 128, True)):
        gain = gain_of(torch.ones(width), 1e-6)
        own, behind = heads * width, (heads + groups) * width
        x = torch.zeros(1, behind + groups * width, dtype=torch.bfloat16)
        turns = None if gated else (torch.zeros(1, width), torch.zeros(1, width))
        seen, arrived = torch.zeros(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
        for first in ((0, own, behind), (0, None, None)):
            parts = module.Heads(heads, groups, width, 1.0, first, gain, gain if first[1] else None, None)
            for pages in (0, 4, 2048):
                keys = torch.zeros(1, 64 if pages else 512, groups, width, dtype=torch.bfloat16)
                table = torch.zeros(1, pages, dtype=torch.int64) if pages else None
                gate = x[:, :own] if gated else None
                launch(x, parts, module.Store(keys, keys, seen, table), turns, gate, x[:, :own], arrived)


def window_attention() -> None:
    """The compact models' heads."""
    q, k, v = leaf(1, 256, 8, 64), leaf(1, 256, 4, 64), leaf(1, 256, 4, 64)
    room("window_attention").window_attention(q, k, v, torch.arange(256)[None], 128, 0.125).sum().backward()


def squared_mlp() -> None:
    """The compact models' MLP, without and with a slope."""
    for slope in (0.0, 0.5):
        x, up, down = leaf(512, 512), leaf(1536, 512), leaf(512, 1536)
        room("squared_mlp").squared_mlp(x, up, down, slope).sum().backward()


def rotary() -> None:
    """Heads with and without a gain."""
    module = room("rotary")
    table = module.rotary_table(torch.arange(64)[None], module.frequencies(16, 1e4, 16, None, torch.float32))
    x, gain = leaf(1, 64, 8, 64), torch.ones(8).requires_grad_()
    for own in (gain, None):
        module.normed_rotation(x, own, *table, 1e-6).sum().backward()


def exclude_value() -> None:
    """The compact models' heads."""
    room("exclude_value").exclude_own_value(leaf(1, 64, 8, 64), leaf(1, 64, 4, 64)).sum().backward()


def mixed_norm() -> None:
    """With everything that a block of the compact models may have, and with nothing of it."""
    module = room("mixed_norm")
    x, branch, first, gate = (leaf(1, 64, 512) for _ in range(4))
    mix, shares = torch.randn(2, 512).requires_grad_(), torch.rand(2, 512).requires_grad_()
    positions = torch.arange(64)[None]
    for stream in ((x, branch, first, mix), (x, None, None, None)):
        sum(part.sum() for part in module.mixed_blend(*stream, positions, *shares, 0.3, 1e-6)).backward()
        sum(part.sum() for part in module.mixed_norm(*stream, 0.3, 1e-6)).backward()
    sum(part.sum() for part in module.mixed_norm(x, branch, None, None, 0.3, 1e-6, gate)).backward()


ROOMS: dict[str, tuple[Callable[[], None], ...]] = {
    "wkv7": (partial(wkv7, 64, False), partial(wkv7, 128, False), partial(wkv7, 128, True)),
    "wkv7/decode": (wkv7_step,),
    "decode_attention": (decode_attention,),
    "decode_product": (decode_product,),
    "recurrence_step": (recurrence_step,),
    "attention_step": (attention_step,),
    "divergence": (divergence,),
    "gated_gelu": (gated_gelu,),
    "rates": (rates,),
    "placed_heads": (placed_heads,),
    "window_attention": (window_attention,),
    "squared_mlp": (squared_mlp,),
    "rotary": (rotary,),
    "exclude_value": (exclude_value,),
    "mixed_norm": (mixed_norm,),
}
HOPPER = ("squared_mlp",)
"""Kernels that their operators take to compute capability 9 only."""


def row(name: str, architecture: int, program: Any) -> dict[str, Any]:
    """What one program takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    registers, stack = map(int, found.groups())
    warps, shared = program.metadata.num_warps, program.metadata.shared
    # Registers are given out by 8 a thread.
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        WHOLE[architecture] // (shared + RESERVED),
        THREADS[architecture] // (32 * warps),
    )
    return {
        "room": name,
        "architecture": architecture,
        "kernel": program.metadata.name,
        "warps": warps,
        "registers": registers,
        "spilled": stack,
        "shared": shared,
        "blocks": blocks,
        "fits": shared <= BLOCK[architecture],
    }


def main() -> int:
    """Compile, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Registers, spills and shared memory of every Triton kernel."
    )
    parser.add_argument("--architecture", type=int, choices=sorted(BLOCK), help="one of them (default all)")
    parser.add_argument("--only", choices=list(ROOMS), help="one room of kernels (default all)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write kernel_resources.json into it")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; unset it, so that kernels are compiled")

    print("| room | sm | kernel | warps | registers | spilled | shared | blocks |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for architecture in (arguments.architecture,) if arguments.architecture else sorted(BLOCK):
        for name in (arguments.only,) if arguments.only else ROOMS:
            if name in HOPPER and architecture < 90:
                continue
            with compiling(architecture) as programs:
                for call in ROOMS[name]:
                    call()
            for program in programs:
                rows.append(row(name, architecture, program))
                print(
                    "| " + " | ".join(str(value) for value in list(rows[-1].values())[:-1]) + " |", flush=True
                )
    if arguments.json is not None:
        arguments.json.mkdir(parents=True, exist_ok=True)
        (arguments.json / "kernel_resources.json").write_text(json.dumps(rows, indent=2) + "\n")
    large = [row for row in rows if not row["fits"]]
    for found in large:
        print(
            f"{found['kernel']} needs {found['shared']} bytes of shared memory, sm_{found['architecture']} has "
            f"{BLOCK[found['architecture']]} a block",
            file=sys.stderr,
        )
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
