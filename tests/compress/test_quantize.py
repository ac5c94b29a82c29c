"""A model as integers: what is stored is what was chosen, roles decide, GPTQ helps the model and a limit is kept."""

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from trihybrid.compress.quantize import (
    SEARCHED_SHARES,
    Stored,
    quantise_model,
    quantise_to_limit,
    searched_scales,
)
from trihybrid.compress.section import CompressSection
from trihybrid.compress.tensors import PlainTensor, QuantisedTensor
from trihybrid.mixers.span import Span, contiguous
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.compact.section import CompactSection
from trihybrid.ops.fake_quantize import fake_quantize, row_scales, storable_scales

SECTION = CompactSection(
    hidden_size=32,
    pattern="TWRF",
    heads=2,
    kv_heads=1,
    head_dim=16,
    bigram_buckets=64,
    bigram_width=16,
    value_embedding_layers=[3],
    rwkv7={
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "decay_rank": 8,
        "iclr_rank": 8,
        "gate_rank": 8,
    },
)
PLAIN = CompressSection(gptq=False, small_tensor_elements=256)


@pytest.fixture(scope="module")
def model() -> CompactModel:
    torch.manual_seed(0)
    model = CompactModel(SECTION, 60)
    model.initialise()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def text(count: int = 12) -> Iterable[tuple[Tensor, Span]]:
    """Tokens that come in runs, so that neighbouring inputs are alike."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        steps = torch.randint(-2, 3, (4, 24), generator=generator).cumsum(1)
        yield (steps + torch.randint(60, (4, 1), generator=generator)) % 60, contiguous(4, 24)


def read_back(tensors: list[Stored]) -> dict[str, Tensor]:
    return {
        tensor.name: tensor.dequantised() if isinstance(tensor, QuantisedTensor) else tensor.values.float()
        for tensor in tensors
    }


def entropy_bytes(tensors: list[Stored]) -> int:
    """What an ideal coder of each tensor's integers would need."""
    total = 0.0
    for tensor in tensors:
        if isinstance(tensor, PlainTensor):
            total += tensor.values.nbytes
        else:
            counts = torch.bincount(tensor.integers_RC.flatten().long() + 128)
            share = counts[counts > 0] / tensor.integers_RC.numel()
            total += -(share * share.log2()).sum().item() * tensor.integers_RC.numel() / 8
            total += tensor.scales_R.nbytes
    return math.ceil(total)


def test_every_parameter_is_stored_once_by_its_role(model: CompactModel) -> None:
    tensors, roles = quantise_model(model, PLAIN, None), model.roles()
    assert [tensor.name for tensor in tensors] == [name for name, _ in model.named_parameters()]
    kinds: dict[str, set[int]] = {role: set() for role in roles.values()}
    for tensor, parameter in zip(tensors, model.parameters(), strict=True):
        if isinstance(tensor, QuantisedTensor):
            assert parameter.numel() >= 256
            kinds[roles[tensor.name]].add(tensor.bits)
        else:
            assert tensor.values.dtype == torch.float16
            assert parameter.numel() < 256 or roles[tensor.name] in ("vector", "decay")
    assert kinds == {"matrix": {6}, "embedding": {8}, "lowrank": {8}, "decay": set(), "vector": set()}


@pytest.mark.parametrize("clip", [None, 6.0])
def test_what_is_stored_is_what_training_saw(model: CompactModel, clip: float | None) -> None:
    section = PLAIN.model_copy(update={"clip": clip})
    for tensor, parameter in zip(quantise_model(model, section, None), model.parameters(), strict=True):
        if isinstance(tensor, QuantisedTensor):
            seen = fake_quantize(parameter, tensor.bits, clip, None)
            torch.testing.assert_close(tensor.dequantised(), seen, rtol=3e-7, atol=0.0)
        else:
            assert torch.equal(tensor.values, parameter.half())


def test_quantising_again_what_was_read_back_changes_nothing(model: CompactModel) -> None:
    first = quantise_model(model, PLAIN, None)
    values = read_back(first)
    again = CompactModel(SECTION, 60)
    again.load_state_dict(values)
    second = read_back(quantise_model(again, PLAIN, None))
    # The largest integer of a row may be the 32nd below zero or a clipped one; steps then differ by a part in 31.
    for tensor in first:
        if isinstance(tensor, PlainTensor):
            assert torch.equal(second[tensor.name], values[tensor.name])
        else:
            error = (second[tensor.name] - values[tensor.name]).abs()
            assert (error <= 0.51 * tensor.scales_R.float()[:, None]).all()


def test_the_model_is_left_as_it_was(model: CompactModel) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantise_model(model, CompressSection(small_tensor_elements=256), text)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_gptq_brings_the_models_outputs_nearer(model: CompactModel) -> None:
    """On text that calibration did not see, with 5 bits: the squared error of the logits falls to under 0.8 of it."""
    tokens, span = list(text(20))[-1]

    def error(section: CompressSection) -> float:
        student = CompactModel(SECTION, 60)
        student.load_state_dict(read_back(quantise_model(model, section, text)))
        with torch.no_grad():
            difference = student.logits(student.hidden(tokens, span)[0]) - model.logits(
                model.hidden(tokens, span)[0]
            )
        return difference.square().sum().item()

    bits = {"matrix": 5, "embedding": 16, "lowrank": 16}
    nearest = error(CompressSection(bits=bits, small_tensor_elements=256, gptq=False))
    ours = error(CompressSection(bits=bits, small_tensor_elements=256))
    assert ours < 0.8 * nearest


def test_search_finds_the_share_of_least_error() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 200, generator=generator)
    weight[:, 0] *= 4
    importance = torch.rand(200, generator=generator)
    importance[0] = 1e-3

    def errors(scale_R: Tensor) -> Tensor:
        scale_R = storable_scales(scale_R)
        value = (weight / scale_R[:, None]).round().clamp(-16, 15) * scale_R[:, None]
        return (weight - value).square() @ importance

    widest = row_scales(weight, 5, None)
    found = errors(searched_scales(weight, 5, importance))
    assert torch.equal(found, torch.stack([errors(share * widest) for share in SEARCHED_SHARES]).amin(0))
    assert (found < errors(widest)).all()


def test_a_search_takes_the_inputs_into_account(model: CompactModel) -> None:
    section = CompressSection(clip="search", small_tensor_elements=256)
    with_inputs = {tensor.name: tensor for tensor in quantise_model(model, section, text)}
    without = {t.name: t for t in quantise_model(model, section.model_copy(update={"gptq": False}), None)}
    name = "blocks.0.mlp.up.weight"
    assert not torch.equal(with_inputs[name].scales_R, without[name].scales_R)
    assert torch.equal(with_inputs["front.tokens"].scales_R, without["front.tokens"].scales_R)


def test_a_limit_is_kept_by_raising_the_clip(model: CompactModel) -> None:
    asked: list[int] = []

    def calibration() -> Iterable[tuple[Tensor, Span]]:
        asked.append(1)
        return text()

    section = CompressSection(small_tensor_elements=256)
    plain = entropy_bytes(quantise_model(model, section, text))
    limit = round(0.8 * plain)
    fit = quantise_to_limit(
        model, section.model_copy(update={"limit_bytes": limit}), calibration, entropy_bytes
    )
    assert fit.bytes == entropy_bytes(fit.tensors) == limit - fit.margin
    assert 0 <= fit.margin < 0.01 * limit
    assert isinstance(fit.clip, float)
    assert len(asked) == 1
    roomy = quantise_to_limit(
        model, section.model_copy(update={"limit_bytes": plain}), calibration, entropy_bytes
    )
    assert (roomy.clip, roomy.margin) == (None, 0)


def test_a_given_clip_is_where_fitting_begins(model: CompactModel) -> None:
    section = CompressSection(small_tensor_elements=256, clip=8.0, gptq=False)
    fit = quantise_to_limit(model, section, None, entropy_bytes)
    assert fit.clip == 8.0
    tight = section.model_copy(update={"limit_bytes": fit.bytes - 500})
    assert quantise_to_limit(model, tight, None, entropy_bytes).clip > 8.0
    coarsest = section.model_copy(update={"clip": 256.0})
    assert quantise_to_limit(model, coarsest, None, entropy_bytes).clip == 256.0
    with pytest.raises(ValueError, match=r"limit_bytes is 10, .*at clip 256"):
        quantise_to_limit(model, coarsest.model_copy(update={"limit_bytes": 10}), None, entropy_bytes)


def test_without_fit_a_limit_is_an_error(model: CompactModel) -> None:
    section = CompressSection(small_tensor_elements=256, gptq=False, fit=False, limit_bytes=1000)
    with pytest.raises(ValueError, match=r"limit_bytes is 1,000.*fit: true"):
        quantise_to_limit(model, section, None, entropy_bytes)


def test_rows_of_zeros_and_of_tiny_numbers_are_stored() -> None:
    model = CompactModel(SECTION, 60)
    model.initialise()
    with torch.no_grad():
        model.front.tokens[0] = 0
        model.front.tokens[1] *= 1e-9
    tensors = {tensor.name: tensor for tensor in quantise_model(model, PLAIN, None)}
    stored = tensors["front.tokens"]
    assert (stored.scales_R > 0).all()
    assert not stored.integers_RC[:2].any()


def test_a_vector_beyond_float16_stays_float32() -> None:
    model = CompactModel(SECTION, 60)
    model.initialise()
    with torch.no_grad():
        model.value_embedding.scales.fill_(1e5)
    values = {tensor.name: tensor for tensor in quantise_model(model, PLAIN, None)}["value_embedding.scales"]
    assert values.values.dtype == torch.float32
    assert values.values.tolist() == [1e5]


def test_a_model_that_diverged_is_refused() -> None:
    model = CompactModel(SECTION, 60)
    model.initialise()
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up.weight holds numbers that are not finite"):
        quantise_model(model, PLAIN, None)


def test_gptq_without_text_is_refused(model: CompactModel) -> None:
    with pytest.raises(ValueError, match="needs calibration text"):
        quantise_model(model, CompressSection(), None)
