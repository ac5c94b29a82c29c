"""Exporting a student: its folder with its own code, a model card, and a configuration that names both."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trihybrid.export.folder.card import model_card
from trihybrid.export.folder.code import auto_map, code_files
from trihybrid.models.families import family_of_student
from trihybrid.models.inventory import differences, wanted_tensors
from trihybrid.storage.folder import MANIFEST, Written, check_folder, save_folder
from trihybrid.storage.tensor_files import read_headers, weight_files
from trihybrid.surgery.card import CARD

CONFIG = "config.json"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        code: names of its Python files.
        code_bytes, weight_bytes: bytes of these and of its weights.
    """

    folder: Path
    code: tuple[str, ...]
    code_bytes: int
    weight_bytes: int


def export_folder(student: Path, out: Path) -> Export:
    """Write the student in `student` to `out`, with all code that it needs beside torch and transformers.

    All other files of the student go with it as they are: weights, tokenizer, generation config, plan. `trihybrid.json`
    lists the hashes of everything, and keeps what it says of the conversion's tensors.

    Raises:
        ValueError: `out` exists; no whole model folder; a teacher; tensors that are not those of the configuration.
            Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    fields = check_folder(student)
    kind = str(fields.get("model_type"))
    code = code_files(kind)
    config = family_of_student(kind).student.config_class.from_dict(dict(fields))
    faults = differences(read_headers(weight_files(student)), wanted_tensors(config))
    if faults:
        raise ValueError(f"{student}: {len(faults)} tensors do not fit {CONFIG}, first: {faults[0]}")
    card = model_card(student, config, out.name)

    def write(partial: Path) -> Written:
        for path in sorted(student.iterdir()):
            if path.is_file() and path.suffix != ".py" and path.name not in (CONFIG, MANIFEST, CARD):
                shutil.copyfile(path, partial / path.name)
        for name, text in code.items():
            (partial / name).write_text(text, encoding="ascii")
        (partial / CONFIG).write_text(json.dumps(fields | {"auto_map": auto_map(kind)}, indent=2) + "\n")
        (partial / CARD).write_text(card, encoding="utf-8")
        return Written(facts=tensor_record(student))

    save_folder(out, write)
    return Export(
        out,
        tuple(code),
        sum(len(text) for text in code.values()),
        sum(path.stat().st_size for path in out.glob("*.safetensors")),
    )


def tensor_record(folder: Path) -> dict[str, Any]:
    """What a student's manifest says of its tensors when it was converted, as a manifest's fact; nothing of a folder
    that says nothing."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    return {"tensors": manifest["tensors"]} if "tensors" in manifest else {}
