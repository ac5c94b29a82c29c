"""What the tests of this room share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module with the tiny task, which is a script too."""
    path = Path(__file__).with_name("interrupted_fit.py")
    spec = importlib.util.spec_from_file_location("interrupted_fit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
