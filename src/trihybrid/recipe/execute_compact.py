"""Running a compact recipe: text, training, quantisation, and the scores of what was read back from the file.

Training and quantisation are recorded in the lineage. A run that was killed goes on where it stopped and ends with the
same bytes; what is measured is measured again.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import is_torchelastic_launched

from trihybrid.compress.artifact import EncodedArtifact, encode_artifact
from trihybrid.compress.quantize import Stored, quantise_to_limit
from trihybrid.data.corpus import Corpus, prepare_corpus
from trihybrid.data.packing import Batch, PackedBatches
from trihybrid.data.prefetch import Prefetch
from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.sample import sample
from trihybrid.mixers.span import Span
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.drawing import drawing
from trihybrid.pretrain.compact import CompactTask, training_span
from trihybrid.recipe.artifact import FORMAT, LoadedArtifact, compute_dtype, load_artifact, tokenizer_kind
from trihybrid.recipe.compact import CompactRecipe, config_hash, read_compact
from trihybrid.recipe.fields import dump_recipe
from trihybrid.recipe.measure_compact import Results, count_parameters, measure, missed_targets
from trihybrid.run import (
    Lineage,
    RunDirectory,
    RunLog,
    hash_file,
    hash_folder,
    hash_json,
    read_log,
    write_json,
    write_text,
)
from trihybrid.run.code import code_hash
from trihybrid.train import Checkpoints, FitSummary, fit
from trihybrid.train.distributed import Workers, process_group

__all__ = ["execute_compact", "missed_targets"]

STAGE = "train"
TRAINED, QUANTISED = "trained", "quantised"
MODEL, ARTIFACT, LEDGER = "model", "model.artifact", "ledger.json"
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
    code_bytes: int

    @property
    def artifact(self) -> Path:
        """The file that the run is for."""
        return self.directory.path / ARTIFACT


def execute_compact(
    recipe: CompactRecipe, folder: str | Path, resume: bool = False, code_bytes: int = 0
) -> Results | None:
    """Run a compact recipe to its end.

    Args:
        recipe: what to do.
        folder: the run directory; it must be new or empty, unless `resume`.
        resume: go on with what is there.
        code_bytes: what the code that goes with the artifact takes, counted against the byte limit.

    Under torchrun all processes train one model, each on its own GPU where there are GPUs; the first does the rest.

    Returns:
        What results.json holds; None in the other processes of torchrun.

    Raises:
        ValueError: the folder holds something and `resume` is False; the recipe was changed; the artifact cannot be
            made to fit; bad input of any kind.
        FloatingPointError: training diverged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_torchelastic_launched():
        return _execute(recipe, Path(folder), resume, code_bytes, Workers(device=torch.device(device)))
    with process_group(device) as workers:
        return _execute(recipe, Path(folder), resume, code_bytes, workers)


def _execute(
    recipe: CompactRecipe, folder: Path, resume: bool, code_bytes: int, workers: Workers
) -> Results | None:
    began = time.perf_counter()
    if workers.first:
        begun = folder.exists() and any(RunDirectory(folder, create=False).path.iterdir())
        if begun and not resume:
            raise ValueError(
                f"{folder}: not empty; continue with --resume, or name another folder with --out"
            )
        if begun:
            _refuse_changes(recipe, folder)
    corpus = _prepare(recipe, folder, workers)
    model = _model(recipe, corpus.tokenizer, workers.device)
    directory = RunDirectory(folder)
    if workers.first:
        write_text(directory.recipe, dump_recipe(recipe))
    run = Run(recipe, directory, Lineage(directory.lineage), corpus, model, code_bytes)
    summary = _train(run, resume, workers)
    if not workers.first:
        return None
    parent = _save(run, summary)
    _quantise(run, parent)
    artifact = load_artifact(run.artifact, workers.device, recipe.train.precision)
    results = measure(recipe, corpus, model, artifact, summary, code_bytes)
    write_json(directory.results, results)
    _write_samples(run, artifact)
    # What an earlier call made took its time too.
    seconds = max(time.perf_counter() - began, sum(record.seconds for record in run.lineage.records))
    _write_summary(run, results, seconds)
    return results


def _refuse_changes(recipe: CompactRecipe, folder: Path) -> None:
    """Raise where training that has begun would now be another one; data and files are held by their hashes."""
    directory = RunDirectory(folder, create=False)
    if not directory.recipe.exists() or not directory.checkpoints(STAGE).is_dir():
        return
    before = read_compact(directory.recipe)
    if _decides_training(before) != _decides_training(recipe):
        raise ValueError(
            f"{folder}: training began with another recipe ({directory.recipe}); restore the recipe, or start a new "
            "run directory"
        )


def _decides_training(recipe: CompactRecipe) -> dict[str, Any]:
    sections = recipe.model_dump(mode="json", include={"model", "train"})
    return sections | {"fake_quantise": _fake_quantise(recipe)}


def _prepare(recipe: CompactRecipe, folder: Path, workers: Workers) -> Corpus:
    """The data of a run. The first worker makes it, then the others open it. Data that cannot be trained on leaves no
    file behind."""
    existed = folder.exists()
    prepare = partial(prepare_corpus, recipe.data, folder / "data", replace=False)
    if workers.first:
        corpus = prepare(processes=_processes(recipe))
        loop = recipe.train.loop
        try:
            PackedBatches(corpus.train, loop.sequence_length, loop.batch_size, loop.seed)
        except ValueError:
            if not existed:
                shutil.rmtree(folder)
            raise
    workers.differ([0.0])
    return corpus if workers.first else prepare(processes=1)


def _processes(recipe: CompactRecipe) -> int:
    source = Path(recipe.data.train)
    files = [source] if source.is_file() else source.rglob("*") if source.is_dir() else []
    size = sum(file.stat().st_size for file in files if file.is_file())
    return max(1, min(size // BYTES_A_PROCESS, os.cpu_count() or 1, MOST_PROCESSES))


def _model(recipe: CompactRecipe, tokenizer: TextTokenizer, device: torch.device) -> CompactModel:
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
    stage_hash = hash_json(_decides_training(recipe) | {"data": corpus.train.manifest.source_hash})
    checkpoints = Checkpoints(run.directory.checkpoints(STAGE), stage_hash, "")
    packed = PackedBatches(corpus.train, loop.sequence_length, loop.batch_size, loop.seed)

    def batch(step: int) -> Batch:
        return packed.batch(step, workers.rank, workers.count)

    task = CompactTask(run.model, section)
    with ExitStack() as stack:
        batches = stack.enter_context(Prefetch(batch, device=workers.device))
        log = None
        if workers.first:
            log = stack.enter_context(RunLog(run.directory.log, STAGE, every=loop.log_every))
            _begin_log(run, log, workers)
        summary = fit(task, batches, section, checkpoints, log, resume, workers)
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


def _save(run: Run, summary: FitSummary) -> str:
    """The trained weights as a model folder; its hash."""
    folder = run.directory.model(MODEL)
    wanted = hash_json(_decides_training(run.recipe) | {"data": run.corpus.train.manifest.source_hash})

    def write() -> str:
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        tensors = {name: p.detach().cpu().contiguous() for name, p in run.model.named_parameters()}
        save_file(tensors, partial_folder / "model.safetensors")
        write_json(partial_folder / "config.json", _configuration(run))
        run.corpus.tokenizer.save(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
        return hash_folder(folder)

    return _phase(run, TRAINED, "", wanted, lambda: hash_folder(folder), write, summary.seconds)


def _quantise(run: Run, parent: str) -> None:
    """The artifact, within the byte limit together with the code."""
    recipe = run.recipe
    wanted = hash_json({"compress": recipe.compress.model_dump(mode="json"), "code_bytes": run.code_bytes})
    configuration = _configuration(run)

    def write() -> str:
        # To try every codec takes minutes, and the smallest is never larger than one of them.
        codec = recipe.compress.codec
        measured = "rans" if codec == "smallest" else codec
        attempts: list[tuple[list[Stored], EncodedArtifact]] = []

        def size(tensors: list[Stored]) -> int:
            encoded = encode_artifact(tensors, configuration, run.code_bytes, measured)
            if encoded.ledger.total_bytes <= recipe.compress.limit_bytes:
                attempts[:] = [(tensors, encoded)]
            return encoded.ledger.total_bytes

        fitted = quantise_to_limit(run.model, recipe.compress, partial(_calibration, run), size)
        encoded = next((encoded for tensors, encoded in attempts if tensors is fitted.tensors), None)
        if encoded is None or codec != measured:
            encoded = encode_artifact(fitted.tensors, configuration, run.code_bytes, codec)
        encoded.write(run.artifact)
        write_json(run.directory.path / LEDGER, encoded.ledger.model_dump(mode="json"))
        return hash_file(run.artifact)

    _phase(run, QUANTISED, parent, wanted, lambda: hash_file(run.artifact), write)


def _phase(
    run: Run,
    name: str,
    parent: str,
    wanted: str,
    found: Callable[[], str],
    write: Callable[[], str],
    seconds: float = 0.0,
) -> str:
    """Let `write` make a phase's output unless the lineage holds it; its hash. `seconds` were spent on it before."""
    done = run.lineage.record(name)
    if done is None:
        began = time.perf_counter()
        output = write()
        run.lineage.append(name, parent, wanted, output, seconds + time.perf_counter() - began)
        return output
    if done.recipe != wanted or done.parent != parent:
        raise ValueError(
            f"{run.directory.path}: {name} was made with another recipe or by other code; restore both, or start a new "
            "run directory"
        )
    try:
        unchanged = found() == done.output
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        raise ValueError(
            f"{run.directory.path}: what was {name} changed since it was made; start a new run directory"
        )
    return done.output


def _configuration(run: Run) -> dict[str, Any]:
    """What the artifact says of its model: enough to build it and to find its tokenizer."""
    tokenizer = run.corpus.tokenizer
    return {
        "format": FORMAT,
        "section": run.model.section.model_dump(mode="json"),
        "vocabulary": run.model.vocabulary,
        "tokenizer": {"kind": tokenizer_kind(tokenizer), "hash": tokenizer.hash},
        "recipe_hash": config_hash(run.recipe),
        "parameters": count_parameters(run.model),
    }


def _calibration(run: Run) -> Iterator[tuple[Tensor, Span]]:
    """Training text for the quantiser, in blocks as the model was trained on: its first batches, row by row."""
    section = run.recipe.train
    loop = section.loop
    device = next(run.model.parameters()).device
    packed = PackedBatches(run.corpus.train, loop.sequence_length, 1, loop.seed)
    for row in range(packed.windows):
        batch = packed.batch(row).to(device)
        yield batch.inputs, training_span(batch.positions, section.leak)


def _write_samples(run: Run, artifact: LoadedArtifact) -> None:
    section = run.recipe.samples
    rows = [
        {
            "stage": "artifact",
            "prompt": prompt,
            "text": sample(artifact.model, run.corpus.tokenizer, prompt, section.tokens, section.temperature),
        }
        for prompt in section.prompts
    ]
    write_json(run.directory.samples, rows)


def _write_summary(run: Run, results: Results, seconds: float) -> None:
    summary = {
        "kind": run.recipe.kind,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "devices": f"{os.cpu_count()} CPUs, {platform.machine()}",
        "torch": torch.__version__,
        "missed": missed_targets(run.recipe, results, seconds),
    }
    write_json(run.directory.path / "summary.json", summary)


def _device_name(workers: Workers) -> str:
    if workers.device.type != "cuda":
        return f"{workers.count} x {platform.machine()}"
    return f"{workers.count} x {torch.cuda.get_device_name(workers.device)}"
