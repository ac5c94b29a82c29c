"""Writing a published student in our format: shards of bounded size, the teacher's tokenizer, and what was read."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trihybrid import __version__
from trihybrid.export.folder.card import IMPORTED
from trihybrid.export.inventory import StoredTensor, wanted_tensors
from trihybrid.export.published.names import Source
from trihybrid.export.published.read import TIED, Reading
from trihybrid.models.checkpoint import save_folder
from trihybrid.models.families import family_of_student

SHARD_BYTES = 2 << 30
"""Bytes of a shard, above which only a single tensor may make it: what is held in memory at once."""
KEPT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside weights and configuration that are the student's too."""
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROWS = 4096
"""Rows of the head that are compared at once."""


def write_published(source: Path, reading: Reading, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the student of a reading to `out`, whole or not at all.

    Raises:
        ValueError: weights in a format other than float; a tied head that differs from its embedding.
    """
    read = {name for place in reading.sources.values() for name in place.names}
    strange = sorted(f"{n} ({reading.stored[n].dtype})" for n in read if reading.stored[n].dtype not in BYTES)
    if strange:
        raise ValueError(
            f"{source}: {len(strange)} tensors are no floats, first {strange[0]}; give unquantised weights"
        )
    _check_tied(source, reading)

    def write(partial: Path) -> None:
        _write_weights(reading, partial, shard_bytes)
        config = reading.config
        embedding = reading.stored[reading.sources["model.embed_tokens.weight"].names[0]]
        config.dtype = DTYPES[embedding.dtype]
        config.architectures = [family_of_student(config.model_type).student.__name__]
        config.save_pretrained(partial)
        for name in KEPT:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / IMPORTED).write_text(json.dumps(_report(source, reading), indent=2) + "\n")

    save_folder(out, write)


def _report(source: Path, reading: Reading) -> dict:
    return {
        "format": 1,
        "trihybrid": __version__,
        "source": source.resolve().name,
        "revision": reading.published.revision.name,
        "teacher": reading.published.teacher,
        "notes": reading.notes,
        "tensors": {
            name: {"from": list(place.names), "change": place.change}
            for name, place in reading.sources.items()
        },
        "left": reading.left,
    }


def _write_weights(reading: Reading, folder: Path, shard_bytes: int) -> None:
    shapes = wanted_tensors(reading.config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, place in reading.sources.items():
        more = _bytes(reading, place)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _tensor(reading, reading.sources[name], shapes[name]) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_bytes(reading, place) for place in reading.sources.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor(reading: Reading, source: Source, shape: tuple[int, ...]) -> Tensor:
    tensors = []
    for name in source.names:
        with safe_open(reading.stored[name].file, "pt") as opened:
            tensors.append(opened.get_tensor(name))
    if source.change == "transpose":
        return tensors[0].squeeze().mT.contiguous()
    if source.change == "stack pairs":
        tensors = [torch.cat(tensors[place : place + 2]) for place in range(0, len(tensors), 2)]
    tensor = torch.stack(tensors) if source.change.startswith("stack") else tensors[0]
    return tensor.reshape(shape).contiguous()


def _bytes(reading: Reading, source: Source) -> int:
    tensors = [reading.stored[name] for name in source.names]
    return sum(BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in tensors)


def _check_tied(source: Path, reading: Reading) -> None:
    """A head that is left out as tied must be the embedding."""
    heads = [name for name, why in reading.left.items() if why == TIED]
    embedding = reading.sources["model.embed_tokens.weight"].names[0]
    for head in heads:
        pairs = zip(_rows(reading.stored, head), _rows(reading.stored, embedding), strict=True)
        if not all(torch.equal(left, right) for left, right in pairs):
            raise ValueError(
                f"{source}: tie_word_embeddings is true, but {head} is not {embedding}; set it to false in config.json"
            )


def _rows(stored: dict[str, StoredTensor], name: str) -> Iterator[Tensor]:
    with safe_open(stored[name].file, "pt") as opened:
        rows = opened.get_slice(name)
        for start in range(0, stored[name].shape[0], ROWS):
            yield rows[start : start + ROWS]
