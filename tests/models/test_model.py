"""The forward pass of a student: chunks, padding, packing, losses, recording, gradients; and the teacher's own numbers.

Legend: B batch, T tokens, D model width, V vocabulary.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4ForCausalLM, StaticCache

from trihybrid.models.cache import CACHE
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM

MakeModel = Callable[..., TrihybridGemma4ForCausalLM]
MakeTeacher = Callable[..., Gemma4ForCausalLM]
Tokens = Callable[..., Tensor]
Difference = Callable[[Tensor, Tensor], float]

FLOAT32 = 1e-5
# Prefill past the window of 8, single tokens, a block longer than the window, single tokens.
CUTS = [0, 13, 14, 15, 30, *range(31, 41)]


def gradients(model: TrihybridGemma4ForCausalLM, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


# The teacher's own numbers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Without per-layer inputs and with shared keys and values, transformers 5.23's own teacher does not run.
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        {"num_kv_shared_layers": 0, "use_double_wide_mlp": False},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
        {"final_logit_softcapping": None},
    ],
    ids=["e2b", "no_per_layer_input", "no_sharing", "keys_are_values", "no_softcap"],
)
def test_unconverted_student_is_the_teacher_to_the_bit(
    teacher: MakeTeacher, student: MakeModel, tokens: Tokens, changes: dict[str, Any]
) -> None:
    original, model = teacher(**changes), student("retained", **changes)
    model.load_state_dict(original.state_dict())
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    packed = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    with torch.no_grad():
        # transformers finds packed documents only where no cache is made.
        for arguments in ({}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False}):
            assert torch.equal(model(ids, **arguments).logits, original(ids, **arguments).logits)
        ours, theirs = model(ids[:, :13]), original(ids[:, :13])
        for index in range(13, 20):
            token = ids[:, index : index + 1]
            ours = model(token, **{CACHE: ours[CACHE]})
            theirs = original(token, **{CACHE: theirs[CACHE]})
            assert torch.equal(ours.logits, theirs.logits)


# Blocks of tokens


@torch.no_grad()
def test_chunks_with_a_cache_are_one_pass(
    student: MakeModel, tokens: Tokens, difference: Difference, layout: str
) -> None:
    model, ids = student(layout), tokens(2, 40)
    whole = model(ids, use_cache=False)
    assert CACHE not in whole
    cache, parts = None, []
    for begin, end in itertools.pairwise(CUTS):
        out = model(ids[:, begin:end], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        parts.append(out.logits)
    assert difference(torch.cat(parts, 1), whole.logits) <= FLOAT32
    assert int(cache.get_seq_length()) == 40


@torch.no_grad()
def test_chunks_with_a_preallocated_cache_are_one_pass(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    model, ids = student(typical_layout), tokens(2, 30)
    cache = StaticCache(config=model.config, max_cache_len=37)
    parts = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 13), (13, 14), (14, 25), (25, 30))]
    assert difference(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= FLOAT32


@torch.no_grad()
def test_later_tokens_change_nothing_earlier(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    model, ids = student(typical_layout), tokens(1, 24)
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 1) % 90 + 3
    before, after = model(ids).logits, model(other).logits
    assert difference(after[:, :15], before[:, :15]) <= FLOAT32
    assert difference(after[:, 15:], before[:, 15:]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("explicit_positions", [False, True])
def test_left_padding_changes_nothing(
    student: MakeModel, tokens: Tokens, difference: Difference, layout: str, explicit_positions: bool
) -> None:
    """In one pass, and when the padded prefix sits in the cache."""
    model, ids = student(layout), tokens(1, 22)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    batch = torch.cat([padded, tokens(1, 28, seed=2)])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0) if explicit_positions else None
    alone = model(ids).logits
    out = model(batch, attention_mask=mask, position_ids=position_ids).logits
    assert difference(out[:1, 6:], alone) <= FLOAT32
    cache, parts = None, []
    for begin, end in ((0, 9), (9, 10), (10, 24), (24, 28)):
        out = model(
            batch[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, begin:end],
            **{CACHE: cache},
        )
        cache = out[CACHE]
        parts.append(out.logits)
    assert difference(torch.cat(parts, 1)[:1, 6:], alone) <= FLOAT32


@torch.no_grad()
def test_padding_longer_than_a_block(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    """A block that holds nothing but padding leaves no trace (and no NaN)."""
    model, ids = student(typical_layout), tokens(1, 12)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 12, dtype=torch.long)], 1)
    first = model(torch.zeros(1, 9, dtype=torch.long), attention_mask=mask[:, :9])
    rest = model(ids, attention_mask=mask, **{CACHE: first[CACHE]})
    assert difference(rest.logits, model(ids).logits) <= FLOAT32


@torch.no_grad()
def test_right_padding_changes_nothing(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    model, ids = student(typical_layout), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    out = model(ids, attention_mask=mask).logits
    assert difference(out[:1, :13], model(ids[:1, :13]).logits) <= FLOAT32
    assert difference(out[1:], model(ids[1:]).logits) <= FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, False], ids=["default_cache", "no_cache"])
def test_packed_documents_are_separate(
    student: MakeModel, tokens: Tokens, difference: Difference, layout: str, use_cache: bool | None
) -> None:
    model, ids, lengths = student(layout), tokens(2, 40), [17, 1, 12, 10]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=position_ids, use_cache=use_cache).logits
    alone = torch.cat([model(document).logits for document in ids.split(lengths, 1)], 1)
    assert difference(packed, alone) <= FLOAT32


@torch.no_grad()
def test_packing_may_differ_from_row_to_row(
    student: MakeModel, tokens: Tokens, difference: Difference
) -> None:
    model, ids = student("tica_everywhere"), tokens(2, 16)
    rows = [torch.cat([torch.arange(5), torch.arange(11)]), torch.cat([torch.arange(9), torch.arange(7)])]
    packed = model(ids, position_ids=torch.stack(rows)).logits
    for row, cut in ((0, 5), (1, 9)):
        alone = torch.cat(
            [model(part).logits for part in (ids[row : row + 1, :cut], ids[row : row + 1, cut:])], 1
        )
        assert difference(packed[row : row + 1], alone) <= FLOAT32


def test_arguments_that_are_refused(student: MakeModel, tokens: Tokens) -> None:
    model, ids = student("tica_everywhere"), tokens(1, 8)
    packed = torch.cat([torch.arange(4), torch.arange(4)])[None]
    mask = torch.ones(1, 8)
    with pytest.raises(ValueError, match="cannot be combined"):
        model(ids, attention_mask=mask, position_ids=packed)
    with pytest.raises(ValueError, match="needs the 2-D mask"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8))
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="the cache already holds 8 tokens"):
        model(ids, position_ids=packed, **{CACHE: model(ids)[CACHE]})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


# Inputs and outputs


@torch.no_grad()
@pytest.mark.parametrize("per_layer", [8, 0])
def test_embeddings_instead_of_ids(student: MakeModel, tokens: Tokens, per_layer: int) -> None:
    model, ids = student("tica_everywhere", hidden_size_per_layer_input=per_layer), tokens(2, 12)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)


@torch.no_grad()
def test_hidden_states_and_last_norm(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    """One entry a layer and the embeddings; the last is after the final norm. Converted layers are recorded too."""
    model, ids = student(typical_layout), tokens(2, 10)
    out = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 10, 32)] * 7
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
    hidden, stream = model.model.prepare(ids)
    for index in range(6):
        assert torch.equal(hidden, out.hidden_states[index])
        hidden = model.model.layer(index, hidden, stream)
    assert torch.equal(model.model.norm(hidden), out.hidden_states[-1])


@torch.no_grad()
def test_a_second_stream_shares_nothing_that_was_published(student: MakeModel, tokens: Tokens) -> None:
    """Two streams in lockstep through one model are two models."""
    model, ids = student("tica_shared"), tokens(1, 10)
    hidden, stream = model.model.prepare(ids)
    twin, forked = -hidden, stream.fork()
    for index in range(6):
        hidden = model.model.layer(index, hidden, stream)
        twin = model.model.layer(index, twin, forked)
    assert torch.equal(model.model.norm(hidden), model.model(ids).last_hidden_state)
    assert not torch.equal(twin, hidden)


@torch.no_grad()
def test_a_teachers_layer_runs_in_a_students_place(
    teacher: MakeTeacher, student: MakeModel, tokens: Tokens
) -> None:
    """All of the teacher's layers, carried by the student's stream, give the teacher's logits."""
    original, model, ids = teacher(), student("tica_everywhere"), tokens(2, 20)
    model.model.load_state_dict(original.model.state_dict(), strict=False)
    hidden, stream = model.model.prepare(ids, layer_types=["full_attention", "sliding_attention"])
    for index, layer in enumerate(original.model.layers):
        hidden = model.model.layer(index, hidden, stream, layer)
    assert torch.equal(original.model.norm(hidden), original.model(ids).last_hidden_state)


@torch.no_grad()
def test_attentions_are_those_of_retained_layers(student: MakeModel, tokens: Tokens) -> None:
    model = student("partial")
    model.set_attn_implementation("eager")
    out = model(tokens(1, 10), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(1, 2, 10, 10)] * 5


@torch.no_grad()
def test_logits_to_keep(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, ids = student(typical_layout), tokens(2, 14)
    whole = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=3).logits, whole[:, -3:], atol=1e-6)
    kept = torch.tensor([0, 7, 13])
    assert torch.allclose(model(ids, logits_to_keep=kept).logits, whole[:, kept], atol=1e-6)


@torch.no_grad()
def test_tuple_instead_of_record(student: MakeModel, tokens: Tokens) -> None:
    model, ids = student("tica_everywhere"), tokens(1, 6)
    out = model(ids, return_dict=False, use_cache=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], model(ids).logits)


def test_loss_is_the_cross_entropy_of_capped_logits(student: MakeModel, tokens: Tokens) -> None:
    model, ids = student("tica_everywhere"), tokens(2, 16)
    model.get_input_embeddings().weight.data *= 40
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    hidden_BTD = model.model(ids).last_hidden_state
    raw_BTV = hidden_BTD @ model.lm_head.weight.T
    assert raw_BTV.abs().max() > 30
    assert out.logits.abs().max() <= 30
    capped_BTV = 30 * torch.tanh(raw_BTV / 30)
    expected = F.cross_entropy(capped_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)


# Attention implementations


@torch.no_grad()
def test_eager_is_sdpa(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    """Chosen after the model was built, too: retained layers and their masks follow, cached and not."""
    model, ids = student(typical_layout), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert model.config._attn_implementation == "sdpa"
    reference = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    retained = [layer for layer in model.model.layers if not isinstance(layer.self_attn, ConvertedSlot)]
    first = model(ids[:, :12], attention_mask=mask[:, :12])
    assert {layer.self_attn.config._attn_implementation for layer in retained} == {"eager"}
    second = model(ids[:, 12:], attention_mask=mask, **{CACHE: first[CACHE]})
    eager = torch.cat([first.logits, second.logits], 1)
    assert difference(eager[0, 5:], reference[0, 5:]) <= FLOAT32
    assert difference(eager[1], reference[1]) <= FLOAT32


# Gradients


def test_every_parameter_gets_its_gradient_with_the_default_cache(
    student: MakeModel, tokens: Tokens, layout: str
) -> None:
    model, ids = student(layout).train(), tokens(2, 12)
    with_cache, without = gradients(model, ids), gradients(model, ids, use_cache=False)
    for name, gradient in without.items():
        assert bool(gradient.any()), name
        assert torch.equal(with_cache[name], gradient), name


def test_checkpointing_is_exact_for_every_parameter(
    student: MakeModel, tokens: Tokens, layout: str, checkpointing: Callable[..., None]
) -> None:
    model, ids = student(layout).train(), tokens(2, 20)
    packed = {"position_ids": torch.cat([torch.arange(8), torch.arange(12)])[None]}
    expected = [gradients(model, ids, use_cache=False, **positions) for positions in ({}, packed)]
    checkpointing(model)
    recomputed = []
    hook = model.model.layers[3].mlp.register_forward_hook(lambda *_: recomputed.append(1))
    actual = [gradients(model, ids, use_cache=False, **positions) for positions in ({}, packed)]
    hook.remove()
    assert len(recomputed) == 4
    for before, after in zip(expected, actual, strict=True):
        for name, gradient in before.items():
            assert torch.equal(after[name], gradient), name


# Number formats


@torch.no_grad()
def test_bfloat16_is_close_and_its_states_stay_float32(
    student: MakeModel, tokens: Tokens, difference: Difference, typical_layout: str
) -> None:
    """The reference has the same rounded weights in float32. Rounding adds up over the layers: the teacher's own
    retained layers already differ by 2e-2 at this size."""
    model, ids = student(typical_layout), tokens(2, 16)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    reference = model(ids).logits
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    out = model(ids[:, :12])
    last = model(ids[:, 12:], **{CACHE: out[CACHE]})
    assert last.logits.dtype == torch.bfloat16
    assert difference(torch.cat([out.logits, last.logits], 1), reference) <= 5e-2
    for slot in last[CACHE].layers:
        states = getattr(slot, "recurrent_states", {})
        assert all(state is None or state.dtype == torch.float32 for state in states.values())
        assert getattr(slot, "keys", None) is None or slot.keys.dtype == torch.bfloat16
