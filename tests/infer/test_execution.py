"""Every way of running a step gives the tokens and states of the plain one."""

import pytest
import torch
from transformers import PreTrainedModel

import tiny_teachers
from small_student import make_student
from trihybrid.infer.engine import Engine
from trihybrid.infer.execution import CompiledDecoder, table

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
    ("execution", "message"),
    [
        ("fast", 'execution is "fast"; choose eager, compiled, graph, fused-graph or kernels'),
        (
            "graph",
            "the model is on cpu; CUDA graphs need a CUDA device: move the model there, or choose eager",
        ),
    ],
)
def test_what_cannot_run_is_refused(execution: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_student(), execution=execution)  # type: ignore[arg-type]


def test_experts_are_not_recorded() -> None:
    model: PreTrainedModel = tiny_teachers.build_teacher("qwen3-experts")
    with pytest.raises(ValueError, match="tokens of a model with experts choose theirs"):
        Engine(model, execution="compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["graph", "fused-graph", "kernels"])
def test_graphs_are_the_plain_steps(execution: str) -> None:
    """In bfloat16, over sequences that join, leave and cross pages: the same tokens."""
    model = make_student().to("cuda", torch.bfloat16)
    plain = Engine(model, rows=2, tokens=1024)
    graph = Engine(model, rows=2, tokens=1024, execution=execution)  # type: ignore[arg-type]
    wanted, expected = write(plain, 12)
    tokens, states = write(graph, 12)
    assert tokens == wanted
    for found, right in zip(states, expected, strict=True):
        for name in right:
            assert torch.allclose(found[name].float(), right[name].float(), rtol=5e-2, atol=5e-2)
