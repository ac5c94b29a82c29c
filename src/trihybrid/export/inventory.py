"""What tensors a folder holds, and what tensors a model of ours has: names, shapes and dtypes, without reading any."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import initialization as init

from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.families import family_of_student


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: which file, its shape, its dtype as safetensors spells it ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the safetensors files of a folder.

    Raises:
        ValueError: a file that is not safetensors, or a name that stands in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    tensor = opened.get_slice(name)
                    if name in found:
                        raise ValueError(
                            f"{folder}: {name} stands in {found[name].file.name} and {file.name}; keep one of them"
                        )
                    found[name] = StoredTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file}: not safetensors ({error}); fetch it again") from None
    return found


def wanted_tensors(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a saved model of this configuration holds; a tied head is not stored."""
    with torch.device("meta"), init.no_init_weights():
        model = family_of_student(config.model_type).student(config)
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def differences(stored: dict[str, StoredTensor], wanted: dict[str, tuple[int, ...]]) -> list[str]:
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
