"""Modules side by side: their imports, and what cannot be laid flat."""

import ast
import sys

import pytest

from trihybrid.export.folder.code import KERNELS, code_files
from trihybrid.export.folder.flatten import LIBRARIES, flatten

FILES = code_files("trihybrid_gemma4")


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_neighbours_and_installed_libraries_alone(name: str) -> None:
    """As transformers looks for them: a line `from .file import names`, and none of the package by its own name."""
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names | LIBRARIES
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in FILES
            assert (
                FILES[name].splitlines()[node.lineno - 1].lstrip().startswith(f"from .{node.module} import")
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in sys.stdlib_module_names | LIBRARIES


def test_sources_are_the_packages_own_but_for_imports() -> None:
    text = FILES["trihybrid_mixers_rwkv7_mixer.py"]
    assert text.startswith("# trihybrid/mixers/rwkv7/mixer.py of trihybrid ")
    from trihybrid.mixers.rwkv7 import mixer

    with open(mixer.__file__, encoding="ascii") as file:
        own = file.read().splitlines()
    made = [line for line in text.splitlines() if not line.startswith("# ")]
    changed = [
        (a, b) for a, b in zip([x for x in own if not x.startswith("# ")], made, strict=True) if a != b
    ]
    assert all(a.startswith("from trihybrid.") and b.startswith("from .") for a, b in changed)
    assert ("from trihybrid.mixers.span import Span", "from .trihybrid_mixers_span import Span") in changed


def test_kernels_are_left_to_an_installed_trihybrid() -> None:
    assert not any("triton.jit" in text for text in FILES.values())
    assert "import_module(KERNELS)" in FILES["trihybrid_ops_wkv7_triton.py"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import numpy\n", "imports numpy, which a folder of a student does without"),
        ("def f():\n    import triton\n", "imports triton"),
        (
            "from trihybrid.ops import backend\n",
            "line 1: `from trihybrid.ops import backend` is followed by nobody",
        ),
        (
            "x = 1\nimport trihybrid.ops.backend\n",
            "line 2: `import trihybrid.ops.backend` is followed by nobody",
        ),
        ("from .backend import choose\n", "`from .backend import choose` is followed by nobody"),
    ],
)
def test_what_cannot_be_laid_flat_is_said(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten({"trihybrid.ops.wkv7": "modeling"}, {"trihybrid.ops.wkv7.reference": source}, "")


def test_the_stand_in_is_the_kernels_own_interface() -> None:
    """An installed trihybrid answers for it: the same reasons, and no reason is a refusal to load."""
    import torch

    from trihybrid.export.folder import kernels
    from trihybrid.ops.wkv7 import triton

    cpu = torch.device("cpu")
    assert kernels.KERNELS == KERNELS == triton.__name__
    assert kernels.available(cpu) == triton.available(cpu) == "its kernels are for NVIDIA GPUs"
    for call in ((64, 64, torch.bfloat16), (64, 60, torch.bfloat16), (64, 64, torch.float32)):
        assert kernels.takes(*call) == triton.takes(*call)


@pytest.mark.parametrize("name", ["wkv7_triton", "wkv7_triton_grouped"])
def test_an_installed_kernel_gets_the_call(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With trihybrid there, the stand-in's function is the installed one, arguments as given."""
    import torch

    from trihybrid.export.folder import kernels
    from trihybrid.ops.wkv7 import triton

    def installed(r, log_w, k, v, a, b, state=None, reset=None):
        return (r, log_w, k, v, a, b, state, reset), "the installed one"

    monkeypatch.setattr(triton, name, installed)
    tensors = tuple(torch.full((1, 2, 1, 2), float(place)) for place in range(6))
    state, reset = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, dtype=torch.bool)
    given, answer = getattr(kernels, name)(*tensors, state, reset)
    assert answer == "the installed one" and all(
        x is y for x, y in zip(given, (*tensors, state, reset), strict=True)
    )


def test_an_installed_trihybrid_without_such_kernels_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trihybrid.export.folder import kernels

    monkeypatch.setattr(kernels, "KERNELS", "trihybrid.ops.wkv7.none")
    reason = kernels.available(torch.device("cpu"))
    assert reason.startswith("the installed trihybrid has no such kernels (No module named")
