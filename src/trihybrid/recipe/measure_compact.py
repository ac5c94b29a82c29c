"""Measuring the artifact of a compact run: results.json, and what of its promises the run broke."""

from dataclasses import asdict
from typing import Any

from trihybrid.data.byte_table import byte_lengths
from trihybrid.data.corpus import Corpus
from trihybrid.evaluate.adaptation import adapted_bpb
from trihybrid.models.compact.model import CompactModel
from trihybrid.recipe.artifact import LoadedArtifact, check_artifact, score
from trihybrid.recipe.compact import CompactRecipe, config_hash
from trihybrid.run import hash_file
from trihybrid.run.code import code_hash
from trihybrid.train import FitSummary

Results = dict[str, Any]


def measure(
    recipe: CompactRecipe,
    corpus: Corpus,
    trained: CompactModel,
    artifact: LoadedArtifact,
    summary: FitSummary,
    code_bytes: int,
) -> Results:
    """All figures of results.json, those of the artifact from the model that was read back from the file.

    Args:
        recipe: says how to measure.
        corpus: validation text and tokenizer.
        trained: the model before it was quantised.
        artifact: the reloaded file.
        summary: of the training.
        code_bytes: what the code that goes with the artifact takes.

    Raises:
        ValueError: the artifact looks ahead, or cannot be scored.
    """
    section = recipe.evaluation
    check_artifact(artifact.model, corpus.validation)
    bpb = score(artifact.model, corpus.tokenizer, corpus.validation, section)
    plain = section.model_copy(update={"sliding": False, "stateful": False})
    before = score(trained, corpus.tokenizer, corpus.validation, plain)["chunked"]
    assert bpb["chunked"] is not None and before is not None
    adaptation = None
    if section.adaptation is not None:
        adapted = adapted_bpb(
            artifact.model,
            corpus.validation,
            byte_lengths(corpus.tokenizer),
            section.adaptation,
            section.length,
            section.isolated,
            section.batch_size,
            section.validation_tokens,
        )
        adaptation = {"label": adapted.label, "updates": adapted.updates, **asdict(adapted.score)}
    size = artifact.path.stat().st_size
    return {
        "name": recipe.name,
        "parameters": count_parameters(trained),
        "config_hash": config_hash(recipe),
        "code_hash": code_hash(),
        "seed": recipe.train.loop.seed,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_seconds": summary.seconds,
        "ms_per_step": 1000 * summary.seconds / summary.steps,
        "artifact": {"file": artifact.path.name, "bytes": size, "sha256": hash_file(artifact.path)},
        "code_bytes": code_bytes,
        "total_bytes": size + code_bytes,
        "limit_bytes": recipe.compress.limit_bytes,
        "bpb": {**bpb, "chunked_before_quantisation": before},
        "gap": bpb["chunked"]["decoded"] - before["decoded"],
        "adaptation": adaptation,
    }


def missed_targets(recipe: CompactRecipe, results: Results, seconds: float) -> list[str]:
    """One line for each promise of the recipe that these results break; to fit into its byte limit is one always."""
    targets, missed = recipe.targets, []
    if results["total_bytes"] > results["limit_bytes"]:
        missed.append(
            f"artifact and code take {results['total_bytes']:,} bytes, more than {results['limit_bytes']:,}"
        )
    bpb = results["bpb"]["chunked"]["decoded"]
    if targets.bpb is not None and not bpb <= targets.bpb:
        missed.append(f"the artifact has {bpb:.4f} bits per byte, wanted at most {targets.bpb}")
    if targets.gap is not None and not results["gap"] <= targets.gap:
        missed.append(f"quantisation costs {results['gap']:.4f} bits per byte, wanted at most {targets.gap}")
    if targets.seconds is not None and seconds > targets.seconds:
        missed.append(f"the run took {seconds:.0f} s, wanted at most {targets.seconds:.0f}")
    return missed


def count_parameters(model: CompactModel) -> int:
    """All of them."""
    return sum(parameter.numel() for parameter in model.parameters())
