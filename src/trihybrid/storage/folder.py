"""Model folders: written whole or not at all, and checked before they are read.

A folder that we write holds, beside transformers' own files, `trihybrid.json`: size and digest of every file in it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trihybrid.storage.digest import check_entry, file_entry, matches
from trihybrid.storage.tensor_files import read_header, weight_files

MANIFEST = "trihybrid.json"
FORMAT = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    config = read_config(folder)
    for path in weight_files(folder):
        read_header(path)
    if (folder / MANIFEST).exists():
        for name, wanted in _read_manifest(folder / MANIFEST).items():
            _check_file(folder / name, wanted)
    return config


def entries_of(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a manifest says of these files: that of the folder where it lists them, otherwise what is read from them.

    Raises:
        ValueError: a manifest that is none.
    """
    path = folder / MANIFEST
    listed = _read_manifest(path) if path.exists() else {}
    return {name: listed[name] if name in listed else file_entry(folder / name) for name in names}


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`.

    Raises:
        ValueError: it is missing, or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no config.json; this is not a model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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
