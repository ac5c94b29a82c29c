"""A tiny task, and a script that fits it: `python interrupted_fit.py FOLDER adamw|muon SECONDS_A_STEP`.

The script resumes whatever FOLDER holds. Tests kill it; other tests of this room load the task from here.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from trihybrid.run import RunLog
from trihybrid.train import Checkpoints, FitSummary, TrainSection, fit

STEPS = 24
ROLES = {
    "embedding.weight": "embedding",
    "mix.weight": "matrix",
    "mix.bias": "vector",
    "decay": "decay",
    "head": "head",
}


class TinyTask:
    """Next-token prediction over 11 tokens, with dropout, so that torch's generator matters."""

    def __init__(
        self,
        seed: int = 0,
        device: str = "cpu",
        dropout: float = 0.2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dropout = dropout

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter((0.3 * torch.randn(*shape, generator=generator)).to(device, dtype))

        self.tensors = {
            "embedding.weight": parameter(11, 8),
            "mix.weight": parameter(8, 8),
            "mix.bias": parameter(8),
            "decay": parameter(8),
            "head": parameter(11, 8),
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.tensors

    def roles(self) -> dict[str, str]:
        return ROLES

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        batch = batch.to(self.tensors["head"].device)
        hidden = nn.functional.embedding(batch[:, :-1], self.tensors["embedding.weight"])
        hidden = torch.tanh(hidden @ self.tensors["mix.weight"] + self.tensors["mix.bias"])
        hidden = nn.functional.dropout(hidden * torch.exp(-self.tensors["decay"].exp()), self.dropout)
        logits = hidden @ self.tensors["head"].T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss, {"accuracy": (logits.argmax(-1) == batch[:, 1:]).float().mean()}

    def tokens(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()


class SplitTask(TinyTask):
    """The tiny task with batches that can be cut by rows."""

    def split(self, batch: Tensor, parts: int) -> list[Tensor]:
        return list(batch.chunk(parts))


def batch_of(step: int) -> Tensor:
    """[4, 6] token ids, a pure function of the step."""
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1000 + step))


def section_of(optimizer: str = "adamw", **loop: float) -> TrainSection:
    """A short stage with warm-up, decay and clipping."""
    return TrainSection.model_validate(
        {
            "loop": {"steps": STEPS, "checkpoint_every": 3, "seed": 5, **loop},
            "optimizer": {"name": optimizer, "learning_rate": 0.02, "gradient_clip": 0.5},
            "schedule": {"kind": "cosine", "warmup_steps": 4},
        }
    )


def run_fit(
    folder: Path,
    optimizer: str = "adamw",
    batches: Callable[[int], Tensor] = batch_of,
    task: TinyTask | None = None,
    resume: bool = True,
    section: TrainSection | None = None,
) -> tuple[TinyTask, FitSummary]:
    """Fit the tiny task in a folder: its log is log.jsonl, its checkpoints are in checkpoints/."""
    task = TinyTask() if task is None else task
    section = section_of(optimizer) if section is None else section
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", stage_hash="stage", parent_hash="parent")
    with RunLog(folder / "log.jsonl", "tiny", every=1000) as log:
        return task, fit(task, batches, section, checkpoints, log, resume)


def main() -> None:
    folder, optimizer, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

    def slow_batch(step: int) -> Tensor:
        time.sleep(seconds)
        return batch_of(step)

    run_fit(folder, optimizer, slow_batch)


if __name__ == "__main__":
    main()
