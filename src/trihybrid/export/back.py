"""Taking a folder in: a student that `trihybrid export` wrote, or a published one, as a student of ours."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trihybrid.export.folder.card import CARD
from trihybrid.export.folder.code import changed_files
from trihybrid.export.folder.write import CONFIG
from trihybrid.export.inventory import differences, stored_tensors, wanted_tensors
from trihybrid.models.checkpoint import MANIFEST, check_folder, save_folder

_logger = logging.getLogger(__name__)


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


def take_back(source: Path, out: Path) -> Import:
    """Make an exported folder the student again that it was. No code of the folder is run.

    Its own code and its card stay behind; all other files go with it as they are.

    Raises:
        ValueError: `out` exists; no whole model folder; tensors that are not those of the configuration.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    fields = check_folder(source)
    kind = str(fields["model_type"])
    changed = changed_files(source, kind)
    notes = []
    if changed:
        notes.append(
            f"{len(changed)} code files of the folder are not what this version of trihybrid writes, first "
            f"{changed[0]}: the student is computed by this version, not by them"
        )
        _logger.warning("%s: %s", source, notes[0])
    fields.pop("auto_map", None)
    faults = differences(stored_tensors(source), wanted_tensors(CONFIG_MAPPING[kind].from_dict(dict(fields))))
    if faults:
        raise ValueError(f"{source}: {len(faults)} tensors do not fit {CONFIG}, first: {faults[0]}")

    def write(partial: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix != ".py" and path.name not in (CONFIG, MANIFEST, CARD):
                shutil.copyfile(path, partial / path.name)
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")

    save_folder(out, write)
    return Import(out, "export", tuple(notes))
