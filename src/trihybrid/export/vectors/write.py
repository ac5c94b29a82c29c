"""Writing vectors: one safetensors file a step, and a manifest that says what every tensor is and how close to be."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from trihybrid import __version__
from trihybrid.export.vectors.record import LEGEND, describe, record_step
from trihybrid.models.checkpoint import load_model
from trihybrid.models.decoder.config import media_tokens
from trihybrid.ops.backend import choose
from trihybrid.run import hash_folder
from trihybrid.storage.folder import save_folder
from trihybrid.testing import TOLERANCE

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURE = (
    "norm(x - reference) / max(norm(reference), 1e-6 sqrt(n)), over the n elements of a tensor, in float64"
)
HOW = (
    "Feed each layer its own recorded input and state, and compare what leaves it; then run all layers and compare the "
    "logits. `prefill` starts from nothing, each `decode` step from the step before it."
)


def write_vectors(
    folder: Path,
    out: Path,
    prompt: int = 12,
    steps: int = 4,
    seed: int = 0,
    tokens: list[int] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Record a model on a prompt and on single tokens after it; returns the manifest.

    Args:
        folder: a teacher or student.
        out: a folder that does not exist yet; gets `manifest.json` and one file a step.
        prompt: tokens of the first step.
        steps: single tokens after it.
        seed: of the tokens, where none are given: the model's BOS and random ids.
        tokens: `prompt` + `steps` token ids, or None.
        dtype: what the model computes in, one of `DTYPES`; weights are converted to it, and what the model keeps in
            float32 (norms, decays, states) stays there.

    Raises:
        ValueError: `out` exists; a folder that is no model; a count below 1, tokens of another count or out of range, a
            token that stands for an image, a video or sound; an unknown dtype.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    if prompt < 1 or steps < 0:
        raise ValueError(f"prompt is {prompt} and steps {steps}; give at least 1 and 0 tokens")
    if dtype not in DTYPES:
        raise ValueError(f'dtype is "{dtype}"; choose from {", ".join(DTYPES)}')
    model = load_model(folder, DTYPES[dtype])
    ids = choose_tokens(model, prompt + steps, seed) if tokens is None else tokens
    check_tokens(model, ids, prompt + steps)
    cache = DynamicCache(config=model.config)
    names = ["prefill", *(f"decode-{step}" for step in range(1, steps + 1))]
    sizes = [prompt] + [1] * steps
    manifest = _head(model, folder, dtype, None if tokens is not None else seed, ids)

    def write(partial: Path) -> None:
        start = 0
        for name, size in zip(names, sizes, strict=True):
            given = ids[start : start + size]
            found = record_step(model, torch.tensor([given]), cache)
            file = partial / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, file)
            manifest["steps"].append(
                {
                    "name": name,
                    "file": file.name,
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "tokens": given,
                    "positions": list(range(start, start + size)),
                    "tensors": {key: _entry(key, tensor) for key, tensor in found.items()},
                }
            )
            start += size
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    save_folder(out, write)
    return manifest


def choose_tokens(model: PreTrainedModel, count: int, seed: int) -> list[int]:
    """BOS, then random ids that stand for text."""
    generator = torch.Generator().manual_seed(seed)
    special = {model.config.bos_token_id, model.config.pad_token_id, *_as_list(model.config.eos_token_id)}
    special |= media_tokens(model.config).keys()
    usable = torch.tensor([token for token in range(model.config.vocab_size) if token not in special])
    drawn = usable[torch.randint(len(usable), (count,), generator=generator)].tolist()
    bos = model.config.bos_token_id
    return drawn if bos is None else [bos, *drawn[1:]]


def check_tokens(model: PreTrainedModel, tokens: list[int], count: int) -> None:
    """Refuse tokens that the text model cannot read.

    Raises:
        ValueError: another count, an id outside of the vocabulary, or one that stands for an image, video or sound.
    """
    if len(tokens) != count:
        raise ValueError(f"tokens: {len(tokens)} are given, prompt and steps need {count}")
    size = model.config.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"tokens: {token} is outside of the vocabulary, 0 to {size - 1}")
    for token, name in media_tokens(model.config).items():
        if token in tokens:
            raise ValueError(
                f"tokens: {token} is the model's {name}; a text model cannot read it, leave it out"
            )


def _as_list(token: int | list[int] | None) -> list[int]:
    return [] if token is None else token if isinstance(token, list) else [token]


def _head(
    model: PreTrainedModel, folder: Path, dtype: str, seed: int | None, tokens: list[int]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "how": HOW,
        "trihybrid": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {
            "name": folder.resolve().name,
            "model_type": model.config.model_type,
            "sha256": hash_folder(folder),
            "layer_types": getattr(model.config, "layer_types", None),
            "slots": getattr(model.config, "slots", None),
        },
        "dtype": dtype,
        "attention": model.config._attn_implementation,
        "wkv7": choose("wkv7", None, torch.device("cpu")).name,
        "seed": seed,
        "tokens": tokens,
        "legend": LEGEND,
        "tolerance": {"measure": MEASURE, "largest": TOLERANCE[DTYPES[dtype]]},
        "steps": [],
    }


def _entry(name: str, tensor: Tensor) -> dict[str, Any]:
    axes, what = describe(name)
    flat = (
        tensor.contiguous().flatten().view(torch.uint8)
        if tensor.numel()
        else torch.zeros(0, dtype=torch.uint8)
    )
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "axes": axes,
        "sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
        "what": what,
    }
