"""The sections take what YAML gives, and refuse what makes no sense."""

import pytest
import yaml

from trihybrid.train import (
    AverageSection,
    LoopSection,
    MuonSection,
    OptimizerSection,
    ScheduleSection,
    TrainSection,
)

RECIPE = """
loop: {steps: 100, batch_size: 4, sequence_length: 64, seed: 7}
optimizer:
  name: muon
  learning_rate: 1e-4
  epsilon: 1e-15
  betas: [0.9, 0.99]
  learning_rate_by_role: {head: 1e-1}
  gradient_clip: null
schedule: {kind: linear, warmup_steps: 10, decay_steps: 40, final_fraction: 0}
"""


def test_yaml_floats_without_a_dot_are_numbers() -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    document = yaml.safe_load(RECIPE)
    assert document["optimizer"]["learning_rate"] == "1e-4"
    section = TrainSection.model_validate(document)
    assert section.optimizer.learning_rate == 1e-4
    assert section.optimizer.epsilon == 1e-15
    assert section.optimizer.learning_rate_by_role == {"head": 0.1}
    assert section.optimizer.gradient_clip is None
    assert section.schedule.final_fraction == 0.0


def test_a_section_survives_json() -> None:
    section = TrainSection.model_validate(yaml.safe_load(RECIPE))
    assert TrainSection.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize(
    ("model", "fields", "match"),
    [
        (OptimizerSection, {"learning_rate": "nan"}, "learning_rate"),
        (OptimizerSection, {"learning_rate": 0}, "greater than 0"),
        (OptimizerSection, {"learning_rate": "fast"}, "valid number"),
        (OptimizerSection, {"betas": [0.9, 1.0]}, "less than 1"),
        (OptimizerSection, {"name": "sgd"}, "adamw.*muon"),
        (OptimizerSection, {"weight_decay_by_role": {"bias": 1.0}}, "matrix"),
        (OptimizerSection, {"learning_rate_by_role": {"head": -1.0}}, "greater than or equal to 0"),
        (OptimizerSection, {"momentum": 0.9}, "Extra inputs"),
        (OptimizerSection, {"muon": {"steps": 4}}, "name is 'adamw'; choose name 'muon'"),
        (MuonSection, {"momentum_start": 0.85}, "momentum_warmup_steps 0; give both"),
        (MuonSection, {"momentum_warmup_steps": 3}, "momentum_start: None .*; give both"),
        (MuonSection, {"coefficients": "polar", "steps": 6}, "6, but 'polar' has coefficients for 5"),
        (AverageSection, {}, "give one of the two"),
        (AverageSection, {"decay": 0.9, "horizon": 0.1}, "give one of the two"),
        (ScheduleSection, {"kind": "constant", "decay_steps": 5}, "kind 'constant' does not decay"),
        (ScheduleSection, {"final_fraction": 1.5}, "less than or equal to 1"),
        (LoopSection, {"steps": 0}, "greater than or equal to 1"),
        (LoopSection, {"steps": 10, "keep": 0}, "greater than or equal to 1"),
        (LoopSection, {"steps": 10, "accumulate": 3}, "3 does not divide batch_size 8"),
        (LoopSection, {"steps": 10, "seconds": 0.0}, "greater than 0"),
        (ScheduleSection, {"kind": "constant", "decay_fraction": 0.5}, "kind 'constant' does not decay"),
        (ScheduleSection, {"decay_steps": 3, "decay_fraction": 0.5}, "beside decay_steps 3; give one"),
        (
            TrainSection,
            {"loop": {"steps": 10}, "schedule": {"warmup_steps": 6, "decay_fraction": 0.5}},
            r"decay_steps 5 = 11 exceed",
        ),
        (TrainSection, {"loop": {"steps": 3}, "schedule": {"warmup_steps": 4}}, "= 4 exceed loop.steps 3"),
        (TrainSection, {"loop": {"steps": 5}, "schedule": {"warmup_steps": 4, "decay_steps": 2}}, "= 6"),
    ],
)
def test_nonsense_is_refused(model: type, fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model.model_validate(fields)


def test_every_field_is_described() -> None:
    models = (AverageSection, LoopSection, MuonSection, OptimizerSection, ScheduleSection, TrainSection)
    for model in models:
        assert all(field.description for field in model.model_fields.values())
