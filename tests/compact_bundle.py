"""A micro recipe of a compact model, its training by the package, and running a bundle the way a stranger would."""

import subprocess
import sys
from pathlib import Path

import torch

from trihybrid.export.bundle import bundle_size
from trihybrid.recipe.compact import CompactRecipe
from trihybrid.recipe.execute_compact import execute_compact
from trihybrid.recipe.fields import dump_recipe


def micro_recipe(text: Path, seed: int = 0) -> CompactRecipe:
    """Three small layers, four steps, bytes as tokens."""
    return CompactRecipe.model_validate(
        {
            "kind": "compact",
            "name": "micro",
            "data": {"train": str(text), "tokenizer": "bytes", "validation_fraction": 0.2},
            "model": {
                "hidden_size": 32, "pattern": "TWF", "heads": 2, "kv_heads": 1, "head_dim": 16, "rope_dims": 8,
                "mlp_ratio": 2.0, "bigram_buckets": 64, "bigram_width": 8, "value_embedding_width": 8,
                "value_embedding_layers": [2],
            },
            "train": {
                "loop": {"steps": 4, "batch_size": 2, "sequence_length": 32, "seed": seed},
                "precision": "float32",
                "quantise_from": 0.5,
            },
            "compress": {"small_tensor_elements": 64, "calibration_tokens": 256, "codec": "zlib", "fit": False},
            "evaluation": {"length": 64, "stride": 32, "sliding": True, "stateful": True, "batch_size": 4},
        }
    )  # fmt: skip


def train_micro(recipe: CompactRecipe, folder: Path) -> Path:
    """Run a recipe with the package itself; returns the run folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        execute_compact(recipe, folder, resume=False, code_bytes=bundle_size(dump_recipe(recipe)))
    finally:
        torch.set_num_threads(threads)
    return folder


def run_isolated(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program from a folder of its own: no PYTHONPATH, no user site, no folder of the script on the path."""
    command = [sys.executable, "-I", "-W", "error", str(program), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
