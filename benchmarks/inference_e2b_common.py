"""What the benchmark of E2B's shape and its peer share: sizes, models with random weights, clocks, rows and targets."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel

from trihybrid.infer.engine import Execution
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.models.shapes import load_shape
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.section import SurgerySection

Row = dict[str, Any]
TARGETS = {
    ("student", "decode", 1, 4096): 2.2,
    ("student", "decode", 1, 131_072): 2.6,
    ("student", "decode", 64, 8192): 64 / 9.0,
    ("student", "prefill", 1, 4096): 85_000.0,
    ("student", "prefill", 1, 131_072): 50_000.0,
}
"""Milliseconds a step at most, prefilled tokens a second at least."""
EXTRA_GIB = 4.0


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: contexts at batch 1, the batch and its context, the long context, tokens of a chunk."""

    device: str
    contexts: tuple[int, ...]
    batch: int
    batch_context: int
    long: int
    chunk: int
    executions: tuple[Execution, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


TRUE = Scale("cuda", (4096, 131_072), 64, 8192, 1_000_000, 4096, ("graph", "fused-graph", "kernels"))
TINY = Scale("cpu", (64, 256), 4, 96, 600, 64, ("eager",))


class Run:
    """Rows as they come, and the time that is left.

    Args:
        scale: of the run.
        deadline: of time.monotonic().
        folder: for the rows, or None.
    """

    def __init__(self, scale: Scale, deadline: float, folder: Path | None) -> None:
        self.scale, self.deadline, self._folder = scale, deadline, folder
        self.rows: list[Row] = []

    def note(self, row: Row) -> None:
        """Print and keep a row, with its targets."""
        target = TARGETS.get((row.get("model"), row.get("what"), row.get("batch"), row.get("context")))  # type: ignore[arg-type]
        if target is not None and "value" in row:
            row["target"] = round(target, 2)
            row["target_met"] = row["value"] <= target if row["what"] == "decode" else row["value"] >= target
            if row["what"] == "prefill":
                row["target_met"] &= row["extra_GiB"] <= EXTRA_GIB
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "inference_e2b.json").write_text(json.dumps(self.rows, indent=1) + "\n")

    def fits(self, seconds: float, model: str, what: str) -> bool:
        """Whether so many seconds are left; notes what is left out."""
        if self.deadline - time.monotonic() >= seconds or self.scale.device == "cpu":
            return True
        self.note({"model": model, "what": what, "left_out": f"needs about {seconds:.0f} s, no time left"})
        return False


def timed(call: Callable[[], Any], device: str, count: int) -> float:
    """Median seconds of a call, after two."""
    times = []
    for _ in range(count + 2):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def shape(scale: Scale) -> Gemma4TextConfig:
    """E2B, or the same in small: five sliding and full layers in turns, the upper half with shared keys and values."""
    if scale.device == "cuda":
        base: Any = load_shape("gemma-4-e2b")
        return base
    return Gemma4TextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=[*["sliding_attention"] * 4, "full_attention"] * 2,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=30.0,
    )


def build(scale: Scale, part: str) -> PreTrainedModel:
    """Random weights, made where they stay; a student's TICA is not silent."""
    base = shape(scale)
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        with torch.device(scale.device):
            torch.manual_seed(0)
            if part == "teacher":
                return Gemma4ForCausalLM(base).eval()
            sizes = {"head_dim": 8, "decay_rank": 4, "iclr_rank": 4, "gate_rank": 4}
            small = {"rwkv7": sizes, "tica": {"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 4}}
            layers = base.num_hidden_layers // 5
            section = SurgerySection.model_validate(
                {"pattern": f"SSSSR * {layers}"} | (small if scale.device == "cpu" else {})
            )
            model = TrihybridGemma4ForCausalLM(student_config(base, section)).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("tica.o_proj.weight"):
                        parameter.normal_(std=0.02)
            return model
    finally:
        torch.set_default_dtype(before)
