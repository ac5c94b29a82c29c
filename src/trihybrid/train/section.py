"""The recipe's sections about training: how long, with which optimizer, at which learning rate.

`TrainSection` holds them; a stage's own section extends it (`class AlignSection(TrainSection)`) or nests it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["matrix", "lowrank", "decay", "vector", "embedding", "head"]
"""What a parameter is for; decides its optimizer, learning rate and weight decay."""

_Multiplier = Annotated[float, Field(ge=0.0, le=1000.0)]
_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class MuonSection(BaseModel):
    """Muon's own options, for the 2-D matrices; see `trihybrid.train.muon`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: float | None = Field(
        default=None, gt=0.0, le=10.0, description="peak learning rate of the matrices; null means AdamW's"
    )
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0, description="decay rate of the momentum, in [0, 1)")
    momentum_start: float | None = Field(
        default=None, ge=0.0, lt=1.0, description="momentum of step 0, where the momentum is warmed up"
    )
    momentum_warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the momentum goes linearly from its start to its value"
    )
    coefficients: Literal["quintic", "polar"] = Field(
        default="quintic", description="quintic: Keller Jordan's; polar: one triple a step (Polar Express)"
    )
    steps: int = Field(default=5, ge=1, le=10, description="Newton-Schulz steps (polar has 5 at most)")
    scale: Literal["rms", "shape"] = Field(
        default="rms",
        description="rms: 0.2 sqrt(max(rows, columns)), AdamW's usual size; "
        "shape: sqrt(max(1, rows / columns)), Keller Jordan's",
    )
    normalise_rows: bool = Field(
        default=False, description="divide each row by its norm before the iteration (MuonEq-R)"
    )
    compile: bool = Field(default=False, description="torch.compile the iteration, once a shape")

    @model_validator(mode="after")
    def _options_fit(self) -> "MuonSection":
        if (self.momentum_start is None) != (self.momentum_warmup_steps == 0):
            raise ValueError(
                f"momentum_start: {self.momentum_start} with momentum_warmup_steps {self.momentum_warmup_steps}; "
                "give both for a warm-up of the momentum, or neither"
            )
        if self.coefficients == "polar" and self.steps > 5:
            raise ValueError(f"steps: {self.steps}, but 'polar' has coefficients for 5; give 1 to 5")
        return self


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
    muon: MuonSection = Field(default_factory=MuonSection, description="options of muon")

    @model_validator(mode="after")
    def _muon_is_used(self) -> "OptimizerSection":
        if self.name == "adamw" and self.muon != MuonSection():
            raise ValueError("muon: options given, but name is 'adamw'; choose name 'muon', or remove them")
        return self


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
    decay_fraction: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="length of the decay at the end as a fraction of the run's steps or seconds, "
        "instead of decay_steps",
    )

    @model_validator(mode="after")
    def _decay_fits_kind(self) -> "ScheduleSection":
        for name in ("decay_steps", "decay_fraction"):
            value = getattr(self, name)
            if self.kind == "constant" and value is not None:
                raise ValueError(
                    f"{name}: {value} given, but kind 'constant' does not decay; "
                    "remove it, or choose kind 'cosine' or 'linear'"
                )
        if self.decay_steps is not None and self.decay_fraction is not None:
            raise ValueError(
                f"decay_fraction: {self.decay_fraction} given beside decay_steps {self.decay_steps}; give one"
            )
        return self

    def decay_length(self, steps: int) -> int:
        """Steps of the decay in a stage of that many steps, at least 1 unless nothing is left after the warm-up
        (negative where the warm-up alone is longer than the stage).
        """
        if self.decay_steps is not None:
            return self.decay_steps
        if self.decay_fraction is not None:
            return max(1, round(self.decay_fraction * steps))
        return steps - self.warmup_steps


class LoopSection(BaseModel):
    """How long a stage trains and what it leaves behind."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(
        ge=1, description="optimizer steps of the stage; the most of them, if seconds is given"
    )
    seconds: float | None = Field(
        default=None, gt=0.0, description="time to train; no step begins that would not end within it"
    )
    batch_size: int = Field(default=8, ge=1, description="sequences a step")
    accumulate: int = Field(
        default=1, ge=1, description="parts of the batch that go through the model one after the other"
    )
    sequence_length: int = Field(default=1024, ge=1, description="tokens a sequence")
    warmup_runs: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="steps made and undone before the time counts, so that compiling is not part of it",
    )
    checkpoint_every: int = Field(
        default=500, ge=1, description="steps between checkpoints (there is one at the end too)"
    )
    log_every: int = Field(
        default=10, ge=1, description="steps between printed progress lines (every step is logged)"
    )
    keep: int = Field(default=2, ge=1, description="checkpoints kept, the newest ones")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of torch's generators at step 0")

    @model_validator(mode="after")
    def _parts_are_equal(self) -> "LoopSection":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} does not divide batch_size {self.batch_size}; give a divisor"
            )
        return self


class AverageSection(BaseModel):
    """A running average of the parameters, which replaces them at the end; see `trihybrid.train.average`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    decay: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="factor of the past at each step; 1 weighs all steps alike, 0 keeps the last one only",
    )
    horizon: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="about how much of the run is averaged over, a fraction of it, instead of decay",
    )
    start_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="fraction of the run that is left out at its beginning"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "AverageSection":
        if (self.decay is None) == (self.horizon is None):
            raise ValueError(f"decay: {self.decay} and horizon: {self.horizon}; give one of the two")
        return self


class TrainSection(BaseModel):
    """All that `fit` needs to know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loop: LoopSection = Field(description="length, batch, checkpoints")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="optimizer")
    schedule: ScheduleSection = Field(default_factory=ScheduleSection, description="learning rate schedule")
    average: AverageSection | None = Field(
        default=None, description="average of the parameters over the steps; null keeps the last ones"
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainSection":
        warmup = self.schedule.warmup_steps
        # An open end takes what the warm-up leaves, which may be nothing.
        decay = max(0, self.schedule.decay_length(self.loop.steps))
        if self.schedule.kind == "constant":
            decay = 0
        if warmup + decay > self.loop.steps:
            raise ValueError(
                f"schedule: warmup_steps {warmup} + decay_steps {decay} = {warmup + decay} "
                f"exceed loop.steps {self.loop.steps}; shorten them, or train longer"
            )
        return self
