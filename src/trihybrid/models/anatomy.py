"""A teacher's anatomy: what plans, surgery, distillation and students must know of it, read off its configuration.

    x = norm(h)    q = n_q(W_q x + b_q)    k = n_k(W_k x + b_k)    v = n_v(W_v x + b_v)      one attention
    h += n_post( W_o softmax(scale * rotate(q) rotate(k)^T) v + b_o )

Families differ in these parts, and in nothing else that another room needs:

| model type | n_q, n_k | n_v | scale | biases | n_post | windows |
|---|---|---|---|---|---|---|
| gemma4_text | x/rms * w | x/rms | 1 | no | yes | by layer, in heads of another width |
| gemma3_text | x/rms * (1 + w) | no | query_pre_attn_scalar^-1/2 | attention_bias | yes | by layer |
| qwen3, qwen3_moe | x/rms * w | no | D^-1/2 | attention_bias | no | by layer; in all or none |
| qwen2 | no | no | D^-1/2 | queries, keys, values | no | by layer |
| llama | no | no | D^-1/2 | attention_bias | no | none |
| mistral | no | no | D^-1/2 | no | no | in all or none |

Sources: the modelling files of transformers. Legend: D channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trihybrid.models.shapes import TeacherConfig

KINDS = {"sliding_attention": "sliding", "full_attention": "full"}
"""transformers' name of an attention's type -> our kind."""
TYPES = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Attention:
    """The attention of one layer.

    Attributes:
        kind: `full` or `sliding`.
        heads, kv_heads, head_dim: query heads, key/value heads, channels of each.
        rotary_pairs: channel pairs (c, c + D/2) of a head that carry a position; the rest match content.
        owner: the layer whose keys and values it reads; its own index where it has its own.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_pairs: int
    owner: int

    @property
    def layer_type(self) -> str:
        """transformers' name of the kind."""
        return TYPES[self.kind]

    @property
    def width(self) -> int:
        """Channels of all query heads: multiply-adds that one query-key pair costs."""
        return self.heads * self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.head_dim


@dataclass(frozen=True)
class Anatomy:
    """What a family says about one of its teachers.

    Attributes:
        attentions: one a layer.
        window: tokens that a sliding attention sees, itself included; None where the teacher has no window.
        norm: how queries and keys are normed a head: not at all, by x/rms * weight, or by x/rms * (1 + weight).
        value_norm: whether values are brought to rms 1 a head.
        keys_are_values: whether global layers have no value projection and take the raw keys.
        score_scale: factor of a query-key product.
        input_bias, output_bias: whether queries, keys and values, and whether outputs have a bias.
        post_norm: name of the layer's norm between attention and residual stream, or None. (In Llama's layers the norm
            called `post_attention_layernorm` is the MLP's own and stands behind the sum.)
        softcap: c of c tanh(logits / c), or None.
        experts: how many experts a layer holds, and how many a token uses; None without a mixture.
    """

    attentions: tuple[Attention, ...]
    window: int | None
    score_scale: float
    norm: Literal["none", "weight", "one_plus_weight"] = "none"
    value_norm: bool = False
    keys_are_values: bool = False
    input_bias: bool = False
    output_bias: bool = False
    post_norm: str | None = None
    softcap: float | None = None
    experts: tuple[int, int] | None = None

    @property
    def kinds(self) -> list[str]:
        """`sliding` or `full` for each layer."""
        return [attention.kind for attention in self.attentions]

    @property
    def owners(self) -> list[int]:
        """For each layer the one whose keys and values it reads, mostly itself."""
        return [attention.owner for attention in self.attentions]

    @property
    def first_sharing_layer(self) -> int:
        """The first layer without keys and values of its own; the number of layers where each has its own."""
        shared = [index for index, owner in enumerate(self.owners) if owner != index]
        return min(shared, default=len(self.attentions))

    @property
    def template(self) -> Attention:
        """The attention that the student's heads are cut from: the first full one, or the first where none is."""
        full = [attention for attention in self.attentions if attention.kind == "full"]
        return (full or list(self.attentions))[0]


def anatomy(base: TeacherConfig) -> Anatomy:
    """The anatomy of a teacher.

    Raises:
        ValueError: a model type that is not in the table; attention in both directions, or of a kind other than full
            and sliding.
    """
    family = _FAMILIES.get(base.model_type)
    if family is None:
        raise ValueError(
            f'model_type is "{base.model_type}"; teachers are {", ".join(sorted(_FAMILIES))}; give one of those'
        )
    return family(base)


def _gemma4(base: TeacherConfig) -> Anatomy:
    _refuse_both_directions(base, base.use_bidirectional_attention == "all")
    kinds = _kinds(base.layer_types)
    first_shared = base.num_hidden_layers - base.num_kv_shared_layers
    shapes = {kind: base.per_layer_config[TYPES[kind]] for kind in dict.fromkeys(kinds)}
    pairs = {
        kind: int(base.rope_parameters[TYPES[kind]].get("partial_rotary_factor", 1.0) * shape.head_dim // 2)
        for kind, shape in shapes.items()
    }
    return Anatomy(
        attentions=tuple(
            Attention(
                kind,
                base.num_attention_heads,
                shapes[kind].num_key_value_heads,
                shapes[kind].head_dim,
                pairs[kind],
                index if index < first_shared else _last(kinds[:first_shared], kind),
            )
            for index, kind in enumerate(kinds)
        ),
        window=base.sliding_window,
        score_scale=1.0,
        norm="weight",
        value_norm=True,
        keys_are_values=base.attention_k_eq_v,
        input_bias=base.attention_bias,
        output_bias=base.attention_bias,
        post_norm="post_attention_layernorm",
        softcap=base.final_logit_softcapping,
        experts=(base.num_experts, base.top_k_experts) if base.enable_moe_block else None,
    )


def _gemma3(base: TeacherConfig) -> Anatomy:
    _refuse_both_directions(base, bool(base.use_bidirectional_attention))
    return Anatomy(
        attentions=_uniform(base, _kinds(base.layer_types)),
        window=base.sliding_window,
        score_scale=base.query_pre_attn_scalar**-0.5,
        norm="one_plus_weight",
        input_bias=base.attention_bias,
        output_bias=base.attention_bias,
        post_norm="post_attention_layernorm",
        softcap=base.final_logit_softcapping,
    )


def _llama(base: TeacherConfig) -> Anatomy:
    return _plain(base, ["full"] * base.num_hidden_layers)


def _mistral(base: TeacherConfig) -> Anatomy:
    return _plain(base, _all_or_none(base))


def _qwen2(base: TeacherConfig) -> Anatomy:
    return replace(_plain(base, _kinds(base.layer_types)), input_bias=True)


def _qwen3(base: TeacherConfig) -> Anatomy:
    return replace(_plain(base, _kinds(base.layer_types)), norm="weight")


def _qwen3_moe(base: TeacherConfig) -> Anatomy:
    experts = base.num_experts, base.num_experts_per_tok
    return replace(_plain(base, _all_or_none(base)), norm="weight", experts=experts)


_FAMILIES: dict[str, Callable[[TeacherConfig], Anatomy]] = {
    "gemma4_text": _gemma4,
    "gemma3_text": _gemma3,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def _kinds(layer_types: Sequence[str]) -> list[str]:
    unknown = sorted(set(layer_types) - set(KINDS))
    if unknown:
        raise ValueError(f"layer_types holds {unknown}; a teacher's attention is {' or '.join(KINDS)}")
    return [KINDS[name] for name in layer_types]


def _all_or_none(base: TeacherConfig) -> list[str]:
    return ["full" if base.sliding_window is None else "sliding"] * base.num_hidden_layers


def _plain(base: TeacherConfig, kinds: list[str]) -> Anatomy:
    """Attention as Llama has it."""
    biased = getattr(base, "attention_bias", False)
    return Anatomy(
        attentions=_uniform(base, kinds),
        window=base.sliding_window if "sliding" in kinds else None,
        score_scale=_width(base) ** -0.5,
        input_bias=biased,
        output_bias=biased,
    )


def _width(base: TeacherConfig) -> int:
    return getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads


def _uniform(base: TeacherConfig, kinds: list[str]) -> tuple[Attention, ...]:
    """Attentions of one size that turn all channels of a head; each has keys and values of its own."""
    width = _width(base)
    sizes = base.num_attention_heads, base.num_key_value_heads, width
    return tuple(Attention(kind, *sizes, width // 2, index) for index, kind in enumerate(kinds))


def _last(kinds: list[str], kind: str) -> int:
    return max(index for index, other in enumerate(kinds) if other == kind)


def _refuse_both_directions(base: TeacherConfig, both: bool) -> None:
    if both:
        raise ValueError(
            f"use_bidirectional_attention is {base.use_bidirectional_attention!r}: tokens see later ones; a teacher is "
            "causal, set it to false (Gemma 4: null)"
        )
