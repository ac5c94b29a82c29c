"""Writing a published student in our format: weights as a stream, the teacher's tokenizer, and what was read."""

import json
import shutil
from pathlib import Path

import torch

from trihybrid import __version__
from trihybrid.data.carry import FILES as TOKENIZER_FILES
from trihybrid.export.folder.card import IMPORTED
from trihybrid.export.published.read import TIED, Reading
from trihybrid.models.families import family_of_student
from trihybrid.models.inventory import wanted_tensors
from trihybrid.storage.folder import Written, save_folder
from trihybrid.storage.tensor_files import DTYPES, TensorJoin
from trihybrid.storage.tensor_writer import TensorShape, TensorWriter, file_order

KEPT = ("generation_config.json", *TOKENIZER_FILES)
"""Files beside weights and configuration that are the student's too."""
WEIGHTS = "model.safetensors"
FLOATS = ("F64", "F32", "BF16", "F16")
ROWS = 4096
"""Rows of the head that are compared at once."""


def write_published(source: Path, reading: Reading, out: Path) -> None:
    """Write the student of a reading to `out`, whole or not at all.

    Raises:
        ValueError: weights in a format other than float; a tied head that differs from its embedding.
    """
    read = {name for place in reading.sources.values() for name in place.names}
    strange = sorted(
        f"{n} ({reading.stored[n].dtype})" for n in read if reading.stored[n].dtype not in FLOATS
    )
    if strange:
        raise ValueError(
            f"{source}: {len(strange)} tensors are no floats, first {strange[0]}; give unquantised weights"
        )
    _check_tied(source, reading)

    def write(partial: Path) -> Written:
        written = _write_weights(reading, partial)
        config = reading.config
        embedding = reading.stored[reading.sources["model.embed_tokens.weight"].names[0]]
        config.dtype = DTYPES[embedding.dtype]
        config.architectures = [family_of_student(config.model_type).student.__name__]
        config.save_pretrained(partial)
        for name in KEPT:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / IMPORTED).write_text(json.dumps(_report(source, reading), indent=2) + "\n")
        return written

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


def _write_weights(reading: Reading, folder: Path) -> Written:
    """All weights as one file, which passes through a few buffers."""
    shapes = wanted_tensors(reading.config)
    stored = {name: tuple(reading.stored[n] for n in place.names) for name, place in reading.sources.items()}
    tensors = {
        name: TensorShape.of(DTYPES[parts[0].dtype], shapes[name])
        for name, parts in sorted(stored.items(), key=lambda item: file_order(item[1][0]))
    }
    with TensorWriter(folder / WEIGHTS, tensors) as writer:
        for name, shape in tensors.items():
            if reading.sources[name].change == "transpose":
                writer.put(name, stored[name][0].read().squeeze().mT)
            else:
                writer.copy(name, TensorJoin(stored[name], shape.shape))
    return Written({WEIGHTS: writer.entry})


def _check_tied(source: Path, reading: Reading) -> None:
    """A head that is left out as tied must be the embedding."""
    heads = [name for name, why in reading.left.items() if why == TIED]
    embedding = reading.sources["model.embed_tokens.weight"].names[0]
    for head in heads:
        left, right = reading.stored[head], reading.stored[embedding]
        starts = range(0, left.shape[0], ROWS)
        ends = [min(start + ROWS, left.shape[0]) for start in starts]
        if left.shape != right.shape or not all(
            torch.equal(left.block(*rows), right.block(*rows)) for rows in zip(starts, ends, strict=True)
        ):
            raise ValueError(
                f"{source}: tie_word_embeddings is true, but {head} is not {embedding}; set it to false in config.json"
            )
