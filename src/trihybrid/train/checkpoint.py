"""Checkpoints: all that a stage needs to go on as if nothing had happened, whole or not at all.

    <folder>/step-000123/              123 steps are done
        parameters.safetensors         the trainable parameters
        optimizer.safetensors          moments and step counters
        average.safetensors            the parameters' running average, where there is one
        random.safetensors             torch's generators (CPU, each CUDA device)
        checkpoint.json                step, stage hash, parent hash, progress; size and sha256 of each file

A checkpoint is written under a temporary name, made durable, and then renamed: a kill leaves it there or not
there. Only safetensors and JSON are read. Where several workers hold rows of the tensors, each writes a file of its
own (see `pieces`), and the first renames when all are durable; any number of workers can go on from there.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trihybrid.run.directory import sync_folder, write_json
from trihybrid.train.average import Average
from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.optim import Optimizers
from trihybrid.train.pieces import Places, described, piece_name, place, read_pieces, write_piece
from trihybrid.train.rows import NO_ROWS, Rows

_logger = logging.getLogger(__name__)

_VERSION = 1
_MANIFEST = "checkpoint.json"
_PARTS = ("parameters", "optimizer", "random")
_FINISHED = re.compile(r"step-(\d{6,})")
_TEMPORARY = "temporary-"


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        step: steps done.
        loss: loss of the last of them (0.0 before the first).
        tokens: tokens seen.
        seconds: training time.
        finished: the stage is done, whatever number of steps it was given.
    """

    step: int = 0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class _Manifest:
    """What checkpoint.json says: progress, files, how many workers wrote, and which tensors of each part are cut."""

    progress: Progress
    files: dict[str, dict[str, Any]]
    workers: int
    places: dict[str, Places]


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: where they lie; made at the first save.
        stage_hash: hash of what decides the stage (its part of the recipe, the code's version...).
        parent_hash: hash of the model that the stage starts from.
    """

    def __init__(self, folder: str | Path, stage_hash: str, parent_hash: str) -> None:
        self.folder = Path(folder)
        self.stage_hash = stage_hash
        self.parent_hash = parent_hash

    def finished(self) -> list[Path]:
        """The complete checkpoints, oldest first; temporary and incomplete folders are passed over."""
        if not self.folder.is_dir():
            return []
        matches = ((_FINISHED.fullmatch(path.name), path) for path in self.folder.iterdir())
        found = [(int(match[1]), path) for match, path in matches if match and (path / _MANIFEST).is_file()]
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        finished = self.finished()
        return finished[-1] if finished else None

    def clean(self) -> None:
        """Remove what an interruption left: temporary folders, and checkpoints without their JSON."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            incomplete = _FINISHED.fullmatch(path.name) and not (path / _MANIFEST).is_file()
            if path.is_dir() and (incomplete or path.name.startswith(_TEMPORARY)):
                _logger.info("checkpoint: removed the incomplete %s", path)
                shutil.rmtree(path)

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimizers: Optimizers,
        average: Average | None = None,
        rows: Mapping[str, Rows] = NO_ROWS,
        workers: Workers = ALONE,
    ) -> Path:
        """Write a checkpoint and return its folder.

        Args:
            progress, parameters, optimizers, average: what is saved.
            rows: parameter name -> its rows, where each worker holds some of them.
            workers: those who save together, each its rows; one that saves whole tensors saves alone.

        Raises:
            ValueError: there is one of this step already.
        """
        target = self.folder / f"step-{progress.step:06d}"
        if target.exists():
            raise ValueError(
                f"checkpoint: {target} exists already; resume from it, or start a new run directory"
            )
        temporary = self.folder / f"{_TEMPORARY}{target.name}"
        if workers.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        workers.wait()
        try:
            contents: dict[str, Mapping[str, Tensor]] = {
                "parameters": dict(parameters),
                "optimizer": optimizers.state_tensors(),
                "random": random_state(),
            }
            if average is not None:
                contents["average"] = average.state_tensors()
            places: dict[str, Places] = {}
            for part, tensors in contents.items():
                cut = _rows_of(part, tensors, rows)
                places[part] = {name: place(found) for name, found in cut.items()}
                own = {name: tensor for name, tensor in tensors.items() if workers.first or name in cut}
                write_piece(temporary / piece_name(part, workers.rank, workers.count), own)
            workers.wait()
            if workers.first:
                manifest = {
                    "version": _VERSION,
                    "stage": self.stage_hash,
                    "parent": self.parent_hash,
                    "progress": asdict(progress),
                    "workers": workers.count,
                    "rows": places,
                    "files": {path.name: described(path) for path in sorted(temporary.iterdir())},
                }
                write_json(temporary / _MANIFEST, manifest)
                os.rename(temporary, target)
                sync_folder(self.folder)
        except BaseException:
            # The others may be writing there still; the first notices when one of them is gone.
            if workers.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        workers.wait()
        return target

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints (at least 1)."""
        if keep < 1:
            raise ValueError(f"keep: {keep} is below 1; keep at least the newest checkpoint")
        for path in self.finished()[:-keep]:
            # Renamed first: a kill half-way through the deletion must not leave something that looks
            # complete.
            doomed = path.with_name(f"{_TEMPORARY}{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)

    def load(
        self,
        path: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizers: Optimizers,
        average: Average | None = None,
        rows: Mapping[str, Rows] = NO_ROWS,
    ) -> Progress:
        """Restore parameters (in place), optimizers, the average and torch's generators from a checkpoint, to the bit.

        Args:
            path: the checkpoint, of any number of workers.
            parameters, optimizers, average: what is restored.
            rows: parameter name -> its rows, where this worker holds some of them only.

        Raises:
            ValueError: it is of another stage or parent, damaged, or does not fit these parameters;
                everything except the generators is checked before anything is changed.
        """
        manifest = self._manifest(path)
        contents = {}
        for part in _PARTS if average is None else (*_PARTS, "average"):
            places = manifest.places.get(part, {})
            wanted = partial(_wanted, part, rows)
            contents[part] = read_pieces(path, part, manifest.files, manifest.workers, places, wanted)
        saved = contents["parameters"]
        _check_parameters(path, saved, parameters)
        if average is not None:
            average.check_state(contents["average"])
        optimizers.load_state_tensors(contents["optimizer"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        if average is not None:
            average.load_state_tensors(contents["average"])
        restore_random_state(contents["random"])
        return manifest.progress

    def _manifest(self, path: Path) -> _Manifest:
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            version, stage, parent = manifest["version"], manifest["stage"], manifest["parent"]
            progress = Progress(**manifest["progress"])
            found = _Manifest(
                progress, manifest["files"], int(manifest.get("workers", 1)), manifest.get("rows", {})
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"checkpoint {path}: {_MANIFEST} is damaged ({error!r}); "
                "delete this folder to go on from the checkpoint before it"
            ) from error
        if version != _VERSION:
            raise ValueError(
                f"checkpoint {path}: version {version!r}, wanted {_VERSION}; "
                "resume with the release that wrote it"
            )
        if stage != self.stage_hash:
            raise ValueError(
                f"checkpoint {path}: the recipe of this stage changed: wanted {self.stage_hash}, found "
                f"{stage}; "
                "start a new run directory or restore the recipe"
            )
        if parent != self.parent_hash:
            raise ValueError(
                f"checkpoint {path}: the stage began from another parent: wanted {self.parent_hash}, found "
                f"{parent}; "
                "start a new run directory or restore the parent model"
            )
        return found


def _owner(part: str, name: str) -> str:
    """The parameter that a tensor of a part belongs to."""
    if part == "optimizer":
        return name.rpartition(".")[0]
    return name.removeprefix("average.") if part == "average" else name


def _wanted(part: str, rows: Mapping[str, Rows], name: str) -> Rows | None:
    return rows.get(_owner(part, name))


def _rows_of(part: str, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows of those tensors that are cut as their parameters are; counters are not."""
    owners = {name: _owner(part, name) for name, tensor in tensors.items() if tensor.dim()}
    return {name: rows[owner] for name, owner in owners.items() if owner in rows}


def _check_parameters(
    path: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    cure = "resume with the model that the checkpoint was made of, or start a new run directory"
    if saved.keys() != parameters.keys():
        raise ValueError(
            f"checkpoint {path}: lacks {sorted(parameters.keys() - saved.keys())}, "
            f"holds besides {sorted(saved.keys() - parameters.keys())}; {cure}"
        )
    for name, parameter in parameters.items():
        tensor = saved[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise ValueError(
                f"checkpoint {path}: {name!r}: wanted {parameter.dtype} {list(parameter.shape)}, "
                f"found {tensor.dtype} {list(tensor.shape)}; {cure}"
            )


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators: "cpu", and "cuda.<number>" once CUDA is in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # a run on the CPU leaves the GPUs of its machine alone
        state |= {f"cuda.{device}": tensor for device, tensor in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Set torch's generators to what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    saved = len(state) - 1
    if saved != devices:
        _logger.warning(
            "checkpoint: made with %d CUDA devices, resumed with %d: the run goes on, not to the bit",
            saved,
            devices,
        )
    for device in range(min(saved, devices)):
        torch.cuda.set_rng_state(state[f"cuda.{device}"], device)
