"""The recording of stage 2: what goes into it says all that a batch says.

Legend: B batch, T tokens.
"""

import copy
import gc

import pytest
import torch
from torch import Tensor

from tiny_gemma4 import VOCABULARY
from trihybrid.data import Batch
from trihybrid.distill.graph import Graphed
from trihybrid.distill.match import Matching, MatchTask, check_recordable
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS, MatchSection
from trihybrid.testing import relative_error

LENGTH = 80


@pytest.fixture
def matching(make_teacher, make_student) -> Matching:
    teacher = make_teacher(torch.float64)
    pair = Pair(make_student(teacher, share_kv="teacher"), copy.deepcopy(teacher), NEW_MIXERS)
    return Matching(pair, checkpointing=True, kept_layers=2)


def rows(seed: int, *lengths: int) -> tuple[Tensor, Tensor]:
    """Two rows of documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    return tokens_BT, torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)


def test_the_tensors_of_a_stream_are_enough(matching) -> None:
    """Batches with and without borders, each against the plain loss; the stream of the first serves for all."""
    parameters = list(matching.pair.trained.values())
    graphed = Graphed(matching, parameters)
    forms = []
    recorded = None
    for batch in (rows(0, 80), rows(1, 30, 50), rows(2, 80), rows(3, 1, 2, 7, 70)):
        expected, expected_parts = matching(*batch)
        wanted = torch.autograd.grad(expected, parameters)
        tensors, stream = graphed.take_apart(*matching.prepare(*batch))
        form = {name: tuple(x.shape) for name, x in tensors.items()}
        parts: dict[str, Tensor] = {}
        if recorded is None or form != forms[-1]:
            recorded = stream
        forms.append(form)
        found = graphed.function(list(tensors), recorded, parts)(*tensors.values())
        assert relative_error(found, expected) <= 1e-10
        torch.testing.assert_close(parts, {name: x.detach() for name, x in expected_parts.items()})
        gradients = zip(torch.autograd.grad(found, parameters), wanted, strict=True)
        assert all(relative_error(one, other) <= 1e-10 for one, other in gradients)
    # Once there were borders, rows of one document go into the same recording.
    assert forms[0] != forms[1] == forms[2] == forms[3]
    assert forms[1]["starts"] == (64,)


def test_more_documents_than_a_recording_holds(matching) -> None:
    graphed = Graphed(matching, [])
    many = rows(0, *[1] * LENGTH)
    sizes = [
        len(graphed.take_apart(*matching.prepare(*batch))[0]["starts"])
        for batch in (rows(0, 30, 50), many, rows(1, 80))
    ]
    assert sizes == [64, 256, 256]


def test_off_the_gpu_a_task_differentiates_without_a_recording(matching, make_batch) -> None:
    task = MatchTask(matching, graph=True)
    batch: Batch = make_batch(0)
    loss, parts = task.differentiate(batch, 0.5)
    expected, _ = matching(batch.inputs, batch.positions)
    wanted = torch.autograd.grad(0.5 * expected, list(task.parameters().values()))
    assert (
        task.graphed is None
        and loss.item() == expected.item()
        and {"kl", "hidden", "agreement"} <= set(parts)
    )
    for parameter, gradient in zip(task.parameters().values(), wanted, strict=True):
        assert relative_error(parameter.grad, gradient) <= 1e-12


def test_a_recurrence_in_float32_is_not_recorded(make_teacher, make_student) -> None:
    student = make_student(make_teacher(torch.float32))
    with pytest.raises(ValueError, match=r"graph: true for a student in torch\.float32, whose recurrence"):
        check_recordable(student)
    check_recordable(student.bfloat16())


@pytest.mark.gpu
def test_a_recording_is_what_it_records(make_teacher, make_student) -> None:
    """To the bit, in the form that the batch has in the recording; the loss is also the plain one, up to the rounding
    of attention with and without borders."""
    teacher = make_teacher(torch.bfloat16).cuda()
    student = make_student(make_teacher(torch.bfloat16)).cuda()
    matching = Matching(Pair(student, teacher, NEW_MIXERS), checkpointing=True, kept_layers=2)
    parameters = list(matching.pair.trained.values())
    graphed, unrecorded = Graphed(matching, parameters), Graphed(matching, parameters)
    for batch in (rows(0, 80), rows(1, 30, 50), rows(2, 80), rows(3, 1, 2, 7, 70)):
        given = tuple(x.cuda() for x in batch)
        with torch.no_grad():
            plain, names = matching(*given)
        tensors, stream = unrecorded.take_apart(*matching.prepare(*given))
        expected = unrecorded.function(list(tensors), stream, {})(*tensors.values())
        wanted = torch.autograd.grad(expected, parameters)
        # No graph may be left alive while a recording is made, not even in a cycle of what checkpointing remembers.
        expected = expected.detach()
        gc.collect()
        matching.zero_grad()
        found, parts = graphed(*given, 1.0)
        assert torch.equal(found, expected) and parts.keys() == names.keys()
        assert relative_error(found, plain) <= 2e-2
        for parameter, gradient in zip(parameters, wanted, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_a_graph_of_weights_that_come_and_go_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graph: true with parallel 'shard'.*give parallel 'replicate', or"):
        MatchSection.model_validate({"loop": {"steps": 1}, "graph": True, "parallel": "shard"})
