"""The engine is generate: alone and among others, from the start and from a snapshot; it gives back what it took."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import tiny_gemma4
import tiny_teachers
from random_weights import randomise
from small_student import make_student
from trihybrid.infer.engine import PAGE, Engine, EngineFull, Snapshot
from trihybrid.infer.sampling import GREEDY, Sampling

MOST = 12
WARM = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@cache
def build(name: str) -> PreTrainedModel:
    if name == "gemma4":
        model = tiny_gemma4.build_teacher()
        randomise(model)
        return model
    if name == "small":
        return make_student()
    family, layout = name.split()
    return tiny_teachers.build_student(family, layout)


@pytest.fixture(
    scope="module", params=["gemma4", "small", "gemma3 .BWR", "qwen3-experts R.B.", "qwen3-windowed RR.B"]
)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def small() -> PreTrainedModel:
    return build("small")


def prompt(length: int, seed: int = 0, vocabulary: int = 61) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, seed=length) for length in (1, 9, 23, 70, 40)]


def drain(engine: Engine) -> dict[int, list[int]]:
    """New tokens of every sequence, until nothing is left to do."""
    new: dict[int, list[int]] = {}
    while engine.busy:
        for token in engine.step():
            new.setdefault(token.sequence, []).append(token.id)
    return new


def alone(
    model: PreTrainedModel, tokens: list[int], sampling: Sampling = GREEDY, most: int = MOST
) -> list[int]:
    return _alone(model, tuple(tokens), sampling, most)


@cache
def _alone(model: PreTrainedModel, tokens: tuple[int, ...], sampling: Sampling, most: int) -> list[int]:
    engine = Engine(model, chunk=16)
    sequence = engine.add(tokens, most=most, sampling=sampling)
    return drain(engine)[sequence]


def test_greedy_tokens_are_those_of_generate(model: PreTrainedModel) -> None:
    for tokens in PROMPTS:
        # Nothing but the likeliest token, whatever the model's own settings are.
        ids = model.generate(
            torch.tensor([tokens]), max_new_tokens=MOST, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert alone(model, tokens) == ids[0, len(tokens) :].tolist()


def test_a_sequence_is_the_same_among_others_that_join_and_leave(model: PreTrainedModel) -> None:
    settings = [Sampling(), *(Sampling(**(vars(WARM) | {"seed": seed})) for seed in (1, 2)), Sampling(), WARM]
    wanted = [alone(model, tokens, sampling) for tokens, sampling in zip(PROMPTS, settings, strict=True)]
    engine = Engine(model, rows=3, chunk=16)
    waiting = list(range(len(PROMPTS)))
    new: dict[int, list[int]] = {}
    names: dict[int, int] = {}
    while waiting or engine.busy:
        if waiting and engine.free_rows:
            place = waiting.pop(0)
            names[engine.add(PROMPTS[place], most=MOST, sampling=settings[place])] = place
        for token in engine.step():
            new.setdefault(names[token.sequence], []).append(token.id)
            if token.finish is not None:
                engine.remove(token.sequence)
    assert [new[place] for place in range(len(PROMPTS))] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_restored_state_goes_on_to_the_bit(model: PreTrainedModel) -> None:
    engine = Engine(model, rows=2, chunk=16)
    whole = engine.add(PROMPTS[3], most=MOST, sampling=WARM)
    for _ in range(9):
        engine.step()
    early = engine.snapshot(whole)
    tensors = engine.export(early)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == early.bytes
    held = engine.tokens_of(whole)
    assert early.tokens == tuple(held[:-1])
    drain(engine)
    wanted, after = engine.tokens_of(whole), engine.export(engine.snapshot(whole))

    elsewhere = Engine(model, rows=1, chunk=4)
    prefix = elsewhere.restore(early.tokens, tensors)
    sequence = elsewhere.add(held, most=len(wanted) - len(held), sampling=WARM, prefix=prefix)
    drain(elsewhere)
    assert elsewhere.tokens_of(sequence) == wanted
    assert same(elsewhere.export(elsewhere.snapshot(sequence)), after)


def test_forks_go_their_own_ways(model: PreTrainedModel) -> None:
    """Two sequences and their source share full pages and nothing else."""
    engine = Engine(model, rows=3, chunk=16)
    source = engine.add(PROMPTS[3], most=MOST)
    while len(engine.tokens_of(source)) < len(PROMPTS[3]) + 3:
        engine.step()
    base = engine.snapshot(source)
    before = engine.export(base)
    tokens = engine.tokens_of(source)
    forks = [[*tokens, *prompt(20, seed)] for seed in (50, 51)]
    names = [engine.add(fork, most=MOST, prefix=base) for fork in forks]
    new = drain(engine)
    assert [new[name] for name in names] == [alone(model, fork) for fork in forks]
    assert engine.tokens_of(source) == PROMPTS[3] + alone(model, PROMPTS[3])
    assert same(engine.export(base), before)


def test_marks_leave_snapshots_on_the_way(model: PreTrainedModel) -> None:
    engine = Engine(model, rows=2, chunk=16)
    sequence = engine.add(PROMPTS[3], most=1, marks={5, 64, 69})
    drain(engine)
    taken = engine.collect(sequence)
    assert [snapshot.tokens for snapshot in taken] == [tuple(PROMPTS[3][:mark]) for mark in (5, 64, 69)]
    assert engine.collect(sequence) == []
    for snapshot in taken:
        again = engine.add(PROMPTS[3], most=MOST, prefix=snapshot)
        assert drain(engine)[again] == alone(model, PROMPTS[3])
        engine.remove(again)
        engine.release(snapshot)
    engine.remove(sequence)
    assert engine.memory()["used"] == 0


def test_a_stop_token_ends_a_sequence_and_is_handed_out(small: PreTrainedModel) -> None:
    new = alone(small, PROMPTS[1])
    stop = new[4]
    engine = Engine(small)
    engine.add(PROMPTS[1], most=MOST, stops={stop})
    found = [token for _ in range(MOST) for token in engine.step()]
    expected = new[: new.index(stop) + 1]
    assert [token.id for token in found] == expected
    assert [token.finish for token in found] == [None] * (len(expected) - 1) + ["stop"]
    assert not engine.busy


def test_what_is_full_changes_nothing_and_leaving_makes_room(small: PreTrainedModel) -> None:
    engine = Engine(small, rows=2, tokens=4 * PAGE)
    with pytest.raises(
        ValueError, match=r"200 tokens and 58 new ones need 320 places .* the engine has 256 in all"
    ):
        engine.add(prompt(200), most=58)
    first = engine.add(prompt(2 * PAGE), most=1)
    assert (engine.free_rows, engine.free_tokens) == (1, 2 * PAGE)
    with pytest.raises(
        EngineFull, match=r"192 more tokens of keys and values do not fit: 128 of 256 are free"
    ):
        engine.add(prompt(2 * PAGE), most=2)
    assert (engine.free_rows, engine.free_tokens) == (1, 2 * PAGE)
    second = engine.add(prompt(2 * PAGE), most=1)
    with pytest.raises(EngineFull, match="all 2 rows are taken"):
        engine.add([3], most=1)
    assert drain(engine)[second] == alone(small, prompt(2 * PAGE), most=1)
    for sequence in (first, second):
        engine.remove(sequence)
    assert (engine.free_rows, engine.free_tokens) == (2, 4 * PAGE)


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_leaving_at_any_time_disturbs_nobody(small: PreTrainedModel, steps: int) -> None:
    engine = Engine(small, rows=3, chunk=16)
    names = [engine.add(PROMPTS[place], most=MOST) for place in (3, 1, 2)]
    new: dict[int, list[int]] = {name: [] for name in names}
    for count in range(100):
        if count == steps:
            engine.remove(names[0])
        for token in engine.step():
            new[token.sequence].append(token.id)
        if not engine.busy:
            break
    assert [new[name] for name in names[1:]] == [alone(small, PROMPTS[place]) for place in (1, 2)]
    assert engine.free_rows == 1


def test_one_step_works_on_no_more_than_a_chunk_of_prompts(small: PreTrainedModel) -> None:
    """70 tokens in chunks of 16 take five steps, between which the other advances."""
    engine = Engine(small, rows=2, chunk=16)
    quick = engine.add(PROMPTS[1], most=MOST)
    assert [token.sequence for token in engine.step()] == [quick]
    slow = engine.add(PROMPTS[3], most=1)
    order = [[token.sequence for token in engine.step()] for _ in range(5)]
    assert order == [[quick]] * 4 + [[quick, slow]]


def test_memory_is_that_of_the_live_tensors(small: PreTrainedModel) -> None:
    engine = Engine(small, rows=3, tokens=5 * PAGE)
    memory = engine.memory()
    states = engine._states
    lines = [part for ring in states.rings.values() for part in (ring.keys, ring.values)]
    lines += states.matrices.values()
    pages = [part for stored in states.pages.values() for part in (stored.keys, stored.values)]
    assert memory["rows"] == sum(part.numel() * part.element_size() for part in lines)
    assert memory["pages"] == sum(part.numel() * part.element_size() for part in pages)
    # TICA: one head of 8 channels, keys and values, in one layer of its own; float32.
    assert memory["token"] == 2 * 8 * 4
    engine.add(prompt(PAGE), most=2)
    assert engine.memory()["used"] == 2 * PAGE * memory["token"]


def test_pages_grow_where_no_bound_is_given(small: PreTrainedModel) -> None:
    engine = Engine(small, rows=2)
    first = engine.add(PROMPTS[3], most=MOST)
    engine.step()
    before = engine.memory()["pages"]
    engine.add(prompt(12 * PAGE), most=1)
    assert engine.memory()["pages"] > before and engine.free_tokens is None
    drain(engine)
    assert engine.tokens_of(first) == PROMPTS[3] + alone(small, PROMPTS[3])


def test_errors_name_what_is_wrong(small: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="rows is 0; it must be at least 1"):
        Engine(small, rows=0)
    engine = Engine(small, rows=2)
    with pytest.raises(ValueError, match="tokens is empty"):
        engine.add([], most=1)
    with pytest.raises(ValueError, match="tokens span 3 to 61; the vocabulary is 0 to 60"):
        engine.add([3, 61], most=1)
    with pytest.raises(ValueError, match="most is 0"):
        engine.add([3], most=0)
    with pytest.raises(ValueError, match="marks span 2 to 4; they lie in 1 to 3"):
        engine.add([3, 4, 5, 6], most=1, marks={2, 4})
    sequence = engine.add([3, 4, 5], most=1)
    with pytest.raises(ValueError, match="has read none of its tokens yet"):
        engine.snapshot(sequence)
    engine.step()
    snapshot = engine.snapshot(sequence)
    with pytest.raises(ValueError, match="prefix has seen 3 tokens"):
        engine.add([3, 4, 6, 7], most=1, prefix=snapshot)
    with pytest.raises(ValueError, match="not one of this engine, or was released"):
        Engine(small).release(snapshot)
    tensors = engine.export(snapshot)
    with pytest.raises(ValueError, match=r"layers\.1\.pages\.keys is .* this model's state of 2 tokens has"):
        engine.restore(snapshot.tokens[:2], tensors)
    engine.release(snapshot)
    with pytest.raises(ValueError, match="not one of this engine, or was released"):
        engine.release(snapshot)
    engine.remove(sequence)
    for call in (engine.remove, engine.tokens_of, engine.snapshot, engine.collect):
        with pytest.raises(ValueError, match=f"no sequence {sequence} is here"):
            call(sequence)
    assert isinstance(snapshot, Snapshot)


def test_a_token_that_stands_for_an_image_is_refused() -> None:
    model = make_student()
    model.config.image_token_id = 60
    with pytest.raises(ValueError, match="tokens hold 60, the image_token_id: this is the text model alone"):
        Engine(model).add([5, 60, 7], most=1)
