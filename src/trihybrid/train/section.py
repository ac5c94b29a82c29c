"""The recipe's sections about training: how long, with which optimizer, at which learning rate.

`TrainSection` holds the three; a stage's own section extends it (`class AlignSection(TrainSection)`) or nests
it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["matrix", "lowrank", "decay", "vector", "embedding", "head"]
"""What a parameter is for; decides its optimizer, learning rate and weight decay."""

_Multiplier = Annotated[float, Field(ge=0.0, le=1000.0)]
_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSection(BaseModel):
    """How gradients become updates."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="adamw for every role, or muon for 2-D matrices and adamw for the rest"
    )
    learning_rate: float = Field(
        default=3e-4, gt=0.0, le=10.0, description="peak learning rate, before role multipliers"
    )
    betas: tuple[_Beta, _Beta] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of both moments, each in [0, 1)"
    )
    weight_decay: float = Field(
        default=0.1, ge=0.0, le=10.0, description="decoupled weight decay, before role multipliers"
    )
    epsilon: float = Field(default=1e-8, gt=0.0, le=1.0, description="AdamW's epsilon")
    gradient_clip: float | None = Field(
        default=1.0, gt=0.0, description="largest global gradient norm; null switches clipping off"
    )
    learning_rate_by_role: dict[Role, _Multiplier] = Field(
        default_factory=dict, description="learning rate multipliers that replace a role's default"
    )
    weight_decay_by_role: dict[Role, _Multiplier] = Field(
        default_factory=dict, description="weight decay multipliers that replace a role's default"
    )


class ScheduleSection(BaseModel):
    """The learning rate over the steps, as a factor of its peak; see `trihybrid.train.schedule`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="shape of the final decay; linear is the warmdown, constant has none"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up from zero")
    final_fraction: float = Field(
        default=0.1, ge=0.0, le=1.0, description="factor that the decay ends at (not used by constant)"
    )
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="length of the decay at the end; null means all steps after the warm-up",
    )

    @model_validator(mode="after")
    def _constant_does_not_decay(self) -> "ScheduleSection":
        if self.kind == "constant" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps: {self.decay_steps} given, but kind 'constant' does not decay; "
                "remove it, or choose kind 'cosine' or 'linear'"
            )
        return self


class LoopSection(BaseModel):
    """How long a stage trains and what it leaves behind."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(ge=1, description="optimizer steps of the stage")
    batch_size: int = Field(default=8, ge=1, description="sequences a step")
    sequence_length: int = Field(default=1024, ge=1, description="tokens a sequence")
    checkpoint_every: int = Field(
        default=500, ge=1, description="steps between checkpoints (there is one at the end too)"
    )
    log_every: int = Field(
        default=10, ge=1, description="steps between printed progress lines (every step is logged)"
    )
    keep: int = Field(default=2, ge=1, description="checkpoints kept, the newest ones")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of torch's generators at step 0")


class TrainSection(BaseModel):
    """All that `fit` needs to know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loop: LoopSection = Field(description="length, batch, checkpoints")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="optimizer")
    schedule: ScheduleSection = Field(default_factory=ScheduleSection, description="learning rate schedule")

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainSection":
        needed = self.schedule.warmup_steps + (self.schedule.decay_steps or 0)
        if needed > self.loop.steps:
            raise ValueError(
                f"schedule: warmup_steps {self.schedule.warmup_steps} + decay_steps "
                f"{self.schedule.decay_steps or 0} "
                f"= {needed} exceed loop.steps {self.loop.steps}; shorten them, or train longer"
            )
        return self
