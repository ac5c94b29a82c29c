"""The whole compact model: its formulas, its size, and the laws of a mixer for all of it at once."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiny_compact import ALL, LENGTH, VOCABULARY, WIDE, build, tokens
from trihybrid.mixers.contract import ROLES, Shared
from trihybrid.mixers.span import Span, contiguous, from_lengths, packed, padded
from trihybrid.mixers.state import state_bytes
from trihybrid.models.compact import CompactModel, CompactSection, CompactState
from trihybrid.testing import relative_error


def in_blocks(
    model: CompactModel, tokens_BT: Tensor, spans: list[Span], state: CompactState
) -> tuple[Tensor, CompactState]:
    rows = []
    for span in spans:
        row_BTD, state = model.hidden(tokens_BT[:, span.start : span.start + span.length], span, state)
        rows.append(row_BTD)
    return torch.cat(rows, 1), state


def same_states(states: CompactState, expected: CompactState) -> None:
    own, reference = states.tensors(), expected.tensors()
    assert set(own) == set(reference)
    for name, tensor in reference.items():
        assert relative_error(own[name].double(), tensor.double()) < 1e-10, name


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def by_hand(model: CompactModel, tokens_BT: Tensor) -> Tensor:
    """Rows of one document a row, from front end and mixers, everything between them written out."""
    section, span, shared = model.section, contiguous(*tokens_BT.shape), Shared()
    x_BTD, _ = model.front(tokens_BT, span, None, WIDE)
    extra = model.value_embedding
    if extra is not None:
        rows_BTE = extra.table[tokens_BT] @ extra.output.weight.T
        for place, layer in enumerate(section.value_embedding_layers):
            shared.value_embeddings[layer] = (extra.scales[place] * rows_BTE).unflatten(
                -1, (section.kv_heads, section.head_dim)
            )
    first_BTD, layers, left = x_BTD, len(model.blocks), []
    for index, block in enumerate(model.blocks):
        mirror = layers // 2 - 1 - (index - layers // 2)
        if model.skip_scales is not None and index >= layers // 2 and mirror >= 0:
            x_BTD = x_BTD + model.skip_scales[index - layers // 2] * left[mirror]
        if section.embedding_mix:
            x_BTD = block.embedding_mix[0] * x_BTD + block.embedding_mix[1] * first_BTD
        z_BTD = rms(x_BTD) * block.norm_scale
        for mixer in block.mixers:
            x_BTD = x_BTD + mixer(z_BTD, span, None, shared)[0]
        x_BTD = x_BTD + block.mlp(rms(x_BTD) * block.norm_scale)
        left.append(x_BTD)
    return rms(x_BTD)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skips": "none"},
        {"pattern": "TWF", "value_embedding_layers": [0, 1, 2]},
        {"pattern": "F", "value_embedding_layers": []},
        {"pattern": "FT", "embedding_mix": False, "branch_scales": False, "value_embedding_layers": [0]},
    ],
    ids=lambda changes: str(changes.get("pattern", changes)),
)
def test_formulas(changes: dict[str, Any]) -> None:
    model, tokens_BT = build(**changes), tokens()
    with torch.no_grad():
        hidden_BTD, _ = model.hidden(tokens_BT, contiguous(2, LENGTH))
    assert relative_error(hidden_BTD, by_hand(model, tokens_BT)) < 1e-10


@pytest.mark.parametrize("cap", [30.0, 0.5, None])
def test_head_and_loss(cap: float | None) -> None:
    model, tokens_BT = build(softcap=cap), tokens()
    targets_BT = tokens_BT.roll(-1, 1)
    with torch.no_grad():
        loss = model.loss(tokens_BT, targets_BT, contiguous(2, LENGTH))
        logits_BTV = by_hand(model, tokens_BT) @ model.front.tokens.T
        if cap is not None:
            logits_BTV = cap * torch.tanh(logits_BTV / cap)
        nats = [
            float(torch.exp(row_V).sum().log() - row_V[target])
            for row_V, target in zip(logits_BTV.flatten(0, 1), targets_BT.flatten(), strict=True)
        ]
        assert loss.item() == pytest.approx(sum(nats) / len(nats), rel=1e-10)
        assert relative_error(model(tokens_BT).logits, logits_BTV) < 1e-10


def test_forward_reads_restarting_positions() -> None:
    model, tokens_BT = build(), tokens(1)
    span = from_lengths([5, 1, 8])
    with torch.no_grad():
        logits_BTV = model(tokens_BT, span.positions_BT).logits
        for document in torch.arange(LENGTH).split([5, 1, 8]):
            alone_BTV = model(tokens_BT[:, document]).logits
            assert relative_error(logits_BTV[:, document], alone_BTV) < 1e-10
    with pytest.raises(ValueError, match="use_cache is True; a compact model's states go through `hidden`"):
        model(tokens_BT, use_cache=True)


def test_compute_dtype_of_float32_masters() -> None:
    wide, narrow = build(torch.float32), build(torch.float32)
    narrow.compute_dtype = torch.bfloat16
    with torch.no_grad():
        (x_BTD, _), (reference_BTD, _) = (m.hidden(tokens(), contiguous(2, LENGTH)) for m in (narrow, wide))
        assert x_BTD.dtype == torch.bfloat16 and narrow.logits(x_BTD).dtype == torch.float32
    # Seven layers of rounding.
    assert 0 < relative_error(x_BTD, reference_BTD) < 0.2
    states = narrow.new_state(1, "cpu").tensors()
    assert states["front.row"].dtype == states["blocks.1.0.keys"].dtype == torch.bfloat16
    assert states["blocks.3.0.matrix"].dtype == torch.float32


@pytest.mark.parametrize(
    ("section", "count"),
    [
        (CompactSection(value_embedding_layers=[9, 10]), 26_999_323),
        (
            CompactSection(
                pattern="A*9", bigram_buckets=0, smear=False, value_embedding_layers=[], mlp_ratio=2,
                activation="relu2", skips="unet", rope_dims=64, norm_scale="none",
            ),
            17_059_912,
        ),
    ],
    ids=["seed", "stock"],
)  # fmt: skip
def test_published_parameter_counts(section: CompactSection, count: int) -> None:
    with torch.device("meta"):
        model = CompactModel(section, 1024)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_value_embedding_without_attention_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        build(value_embedding_layers=[0, 2, 3])
    assert "[0, 3] have no attention" in caplog.text


def test_causal() -> None:
    model, tokens_BT = build(), tokens()
    with torch.no_grad():
        before, _ = model.hidden(tokens_BT, contiguous(2, LENGTH))
        for t in (0, 1, 6, LENGTH - 2):
            other_BT = tokens_BT.clone()
            other_BT[:, t] = (other_BT[:, t] + 1) % VOCABULARY
            after, _ = model.hidden(other_BT, contiguous(2, LENGTH))
            assert relative_error(after[:, :t], before[:, :t]) < 1e-10
            assert bool((after[:, t:] != before[:, t:]).any(-1).all())


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=LENGTH))
def test_blocks_are_the_whole(sizes: list[int]) -> None:
    model, tokens_BT, spans, start = build(), tokens(), [], 0
    while start < LENGTH:
        stop = min(LENGTH, start + sizes[len(spans) % len(sizes)])
        spans.append(contiguous(2, stop - start, start))
        start = stop
    with torch.no_grad():
        expected, final = model.hidden(tokens_BT, contiguous(2, LENGTH))
        rows_BTD, state = in_blocks(model, tokens_BT, spans, model.new_state(2, "cpu"))
    assert relative_error(rows_BTD, expected) < 1e-10
    same_states(state, final)


@pytest.mark.parametrize("sizes", [[LENGTH], [5, 2, 7], [1] * LENGTH], ids=len)
def test_packed_is_separate(sizes: list[int]) -> None:
    model, tokens_BT = build(), tokens(1)
    lengths = [4, 1, 6, 3]
    positions_BT = from_lengths(lengths).positions_BT
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    spans = [packed(positions_BT[:, a : a + size], a) for a, size in zip(starts, sizes, strict=True)]
    with torch.no_grad():
        rows_BTD, _ = in_blocks(model, tokens_BT, spans, model.new_state(1, "cpu"))
        separate = [
            model.hidden(tokens_BT[:, document], contiguous(1, len(document)))[0]
            for document in torch.arange(LENGTH).split(lengths)
        ]
    assert relative_error(rows_BTD, torch.cat(separate, 1)) < 1e-10


def test_gradients_of_packed_documents_add_up() -> None:
    model, tokens_BT, lengths = build(), tokens(1), [4, 1, 9]
    targets_BT = tokens_BT.roll(-1, 1)
    parameters = dict(model.named_parameters())

    def gradients(part: Tensor, span: Span) -> list[Tensor]:
        loss = model.loss(tokens_BT[:, part], targets_BT[:, part], span) * len(part)
        return list(torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))

    whole = gradients(torch.arange(LENGTH), from_lengths(lengths))
    parts = [gradients(d, contiguous(1, len(d))) for d in torch.arange(LENGTH).split(lengths)]
    for name, together, *alone in zip(parameters, whole, *parts, strict=True):
        assert together.any(), name
        assert relative_error(together, torch.stack(alone).sum(0)) < 1e-10, name


def test_left_padding_changes_no_real_token() -> None:
    model, tokens_BT = build(), tokens()
    mask_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    mask_BS[0, :5] = False
    with torch.no_grad():
        for block in (LENGTH, 8, 1):
            spans = [padded(mask_BS[:, : a + block], block, a) for a in range(0, LENGTH - block + 1, block)]
            rows_BTD, _ = in_blocks(model, tokens_BT, spans, model.new_state(2, "cpu"))
            seen = rows_BTD.shape[1]
            for row, pad in enumerate((5, 0)):
                alone = tokens_BT[row : row + 1, pad:seen]
                expected, _ = model.hidden(alone, contiguous(1, seen - pad))
                assert relative_error(rows_BTD[row, pad:], expected[0]) < 1e-10
        fresh_BTD, _ = model.hidden(tokens_BT, padded(mask_BS, LENGTH))
        assert (
            relative_error(fresh_BTD[0, 5:], model.hidden(tokens_BT[:1, 5:], contiguous(1, 9))[0][0]) < 1e-10
        )


@pytest.mark.parametrize("dtype", [WIDE, torch.bfloat16])
def test_a_saved_state_continues_to_the_bit(dtype: torch.dtype) -> None:
    model, tokens_BT = build(dtype), tokens()
    with torch.no_grad():
        _, state = model.hidden(tokens_BT[:, :9], contiguous(2, 9))
        data = save({name: tensor.contiguous() for name, tensor in state.tensors().items()})
        restored = model.new_state(1, "cpu").restore(load(data))
        assert (restored.start, type(restored.blocks[4][1])) == (9, type(state.blocks[4][1]))
        rest = contiguous(2, 5, 9)
        (ahead, after), (again, after_again) = (
            model.hidden(tokens_BT[:, 9:], rest, s) for s in (state, restored)
        )
    assert torch.equal(ahead, again)
    for name, tensor in after.tensors().items():
        assert torch.equal(after_again.tensors()[name], tensor), name


def test_states_of_another_model_or_place_are_refused() -> None:
    model, tokens_BT = build(), tokens()
    state = model.new_state(2, "cpu")
    named = state.tensors()
    with pytest.raises(ValueError, match=r"differ from those given by \['front.row'\]"):
        state.restore({name: tensor for name, tensor in named.items() if name != "front.row"})
    with pytest.raises(ValueError, match=r"restore with the model that saved them"):
        build(pattern="TF", value_embedding_layers=[]).new_state(2, "cpu").restore(named)
    with pytest.raises(ValueError, match=r"span.start is 3; the state holds 0 tokens"):
        model.hidden(tokens_BT, contiguous(2, LENGTH, 3), state)
    with pytest.raises(ValueError, match=r"span.start is 1; the state holds 0 tokens"):
        model.hidden(tokens_BT, contiguous(2, LENGTH, 1))
    _, after = model.hidden(tokens_BT, contiguous(2, LENGTH), state)
    with pytest.raises(ValueError, match=r"span.start is 0; the state holds 14 tokens"):
        model.hidden(tokens_BT, contiguous(2, LENGTH), after)


def test_start_is_the_seeds_and_scores_the_vocabulary() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = CompactModel(CompactSection.model_validate(ALL | {"hidden_size": 32}), 200)
        model.initialise()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        models.append(model)
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["front.tokens"], other["front.tokens"])
    tokens_BT = torch.randint(200, (4, 33))
    with torch.no_grad():
        loss = models[0].loss(tokens_BT[:, :-1], tokens_BT[:, 1:], contiguous(4, 32))
    assert loss.item() == pytest.approx(math.log(200), abs=0.1)


def test_uniform_start_leaves_zeros_alone() -> None:
    torch.manual_seed(0)
    model = CompactModel(CompactSection.model_validate(ALL | {"matrix_init": "uniform"}), VOCABULARY)
    model.initialise()
    for name, projection in model.projections().items():
        bound = projection.in_features**-0.5
        top = projection.weight.detach().abs().max().item()
        assert top == 0 or 0.6 * bound < top <= bound, name
    assert model.blocks[0].mixers[0].key.weight.any() and not model.blocks[0].mixers[0].value.weight.any()


def test_copies_are_independent() -> None:
    model, tokens_BT = build(), tokens()
    model.enable_fake_quantise({"matrix": 4}, None)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(tokens_BT).logits
        for parameter in model.parameters():
            parameter.add_(1.0)
        model.set_quantisation(True)
        assert torch.equal(twin(tokens_BT).logits, before)
        twin.set_quantisation(True)
        assert not torch.equal(twin(tokens_BT).logits, before)


def test_every_parameter_has_a_role_and_every_projection_a_name() -> None:
    model = build()
    roles, names = model.roles(), dict(model.named_parameters())
    assert set(roles) == set(names) and set(roles.values()) <= set(ROLES)
    assert roles["front.tokens"] == "embedding" and roles["blocks.3.mixers.0.w0"] == "decay"
    for name, projection in model.projections().items():
        assert names[f"{name}.weight"] is projection.weight
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(model.projections())


@pytest.mark.parametrize("context", [1, 2, 5, LENGTH])
def test_cost_is_what_is_counted(context: int) -> None:
    model, tokens_BT = build(torch.bfloat16), tokens(1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        state = model.new_state(1, "cpu")
        if context > 1:
            _, state = model.hidden(tokens_BT[:, : context - 1], contiguous(1, context - 1), state)
        with FlopCounterMode(display=False) as counter:
            span = contiguous(1, 1, context - 1)
            hidden_BTD, after = model.hidden(tokens_BT[:, context - 1 : context], span, state)
            model.logits(hidden_BTD)
    cost = model.cost(context)
    assert cost.flops == counter.get_total_flops()
    parts = [after.front, *(part for parts in after.blocks for part in parts)]
    assert cost.state_bytes == sum(state_bytes(part) for part in parts)


def test_bytes_read_are_weights_one_row_a_table_and_states() -> None:
    model = build(pattern="TRT", value_embedding_layers=[1], skips="unet")
    tables = model.front.bigrams.numel() + model.value_embedding.table.numel()
    weights = sum(p.numel() for p in model.parameters()) - tables
    # A row of BigramHash, one of the value embedding, one of the embedding (the head reads it all).
    rows = 4 + 3 + 8
    cost = model.cost(9)
    assert cost.bytes_read == 2 * (weights + rows) + cost.state_bytes
