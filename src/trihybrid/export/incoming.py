"""Taking a folder in: a student that `trihybrid export` wrote, or a published one, as a student of ours."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trihybrid.export.folder.code import changed_files
from trihybrid.export.folder.write import CONFIG, tensor_record
from trihybrid.export.published.read import read_published
from trihybrid.export.published.write import write_published
from trihybrid.models.families import FAMILIES, family_of_student
from trihybrid.models.inventory import differences, wanted_tensors
from trihybrid.storage.folder import MANIFEST, Written, check_folder, save_folder
from trihybrid.storage.tensor_files import read_headers, weight_files
from trihybrid.surgery.card import CARD


@dataclass(frozen=True)
class Import:
    """What was taken in.

    Attributes:
        folder: the student's folder.
        source: what it was: `export`, or the name of a revision.
        notes: one line for everything that a reader should know: what was left out, and why.
    """

    folder: Path
    source: str
    notes: tuple[str, ...]


def import_folder(source: Path, out: Path, revision: str | None = None) -> Import:
    """Make a folder from elsewhere a student of ours. No code of the folder is run.

    Args:
        source: an exported student, or a published one of the hxa07 family.
        out: a folder that does not exist yet.
        revision: of a published student whose configuration does not name it.

    Raises:
        ValueError: `out` exists; no whole model folder; a teacher, or a student that is not known; tensors that do not
            fit. Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    fields = check_folder(source)
    kind = str(fields.get("model_type"))
    if kind in {family.teacher_type for family in FAMILIES}:
        raise ValueError(f'{source}: model_type is "{kind}", a teacher; it needs no import')
    if kind in {family.student_type for family in FAMILIES}:
        if revision is not None:
            raise ValueError(f"revision is {revision}, but {source} is a student of ours; leave it away")
        return _take_back(source, fields, kind, out)
    reading = read_published(source, fields, revision)
    write_published(source, reading, out)
    left = Counter(reading.left.values())
    notes = [*reading.notes, *(f"{count} tensors left out: {why}" for why, count in sorted(left.items()))]
    return Import(out, f"{reading.published.revision.name} on {reading.published.teacher}", tuple(notes))


def _take_back(source: Path, fields: dict[str, Any], kind: str, out: Path) -> Import:
    """The student that was exported: its own code and its card stay behind, all other files come as they are. A folder
    without code is a student's that was never exported."""
    changed = changed_files(source, kind) if any(source.glob("*.py")) else []
    notes = []
    if changed:
        notes.append(
            f"{len(changed)} code files of the folder are not what this version of trihybrid writes, first "
            f"{changed[0]}: the student is computed by this version, not by them"
        )
    fields.pop("auto_map", None)
    config = family_of_student(kind).student.config_class.from_dict(dict(fields))
    faults = differences(read_headers(weight_files(source)), wanted_tensors(config))
    if faults:
        raise ValueError(f"{source}: {len(faults)} tensors do not fit {CONFIG}, first: {faults[0]}")

    def write(partial: Path) -> Written:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix != ".py" and path.name not in (CONFIG, MANIFEST, CARD):
                shutil.copyfile(path, partial / path.name)
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        return Written(facts=tensor_record(source))

    save_folder(out, write)
    return Import(out, "export", tuple(notes))
