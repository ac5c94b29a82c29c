"""What tensors a model of a configuration holds: names and shapes, without memory for any."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import family_of, family_of_student
from trihybrid.models.shapes import TeacherConfig
from trihybrid.storage.tensor_files import StoredTensor


def empty_student(config: HybridConfig) -> HybridForCausalLM:
    """A student without memory for its tensors."""
    with torch.device("meta"), init.no_init_weights():
        return family_of_student(config.model_type).student(config)


def empty_teacher(base: TeacherConfig) -> PreTrainedModel:
    """A teacher without memory for its tensors."""
    with torch.device("meta"), init.no_init_weights():
        return family_of(base).teacher(base)


def wanted_tensors(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a saved student of this configuration holds; a tied head is not stored."""
    student = empty_student(config)
    tied = set(student._tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(t.shape) for name, t in student.state_dict().items() if name not in tied}


def converted_prefixes(config: HybridConfig) -> tuple[str, ...]:
    """What the names of all tensors of converted slots begin with."""
    return tuple(
        f"model.layers.{i}.self_attn." for i, slot in enumerate(config.slot_list()) if slot.converted
    )


def differences(stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each tensor that is missing, has another shape, or that no model of the configuration has."""
    lines = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in stored]
    lines += [
        f"{name} is {list(stored[name].shape)}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    return lines + [
        f"{name} {list(t.shape)} belongs to nothing" for name, t in stored.items() if name not in wanted
    ]
