"""Model folders: written whole or not at all, and checked before they are read.

A folder that we write holds, beside transformers' own files, `trihybrid.json`: size and sha256 of every file in it.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Gemma4UnifiedTextConfig, PreTrainedModel

from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import FAMILIES, register
from trihybrid.models.shapes import CLASSES, TeacherConfig, load_shape

MANIFEST = "trihybrid.json"


def save_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, add the manifest, and put it in place.

    An exception in `write` leaves the old folder as it was. A kill leaves the old folder or the new one whole, and at
    worst folders whose names end in `.partial`, which nothing reads and the next call removes. (Between two renames the
    old one is `.old.partial` and the new one `.partial`, both whole.)
    """
    folder = Path(folder)
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old.partial")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.iterdir())
    }
    (partial / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder}: no *.safetensors; weights in other formats are not read")
    for path in weights:
        _check_safetensors(path)
    if (folder / MANIFEST).exists():
        for name, wanted in _read_manifest(folder / MANIFEST).items():
            _check_file(folder / name, wanted)
    return config


def load_model(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A teacher or student from a folder, checked first.

    Raises:
        ValueError: see `check_folder`; a model type that we do not know; a configuration that cannot be; tensors that
            are missing or do not fit.
    """
    register()
    config = check_folder(folder)
    known = [family.teacher_type for family in FAMILIES] + [family.student_type for family in FAMILIES]
    if config.get("model_type") not in known:
        raise ValueError(
            f'{folder}: model_type is "{config.get("model_type")}"; this version reads text-only teachers and their '
            f"converted students: {', '.join(known)}"
        )
    try:
        # Ignored there, so that the error below can name the tensors.
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except StrictDataclassError as error:
        raise _impossible(folder, error) from error
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
    return model.eval()


def load_teacher(folder: str | Path) -> PreTrainedModel:
    """A teacher of any family from a folder.

    Raises:
        ValueError: see `load_model`; or the folder holds a student.
    """
    model = load_model(folder)
    if isinstance(model, HybridForCausalLM):
        raise ValueError(
            f"{folder}: a converted student, not a teacher; give the folder of the model that it was made from"
        )
    return model


def load_student(folder: str | Path) -> HybridForCausalLM:
    """A student of any family from a folder.

    Raises:
        ValueError: see `load_model`; or the folder holds a teacher.
    """
    model = load_model(folder)
    if not isinstance(model, HybridForCausalLM):
        raise ValueError(f"{folder}: a teacher, not a converted student; convert it first")
    return model


def load_teacher_config(name: str) -> TeacherConfig:
    """The text configuration of a teacher: a folder (weights are not needed) or the name of a built-in shape.

    The text model of a unified Gemma 4 becomes the `gemma4_text` that computes the same: one without per-layer inputs.

    Raises:
        ValueError: neither; or the configuration of another architecture, or one that cannot be.
    """
    folder = Path(name)
    if not folder.is_dir():
        return load_shape(name)
    fields = _read_config(folder)
    fields = fields.get("text_config", fields)
    kind = fields.get("model_type")
    if kind == Gemma4UnifiedTextConfig.model_type:
        kind = Gemma4TextConfig.model_type
        fields = Gemma4UnifiedTextConfig.from_dict(fields).to_dict()
        fields |= {"model_type": kind, "hidden_size_per_layer_input": 0, "enable_moe_block": False}
    if kind not in CLASSES:
        raise ValueError(
            f'{folder}: model_type is "{kind}"; a teacher is one of {", ".join(CLASSES)} (plans also take '
            f"{Gemma4UnifiedTextConfig.model_type})"
        )
    try:
        return CLASSES[kind].from_dict(fields)
    except StrictDataclassError as error:
        raise _impossible(folder, error) from error


def _impossible(folder: str | Path, error: StrictDataclassError) -> ValueError:
    return ValueError(f"{folder}: config.json cannot be: {' '.join(str(error.__cause__ or error).split())}")


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


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{path}: truncated: {size} bytes, its header alone needs {8 + length}; fetch it again"
            )
        try:
            tensors = json.loads(file.read(length))
            ends = [
                int(entry["data_offsets"][1]) for name, entry in tensors.items() if name != "__metadata__"
            ]
        except (ValueError, TypeError, AttributeError, LookupError):
            raise ValueError(f"{path}: the header is not safetensors; fetch it again") from None
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        raise ValueError(
            f"{path}: {size} bytes, its header describes {needed}; the file is cut short or damaged"
        )


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(path.read_text())["files"]
        return {
            name: {"bytes": wanted["bytes"], "sha256": wanted["sha256"]} for name, wanted in files.items()
        }
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(f"{path}: not a manifest of this version; copy the whole folder again") from None


def _check_file(path: Path, wanted: dict[str, Any]) -> None:
    if not path.exists():
        raise ValueError(f"{path}: missing, but {MANIFEST} lists it; copy the whole folder")
    if path.stat().st_size != wanted["bytes"]:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {wanted['bytes']}; copy it again"
        )
    if _sha256(path) != wanted["sha256"]:
        raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST}; the file was changed or damaged")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
