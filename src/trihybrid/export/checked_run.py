"""A finished compact run, held against its own claims: what a submission may be made of.

Every number that a run states is computed again from something else: the code's hash from the sources, the parameters
from the recipe and from the artifact, bytes and sha256 from the files, the score from the artifact.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trihybrid.compress.ledger import Ledger
from trihybrid.export.bundle import bundle_size
from trihybrid.models.compact.model import CompactModel
from trihybrid.recipe.artifact import LoadedArtifact, load_artifact, rescore_run
from trihybrid.recipe.compact import CompactRecipe, config_hash, read_compact
from trihybrid.run import RunDirectory, hash_file, read_log
from trihybrid.run.code import code_hash

ARTIFACT = "model.artifact"
HEAD = ("parameters", "config_hash", "code_hash", "seed")
"""What the first event of a log and the results must both say."""
SCORE_TOLERANCE = 2e-4
"""Largest difference of bits per byte between a score and its repetition: other devices and dtypes round otherwise."""


@dataclass(frozen=True)
class CheckedRun:
    """A run that is what it says.

    Attributes:
        path: its folder.
        recipe: its resolved recipe.
        head: the event that its log begins with, `HEAD` and more.
        steps: the rows of its training, in order.
        results: results.json.
        ledger: the artifact's own account of its bytes.
    """

    path: Path
    recipe: CompactRecipe
    head: dict[str, Any]
    steps: list[dict[str, Any]]
    results: dict[str, Any]
    ledger: Ledger

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.head["seed"]

    @property
    def score(self) -> dict[str, Any]:
        """The score that counts: with sliding windows where they were asked for, else in plain ones."""
        return self.results["bpb"]["sliding"] or self.results["bpb"]["chunked"]


def check_run(path: Path, rescore: bool) -> CheckedRun:
    """Read a run and refuse it where a claim does not hold.

    Args:
        path: the run folder.
        rescore: repeat the chunked score with the artifact, on the validation shards in the run folder. Sliding
            scores cost too much to be repeated here; they are held against the chunked one's tokens and bytes.

    Raises:
        ValueError: a file is missing or malformed, or a claim is wrong; names run, claim and both values.
    """
    folder = RunDirectory(path, create=False)
    artifact_file = path / ARTIFACT
    for file in (folder.recipe, folder.log, folder.results, artifact_file):
        if not file.is_file():
            raise ValueError(f"{path}: no {file.name}; give the folder of a finished compact run")
    recipe = read_compact(folder.recipe)
    limit = recipe.evaluation.validation_tokens
    if limit is not None:
        raise ValueError(
            f"{path}: evaluation.validation_tokens is {limit}, which scores a part of the text; a submission needs all "
            "of it, null"
        )
    results = _read_object(folder.results)
    head = read_head(path)
    steps = [row for row in read_log(folder.log) if row.get("kind") == "train"]
    try:
        _check_head(path, recipe, head, steps, results)
        _check_file(path, artifact_file, folder.recipe.read_text(encoding="utf-8"), results)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        artifact = load_artifact(artifact_file, device, recipe.train.precision)
        _check_model(path, artifact, recipe, head, results)
        _check_scores(path, results)
        if rescore:
            _check_rescored(path, results["bpb"]["chunked"], rescore_run(artifact, recipe, path))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder.results}: not the results of a compact run ({error!r}); run it again"
        ) from error
    return CheckedRun(path, recipe, head, steps, results, artifact.ledger)


def read_head(path: Path) -> dict[str, Any]:
    """The event that the log of a run begins with. A run that was resumed may have several, which agree.

    Raises:
        ValueError: there is none, or it lacks one of `HEAD`, or they differ.
    """
    log = RunDirectory(path, create=False).log
    heads = [row for row in read_log(log) if row.get("kind") == "event" and row.get("event") == "begin"]
    if not heads or any(name not in head for head in heads for name in HEAD):
        raise ValueError(
            f"{log}: no event `begin` with {', '.join(HEAD)}; this log cannot be tied to any code"
        )
    for head in heads[1:]:
        for name in HEAD:
            _agree(path, name, "its log at first", heads[0][name], "its log later", head[name])
    return heads[0]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run it again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: {type(value).__name__}, must be one object; give the folder of a compact run"
        )
    return value


def _check_head(
    path: Path,
    recipe: CompactRecipe,
    head: dict[str, Any],
    steps: list[dict[str, Any]],
    results: dict[str, Any],
) -> None:
    _agree(path, "code_hash", "its log", head["code_hash"], "the bundle", code_hash())
    _agree(path, "config_hash", "its log", head["config_hash"], "its recipe", config_hash(recipe))
    _agree(path, "seed", "its log", head["seed"], "its recipe", recipe.train.loop.seed)
    for name in HEAD:
        _agree(path, name, "its log", head[name], "its results", results[name])
    count = len(steps)
    if [row.get("step") for row in steps] != list(range(count)) or count != results["steps"]:
        raise ValueError(
            f"{path}: its log holds {count} training steps and its results say {results['steps']}; a log must hold "
            "every step"
        )


def _check_file(path: Path, file: Path, recipe_text: str, results: dict[str, Any]) -> None:
    stated = results["artifact"]
    _agree(path, "artifact sha256", "its results", stated["sha256"], file.name, hash_file(file))
    _agree(path, "artifact bytes", "its results", stated["bytes"], file.name, file.stat().st_size)
    code = bundle_size(recipe_text)
    _agree(path, "code_bytes", "its results", results["code_bytes"], "the bundle", code)
    _agree(path, "total_bytes", "its results", results["total_bytes"], "its files", stated["bytes"] + code)


def _check_model(
    path: Path,
    artifact: LoadedArtifact,
    recipe: CompactRecipe,
    head: dict[str, Any],
    results: dict[str, Any],
) -> None:
    ledger, configuration = artifact.ledger, artifact.configuration
    _agree(path, "code_bytes", "its artifact", ledger.code_bytes, "its results", results["code_bytes"])
    with torch.device("meta"):
        model = CompactModel(recipe.model, artifact.model.vocabulary)
    counts = {
        "its recipe": sum(parameter.numel() for parameter in model.parameters()),
        "its artifact": sum(math.prod(tensor.shape) for tensor in ledger.tensors),
        "its artifact's configuration": configuration.get("parameters"),
    }
    for source, count in counts.items():
        _agree(path, "parameters", "its log", head["parameters"], source, count)


def _check_scores(path: Path, results: dict[str, Any]) -> None:
    """Bits a byte follow from nats and bytes, and all protocols count the same tokens."""
    scores = results["bpb"]
    for protocol in ("chunked", "sliding"):
        score = scores[protocol]
        if score is None and protocol == "sliding":
            continue
        for name in ("tokens", "bytes"):
            _agree(path, name, protocol, score[name], "chunked", scores["chunked"][name])
        bits = score["nats"] / math.log(2) / score["bytes"]
        if not math.isclose(bits, score["decoded"], rel_tol=1e-9):
            raise ValueError(
                f"{path}: {protocol} bpb is {score['decoded']!r}, but its nats and bytes make {bits!r}; run it again"
            )


def _check_rescored(path: Path, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in ("tokens", "bytes"):
        _agree(path, name, "its results", stated[name], "the reloaded artifact", found[name])
    if not abs(stated["decoded"] - found["decoded"]) <= SCORE_TOLERANCE:
        raise ValueError(
            f"{path}: bpb is {stated['decoded']!r} in its results, and {found['decoded']!r} of the reloaded "
            "artifact; a score must be that of the artifact (check it on the kind of device that it was made on)"
        )


def _agree(path: Path, claim: str, one: str, value: Any, other: str, expected: Any) -> None:
    if value != expected:
        raise ValueError(
            f"{path}: {claim} is {value!r} in {one}, but {expected!r} by {other}; what is submitted must be what ran"
        )
