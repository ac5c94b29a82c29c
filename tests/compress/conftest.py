"""The fuzzer lies in benchmarks, where it is a command; the tests here import it and its helpers by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
