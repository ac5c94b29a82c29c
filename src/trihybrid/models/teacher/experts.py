"""Experts that a file holds one by one, and a model in one tensor.

    gate_up_proj [E, 2 I, C]: for each expert its gate_proj [I, C], then its up_proj [I, C];   down_proj [E, C, I]

Source: transformers' conversion of `qwen2_moe` (`conversion_mapping.py`), which the `qwen3_moe` files need too.
"""

import re


def single_experts(name: str, experts: int) -> tuple[str, ...]:
    """Names of the tensors that, one after the other, are the tensor `name` of so many experts; none where `name` is
    no such tensor."""
    found = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if found is None:
        return ()
    parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
    return tuple(f"{found[1]}.{expert}.{part}.weight" for expert in range(experts) for part in parts)
