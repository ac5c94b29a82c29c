"""What a recipe may hold. Each section belongs to the room that it configures; here they are put together."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trihybrid.data.section import DataSection
from trihybrid.distill.section import AlignSection, MatchSection
from trihybrid.evaluate.section import EvaluationSection
from trihybrid.infer.section import SamplesSection
from trihybrid.pretrain.section import PretrainSection
from trihybrid.surgery.section import SurgerySection

Stage = Annotated[AlignSection | MatchSection, Field(discriminator="kind")]

NAMES = {"align": "aligned", "match": "matched"}
"""What the model after a stage is called, in folders, logs and tables."""


class TeacherSection(BaseModel):
    """Where the teacher comes from: a folder, or trained here."""

    model_config = ConfigDict(extra="forbid")
    folder: str | None = Field(
        default=None, description="folder of a text model of a family that can be converted"
    )
    shape: str | None = Field(
        default=None,
        description="name of the built-in shape that the folder must have; the recipe is planned with it where the "
        "folder is not at hand",
    )
    pretrain: PretrainSection | None = Field(
        default=None, description="shape and training of a teacher made here"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherSection":
        if (self.folder is None) == (self.pretrain is None):
            raise ValueError("give exactly one of folder and pretrain")
        if self.shape is not None and self.folder is None:
            raise ValueError("shape names what a folder must have; a pretrained teacher gives its own")
        return self


class TargetsSection(BaseModel):
    """What the run promises; a missed target is said in the report and fails the command."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    bpb_gap: float | None = Field(
        default=None, ge=0, description="bits a byte of the last student above the teacher's, at most"
    )
    teacher_recall: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="the teacher's recall beyond the window, or at all distances where there is none, at least",
    )
    improvement: bool = Field(default=False, description="bpb and KL fall from operated through every stage")
    seconds: float | None = Field(default=None, gt=0, description="time of the whole run, at most")


class Recipe(BaseModel):
    """Teacher, surgery, stages, evaluation."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="name of the run, for its folder")
    data: DataSection = Field(default_factory=DataSection, description="text and tokenizer")
    teacher: TeacherSection = Field(description="the model to convert")
    surgery: SurgerySection = Field(default_factory=SurgerySection, description="what stands in each slot")
    stages: list[Stage] = Field(description="distillation, in order")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="what is measured")
    samples: SamplesSection = Field(default_factory=SamplesSection, description="generated text")
    targets: TargetsSection = Field(default_factory=TargetsSection, description="what the run promises")

    @model_validator(mode="after")
    def _each_stage_once(self) -> "Recipe":
        kinds = [stage.kind for stage in self.stages]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"stages: {kinds} names a kind twice; each kind may stand once")
        return self
