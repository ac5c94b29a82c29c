"""The tensors of one published layer: found by their spellings, by their shapes, or reported.

What is wanted comes from our own mixers, built without memory, so that there is no second list of shapes. Names are
those behind `model.layers.<i>.self_attn.`; a LoRA matrix is stored (in, out), or (out, in) where it is a `.weight` of a
linear layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trihybrid.export.published.identify import Published
from trihybrid.mixers.contract import Mixer
from trihybrid.mixers.rwkv7 import Rwkv7, Rwkv7Options
from trihybrid.mixers.tica import Tica, TicaOptions

Shape = tuple[int, ...]
Change = Literal["none", "reshape", "transpose", "stack", "stack pairs"]

STEMS = {
    "receptance": ("receptance", "receptance_proj", "r_proj", "q_proj"),
    "key": ("key", "key_proj", "k_proj"),
    "value": ("value", "value_proj", "v_proj"),
    "output": ("output", "output_proj", "o_proj"),
    "r_norm": ("r_norm", "receptance_norm", "q_norm"),
    "k_norm": ("k_norm", "key_norm"),
}
"""Our module's name -> the names that it was published under, the surest first."""

TINY = ("tiny_", "tiny_attn.", "tiny_attention.")
"""How the names of TICA's tensors may begin."""

METADATA = ("layer_architecture", "head_size_record")
"""Tensors that training left behind and every loader skips."""


@dataclass(frozen=True)
class Source:
    """One published tensor or several, and how they become ours: as they are, in another shape, turned round, stacked
    along a new first dimension, or joined in pairs and then stacked."""

    names: tuple[str, ...]
    change: Change = "none"


@dataclass
class Layer:
    """What was found of one layer.

    Attributes:
        rwkv7, tica: fields of the mixers' options, without hidden size and epsilon; `tica` None without one.
        sources: our name inside the slot (`rwkv7.w0`) -> the tensor that it comes from.
        left: published name -> why it is not read.
        notes: what a reader should know.
        faults: what does not fit.
        misfits: our name -> the published names that were found for it, none of a shape that fits.
    """

    rwkv7: dict[str, Any] = field(default_factory=dict)
    tica: dict[str, Any] | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    misfits: dict[str, list[str]] = field(default_factory=dict)


def recurrent(names: Iterable[str]) -> bool:
    """Whether a layer's tensors are those of a recurrence."""
    return any(name.removesuffix(".weight") in ("w0", "w1", "w2", "a0", "a1", "a2") for name in names)


def match_layer(
    found: Mapping[str, Shape],
    published: Published,
    hidden: int,
    index: int,
    first: int,
    ranks: Mapping[str, int],
) -> Layer:
    """The mixers of layer `index`.

    Args:
        found: name behind `self_attn.` -> shape.
        published: the configuration.
        hidden: model width.
        index: of the layer.
        first: index of the first recurrent layer.
        ranks: those of residuals and of the v-LoRA, which the first layer cannot tell.
    """
    layer = Layer()
    try:
        layer.rwkv7 = _rwkv7_fields(found, published, hidden, ranks)
        options = Rwkv7Options(hidden_size=hidden, **layer.rwkv7)
        if any(_tiny(found)):
            layer.tica = _tica_fields(found)
            small = TicaOptions(hidden_size=hidden, **layer.tica)
    except ValueError as error:
        layer.faults.append(str(error))
        return layer
    with torch.device("meta"):
        mixers: list[Mixer] = [Rwkv7(options, index, first=None if index == first else first)]
        if layer.tica is not None:
            mixers.append(Tica(small, index))
    for mixer in mixers:
        for name, tensor in mixer.state_dict().items():
            spellings = _spellings(mixer.kind, name, published)
            _match(layer, found, f"{mixer.kind}.{name}", tuple(tensor.shape), spellings)
    _match_by_shape(layer, found, mixers)
    _explain_the_rest(layer, found, published, index == first)
    return layer


def residual_ranks(found: Mapping[str, Shape], published: Published, hidden: int) -> dict[str, int]:
    """Ranks of residuals and v-LoRA that a layer's tensors show."""
    names = {
        "value_residual_rank": "v1",
        "key_residual_rank": "k1",
        "value_lora_rank": _value_lora(published)[0],
    }
    needed = published.revision.needs()
    shown = {rank: _rank(found, names[rank], hidden) for rank in needed}
    return {rank: value for rank, value in shown.items() if value}


def _rwkv7_fields(
    found: Mapping[str, Shape], published: Published, hidden: int, ranks: Mapping[str, int]
) -> dict[str, Any]:
    channels = _numbers(_shape(found, ("w0", "w0.weight")))
    width = _width(found, published)
    keys = _shape(found, _named("key"))[0]
    if channels % width or keys % width:
        raise ValueError(
            f"w0 has {channels} channels and the key projection {keys} rows; both must be multiples of the head width, "
            f"{width}"
        )
    norms = [name for stem in STEMS["r_norm"] if (name := f"{stem}.weight") in found]
    read = hidden if published.revision.lora_input == "input" else channels
    sizes = {"heads": channels // width, "kv_heads": keys // width, "head_dim": width}
    for name, letter in (("decay_rank", "w1"), ("iclr_rank", "a1"), ("gate_rank", "g1")):
        rank = _rank(found, letter, read)
        if not rank:
            raise ValueError(
                f"{letter} is missing or has no side of {read} channels, so its rank is not known"
            )
        sizes[name] = rank
    return {
        **sizes,
        "gate": "published",
        "qk_norm": bool(norms) if published.qk_norm is None else published.qk_norm,
        "input_bias": any(f"{stem}.bias" in found for stem in STEMS["receptance"]),
        "output_bias": any(f"{stem}.bias" in found for stem in STEMS["output"]),
        **published.revision.fields(published.rope_base, ranks),
    }


def _width(found: Mapping[str, Shape], published: Published) -> int:
    for stem in STEMS["r_norm"]:
        if f"{stem}.weight" in found:
            return _numbers(found[f"{stem}.weight"])
    if "r_k" in found and len(found["r_k"]) > 1:
        return found["r_k"][-1]
    if published.head_dim:
        return published.head_dim
    raise ValueError("the head width is not known: there is no r_norm, no r_k and no head_dim in config.json")


def _tica_fields(found: Mapping[str, Shape]) -> dict[str, Any]:
    width = _numbers(_shape(found, [f"{start}q_norm.weight" for start in TINY]))
    queries = _shape(found, [f"{start}q_proj.weight" for start in TINY])[0]
    keys = _shape(found, [f"{start}k_proj.weight" for start in TINY])[0]
    gate = _shape(found, [f"{start}g2{end}" for start in TINY for end in ("", ".weight")])
    rank = next((size for size in gate if size != queries), queries)
    if queries % width or keys % width:
        raise ValueError(
            f"TICA's {queries} query and {keys} key channels are no multiples of its head width, {width}"
        )
    return {"heads": queries // width, "kv_heads": keys // width, "head_dim": width, "gate_rank": rank}


def _spellings(kind: str, name: str, published: Published) -> list[str]:
    if kind == "tica":
        ends = ("",) if name.endswith("weight") else ("", ".weight")
        return [f"{start}{name}{end}" for start in TINY for end in ends]
    stem, _, last = name.partition(".")
    if stem in STEMS:
        return [f"{spelling}.{last}" for spelling in STEMS[stem]]
    if stem in ("dv1", "dv2"):
        stem = _value_lora(published)[int(stem[-1]) - 1]
    return [stem, f"{stem}.weight"]


def _value_lora(published: Published) -> tuple[str, str]:
    """hxa07b and hxa07c call their v-LoRA v1, v2, which are hxa07e's residual."""
    return ("dv1", "dv2") if published.revision.value_residual else ("v1", "v2")


def _match(layer: Layer, found: Mapping[str, Shape], ours: str, wanted: Shape, spellings: list[str]) -> None:
    there = [name for name in spellings if name in found]
    for name in there:
        change = _change(ours, name, found[name], wanted)
        if change is not None:
            layer.sources[ours] = Source((name,), change)
            return
    if there:
        layer.misfits[ours] = there
        shapes = ", ".join(f"{name} {list(found[name])}" for name in there)
        layer.faults.append(f"{ours}: wanted {list(wanted)}, found {shapes}")


def _change(ours: str, name: str, found: Shape, wanted: Shape) -> Change | None:
    """How a tensor becomes ours, None where it does not fit. A square matrix under the name of a linear layer could be
    either way round, and fits neither."""
    turned = name.endswith(".weight") and not ours.endswith("weight") and len(wanted) == 2
    if found == wanted:
        return None if turned and wanted[0] == wanted[1] else "none"
    if turned and found == wanted[::-1]:
        return "transpose"
    squeezed = tuple(size for size in found if size != 1)
    flat = len(wanted) == 1 or ours.endswith("r_k")
    if _numbers(found) == _numbers(wanted) and (flat or squeezed == wanted):
        return "reshape"
    return None


def _match_by_shape(layer: Layer, found: Mapping[str, Shape], mixers: list[Mixer]) -> None:
    """What no spelling found: the one tensor left of its shape, where no other wanted tensor has that shape."""
    used = {name for source in layer.sources.values() for name in source.names}
    settled = {*layer.sources, *layer.misfits}
    open_shapes = {
        f"{mixer.kind}.{name}": tuple(tensor.shape)
        for mixer in mixers
        for name, tensor in mixer.state_dict().items()
        if f"{mixer.kind}.{name}" not in settled
    }
    rest = {name: shape for name, shape in found.items() if name not in used and name not in METADATA}
    for ours, shape in open_shapes.items():
        same = [name for name, other in rest.items() if other == shape]
        if len(same) == 1 and list(open_shapes.values()).count(shape) == 1:
            layer.sources[ours] = Source((same[0],))
            layer.notes.append(f"{same[0]} is read as {ours}: by its shape alone, {list(shape)}")
        else:
            listed = f"; of this shape are {', '.join(same)}" if same else ""
            layer.faults.append(f"{ours}: wanted {list(shape)}, not found{listed}")


def _explain_the_rest(layer: Layer, found: Mapping[str, Shape], published: Published, first: bool) -> None:
    used = {name for source in layer.sources.values() for name in source.names}
    used |= {name for names in layer.misfits.values() for name in names}
    for name in found:
        stem = name.removesuffix(".weight").removesuffix(".bias")
        if name in used:
            continue
        if name in METADATA:
            layer.left[name] = "what training noted"
        elif any(stem in stems[1:] for stems in STEMS.values()):
            layer.left[name] = "the teacher's own, beside the recurrence's"
        elif first and stem in ("v0", "v1", "v2", "k0", "k1", "k2") and published.revision.value_residual:
            layer.left[name] = "the first recurrent layer mixes nothing in"
        elif stem in ("k1", "k2") and published.revision.name in ("hxa07b", "hxa07c"):
            layer.left[name] = f"declared and not used by {published.revision.name}"
        else:
            layer.faults.append(f"{name} {list(found[name])} belongs to nothing in {published.revision.name}")


def _tiny(found: Mapping[str, Shape]) -> list[str]:
    return [name for name in found if name.startswith(TINY)]


def _named(stem: str) -> list[str]:
    return [f"{spelling}.weight" for spelling in STEMS[stem]]


def _shape(found: Mapping[str, Shape], names: Iterable[str]) -> Shape:
    names = list(names)
    for name in names:
        if name in found:
            return found[name]
    raise ValueError(f"{names[0]} is missing (also looked for: {', '.join(names[1:])})")


def _rank(found: Mapping[str, Shape], name: str, inputs: int) -> int:
    """The other side of a matrix that has one side of `inputs`; 0 where there is none."""
    for spelling in (name, f"{name}.weight"):
        shape = tuple(size for size in found.get(spelling, ()) if size != 1)
        if len(shape) == 2 and inputs in shape:
            return shape[1] if shape[0] == inputs else shape[0]
    return 0


def _numbers(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
