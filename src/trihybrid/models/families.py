"""Every family of teachers: its model in transformers, and the model of ours that its students are."""

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma4ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from trihybrid.models.decoder.families import (
    TrihybridGemma3ForCausalLM,
    TrihybridLlamaForCausalLM,
    TrihybridMistralForCausalLM,
    TrihybridQwen2ForCausalLM,
    TrihybridQwen3ForCausalLM,
    TrihybridQwen3MoeForCausalLM,
)
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.models.shapes import TeacherConfig


@dataclass(frozen=True)
class Family:
    """The classes of a family: its teachers' language model, and its students'."""

    teacher: type[PreTrainedModel]
    student: type[HybridForCausalLM]

    @property
    def teacher_type(self) -> str:
        """The teachers' model type."""
        return self.student.config_class.teacher_config.model_type

    @property
    def student_type(self) -> str:
        """The students' model type."""
        return self.student.config_class.model_type


FAMILIES = (
    Family(Gemma4ForCausalLM, TrihybridGemma4ForCausalLM),
    Family(Gemma3ForCausalLM, TrihybridGemma3ForCausalLM),
    Family(LlamaForCausalLM, TrihybridLlamaForCausalLM),
    Family(MistralForCausalLM, TrihybridMistralForCausalLM),
    Family(Qwen2ForCausalLM, TrihybridQwen2ForCausalLM),
    Family(Qwen3ForCausalLM, TrihybridQwen3ForCausalLM),
    Family(Qwen3MoeForCausalLM, TrihybridQwen3MoeForCausalLM),
)


def family_of(base: TeacherConfig) -> Family:
    """The family of a teacher.

    Raises:
        ValueError: a model type of none.
    """
    for family in FAMILIES:
        if family.teacher_type == base.model_type:
            return family
    raise ValueError(
        f'model_type is "{base.model_type}"; teachers are {", ".join(f.teacher_type for f in FAMILIES)}'
    )


def family_of_student(model_type: str) -> Family:
    """The family whose students have this model type.

    Raises:
        ValueError: no family has.
    """
    for family in FAMILIES:
        if family.student_type == model_type:
            return family
    raise ValueError(
        f'model_type is "{model_type}"; converted students are {", ".join(f.student_type for f in FAMILIES)}'
    )


def register() -> None:
    """Make transformers' Auto classes know the students of every family; safe to call again."""
    for family in FAMILIES:
        config = family.student.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, family.student.decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, family.student, exist_ok=True)
