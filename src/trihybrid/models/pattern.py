"""The layout of a model: which mixers stand in which slot.

A pattern is a string of letters and a legend. `"SSSSR * 7"` with `{"S": "sliding", "R": ["rwkv7", "tica"]}` is 35
slots; mixers in one slot add up.
"""

import re
from dataclasses import dataclass, field
from typing import Any

KINDS = ("full", "sliding", "rwkv7", "tica")
RECURRENT = ("rwkv7",)
GROWING = ("full", "tica")

LegendEntry = str | list[str] | dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One layer's mixers.

    Attributes:
        mixers: kinds in the order in which they are added.
        donors: mixer kind -> index of the earlier slot whose keys and values it reads.
    """

    mixers: tuple[str, ...]
    donors: dict[str, int] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        """Whether the slot holds mixers of ours instead of the teacher's attention."""
        return not set(self.mixers) <= {"full", "sliding"}

    @property
    def grows(self) -> bool:
        """Whether the slot stores keys and values of every token."""
        return any(kind in GROWING and kind not in self.donors for kind in self.mixers)

    def as_dict(self) -> dict[str, Any]:
        return {"mixers": list(self.mixers), "donors": dict(self.donors)}

    @classmethod
    def from_dict(cls, slot: dict[str, Any]) -> "Slot":
        return cls(
            tuple(slot["mixers"]), {kind: int(index) for kind, index in slot.get("donors", {}).items()}
        )


def parse_pattern(pattern: str, legend: dict[str, LegendEntry], layers: int) -> list[Slot]:
    """Slots of a model of `layers` layers.

    Raises:
        ValueError: unreadable pattern, letter that is not in the legend, mixer that does not exist, two mixers of one
            kind in a slot, or a pattern of another length.
    """
    groups = re.findall(r"([A-Za-z]+)\s*(?:\*\s*(\d+))?", pattern)
    rest = re.sub(r"([A-Za-z]+)\s*(?:\*\s*(\d+))?", "", pattern).strip()
    if rest or not groups:
        raise ValueError(
            f'pattern "{pattern}": cannot read "{rest or pattern}"; write letters and repeats, as "SSSSR * 7"'
        )
    letters = "".join(letters * int(repeats or 1) for letters, repeats in groups)
    if len(letters) != layers:
        raise ValueError(f'pattern "{pattern}" has {len(letters)} slots, the model has {layers} layers')
    return [Slot(_mixers(letter, legend)) for letter in letters]


def _mixers(letter: str, legend: dict[str, LegendEntry]) -> tuple[str, ...]:
    if letter not in legend:
        raise ValueError(f'pattern letter "{letter}" is not in the legend {sorted(legend)}')
    entry = legend[letter]
    if isinstance(entry, dict):
        if set(entry) != {"mixer"}:
            raise ValueError(
                f'legend "{letter}" has the options {sorted(entry)}; a slot takes "mixer" and no other'
            )
        entry = entry["mixer"]
    kinds = (entry,) if isinstance(entry, str) else tuple(entry)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f'legend "{letter}": no mixer "{kind}"; choose from {list(KINDS)}')
    if len(set(kinds)) != len(kinds) or not kinds:
        raise ValueError(f'legend "{letter}": {list(kinds)} must name each mixer once')
    if len(kinds) > 1 and set(kinds) & {"full", "sliding"}:
        raise ValueError(
            f'legend "{letter}": {list(kinds)} adds to a retained attention; add tica to rwkv7 only'
        )
    return kinds
