"""What the kernels of a step do not take, by name and with a cure."""

from typing import Any

from torch import nn

from trihybrid.infer.network import Network
from trihybrid.infer.network.attention import RetainedAttention
from trihybrid.infer.network.mixers import SlotMixers
from trihybrid.mixers.contract import Projection
from trihybrid.ops import attention_step, decode_product, recurrence_step

ACTIVATIONS = {"GELUTanh": "gelu", "SiLUActivation": "silu", "SiLU": "silu"}
"""Class of an activation -> our name of it."""
MAPS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "per_layer_input_gate",
    "per_layer_projection", "receptance", "key", "value", "output",
}  # fmt: skip
"""Names of the linear maps of a layer, whose weights the kernels read past their modules."""


def refusal(network: Network) -> str | None:
    """Why a network's steps cannot be run by the kernels, or None. Where they cannot, `fused-graph` takes it."""
    if network.has_experts:
        return "its layers choose experts"
    width = network.decoder.embed_tokens.weight.shape[1]
    if width > decode_product.WIDEST:
        return f"hidden_size is {width}; at most {decode_product.WIDEST}"
    for index, layer in enumerate(network.layers):
        reason = _of_layer(layer) or _of_maps(layer.module)
        if reason is not None:
            return f"layer {index}: {reason}"
    return _of_map("lm_head", network.model.lm_head)


def _of_layer(layer: Any) -> str | None:
    mlp, mix = layer.module.mlp, layer.mix
    if not hasattr(mlp, "gate_proj"):
        return "its MLP has no gate"
    name = type(mlp.act_fn).__name__
    if name not in ACTIVATIONS:
        return f"activation is {name}; {', '.join(ACTIVATIONS)} are taken"
    if isinstance(mix, RetainedAttention):
        return _of_attention(mix)
    assert isinstance(mix, SlotMixers)
    return _of_rwkv7(mix) or _of_tica(mix)


def _of_attention(mix: RetainedAttention) -> str | None:
    if mix.v_norm is not None and mix.v_norm.weight is not None:
        return "the norm of its values has a weight"
    if mix.width > attention_step.WIDEST:
        return f"head_dim is {mix.width}; at most {attention_step.WIDEST}"
    return _of_groups("", mix.module.q_proj.weight.shape[0] // mix.width, mix.store.stored.keys.shape[2])


def _of_tica(mix: SlotMixers) -> str | None:
    if mix.tica is None:
        return None
    options = mix.tica.options
    if options.head_dim > attention_step.WIDEST:
        return f"tica.head_dim is {options.head_dim}; at most {attention_step.WIDEST}"
    return _of_groups("tica ", options.heads, options.kv_heads)


def _of_groups(name: str, heads: int, groups: int) -> str | None:
    if heads > attention_step.MOST_REPEATS * groups:
        return f"{name}heads are {heads} on {groups} of keys; at most {attention_step.MOST_REPEATS} on each"
    return None


def _of_rwkv7(mix: SlotMixers) -> str | None:
    if mix.rwkv7 is None:
        return None
    options = mix.rwkv7.options
    if options.head_dim > recurrence_step.WIDEST:
        return f"rwkv7.head_dim is {options.head_dim}; at most {recurrence_step.WIDEST}"
    if mix.rwkv7.donor is not None:
        return f"rwkv7 reads keys and values of layer {mix.rwkv7.donor}"
    if options.rope_base is not None:
        return f"rwkv7.rope_base is {options.rope_base}; null is taken"
    if options.lora_input != "input":
        return f'rwkv7.lora_input is "{options.lora_input}"; "input" is taken'
    for name in ("value_residual_rank", "key_residual_rank", "value_lora_rank"):
        if getattr(options, name):
            return f"rwkv7.{name} is {getattr(options, name)}; 0 is taken"
    return None


def _of_maps(module: nn.Module) -> str | None:
    return next(
        (
            reason
            for name, part in module.named_modules()
            if name.rpartition(".")[2] in MAPS and (reason := _of_map(name, part)) is not None
        ),
        None,
    )


def _of_map(name: str, module: Any) -> str | None:
    """Whether a linear map is anything else than a product with a plain weight."""
    if type(module) not in (nn.Linear, Projection):
        return f"{name} is a {type(module).__name__}; linear maps are taken"
    if type(module.weight) is not nn.Parameter:
        return f"{name} is quantised; weights in full are taken"
    if module.bias is not None:
        return f"{name} has a bias"
    if isinstance(module, Projection) and (module.scale is not None or module.quantiser is not None):
        return f"{name} has a scale or a quantiser of its own"
    return None
