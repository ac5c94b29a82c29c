"""The layout of a model: which mixers stand in which slot.

A pattern is a string of letters and a legend. `"SSSSR * 7"` with `{"S": "sliding", "R": ["rwkv7", "tica"]}` is 35
slots; mixers in one slot add up. A legend entry may carry options: `X: {mixer: sliding, window: 128, xsa: true}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("full", "sliding", "rwkv7", "tica", "token_shift")
CONVERSION_KINDS = ("full", "sliding", "rwkv7", "tica")
GROWING = ("full", "tica")
MOST_SLOTS = 4096
"""More layers than any model has: a slip in a repeat is told apart from a layout before it fills the memory."""

LegendEntry = str | list[str] | dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One layer's mixers.

    Attributes:
        mixers: kinds in the order in which they are added.
        donors: mixer kind -> index of the earlier slot whose keys and values it reads.
        options: what the legend says beside the mixers.
    """

    mixers: tuple[str, ...]
    donors: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        """Whether the slot holds mixers of ours instead of the teacher's attention."""
        return not set(self.mixers) <= {"full", "sliding"}

    @property
    def grows(self) -> bool:
        """Whether the slot stores keys and values of every token."""
        return any(kind in GROWING and kind not in self.donors for kind in self.mixers)

    @property
    def window(self) -> int | None:
        """Tokens that the slot's sliding attention sees, where it says so itself. In a student it does where the
        teacher's layer was a full one, which keeps its weights."""
        return self.options.get("window") if self.mixers == ("sliding",) else None

    def as_dict(self) -> dict[str, Any]:
        return {"mixers": list(self.mixers), "donors": dict(self.donors)} | (
            {"window": self.window} if self.window else {}
        )

    @classmethod
    def from_dict(cls, slot: dict[str, Any]) -> "Slot":
        """A slot from what `as_dict` gave.

        Raises:
            ValueError: something else.
        """
        if not _is_slot(slot):
            raise ValueError(
                f'slots holds {slot!r:.80}; a slot is an object as {{"mixers": ["rwkv7"], "donors": {{"rwkv7": 4}}}}, '
                "with a window where it slides"
            )
        return cls(
            tuple(slot["mixers"]),
            {kind: int(index) for kind, index in slot.get("donors", {}).items()},
            {"window": slot["window"]} if "window" in slot else {},
        )


def _is_slot(slot: Any) -> bool:
    if not isinstance(slot, dict):
        return False
    mixers, donors = slot.get("mixers"), slot.get("donors", {})
    named = isinstance(mixers, list | tuple) and all(isinstance(m, str) for m in mixers)
    return named and isinstance(donors, dict) and all(isinstance(index, int) for index in donors.values())


def parse_pattern(pattern: str, legend: Mapping[str, LegendEntry], layers: int) -> list[Slot]:
    """Slots of a teacher of `layers` layers: a retained attention alone (a sliding one may have a `window`), or mixers
    of ours.

    Raises:
        ValueError: unreadable pattern, letter that is not in the legend, mixer that does not exist, two mixers of one
            kind in a slot, mixers added to a retained attention, other options, or a pattern of another length.
    """
    slots = read_slots(pattern, legend, CONVERSION_KINDS, {"sliding": frozenset({"window"})})
    if len(slots) != layers:
        raise ValueError(f'pattern "{pattern}" has {len(slots)} slots, the model has {layers} layers')
    for slot in slots:
        if len(slot.mixers) > 1 and set(slot.mixers) & {"full", "sliding"}:
            raise ValueError(
                f"pattern: {list(slot.mixers)} adds to a retained attention; add tica to rwkv7 only"
            )
    return slots


def read_slots(
    pattern: str,
    legend: Mapping[str, LegendEntry],
    kinds: tuple[str, ...],
    options: Mapping[str, frozenset[str]],
) -> list[Slot]:
    """One slot for each letter of a pattern.

    Args:
        pattern: letters and repeats.
        legend: letter -> kind, kinds, or a mapping of `mixer` and options.
        kinds: the mixers that may stand in it.
        options: mixer kind -> names of the options that it takes.

    Raises:
        ValueError: unreadable pattern, more than `MOST_SLOTS` slots, letter that is not in the legend, mixer or option
            that does not exist, or two mixers of one kind in a slot.
    """
    groups = re.findall(r"([A-Za-z]+)\s*(?:\*\s*(\d+))?", pattern)
    rest = re.sub(r"([A-Za-z]+)\s*(?:\*\s*(\d+))?", "", pattern).strip()
    if rest or not groups:
        raise ValueError(
            f'pattern "{pattern}": cannot read "{rest or pattern}"; write letters and repeats, as "SSSSR * 7"'
        )
    count = sum(len(letters) * int(repeats or 1) for letters, repeats in groups)
    if count > MOST_SLOTS:
        raise ValueError(f'pattern "{pattern}" has {count} slots; at most {MOST_SLOTS} are read')
    letters = "".join(letters * int(repeats or 1) for letters, repeats in groups)
    return [_slot(letter, legend, kinds, options) for letter in letters]


def _slot(
    letter: str,
    legend: Mapping[str, LegendEntry],
    kinds: tuple[str, ...],
    options: Mapping[str, frozenset[str]],
) -> Slot:
    if letter not in legend:
        raise ValueError(f'pattern letter "{letter}" is not in the legend {sorted(legend)}')
    entry = legend[letter]
    given: dict[str, Any] = {}
    if isinstance(entry, dict):
        given = {name: value for name, value in entry.items() if name != "mixer"}
        if "mixer" not in entry:
            raise ValueError(f'legend "{letter}" has the options {sorted(entry)} and no "mixer"; name one')
        entry = entry["mixer"]
    named = (entry,) if isinstance(entry, str) else tuple(entry)
    for kind in named:
        if kind not in kinds:
            raise ValueError(f'legend "{letter}": no mixer "{kind}"; choose from {list(kinds)}')
    if len(set(named)) != len(named) or not named:
        raise ValueError(f'legend "{letter}": {list(named)} must name each mixer once')
    allowed = frozenset[str]().union(*(options.get(kind, frozenset()) for kind in named))
    if not set(given) <= allowed:
        raise ValueError(
            f'legend "{letter}" has the options {sorted(given)}; {" and ".join(named)} '
            + (f'takes "mixer" and {sorted(allowed)}' if allowed else 'takes "mixer" and no other')
        )
    return Slot(named, options=given)
