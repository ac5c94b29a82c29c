"""Recording one forward pass of a teacher or student: what enters and leaves each part, and the states around it.

Legend: B batch (1), T new tokens, S stored tokens, D model width, P width of a per-layer input, V vocabulary, H heads,
G key/value heads, N head width, K and V key and value width of a recurrence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from trihybrid.mixers.contract import Mixer
from trihybrid.models.cache import CACHE, slot_tensors

LEGEND = {
    "B": "batch, 1",
    "T": "tokens of the step",
    "S": "stored tokens",
    "D": "model width",
    "P": "width of a per-layer input",
    "V": "vocabulary; of a recurrence's state, value width",
    "H": "heads",
    "G": "key/value heads",
    "N": "head width",
    "K": "key width",
}
"""Letter of an axis -> what it counts."""

WHAT = {
    "embedding": ("B T D", "rows of the embedding, scaled as the model scales them"),
    "input": ("B T D", "the residual stream that enters the layer"),
    "per_layer_input": ("B T P", "the layer's slice of the per-layer inputs"),
    "mixer.input": ("B T D", "the normed stream that the layer's attention or mixers read"),
    "mixer.output": ("B T D", "what they give back, before any post-norm; the sum where there are several"),
    "rwkv7.output": ("B T D", "the recurrence's share of mixer.output"),
    "tica.output": ("B T D", "the small attention's share of mixer.output"),
    "mlp.input": ("B T D", "the normed stream that the MLP reads"),
    "mlp.output": ("B T D", "what the MLP gives back, before any post-norm"),
    "output": ("B T D", "the residual stream that leaves the layer"),
    "keys": ("B G S N", "stored keys, oldest first, as attention reads them"),
    "values": ("B G S N", "stored values, oldest first"),
    "matrix": ("B H K V", "the recurrence's state"),
    "final_norm": ("B T D", "the stream after the last norm"),
    "logits": ("B T V", "logits, softcapped where the model does that"),
}
"""Last part of a tensor's name -> its axes, and what it is."""


def describe(name: str) -> tuple[str, str]:
    """Axes and meaning of a recorded tensor, by its name.

    Raises:
        ValueError: no such tensor is recorded.
    """
    parts = name.split(".")
    moment = ""
    if parts[-1] in ("before", "after"):
        moment = f", {parts.pop()} the step"
    for length in (2, 1):
        known = WHAT.get(".".join(parts[-length:]))
        if known is not None:
            return known[0], known[1] + moment
    raise ValueError(f"{name}: not a recorded tensor; known are {', '.join(WHAT)}")


def record_step(model: PreTrainedModel, tokens_BT: Tensor, cache: Cache) -> dict[str, Tensor]:
    """Run tokens [1, T] after those in the cache, which then holds them too.

    Returns:
        Name -> tensor, in the order of the pass: `embedding`, `layers.<i>.<what>`, `layers.<i>.state.<what>.before` and
        `.after`, `final_norm`, `logits`. A layer that stores nothing has no state; the state before the first step is
        zero, its keys and values none.
    """
    layers = model.model.layers
    before = [slot_tensors(cache, index) for index in range(len(layers))]
    with recording(model) as found, torch.no_grad():
        outputs = model(input_ids=tokens_BT, use_cache=True, **{CACHE: cache})
    found["logits"] = outputs.logits.detach().clone()
    for index in range(len(layers)):
        for name, tensor in slot_tensors(cache, index).items():
            empty = torch.zeros_like(tensor) if name == "matrix" else tensor[:, :, :0].clone()
            found[f"layers.{index}.state.{name}.before"] = before[index].get(name, empty)
            found[f"layers.{index}.state.{name}.after"] = tensor
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[int, int]:
    parts = name.split(".")
    if parts[0] == "layers":
        return 1, int(parts[1])
    return (0 if name == "embedding" else 2), 0


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """While it is open, a forward pass fills the dictionary with clones of what passes."""
    found: dict[str, Tensor] = {}
    handles: list[Any] = []

    def watch(module: nn.Module, title: str, inputs: bool) -> None:
        def hook(_: nn.Module, arguments: tuple, options: dict, result: Any) -> None:
            if inputs:
                # Decoder layers of some families take their stream by its place, attentions by its name.
                found[f"{title}input"] = (
                    (arguments[0] if arguments else options["hidden_states"]).detach().clone()
                )
            per_layer = options.get("per_layer_input", arguments[1] if len(arguments) > 1 else None)
            if module in layers and isinstance(per_layer, Tensor):
                found[f"{title}per_layer_input"] = per_layer.detach().clone()
            y = result[0] if isinstance(result, tuple) else result
            found[f"{title}output" if title.endswith(".") else title] = y.detach().clone()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    decoder = model.model
    layers = set(decoder.layers)
    watch(decoder.embed_tokens, "embedding", inputs=False)
    for index, layer in enumerate(decoder.layers):
        watch(layer, f"layers.{index}.", inputs=True)
        watch(layer.self_attn, f"layers.{index}.mixer.", inputs=True)
        for mixer in layer.self_attn.children():
            if isinstance(mixer, Mixer):
                watch(mixer, f"layers.{index}.{mixer.kind}.", inputs=False)
        watch(layer.mlp, f"layers.{index}.mlp.", inputs=True)
    watch(decoder.norm, "final_norm", inputs=False)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
