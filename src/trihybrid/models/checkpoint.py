"""Model folders: written whole or not at all, and checked before they are read.

A folder that we write holds, beside transformers' own files, `trihybrid.json`: size and digest of every file in it.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, GenerationConfig, PreTrainedModel

from trihybrid.models.digest import check_entry, file_entry, matches
from trihybrid.models.gemma4 import TrihybridGemma4Config, register
from trihybrid.models.published import (
    MULTIMODAL_TYPE,
    TEACHER_TYPE,
    PublishedTeacher,
    open_published,
    text_config,
)
from trihybrid.models.selfcheck import check_rotary, check_teacher
from trihybrid.models.shapes import TeacherConfig, load_shape
from trihybrid.models.tensor_files import DTYPES, read_header, weight_files

MANIFEST = "trihybrid.json"
FORMAT = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What a writer of a folder can say of it.

    Attributes:
        entries: manifest entries of files that it hashed while it wrote and synced them; the others are read again.
        facts: what the manifest shall hold beside its own fields.
    """

    entries: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_folder(folder: str | Path, write: Callable[[Path], Written | None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, add the manifest, and put it in place.

    An exception in `write` leaves the old folder as it was and nothing else. A kill or a power failure leaves the old
    folder or the new one whole, and at worst folders whose names end in `.partial`, which nothing reads and the next
    call removes. (Between two renames the old one is `.old.partial` and the new one `.partial`, both whole.)

    Raises:
        ValueError: the disk is full, or takes no file of that size.
    """
    folder = Path(folder)
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old.partial")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _add_manifest(partial, write(partial) or Written())
    except BaseException as error:
        shutil.rmtree(partial)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise ValueError(
                f"{folder}: {os.strerror(error.errno)} while it was written; nothing of it is left; free space, or "
                "name a folder on another disk"
            ) from error
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _add_manifest(partial: Path, written: Written) -> None:
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        name = path.relative_to(partial).as_posix()
        if name in written.entries:
            files[name] = written.entries[name]
        else:
            _sync(path)
            files[name] = file_entry(path)
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files, **written.facts}, indent=2) + "\n")
    for path in (manifest, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_folder(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a model folder whose files are whole.

    Raises:
        ValueError: no such folder, no config.json, a configuration that is not JSON, no weights, a safetensors file
            whose size is not what its header says, or a file that differs from the manifest.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder; give a folder with config.json and *.safetensors")
    config = _read_config(folder)
    for path in weight_files(folder):
        read_header(path)
    if (folder / MANIFEST).exists():
        for name, wanted in _read_manifest(folder / MANIFEST).items():
            _check_file(folder / name, wanted)
    return config


def open_teacher(folder: str | Path) -> PublishedTeacher:
    """A teacher's folder, checked, its weights left on the disk.

    Raises:
        ValueError: see `check_folder` and `open_published`.
    """
    return open_published(Path(folder), check_folder(folder))


def load_model(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A teacher or student from a folder, checked first. Of a multimodal teacher the text model.

    Tensors that the model has no place for are named in one line of the log.

    Raises:
        ValueError: see `check_folder` and `check_rotary`; a model type that we do not know; tensors that are missing
            or do not fit.
    """
    register()
    folder = Path(folder)
    config = check_folder(folder)
    known = (TEACHER_TYPE, MULTIMODAL_TYPE, TrihybridGemma4Config.model_type)
    if config.get("model_type") not in known:
        raise ValueError(
            f'{folder}: model_type is "{config.get("model_type")}"; this version reads {", ".join(known)} '
            "(a Gemma-4, of which the text model is read, and its converted students)"
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "local_files_only": True,
        # Ignored there, so that the error below can name the tensors.
        "ignore_mismatched_sizes": True,
    }
    try:
        if config["model_type"] == MULTIMODAL_TYPE:
            model, info = _load_text_model(open_published(folder, config), options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    missing += sorted(
        f"{name} ({list(found)}, wanted {list(wanted)})" for name, found, wanted in info["mismatched_keys"]
    )
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing or have another shape, first {missing[0]}"
        )
    surplus = sorted(info["unexpected_keys"])
    if surplus:
        _logger.warning("%s: %d tensors are not used, first %s", folder, len(surplus), surplus[0])
    check_rotary(model, str(folder))
    return model.eval()


def _load_text_model(
    teacher: PublishedTeacher, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The text model alone. Under its own names: a mapping of names would be applied backwards when it is saved."""
    if options["dtype"] == "auto":
        kept = teacher.text.get("model.embed_tokens.weight")
        options = options | {"dtype": torch.float32 if kept is None else DTYPES[kept.dtype]}
    tensors = {name: place.read() for name, place in teacher.text.items()}
    model, info = Gemma4ForCausalLM.from_pretrained(None, config=teacher.base, state_dict=tensors, **options)
    if (teacher.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(teacher.folder), local_files_only=True)
    info["unexpected_keys"] = [*info["unexpected_keys"], *teacher.strangers]
    return model, info


def load_teacher(folder: str | Path) -> Gemma4ForCausalLM:
    """A teacher from a folder, whose cache and checkpointing were tried out.

    Raises:
        ValueError: see `load_model` and `check_teacher`; or the folder holds a student.
    """
    model = load_model(folder)
    if not isinstance(model, Gemma4ForCausalLM):
        raise ValueError(
            f"{folder}: a converted student, not a teacher; give the folder of a Gemma-4 text model"
        )
    check_teacher(model, str(folder))
    return model


def load_teacher_config(name: str) -> TeacherConfig:
    """The text configuration of a teacher: a folder (weights are not needed) or the name of a built-in shape.

    Raises:
        ValueError: neither; or the configuration of another architecture.
    """
    folder = Path(name)
    if not folder.is_dir():
        return load_shape(name)
    return text_config(folder, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no config.json; this is not a model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: holds a {type(config).__name__}, not an object; this is not a model folder"
        )
    return config


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(path.read_text())["files"]
        return {name: check_entry(wanted) for name, wanted in files.items()}
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(f"{path}: not a manifest of this version; copy the whole folder again") from None


def _check_file(path: Path, wanted: dict[str, Any]) -> None:
    if not path.exists():
        raise ValueError(f"{path}: missing, but {MANIFEST} lists it; copy the whole folder")
    if path.stat().st_size != wanted["bytes"]:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {wanted['bytes']}; copy it again"
        )
    if not matches(path, wanted):
        raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST}; the file was changed or damaged")
