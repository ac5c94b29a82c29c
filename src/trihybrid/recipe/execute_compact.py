"""Running a compact recipe: text, training, quantisation, and the scores of what was read back from the file.

Training and quantisation are recorded in the lineage. A run that was killed goes on where it stopped and ends with the
same bytes; what is measured is measured again.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trihybrid.compress.artifact import EncodedArtifact, encode_artifact
from trihybrid.compress.quantize import Stored, quantise_to_limit
from trihybrid.data.packing import PackedBatches
from trihybrid.infer.sample import sample
from trihybrid.mixers.span import Span
from trihybrid.pretrain.compact import training_span
from trihybrid.recipe.artifact import FORMAT, LoadedArtifact, load_artifact, tokenizer_kind
from trihybrid.recipe.compact import CompactRecipe, config_hash
from trihybrid.recipe.measure_compact import Results, count_parameters, measure, missed_targets
from trihybrid.recipe.train_compact import Run, decides_training, trained
from trihybrid.recipe.workers import recipe_workers
from trihybrid.run import (
    hash_file,
    hash_folder,
    hash_json,
    write_json,
)
from trihybrid.train import FitSummary
from trihybrid.train.distributed import Workers

__all__ = ["execute_compact", "missed_targets"]

TRAINED, QUANTISED = "trained", "quantised"
MODEL, ARTIFACT, LEDGER = "model", "model.artifact", "ledger.json"


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
    limit = recipe.compress.limit_bytes
    if code_bytes >= limit:
        raise ValueError(
            f"compress.limit_bytes is {limit:,}, but the code alone takes {code_bytes:,}; raise the limit"
        )
    with recipe_workers() as workers:
        began = time.perf_counter()
        run, summary = trained(recipe, Path(folder), resume, workers)
        return _finish(run, summary, code_bytes, began, workers) if workers.first else None


def _finish(run: Run, summary: FitSummary, code_bytes: int, began: float, workers: Workers) -> Results:
    recipe, directory = run.recipe, run.directory
    parent = _save(run, summary)
    _quantise(run, parent, code_bytes)
    artifact = load_artifact(_artifact(run), workers.device, recipe.train.precision)
    results = measure(recipe, run.corpus, run.model, artifact, summary, code_bytes)
    write_json(directory.results, results)
    _write_samples(run, artifact)
    # What an earlier call made took its time too.
    seconds = max(time.perf_counter() - began, sum(record.seconds for record in run.lineage.records))
    _write_summary(run, results, seconds)
    return results


def _save(run: Run, summary: FitSummary) -> str:
    """The trained weights as a model folder; its hash."""
    folder = run.directory.model(MODEL)
    wanted = hash_json(decides_training(run.recipe) | {"data": run.corpus.train.manifest.source_hash})

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


def _quantise(run: Run, parent: str, code_bytes: int) -> None:
    """The artifact, within the byte limit together with the code."""
    recipe = run.recipe
    wanted = hash_json({"compress": recipe.compress.model_dump(mode="json"), "code_bytes": code_bytes})
    configuration = _configuration(run)

    def write() -> str:
        # To try every codec takes minutes, and the smallest is never larger than one of them.
        codec = recipe.compress.codec
        measured = "rans" if codec == "smallest" else codec
        attempts: list[tuple[list[Stored], EncodedArtifact]] = []

        def size(tensors: list[Stored]) -> int:
            encoded = encode_artifact(tensors, configuration, code_bytes, measured)
            if encoded.ledger.total_bytes <= recipe.compress.limit_bytes:
                attempts[:] = [(tensors, encoded)]
            return encoded.ledger.total_bytes

        fitted = quantise_to_limit(run.model, recipe.compress, partial(_calibration, run), size)
        encoded = next((encoded for tensors, encoded in attempts if tensors is fitted.tensors), None)
        if encoded is None or codec != measured:
            encoded = encode_artifact(fitted.tensors, configuration, code_bytes, codec)
        encoded.write(_artifact(run))
        write_json(run.directory.path / LEDGER, encoded.ledger.model_dump(mode="json"))
        return hash_file(_artifact(run))

    _phase(run, QUANTISED, parent, wanted, lambda: hash_file(_artifact(run)), write)


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
    packed = PackedBatches(run.corpus.train, loop.sequence_length, 1, section.order_seed)
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


def _artifact(run: Run) -> Path:
    """The file that a run is for."""
    return run.directory.path / ARTIFACT
