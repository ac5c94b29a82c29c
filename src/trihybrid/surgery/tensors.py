"""What became of every tensor of a teacher, and where every tensor of its student comes from."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

TOWERS = "towers"
"""Folder beside a student's weights with the teacher's towers for images and sound: their tensors under their published
names in `model.safetensors`, the published `config.json`, and the files of the processor."""


@dataclass(frozen=True)
class TensorReport:
    """One conversion, tensor by tensor.

    Attributes:
        copied: number of the teacher's tensors that are the student's, byte for byte.
        made: the student's tensors that were made from the teacher's.
        fresh: the student's tensors that nothing of the teacher fills: they are drawn, or have a start of their own.
        carried: names of the towers' tensors that were carried along.
        left_out: names of those that were left out.
        unused: the teacher's tensors that nothing was made from, by their published names.
    """

    copied: int
    made: list[str]
    fresh: list[str]
    carried: list[str]
    left_out: list[str]
    unused: list[str]

    def lines(self) -> list[str]:
        """The report in words, names that differ by numbers only as one."""
        found = [
            f"{self.copied:,} tensors copied byte for byte, {len(self.made):,} made from the teacher's",
            f"not filled by the teacher, {len(self.fresh):,}: {folded(self.fresh)}",
            f"not used, {len(self.unused):,}: {folded(self.unused)}",
        ]
        if self.carried:
            found.append(f"carried along in {TOWERS}/, {len(self.carried):,}: {_towers(self.carried)}")
        if self.left_out:
            found.append(f"left out, {len(self.left_out):,}: {_towers(self.left_out)}")
        return found


def folded(names: Iterable[str]) -> str:
    """Names with * for every number in them, each with its count; "none" where there is no name."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none"


def _towers(names: Iterable[str]) -> str:
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{name}.* ({count:,})" for name, count in sorted(counts.items()))
