import pytest
import torch

from trihybrid.models.teacher.source import ModelSource
from trihybrid.models.teacher.streamed import streamed_model
from trihybrid.surgery.calibrate import record_layers


def test_records_are_what_the_attention_sees_and_says(make_teacher, calibration) -> None:
    """Output and input satisfy the decoder layer's own equations, block by block."""
    teacher = make_teacher()
    tokens_BT, positions_BT = calibration
    blocks = [(tokens_BT[:1], positions_BT[:1]), (tokens_BT[1:], positions_BT[1:])]
    records = record_layers(teacher.model, blocks, [2, 8])
    assert {index: [x.shape for x in record.inputs] for index, record in records.items()} == {
        2: [(1, 40, 32)] * 2,
        8: [(1, 40, 32)] * 2,
    }
    with torch.no_grad():
        hidden = teacher.model(
            input_ids=tokens_BT[1:], position_ids=positions_BT[1:], use_cache=False, output_hidden_states=True
        ).hidden_states
        layer = teacher.model.layers[2]
        assert torch.equal(records[2].inputs[1], layer.input_layernorm(hidden[2]))
        # Layer 2 again with its attention replaced by the record gives the teacher's next hidden state.
        handle = layer.self_attn.register_forward_hook(lambda *_: (records[2].outputs[1], None))
        again = teacher.model(
            input_ids=tokens_BT[1:], position_ids=positions_BT[1:], use_cache=False, output_hidden_states=True
        ).hidden_states
        handle.remove()
    assert torch.equal(again[3], hidden[3])


@pytest.mark.parametrize("layers", [[2], [2, 5, 8]])
def test_records_over_a_source_are_those_of_the_model(make_teacher, calibration, layers) -> None:
    """To the bit, with one layer in memory at a time, and with nothing above the last one read."""
    teacher = make_teacher()
    source = ModelSource(teacher)
    for name in source.names:
        if name.startswith("model.layers.") and int(name.split(".")[2]) > max(layers):
            del source._tensors[name]
    wanted = record_layers(teacher.model, [calibration], layers)
    found = record_layers(streamed_model(teacher.config, source, torch.float32), [calibration], layers)
    assert found.keys() == wanted.keys() == set(layers)
    for index in layers:
        assert torch.equal(found[index].inputs[0], wanted[index].inputs[0])
        assert torch.equal(found[index].outputs[0], wanted[index].outputs[0])


def test_nothing_above_the_last_layer_runs(make_teacher, calibration) -> None:
    teacher = make_teacher()
    ran: list[int] = []
    for index, layer in enumerate(teacher.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    record_layers(teacher.model, [calibration], [5, 2])
    assert ran == [0, 1, 2, 3, 4]


def test_recording_leaves_no_hooks_and_the_mode_as_it_was(make_teacher, calibration) -> None:
    teacher = make_teacher().train()
    record_layers(teacher.model, [calibration], [5])
    assert teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())
    teacher.model.layers[3].mlp.register_forward_hook(_fail)
    try:
        record_layers(teacher.model, [calibration], [5])
    except RuntimeError:
        pass
    else:
        raise AssertionError("the hook did not run")
    assert teacher.training
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)


def _fail(*_: object) -> None:
    raise RuntimeError("stop")
