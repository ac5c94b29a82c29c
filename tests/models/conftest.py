"""A tiny Gemma-4 with everything that E2B has (shared keys and values, per-layer inputs, double-wide MLP, softcap), and
students of it in every layout that transformers' cache treats differently."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from random_weights import randomise
from trihybrid.models.families import register
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

register()

VOCABULARY = 97
# Layers 4 and 5 read the keys and values of 2 (sliding) and 3 (full).
SLIDING, FULL = {"mixers": ["sliding"]}, {"mixers": ["full"]}
WINDOWED = {"mixers": ["sliding"], "window": 8}
BOTH, RECURRENT, TICA = {"mixers": ["rwkv7", "tica"]}, {"mixers": ["rwkv7"]}, {"mixers": ["tica"]}
TICA_SHARED = {"mixers": ["rwkv7", "tica"], "donors": {"tica": 1}}
RWKV7_SHARED = {"mixers": ["rwkv7", "tica"], "donors": {"rwkv7": 3}}
TICA_ALONE_SHARED = {"mixers": ["tica"], "donors": {"tica": 1}}
LAYOUTS = {
    "retained": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "tica_everywhere": [SLIDING, BOTH, SLIDING, BOTH, SLIDING, BOTH],
    "tica_on_one": [SLIDING, RECURRENT, SLIDING, BOTH, SLIDING, RECURRENT],
    "rwkv7_only": [SLIDING, RECURRENT, SLIDING, RECURRENT, SLIDING, RECURRENT],
    "tica_shared": [SLIDING, BOTH, SLIDING, TICA_SHARED, SLIDING, TICA_SHARED],
    "rwkv7_shared": [SLIDING, BOTH, SLIDING, BOTH, SLIDING, RWKV7_SHARED],
    "partial": [SLIDING, BOTH, SLIDING, FULL, SLIDING, FULL],
    "tica_alone": [SLIDING, TICA, SLIDING, TICA_ALONE_SHARED, SLIDING, RECURRENT],
    "recurrence_first": [RECURRENT, RECURRENT, SLIDING, FULL, SLIDING, FULL],
    # Global layers that see a window; the last reads the keys and values of the one before.
    "windowed": [SLIDING, BOTH, SLIDING, WINDOWED, SLIDING, WINDOWED],
}
# One of each way in which transformers' cache sees a converted slot, for the slow tests.
TYPICAL = ["tica_everywhere", "rwkv7_only", "tica_shared", "tica_alone", "recurrence_first", "windowed"]


def make_teacher_config(**changes: Any) -> Gemma4TextConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 512,
    }
    return Gemma4TextConfig(**(sizes | changes))


def make_config(layout: str, **changes: Any) -> TrihybridGemma4Config:
    return TrihybridGemma4Config(
        base_config=make_teacher_config(**changes).to_dict(),
        slots=copy.deepcopy(LAYOUTS[layout]),
        rwkv7={"heads": 4, "kv_heads": 2, "head_dim": 8, "decay_rank": 4, "iclr_rank": 4, "gate_rank": 4},
        tica={"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 4},
    )


@pytest.fixture
def teacher_config() -> Callable[..., Gemma4TextConfig]:
    """Factory: changed fields -> the tiny teacher's configuration."""
    return make_teacher_config


@pytest.fixture
def config() -> Callable[..., TrihybridGemma4Config]:
    """Factory: layout, changed fields of the teacher -> a student's configuration."""
    return make_config


@pytest.fixture
def teacher() -> Callable[..., Gemma4ForCausalLM]:
    """Factory: changed fields -> the tiny teacher, random, in eval mode."""

    def make(**changes: Any) -> Gemma4ForCausalLM:
        model = Gemma4ForCausalLM(make_teacher_config(**changes)).eval()
        randomise(model)
        return model

    return make


@pytest.fixture(scope="session")
def built() -> dict[str, TrihybridGemma4ForCausalLM]:
    """Students that `student` has built; it hands out copies."""
    return {}


@pytest.fixture
def student(built: dict[str, TrihybridGemma4ForCausalLM]) -> Callable[..., TrihybridGemma4ForCausalLM]:
    """Factory: layout, changed fields of the teacher -> a student, random, in eval mode."""

    def make(layout: str, **changes: Any) -> TrihybridGemma4ForCausalLM:
        key = f"{layout} {changes}"
        if key not in built:
            built[key] = TrihybridGemma4ForCausalLM(make_config(layout, **changes)).eval()
            randomise(built[key])
        return copy.deepcopy(built[key])

    return make


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TYPICAL)
def typical_layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Factory: batch, length, seed -> token ids without special ones, [batch, length]."""

    def make(batch: int, length: int, seed: int = 1) -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def difference() -> Callable[[Tensor, Tensor], float]:
    """Relative rms error: norm(x - ref) / max(norm(ref), 1e-6 sqrt(n))."""

    def measure(x: Tensor, reference: Tensor) -> float:
        assert x.shape == reference.shape
        floor = 1e-6 * reference.numel() ** 0.5
        return float((x.double() - reference.double()).norm()) / max(float(reference.double().norm()), floor)

    return measure


@pytest.fixture
def checkpointing() -> Callable[..., None]:
    """Switch checkpointing on, by the name that this release of transformers does not call deprecated."""

    def enable(model: Any, options: dict[str, Any] | None = None) -> None:
        switch = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        switch(options)

    return enable
