"""The training of a compact recipe: from text to weights that wait for their quantiser.

A run that was killed goes on where it stopped and ends with the same bytes.
"""

import os
import platform
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trihybrid.data.corpus import Corpus, prepare_corpus
from trihybrid.data.packing import Batch, PackedBatches
from trihybrid.data.prefetch import Prefetch
from trihybrid.data.tokens import TextTokenizer
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.drawing import drawing
from trihybrid.pretrain.compact import CompactTask
from trihybrid.recipe.artifact import compute_dtype
from trihybrid.recipe.compact import CompactRecipe, config_hash, read_compact
from trihybrid.recipe.fields import dump_recipe
from trihybrid.recipe.measure_compact import count_parameters
from trihybrid.recipe.workers import recipe_workers
from trihybrid.run import Lineage, RunDirectory, RunLog, hash_json, read_log, write_text
from trihybrid.run.code import code_hash
from trihybrid.train import Checkpoints, FitSummary, fit
from trihybrid.train.distributed import Workers

STAGE = "train"
BYTES_A_PROCESS = 2**25
"""Text that is worth a process of its own to tokenize."""
MOST_PROCESSES = 16


@dataclass
class Run:
    """One execution of a recipe on the worker that writes."""

    recipe: CompactRecipe
    directory: RunDirectory
    lineage: Lineage
    corpus: Corpus
    model: CompactModel


def train_compact(recipe: CompactRecipe, folder: str | Path, resume: bool = False) -> FitSummary:
    """The training of `execute_compact` alone, which goes on from there when it is asked to resume: packing and scoring
    may then run beside other work, and at another time.

    Raises:
        ValueError, FloatingPointError: as `execute_compact`.
    """
    with recipe_workers() as workers:
        return trained(recipe, Path(folder), resume, workers)[1]


def trained(recipe: CompactRecipe, folder: Path, resume: bool, workers: Workers) -> tuple[Run, FitSummary]:
    """The run with its model trained, as all workers have it; errors as `execute_compact`."""
    if workers.first:
        begun = folder.exists() and any(RunDirectory(folder, create=False).path.iterdir())
        if begun and not resume:
            raise ValueError(
                f"{folder}: not empty; continue with --resume, or name another folder with --out"
            )
        if begun:
            _refuse_changes(recipe, folder)
    corpus = _prepare(recipe, folder, workers)
    model = draw_model(recipe, corpus.tokenizer, workers.device)
    directory = RunDirectory(folder)
    if workers.first:
        write_text(directory.recipe, dump_recipe(recipe))
    run = Run(recipe, directory, Lineage(directory.lineage), corpus, model)
    return run, _train(run, resume, workers)


def _refuse_changes(recipe: CompactRecipe, folder: Path) -> None:
    """Raise where training that has begun would now be another one; data and files are held by their hashes."""
    directory = RunDirectory(folder, create=False)
    if not directory.recipe.exists() or not directory.checkpoints(STAGE).is_dir():
        return
    before = read_compact(directory.recipe)
    if decides_training(before) != decides_training(recipe):
        raise ValueError(
            f"{folder}: training began with another recipe ({directory.recipe}); restore the recipe, or start a new "
            "run directory"
        )


def decides_training(recipe: CompactRecipe) -> dict[str, Any]:
    """The part of a recipe that trained weights depend on, besides the text."""
    sections = recipe.model_dump(mode="json", include={"model", "train"})
    return sections | {"fake_quantise": _fake_quantise(recipe)}


def _prepare(recipe: CompactRecipe, folder: Path, workers: Workers) -> Corpus:
    """The data of a run. The first worker makes it, then the others open it. Data that cannot be trained on leaves no
    file behind."""
    prepare = partial(prepare_corpus, recipe.data, folder / "data", replace=False)
    if workers.first:
        existed = folder.exists()
        begun = existed and any(folder.iterdir())
        try:
            corpus = prepare(processes=_processes(recipe))
            loop = recipe.train.loop
            PackedBatches(corpus.train, loop.sequence_length, loop.batch_size, recipe.train.order_seed)
        except ValueError:
            made = folder / "data" if existed else folder
            # Neither is there where the data are shards that lie elsewhere.
            if made.exists() and not begun:
                shutil.rmtree(made)
            raise
    workers.differ([0.0])
    return corpus if workers.first else prepare(processes=1)


def _processes(recipe: CompactRecipe) -> int:
    source = Path(recipe.data.train)
    files = [source] if source.is_file() else source.rglob("*") if source.is_dir() else []
    size = sum(file.stat().st_size for file in files if file.is_file())
    return max(1, min(size // BYTES_A_PROCESS, os.cpu_count() or 1, MOST_PROCESSES))


def draw_model(recipe: CompactRecipe, tokenizer: TextTokenizer, device: torch.device) -> CompactModel:
    """The model at its start, drawn on the CPU."""
    with drawing(recipe.train.loop.seed):
        model = CompactModel(recipe.model, tokenizer.vocab_size)
        model.initialise()
    model.to(device)
    model.compute_dtype = compute_dtype(recipe.train.precision, device)
    fake = _fake_quantise(recipe)
    if fake is not None:
        model.enable_fake_quantise(fake["bits"], fake["clip"], fake["step_floor"])
    return model


def _fake_quantise(recipe: CompactRecipe) -> dict[str, Any] | None:
    """What `enable_fake_quantise` gets; None where training sees no quantisation."""
    if recipe.train.quantise_from is None:
        return None
    section = recipe.compress
    return {
        "bits": {str(role): int(bits) for role, bits in section.bits.items()},
        "clip": section.clip if isinstance(section.clip, float) else None,
        "step_floor": section.step_floor,
    }


def _train(run: Run, resume: bool, workers: Workers) -> FitSummary:
    """Train to the end of the recipe, from the newest checkpoint on. The model then holds the averaged weights, where
    the recipe asks for an average."""
    recipe, corpus, section = run.recipe, run.corpus, run.recipe.train
    loop = section.loop
    stage_hash = hash_json(decides_training(recipe) | {"data": corpus.train.manifest.source_hash})
    checkpoints = Checkpoints(run.directory.checkpoints(STAGE), stage_hash, "")
    packed = PackedBatches(corpus.train, loop.sequence_length, loop.batch_size, section.order_seed)

    def batch(step: int) -> Batch:
        return packed.batch(step, workers.rank, workers.count)

    def name_batch(step: int) -> str:
        return packed.name(step, workers.rank, workers.count)

    task = CompactTask(run.model, section)
    with ExitStack() as stack:
        batches = stack.enter_context(Prefetch(batch, device=workers.device))
        log = None
        if workers.first:
            log = stack.enter_context(RunLog(run.directory.log, STAGE, every=loop.log_every))
            _begin_log(run, log, workers)
        summary = fit(task, batches, section, checkpoints, log, resume, workers, name_batch)
    run.model.set_quantisation(False)
    return summary


def _begin_log(run: Run, log: RunLog, workers: Workers) -> None:
    """Write what ran into the log, again after a resume by other code or on another machine."""
    fields = {
        "parameters": count_parameters(run.model),
        "config_hash": config_hash(run.recipe),
        "code_hash": code_hash(),
        "seed": run.recipe.train.loop.seed,
        "torch": torch.__version__,
        "device": _device_name(workers),
    }
    begun = [row for row in read_log(run.directory.log) if row.get("event") == "begin"]
    if not begun or any(begun[-1].get(name) != value for name, value in fields.items()):
        log.event("begin", fields)


def _device_name(workers: Workers) -> str:
    if workers.device.type != "cuda":
        return f"{workers.count} x {platform.machine()}"
    return f"{workers.count} x {torch.cuda.get_device_name(workers.device)}"
