"""A compact model from its artifact file alone: reloading, measuring, and the tokenizer that belongs to it."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trihybrid.compress.artifact import read_artifact
from trihybrid.compress.ledger import Ledger
from trihybrid.data.byte_table import byte_lengths, check_table
from trihybrid.data.challenge import challenge_files, import_challenge
from trihybrid.data.corpus import CorpusSection, prepare_corpus
from trihybrid.data.sentencepiece import SentencePieceTokenizer, open_tokenizer
from trihybrid.data.shards import MANIFEST, TokenShards, write_shards
from trihybrid.data.text import read_documents
from trihybrid.data.tokens import TextTokenizer, Tokenizer
from trihybrid.evaluate.causality import check_causality
from trihybrid.evaluate.stream import StreamScore, chunked_bpb, sliding_bpb, stateful_bpb
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.compact.section import CompactSection
from trihybrid.recipe.compact import CompactEvaluationSection, CompactRecipe
from trihybrid.recipe.fields import validate

FORMAT = 1
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
CHECKED_TOKENS = 256
MOST_TOKENS = 2**24


@dataclass(frozen=True)
class LoadedArtifact:
    """What a file holds: model with the dequantised weights, its configuration, and the account of its bytes."""

    path: Path
    model: CompactModel
    configuration: dict[str, Any]
    ledger: Ledger


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The activations' dtype on a device for `train.precision`; None for that of the parameters."""
    if precision == "auto":
        precision = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def load_artifact(
    path: str | Path, device: torch.device | str = "cpu", precision: str = "auto"
) -> LoadedArtifact:
    """The model of an artifact file in evaluation mode: float32 parameters, activations as `compute_dtype` says.

    Raises:
        ValueError: the file is damaged, of another format, or its tensors are not those of its shape.
    """
    path = Path(path)
    artifact = read_artifact(path)
    configuration = artifact.configuration
    if configuration.get("format") != FORMAT:
        raise ValueError(
            f"{path}: configuration format {configuration.get('format')!r}, this version reads {FORMAT}"
        )
    vocabulary = configuration.get("vocabulary")
    if type(vocabulary) is not int or not 1 <= vocabulary <= MOST_TOKENS:
        raise ValueError(
            f"{path}: vocabulary is {vocabulary!r}, must be a number of tokens, 1 to {MOST_TOKENS}"
        )
    shape = configuration.get("section")
    if not isinstance(shape, dict):
        raise ValueError(f"{path}: section must be an object, the fields of a compact model's shape")
    section = validate(CompactSection, shape, str(path))
    with torch.device("meta"):
        empty = CompactModel(section, vocabulary)
    # Nothing of the model's size is allocated before the file has shown that it holds as much.
    _check_tensors(path, empty, artifact.tensors)
    model = CompactModel(section, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(artifact.tensors[name])
    model.compute_dtype = compute_dtype(precision, device)
    return LoadedArtifact(path, model.to(device).eval(), artifact.configuration, artifact.ledger)


def find_tokenizer(artifact: LoadedArtifact, name: str | None = None) -> tuple[str, TextTokenizer]:
    """The tokenizer that an artifact was trained with, and where it was found.

    Args:
        artifact: says which one, by kind and hash.
        name: `bytes`, a tokenizer.json, a SentencePiece .model or a folder of one; None looks in the artifact's folder
            and in the `model` folder of its run. Bytes need no file.

    Raises:
        ValueError: none is found, or it is another one than the artifact's.
    """
    kind, wanted = _tokenizer_of(artifact)
    if name is None and kind == "bytes":
        name = "bytes"
    if name is None:
        folder = artifact.path.parent
        found = [
            place / file
            for place in (folder, folder / "model")
            for file in TOKENIZER_FILES
            if (place / file).is_file()
        ]
        if not found:
            raise ValueError(
                f"{artifact.path}: no {' or '.join(TOKENIZER_FILES)} beside it; name its tokenizer with --tokenizer"
            )
        name = str(found[0])
    tokenizer = open_tokenizer(name)
    if tokenizer.hash != wanted:
        raise ValueError(
            f"{artifact.path}: trained with another tokenizer (hash {wanted}) than {name} (hash {tokenizer.hash}); "
            "name the right one with --tokenizer"
        )
    return name, tokenizer


def tokenizer_kind(tokenizer: TextTokenizer) -> str:
    """How an artifact calls a tokenizer: `bytes`, `sentencepiece`, or `tokenizers` for any other tokenizer.json."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return "sentencepiece"
    return "bytes" if tokenizer.hash == Tokenizer.bytes().hash else "tokenizers"


def score(
    model: CompactModel, tokenizer: TextTokenizer, shards: TokenShards, section: CompactEvaluationSection
) -> dict[str, dict[str, Any] | None]:
    """Bits per byte of a model: {"chunked": score, "sliding": score or None, "stateful": score or None}, each a
    `StreamScore` as a dict."""
    table, size, limit = byte_lengths(tokenizer), section.batch_size, section.validation_tokens
    scores: dict[str, StreamScore | None] = {"sliding": None, "stateful": None}
    scores["chunked"] = chunked_bpb(model, shards, table, section.length, section.isolated, size, limit)
    if section.sliding:
        scores["sliding"] = sliding_bpb(
            model, shards, table, section.length, section.stride, section.isolated, size, limit
        )
    if section.stateful:
        scores["stateful"] = stateful_bpb(model, shards, table, section.length, section.isolated, size, limit)
    return {name: None if found is None else asdict(found) for name, found in scores.items()}


def check_artifact(model: CompactModel, shards: TokenShards) -> float:
    """Refuse a model that looks ahead, on the first tokens of the validation text; the largest move that was found.

    Raises:
        ValueError: it does.
    """
    tokens = shards.tokens(0, min(CHECKED_TOKENS, len(shards)))
    return check_causality(model, torch.from_numpy(tokens.astype("int64"))[None])


def evaluate_artifact(
    path: Path, text: str, section: CompactEvaluationSection, tokenizer: str | None = None
) -> dict[str, Any]:
    """Bits per byte of an artifact on any text.

    Args:
        path: the file.
        text: `builtin` (the part of it that a recipe keeps for validation by default), a text file, a folder of them,
            or a folder of token shards, ours or the challenge's.
        section: windows and tokens.
        tokenizer: see `find_tokenizer`.

    Returns:
        {"parameters", "bytes", "recipe_hash", "bpb": as `score` has it}.

    Raises:
        ValueError: a file, tokenizer or text that does not serve, or a model that looks ahead.
    """
    artifact = load_artifact(path, "cuda" if torch.cuda.is_available() else "cpu")
    name, opened = find_tokenizer(artifact, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        shards = _validation_shards(text, name, opened, Path(folder))
        check_artifact(artifact.model, shards)
        bpb = score(artifact.model, opened, shards, section)
    return {
        "parameters": sum(parameter.numel() for parameter in artifact.model.parameters()),
        "bytes": path.stat().st_size,
        "recipe_hash": artifact.configuration.get("recipe_hash"),
        "bpb": bpb,
    }


def rescore_run(artifact: LoadedArtifact, recipe: CompactRecipe, run: Path) -> dict[str, Any]:
    """The chunked score of an artifact on the validation shards of its run, measured again.

    Raises:
        ValueError: the shards or the tokenizer are not there, or not those of the artifact.
    """
    _, tokenizer = find_tokenizer(artifact)
    own = run / "data" / "validation"
    if (own / MANIFEST).is_file():
        shards = TokenShards(own)
    else:  # a run that was given shards uses them where they lie
        shards = prepare_corpus(recipe.data, run / "data", replace=False).validation
    measured = score(
        artifact.model,
        tokenizer,
        shards,
        recipe.evaluation.model_copy(update={"sliding": False, "stateful": False}),
    )
    assert measured["chunked"] is not None
    return measured["chunked"]


def _validation_shards(text: str, name: str, tokenizer: TextTokenizer, folder: Path) -> TokenShards:
    """The tokens of a source, all of it unless it is `builtin`, in `folder` where they are not shards already."""
    if text == "builtin":
        return prepare_corpus(CorpusSection(tokenizer=name), folder).validation
    place = Path(text)
    if challenge_files(place, "val"):
        shards = import_challenge(place, "val", folder, tokenizer, "")
    elif found := [path for path in (place / "validation", place) if (path / MANIFEST).is_file()]:
        shards = TokenShards(found[0])
    else:
        documents = read_documents(text)
        shards = write_shards(
            folder,
            (tokenizer.encode(document) for document in documents),
            tokenizer.vocab_size,
            tokenizer.bos_id,
            text_bytes=sum(len(document.encode()) for document in documents),
            tokenizer_hash=tokenizer.hash,
        )
    check_table(shards, tokenizer)
    return shards


def _check_tensors(path: Path, model: CompactModel, tensors: dict[str, Tensor]) -> None:
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        have, want = (None if size is None else list(size) for size in (found.get(name), wanted.get(name)))
        raise ValueError(
            f"{path}: {len(wrong)} tensors are not those of its shape, first {name} ({have or 'missing'}, "
            f"wanted {want or 'none'}); the file was made for another version"
        )


def _tokenizer_of(artifact: LoadedArtifact) -> tuple[str, str]:
    record = artifact.configuration.get("tokenizer")
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), str) for name in ("kind", "hash")
    ):
        raise ValueError(
            f"{artifact.path}: its configuration does not say which tokenizer it was trained with"
        )
    return record["kind"], record["hash"]
