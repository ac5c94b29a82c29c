"""A published checkpoint as a whole: our configuration, and for each of our tensors the one that it comes from.

Nothing is left to chance: a tensor that is missing, has another shape, or belongs to nothing refuses the folder, with
what was wanted and what was found.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trihybrid.export.published.identify import Published, identify
from trihybrid.export.published.names import Layer, Shape, Source, match_layer, recurrent, residual_ranks
from trihybrid.mixers.rwkv7 import Revision
from trihybrid.models.anatomy import KINDS, TYPES, anatomy
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.families import FAMILIES
from trihybrid.models.inventory import wanted_tensors
from trihybrid.models.pattern import Slot
from trihybrid.models.teacher.experts import single_experts
from trihybrid.storage.tensor_files import TensorRange, read_headers, weight_files

SPELLINGS = (
    (re.compile(r"^model\.model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^model\.lm_head\."), "lm_head."),
    (re.compile(r"\.self_attn\.student_attn\."), ".self_attn."),
)
"""Prefixes of training checkpoints and of multimodal models, and what they become."""

OTHER_TOWERS = re.compile(r"(^|\.)(visual|vision_tower|audio_tower|embed_vision|embed_audio|vision_model)\.")
HEAD = "lm_head.weight"
TIED = "tied to the embedding, and equal to it"
SHOWN = 12
"""Faults that an error spells out; the rest are counted."""


@dataclass(frozen=True)
class Reading:
    """A checkpoint that fits.

    Attributes:
        published: what its configuration says.
        config: of the student.
        stored: every tensor in the files, by its published name.
        sources: our name -> the tensor that it comes from.
        left: published name -> why it is not read.
        notes: what a reader should know.
    """

    published: Published
    config: HybridConfig
    stored: dict[str, TensorRange]
    sources: dict[str, Source]
    left: dict[str, str]
    notes: list[str] = field(default_factory=list)


def read_published(folder: Path, fields: dict[str, Any], revision: str | None = None) -> Reading:
    """Match a published folder against the student of ours that it would be; reads no weights.

    Args:
        folder: with safetensors files.
        fields: its `config.json`.
        revision: its revision, where the configuration does not say.

    Raises:
        ValueError: a configuration that is refused (see `identify`), or tensors that do not fit: a report of what was
            wanted, what was found, and what is missing.
    """
    published = identify(fields, revision)
    stored = read_headers(weight_files(folder))
    names = _our_spelling(stored)
    shapes = _layers(names, stored)
    hidden = int(published.base.get("hidden_size", 0))
    if hidden < 1:
        raise ValueError(f"{folder}: config.json gives no hidden_size")
    converted = sorted(index for index, found in shapes.items() if recurrent(found))
    _check_layout(folder, published, list(shapes), converted)
    mixers = _mixers(shapes, published, hidden, converted)
    faults = [f"layer {i}: {fault}" for i, layer in mixers.items() for fault in layer.faults]
    faults += _disagreements(mixers) + _wrong_tica(published, mixers)
    if faults:
        raise _report(folder, published.revision, faults)
    config = _config(published, mixers)
    reading = Reading(published, config, stored, {}, {})
    reading.notes.extend(f"layer {i}: {note}" for i, layer in mixers.items() for note in layer.notes)
    _place(reading, names, mixers, faults)
    if faults:
        raise _report(folder, published.revision, faults)
    dtypes = {stored[name].dtype for source in reading.sources.values() for name in source.names}
    if len(dtypes) > 1:
        reading.notes.append(
            f"weights are stored in {', '.join(sorted(dtypes))}; transformers loads all in one of them"
        )
    return reading


def _our_spelling(stored: Mapping[str, TensorRange]) -> dict[str, str]:
    """Our spelling of every name -> the published one.

    Raises:
        ValueError: two names that would be one.
    """
    names: dict[str, str] = {}
    for published in stored:
        ours = published
        for pattern, replacement in SPELLINGS:
            ours = pattern.sub(replacement, ours)
        if ours in names:
            raise ValueError(
                f"{published} and {names[ours]} are two spellings of one tensor; keep one of them"
            )
        names[ours] = published
    return names


def _layers(names: Mapping[str, str], stored: Mapping[str, TensorRange]) -> dict[int, dict[str, Shape]]:
    """Layer -> shapes of the tensors in its `self_attn`, by the ends of their names."""
    layers: dict[int, dict[str, Shape]] = {}
    for name, published in names.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if found is not None:
            shapes = layers.setdefault(int(found[1]), {})
            if found[2].startswith("self_attn."):
                shapes[found[2].removeprefix("self_attn.")] = stored[published].shape
    return layers


def _check_layout(folder: Path, published: Published, layers: list[int], converted: list[int]) -> None:
    count = published.base.get("num_hidden_layers")
    if not converted or sorted(layers) != list(range(count or 0)):
        raise ValueError(
            f"{folder}: there are tensors of layers {_span(sorted(layers))}, recurrences in {_span(converted)}, and "
            f"config.json says {count} layers; is a file of the checkpoint missing?"
        )
    said = (published.attention_layers or frozenset()) & set(converted)
    if said:
        raise ValueError(
            f"{folder}: transformer_layers lists {sorted(said)}, whose tensors are those of a recurrence; correct "
            "config.json"
        )
    if published.attention_layers is not None:
        silent = set(range(count or 0)) - published.attention_layers - set(converted)
        if silent:
            raise ValueError(
                f"{folder}: layers {sorted(silent)} are not in transformer_layers, but have no tensors of a "
                "recurrence; is a file of the checkpoint missing?"
            )


def _mixers(
    shapes: Mapping[int, Mapping[str, Shape]], published: Published, hidden: int, converted: list[int]
) -> dict[int, Layer]:
    """What was found of every recurrent layer. The ranks of residuals stand in later layers alone."""
    shown = [residual_ranks(shapes[i], published, hidden) for i in (*converted[1:], converted[0])]
    ranks = {name: rank for found in reversed(shown) for name, rank in found.items()}
    if len(converted) == 1:
        ranks = dict.fromkeys(published.revision.needs(), 1) | ranks
    return {i: match_layer(shapes[i], published, hidden, i, converted[0], ranks) for i in converted}


def _disagreements(mixers: Mapping[int, Layer]) -> list[str]:
    """One set of sizes holds for all layers of a model of ours."""
    lines = []
    for kind in ("rwkv7", "tica"):
        seen = {i: fields for i, layer in mixers.items() if (fields := getattr(layer, kind))}
        if not seen:
            continue
        first = min(seen)
        for i, fields in seen.items():
            for name, value in fields.items():
                if value != seen[first].get(name):
                    lines.append(
                        f"layer {i}: {kind}.{name} is {value}, layer {first} has {seen[first].get(name)}"
                    )
    return lines


def _wrong_tica(published: Published, mixers: Mapping[int, Layer]) -> list[str]:
    """Layers that should have TICA and do not, and the other way round."""
    if published.tica_layers is None:
        return []
    found = {i for i, layer in mixers.items() if layer.tica is not None or layer.faults}
    return [
        f"layer {i}: tiny_attention_layers lists it, but it has no tensors of TICA"
        for i in sorted(published.tica_layers - found)
    ] + [
        f"layer {i}: has tensors of TICA, but tiny_attention_layers does not list it"
        for i in sorted(found - published.tica_layers)
        if mixers[i].tica is not None
    ]


def _config(published: Published, mixers: Mapping[int, Layer]) -> HybridConfig:
    """The student's configuration: the teacher's fields as they are, and what stands in each slot."""
    config_class = next(f.student.config_class for f in FAMILIES if f.teacher_type == published.teacher)
    fields = {**published.base, "model_type": published.teacher}
    types = fields.get("layer_types")
    if types is not None:
        # A published configuration may have words of its own for converted layers.
        fields["layer_types"] = [
            TYPES["full"] if i in mixers and kind not in KINDS else kind for i, kind in enumerate(types)
        ]
    base = config_class.teacher_config.from_dict(fields)
    kinds = anatomy(base).kinds
    slots = [Slot((kind,)) for kind in kinds]
    for i, layer in mixers.items():
        slots[i] = Slot(("rwkv7",) if layer.tica is None else ("rwkv7", "tica"))
    last = mixers[max(mixers)]
    return config_class(
        base_config=base.to_dict(),
        slots=[slot.as_dict() for slot in slots],
        rwkv7=last.rwkv7,
        tica=next((layer.tica for layer in mixers.values() if layer.tica is not None), None),
        nope=published.nope and any(not slot.converted for slot in slots),
    )


def _report(folder: Path, revision: Revision, faults: list[str]) -> ValueError:
    shown = "; ".join(faults[:SHOWN])
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return ValueError(f"{folder}: {len(faults)} tensors do not fit {revision.name}: {shown}{more}")


def _span(indices: list[int]) -> str:
    return "none" if not indices else f"{indices[0]} to {indices[-1]} ({len(indices)})"


def _place(
    reading: Reading, names: Mapping[str, str], mixers: Mapping[int, Layer], faults: list[str]
) -> None:
    """Fill a reading's sources and what is left, and list what does not fit."""
    for name, shape in wanted_tensors(reading.config).items():
        mixed = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.((?:rwkv7|tica)\..+)", name)
        if mixed is not None:
            source = mixers[int(mixed[1])].sources[mixed[2]]
            places = tuple(names[f"model.layers.{mixed[1]}.self_attn.{end}"] for end in source.names)
            reading.sources[name] = replace(source, names=places)
            continue
        if name not in names:
            experts = _experts(name, shape, names, reading.stored)
            if experts is None:
                faults.append(f"{name} {list(shape)} is missing")
            else:
                reading.sources[name] = experts
            continue
        found = reading.stored[names[name]].shape
        if found == shape:
            reading.sources[name] = Source((names[name],))
        elif [size for size in found if size != 1] == [size for size in shape if size != 1]:
            reading.sources[name] = Source((names[name],), "reshape")
        else:
            faults.append(f"{name}: wanted {list(shape)}, found {list(found)}")
    used = {place for source in reading.sources.values() for place in source.names}
    misfits = {fault.partition(":")[0] for fault in faults}
    for name, place in names.items():
        if place in used or name in misfits:
            continue
        why = _why_left(reading.config, name, mixers)
        if why is None:
            faults.append(f"{place} {list(reading.stored[place].shape)} belongs to nothing")
        else:
            reading.left[place] = why


def _experts(
    name: str, shape: Shape, names: Mapping[str, str], stored: Mapping[str, TensorRange]
) -> Source | None:
    """Experts that are stored one by one, where ours lie in one tensor, [experts, outputs, inputs]: `gate_up_proj` is
    gate above up. None where they are not all there, in their shapes."""
    wanted = single_experts(name, shape[0])
    if not wanted:
        return None
    pair = len(wanted) == 2 * shape[0]
    single = (shape[1] // (2 if pair else 1), shape[2])
    if not all(part in names and stored[names[part]].shape == single for part in wanted):
        return None
    return Source(tuple(names[part] for part in wanted), "stack pairs" if pair else "stack")


def _why_left(config: HybridConfig, name: str, mixers: Mapping[int, Layer]) -> str | None:
    """Why a tensor is rightly not read, or None."""
    if OTHER_TOWERS.search(name):
        return "of another tower; the student is the text model"
    if name.endswith("inv_freq"):
        return "rotary frequencies, which follow from the configuration"
    if name == HEAD and config.tie_word_embeddings:
        return TIED
    found = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.(.+)", name)
    if found is None:
        return None
    index = int(found[1])
    if index in mixers:
        return mixers[index].left.get(found[2])
    shares = anatomy(config.base()).attentions[index].owner != index
    if shares and found[2].partition(".")[0] in ("k_proj", "v_proj", "k_norm"):
        return "never read: the layer shares the keys and values of another"
    return None
