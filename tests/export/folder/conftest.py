"""A small student in a folder, its export, and a Python that has torch and transformers and no trihybrid."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma4TextConfig

from trihybrid.export.folder.write import export_folder
from trihybrid.models.checkpoint import save_folder
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

SLOTS = [
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7", "tica"]},
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7", "tica"], "donors": {"tica": 1}},
    {"mixers": ["sliding"]},
    {"mixers": ["rwkv7"]},
]


def make_student() -> TrihybridGemma4ForCausalLM:
    """Sliding layers, and recurrences of both kinds of cache slots, one with shared keys and values."""
    base = Gemma4TextConfig(
        vocab_size=61,
        vocab_size_per_layer_input=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        final_logit_softcapping=30.0,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    config = TrihybridGemma4Config(
        base_config=base.to_dict(),
        slots=[dict(slot) for slot in SLOTS],
        rwkv7={"heads": 4, "kv_heads": 2, "head_dim": 8, "decay_rank": 3, "iclr_rank": 3, "gate_rank": 3},
        tica={"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 3},
    )
    torch.manual_seed(0)
    model = TrihybridGemma4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student."""
    folder = tmp_path_factory.mktemp("student") / "student"
    save_folder(folder, make_student().save_pretrained)
    return folder


@pytest.fixture(scope="session")
def exported(student: Path) -> Path:
    """Its export, not to be changed."""
    out = student.with_name("exported")
    export_folder(student, out)
    return out


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Run a script in a Python whose path has everything that is installed here but trihybrid: the standard library and
    a folder of links. No site module, so no `.pth` file brings it back. The script prints one JSON object."""
    root = tmp_path_factory.mktemp("bare")
    packages = root / "packages"
    packages.mkdir()
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            if "trihybrid" not in entry.name and entry.suffix != ".pth":
                link = packages / entry.name
                if not link.exists():
                    link.symlink_to(entry)

    def run(script: str, *arguments: object) -> dict:
        start = (
            f"import sys; sys.path.append({str(packages)!r}); import importlib.util; "
            "assert importlib.util.find_spec('trihybrid') is None\n"
        )
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))
        }
        environment |= {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", start + script, *map(str, arguments)],
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
