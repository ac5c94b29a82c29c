"""Both stages through the training loop."""

import copy
import math
from pathlib import Path

import pytest
import torch

from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.run import RunLog, read_log
from trihybrid.train import Checkpoints, TrainSection, fit


class Stop(Exception):
    pass


@pytest.fixture
def run(make_teacher, make_student, make_batch):
    def run(
        folder: Path,
        stage: str,
        steps: int,
        stop: int | None = None,
        every: int = 2,
        train: tuple[str, ...] = (),
    ):
        teacher = make_teacher()
        pair = Pair(make_student(teacher), copy.deepcopy(teacher), [*NEW_MIXERS, *train])
        task = AlignTask(pair) if stage == "align" else MatchTask(Matching(pair, chunk=64))
        section = TrainSection.model_validate(
            {
                "loop": {"steps": steps, "checkpoint_every": every, "seed": 3},
                "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.0},
                "schedule": {"kind": "constant"},
            }
        )

        def batches(step: int):
            if step == stop:
                raise Stop
            return make_batch(step % 2)

        folder.mkdir(exist_ok=True)
        checkpoints = Checkpoints(folder / "checkpoints", stage_hash=stage, parent_hash="parent")
        with RunLog(folder / "log.jsonl", stage, every=1000) as log:
            fit(task, batches, section, checkpoints, log, resume=True)
        return pair, [row for row in read_log(folder / "log.jsonl") if row["kind"] == "train"]

    return run


@pytest.mark.parametrize(("stage", "name"), [("align", "loss"), ("match", "kl")])
def test_a_few_steps_lower_what_the_stage_is_about(run, tmp_path, stage, name) -> None:
    _, rows = run(tmp_path, stage, 12, every=100)
    values = [row[name] for row in rows]
    assert all(math.isfinite(value) for value in values)
    assert sum(values[-4:]) < 0.85 * sum(values[:4])


@pytest.mark.parametrize(("stage", "train"), [("align", ()), ("match", ("model.layers.3.self_attn.*",))])
def test_an_interrupted_stage_resumes_to_the_bit(run, tmp_path, stage, train) -> None:
    whole, whole_rows = run(tmp_path / "whole", stage, 6, train=train)
    with pytest.raises(Stop):
        run(tmp_path / "parts", stage, 6, stop=5, train=train)
    torch.manual_seed(77)
    parts, rows = run(tmp_path / "parts", stage, 6, train=train)
    assert whole.trained.keys() == parts.trained.keys()
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, parts.trained[name]), name
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole_rows]


@pytest.mark.parametrize("stage", ["align", "match"])
def test_nan_in_a_new_mixer_names_its_layer_and_leaves_the_last_checkpoint(
    make_teacher, make_student, make_batch, tmp_path, stage
) -> None:
    teacher = make_teacher()
    pair = Pair(make_student(teacher), copy.deepcopy(teacher), NEW_MIXERS)
    task = AlignTask(pair) if stage == "align" else MatchTask(Matching(pair, chunk=64))
    loop = {"steps": 4, "checkpoint_every": 1}

    def batches(step: int):
        if step == 2:
            # One unit of one layer overflows, as the exponential of a decay may; the weights stay finite.
            pair.student.model.layers[5].self_attn.rwkv7.register_forward_hook(overflow)
        return make_batch(0)

    def overflow(module, arguments, output):
        return output[0] * torch.full((), float("inf")), output[1]

    checkpoints = Checkpoints(tmp_path / "checkpoints", stage_hash=stage, parent_hash="parent")
    section = TrainSection.model_validate({"loop": loop})
    log = RunLog(tmp_path / "log.jsonl", stage, every=1000)
    with pytest.raises(
        FloatingPointError, match=r"step 2: .*batch: rows at 2; layer: .*layers\.5\.self_attn"
    ):
        fit(task, batches, section, checkpoints, log, True, name_batch=lambda step: f"rows at {step}")
    assert checkpoints.latest() == tmp_path / "checkpoints" / "step-000002"
    *rows, event = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and event["event"] == "not_finite"
    assert ("alignment/5" if stage == "align" else "hidden/5") in event["metrics"]
    assert all("gradient/5" in row for row in rows)
