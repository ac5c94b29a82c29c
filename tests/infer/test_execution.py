"""Every way of running a step gives the tokens and states of the plain one."""

import copy
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

import tiny_teachers
from small_student import make_student
from trihybrid.infer import execution
from trihybrid.infer.engine import Engine
from trihybrid.infer.execution import CompiledDecoder, GraphDecoder, by_rows, table
from trihybrid.infer.network import Network
from trihybrid.infer.network.parts import Fusion
from trihybrid.testing import relative_error

PROMPTS = [[(place * step) % 57 + 3 for place in range(length)] for step, length in ((5, 130), (7, 9))]


def write(engine: Engine, most: int = 8) -> tuple[list[list[int]], list[dict[str, torch.Tensor]]]:
    names = [engine.add(prompt, most=most) for prompt in PROMPTS]
    while engine.busy:
        engine.step()
    return [engine.tokens_of(name) for name in names], [
        engine.export(engine.snapshot(name)) for name in names
    ]


def test_a_captured_step_is_the_plain_one_with_tables_of_any_width() -> None:
    """Captured whole, by torch's compiler without its code generation; the first sequence crosses into a third page."""
    model = make_student()
    plain, captured = (Engine(model, rows=2, tokens=1024) for _ in range(2))
    captured._decoder = CompiledDecoder(captured._network, backend="eager")
    for most in (4, 80):
        (tokens, states), (wanted, expected) = write(captured, most), write(plain, most)
        assert tokens == wanted
        for found, right in zip(states, expected, strict=True):
            assert all(torch.allclose(found[name], right[name], rtol=1e-5, atol=1e-6) for name in right)
        for engine in (plain, captured):
            for name in list(engine._sequences):
                engine.remove(name)


def test_tables_are_filled_with_the_page_of_nobody() -> None:
    assert table([[5, 6, 7], [9]], 2) == [[5, 6], [9, 0]]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("fast", 'execution is "fast"; choose eager, compiled, graph, fused-graph or kernels'),
        (
            "graph",
            "the model is on cpu; CUDA graphs need a CUDA device: move the model there, or choose eager",
        ),
    ],
)
def test_what_cannot_run_is_refused(way: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_student(), execution=way)  # type: ignore[arg-type]


def test_experts_are_not_recorded() -> None:
    model: PreTrainedModel = tiny_teachers.build_teacher("qwen3-experts")
    with pytest.raises(ValueError, match="tokens of a model with experts choose theirs"):
        Engine(model, execution="compiled")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            make_student,
            "its weights are torch.float32; torch.bfloat16 and torch.float16 are taken; choose fused-graph",
        ),
        (
            lambda: tiny_teachers.build_teacher("qwen2").bfloat16(),
            "layer 0: self_attn.q_proj has a bias; choose",
        ),
    ],
)
def test_kernels_refuse_what_they_do_not_take(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_rows(Network(build(), rows=1, length=4))


def test_kernels_refuse_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(make_student().bfloat16(), rows=1, length=4)
    network.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"its GPU has no compute capability 8.0; choose fused-graph"):
        by_rows(network)


@torch.inference_mode()
def test_more_sequences_than_the_kernels_take_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "MOST_ROWS", 2)
    monkeypatch.setattr(Fusion, "compiled", Fusion)
    network = Network(make_student().bfloat16(), rows=3, length=4)
    network.states.grow(4)
    ways: list[int] = []
    monkeypatch.setattr(execution.KernelStep, "__call__", lambda step, ids_B, *rest: ways.append(len(ids_B)))
    decode = by_rows(network)
    for rows in (1, 2, 3):
        ids_B = torch.full((rows,), 5)
        logits_BV = decode(ids_B, torch.zeros_like(ids_B), torch.arange(rows)[:, None])
    assert ways == [1, 2]
    assert logits_BV.shape == (3, network.vocabulary)


@pytest.mark.gpu
@torch.inference_mode()
def test_recorded_kernels_are_their_step() -> None:
    """To the bit, with sequences that join, over several steps: nothing depends on which program comes last."""
    networks = [Network(make_student().to("cuda", torch.bfloat16), rows=4, length=4) for _ in range(2)]
    for network in networks:
        network.states.grow(20)
    plain, recorded = (by_rows(network) for network in networks)
    decoder = GraphDecoder(networks[1], recorded)
    pages = [[1 + row + 4 * place for place in range(4)] for row in range(4)]
    for rows in (1, 3, 4):
        for place in range(12):
            ids, positions = [5 + place + row for row in range(rows)], [place] * rows
            wanted_BV = plain(
                torch.tensor(ids, device="cuda"),
                torch.tensor(positions, device="cuda"),
                torch.tensor(pages[:rows], device="cuda"),
            )
            assert torch.equal(decoder(ids, positions, pages[:rows]), wanted_BV)


@pytest.mark.gpu
def test_a_graph_is_the_plain_steps() -> None:
    """In bfloat16, over sequences that join, leave and cross pages: the same tokens."""
    model = make_student().to("cuda", torch.bfloat16)
    plain = Engine(model, rows=2, tokens=1024)
    graph = Engine(model, rows=2, tokens=1024, execution="graph")
    wanted, expected = write(plain, 12)
    tokens, states = write(graph, 12)
    assert tokens == wanted
    for found, right in zip(states, expected, strict=True):
        for name in right:
            assert torch.allclose(found[name].float(), right[name].float(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@torch.inference_mode()
def test_recorded_fused_parts_are_as_near_to_float32_as_the_plain_ones() -> None:
    """They round fewer times, so where two tokens are nearly as good another may come first."""
    model = make_student().bfloat16()
    plain, fused, exact = (
        Network(copy.deepcopy(model).to("cuda", dtype), rows=1, length=4)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    recorded = Network(copy.deepcopy(model).to("cuda"), rows=1, length=4)
    fusion = Fusion.compiled()
    decoder = GraphDecoder(recorded, partial(recorded.decode, fusion=fusion))
    pages = list(range(1, 7))
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in ("plain", "fused", "recorded", "exact")}
    for network in (plain, fused, exact, recorded):
        network.states.grow(8)
    for place in range(20):
        logits["recorded"].append(decoder([place + 3], [place], [pages]).clone())
        # Tables are as wide as those of the recording, to be the same shapes.
        width = 1 << (place // 4).bit_length()
        given = [torch.tensor(x, device="cuda") for x in ([place + 3], [place], table([pages], width))]
        logits["plain"].append(plain.decode(*given))
        logits["fused"].append(fused.decode(*given, fusion))
        logits["exact"].append(exact.decode(*given))
    errors = {
        name: relative_error(torch.stack(steps), torch.stack(logits["exact"]))
        for name, steps in logits.items()
    }
    assert errors["plain"] < 0.15
    assert max(errors["fused"], errors["recorded"]) <= 1.5 * errors["plain"]
