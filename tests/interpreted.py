"""GPU kernels on a CPU: Triton's interpreter runs them with numpy, and their operators are told to take CPU tensors.

For tests marked `triton`, which `make test-triton` runs: TRITON_INTERPRET=1 has to be set before Triton is imported.
"""

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.library import CustomOpDef

PROCESSORS = 2  # of the GPU that is not there, for kernels whose number of programs depends on it

MARKS = [
    pytest.mark.triton,
    # What Triton 3.6's interpreter does with numpy: arrays of one element as scalars, and masked lanes that overflow.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the package by name, with operators that run on the CPU and that take everything.

    Fails, rather than skips, where kernels would be compiled.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.fail("these tests run kernels in Triton's interpreter: run them with make test-triton")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=PROCESSORS)
    )

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        for operator in vars(module).values():
            if isinstance(operator, CustomOpDef) and operator not in _taught:
                operator.register_kernel("cpu")(operator._init_fn)
                _taught.append(operator)
        for name in {"fusable", "fits"} & set(vars(module)):
            monkeypatch.setattr(module, name, lambda *arguments: True)
        return module

    return load


_taught: list[CustomOpDef] = []
