import torch

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
