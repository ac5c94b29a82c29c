"""The published revisions of the hxa07 family, and how each differs from hxa07i.

Sources: the training code (OpenMOSE/RWKVInside) for hxa079 to hxa07C; the llama.cpp graphs of the same author for
hxa07D, hxa07E and hxa07i. `options` has the formulas.

| revision | residuals     | rope             | key scale | v-LoRA | LoRA input | bonus |
|----------|---------------|------------------|-----------|--------|------------|-------|
| hxa079   | values, keys  | as configured    | 1 - l + a | -      | x          | yes   |
| hxa07a   | -             | as configured    | 1 - l + a | -      | x          | -     |
| hxa07b   | -             | as configured    | 1 - l + a | 0.2    | x          | -     |
| hxa07c   | -             | as configured    | 1 - W + a | 0.2    | x          | -     |
| hxa07d   | values, keys  | always           | 1 - W + a | -      | x          | yes   |
| hxa07e   | values        | as configured    | 1 - W + a | 0.5    | r          | -     |
| hxa07i   | -             | never            | 1 - W + a | -      | x          | -     |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Revision:
    """What of a mixer's options a revision fixes; sizes, ranks, norms and biases are a checkpoint's own.

    Attributes:
        rope: whether r and k are rotated: `always`, `never`, or `configured` (a published configuration's
            `nope_in_rwkv` says no).
        value_lora_factor: factor of the v-LoRA; None for a revision without one.
        key_scale, lora_input, bonus: as in `Rwkv7Options`.
        value_residual, key_residual: whether later slots mix in the first one's.
    """

    name: str
    value_residual: bool = False
    key_residual: bool = False
    rope: Literal["always", "never", "configured"] = "configured"
    key_scale: Literal["decay", "log_log_decay"] = "decay"
    value_lora_factor: float | None = None
    lora_input: Literal["input", "receptance"] = "input"
    bonus: bool = False

    def needs(self) -> list[str]:
        """The ranks that a mixer of this revision has beside those of decay, iclr and gate."""
        wanted = {
            "value_residual_rank": self.value_residual,
            "key_residual_rank": self.key_residual,
            "value_lora_rank": self.value_lora_factor is not None,
        }
        return [name for name, needed in wanted.items() if needed]

    def fields(self, rope_base: float | None, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The fields of `Rwkv7Options` that this revision sets.

        Args:
            rope_base: of the positions; None for none.
            ranks: those that `needs` names.

        Raises:
            ValueError: positions missing where the revision always has them, or there where it never has, or a rank
                that is missing.
        """
        if (self.rope == "always" and rope_base is None) or (self.rope == "never" and rope_base is not None):
            raise ValueError(f"{self.name} {self.rope} turns r and k by position; rope_base is {rope_base}")
        missing = [name for name in self.needs() if not ranks.get(name)]
        if missing:
            raise ValueError(f"{self.name} has {', '.join(missing)}, of which no rank is known")
        factor = {} if self.value_lora_factor is None else {"value_lora_factor": self.value_lora_factor}
        return {
            "rope_base": rope_base,
            "key_scale": self.key_scale,
            "lora_input": self.lora_input,
            "bonus": self.bonus,
            **{name: ranks[name] for name in self.needs()},
            **factor,
        }


REVISIONS = {
    revision.name: revision
    for revision in (
        Revision("hxa079", value_residual=True, key_residual=True, key_scale="log_log_decay", bonus=True),
        Revision("hxa07a", key_scale="log_log_decay"),
        Revision("hxa07b", key_scale="log_log_decay", value_lora_factor=0.2),
        Revision("hxa07c", value_lora_factor=0.2),
        Revision("hxa07d", value_residual=True, key_residual=True, rope="always", bonus=True),
        Revision("hxa07e", value_residual=True, value_lora_factor=0.5, lora_input="receptance"),
        Revision("hxa07i", rope="never"),
    )
}
"""Revision by name."""
