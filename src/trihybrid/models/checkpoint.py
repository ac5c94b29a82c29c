"""Models from folders: teachers, published or text only, and students, checked before anything is made of them."""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import FAMILIES, family_of, register
from trihybrid.models.shapes import TeacherConfig, load_shape
from trihybrid.models.teacher.published import (
    MULTIMODAL_TYPES,
    PublishedTeacher,
    impossible,
    open_published,
    text_config,
)
from trihybrid.models.teacher.selfcheck import check_rotary, check_teacher
from trihybrid.storage.folder import check_folder, read_config
from trihybrid.storage.tensor_files import DTYPES

_logger = logging.getLogger(__name__)


def open_teacher(folder: str | Path) -> PublishedTeacher:
    """A teacher's folder, checked, its weights left on the disk.

    Raises:
        ValueError: see `check_folder` and `open_published`; or the folder holds a student.
    """
    fields = check_folder(folder)
    if fields.get("model_type") in {family.student_type for family in FAMILIES}:
        raise _no_teacher(folder)
    return open_published(Path(folder), fields)


def load_model(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A teacher or student from a folder, checked first. Of a multimodal teacher the text model.

    Tensors that the model has no place for are named in one line of the log.

    Raises:
        ValueError: see `check_folder` and `check_rotary`; a model type that we do not know; a configuration that cannot
            be; tensors that are missing or do not fit.
    """
    register()
    folder = Path(folder)
    config = check_folder(folder)
    known = [family.teacher_type for family in FAMILIES] + [family.student_type for family in FAMILIES]
    if config.get("model_type") not in (*known, *MULTIMODAL_TYPES):
        raise ValueError(
            f'{folder}: model_type is "{config.get("model_type")}"; this version reads teachers and their converted '
            f"students: {', '.join(known)}; and the text models of {', '.join(MULTIMODAL_TYPES)}"
        )
    if config["model_type"] in {family.teacher_type for family in FAMILIES}:
        text_config(folder, config)  # which refuses in one line what transformers would fail at
    options: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "local_files_only": True,
        # Ignored there, so that the error below can name the tensors.
        "ignore_mismatched_sizes": True,
    }
    try:
        if config["model_type"] in MULTIMODAL_TYPES:
            model, info = _load_text_model(open_published(folder, config), options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except StrictDataclassError as error:
        raise ValueError(f"{folder}: {impossible(error)}") from error
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
    model, info = family_of(teacher.base).teacher.from_pretrained(
        None, config=teacher.base, state_dict=tensors, **options
    )
    if (teacher.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(teacher.folder), local_files_only=True)
    info["unexpected_keys"] = [*info["unexpected_keys"], *teacher.strangers]
    return model, info


def load_teacher(folder: str | Path) -> PreTrainedModel:
    """A teacher of any family from a folder, whose cache and checkpointing were tried out.

    Raises:
        ValueError: see `load_model` and `check_teacher`; or the folder holds a student.
    """
    model = load_model(folder)
    if isinstance(model, HybridForCausalLM):
        raise _no_teacher(folder)
    check_teacher(model, str(folder))
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

    Raises:
        ValueError: neither; or the configuration of another architecture, or one that cannot be.
    """
    folder = Path(name)
    if not folder.is_dir():
        return load_shape(name)
    return text_config(folder, read_config(folder))


def _no_teacher(folder: str | Path) -> ValueError:
    return ValueError(
        f"{folder}: a converted student, not a teacher; give the folder of the model that it was made from"
    )
