"""Teacher, student and losses of distill_e2b.py: random weights, in the true shape of Gemma-4 E2B or a tiny one.

Legend: B batch, T tokens, V vocabulary, C tokens of a chunk.
"""

import gc
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig, PreTrainedModel

from trihybrid.distill.align import relative_distance
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import family_of
from trihybrid.models.shapes import TeacherConfig, load_shape
from trihybrid.ops.part import Part
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.section import Rwkv7Section, SurgerySection, TicaSection


@dataclass(frozen=True)
class Setting:
    """What is measured: shapes, lengths and how often.

    Attributes:
        base, surgery: the teacher's configuration and the student's plan.
        align, match, long: (rows, tokens of a row) of a step of stage 1, of stage 2, and of stage 2 at length.
        kept: numbers of layers that stage 2 does not recompute, one after the other.
        chunk, block: tokens and words whose logits exist at once.
        steps: timed steps of a row.
    """

    base: TeacherConfig
    surgery: SurgerySection
    align: tuple[int, int]
    match: tuple[int, int]
    long: tuple[int, int]
    kept: tuple[int, ...]
    chunk: int
    block: int
    steps: int
    device: torch.device
    dtype: torch.dtype


def e2b() -> Setting:
    """The true shape on a GPU; the student is the card's, RWKV-7 + TICA in all seven global layers."""
    return Setting(
        load_shape("gemma-4-e2b"), SurgerySection(), (8, 2048), (1, 4096), (1, 32768), (8, 10, 12, 16), 256, 262144, 5,
        torch.device("cuda"), torch.bfloat16,
    )  # fmt: skip


def tiny() -> Setting:
    """Everything that the true shape has, at a size of seconds on a CPU."""
    base = Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, global_head_dim=32, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, num_kv_shared_layers=3,
        use_double_wide_mlp=True, hidden_size_per_layer_input=8, final_logit_softcapping=30.0,
        max_position_embeddings=512, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    surgery = SurgerySection(
        rwkv7=Rwkv7Section(head_dim=16, decay_rank=6, iclr_rank=5, gate_rank=7),
        tica=TicaSection(heads=4, kv_heads=2, head_dim=8, gate_rank=3),
    )
    cpu = torch.device("cpu")
    return Setting(base, surgery, (1, 16), (1, 72), (1, 136), (0, 2), 32, 64, 1, cpu, torch.float32)


def build(setting: Setting) -> tuple[PreTrainedModel, HybridForCausalLM]:
    """A random teacher and a student with its weights and random mixers, two whole models."""
    torch.manual_seed(0)
    family = family_of(setting.base)
    models = []
    with torch.device(setting.device):
        for make, config in (
            (family.teacher, setting.base),
            (family.student, student_config(setting.base, setting.surgery)),
        ):
            model = make(config).eval().requires_grad_(False)
            for tensor in [
                *model.parameters(),
                *(b for n, b in model.named_buffers() if n.endswith("scalar")),
            ]:
                # Not `model.to`, which would round the rotary frequencies.
                tensor.data = tensor.data.to(setting.dtype)
            models.append(model)
    teacher, student = models
    missing = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    assert all(".rwkv7." in name or ".tica." in name for name in missing), missing
    return teacher, student


def build_pair(setting: Setting, part: Part | None = None) -> Pair:
    """Teacher and student over one copy of the frozen weights, for whole rows or a part of each."""
    teacher, student = build(setting)
    pair = Pair(student, teacher, NEW_MIXERS, part)
    del teacher
    clear()
    return pair


def clear() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TwoModels(nn.Module):
    """Stage 2 by the book: both models in full, all logits at once, the student's layers recomputed."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.teacher, self.student = build(setting)
        self.trained = {}
        for name, parameter in self.student.named_parameters():
            if ".rwkv7." in name or ".tica." in name:
                parameter.data = parameter.data.float()
                self.trained[name] = parameter.requires_grad_()
        slots = self.student.config.slot_list()
        self.first = next(index for index, slot in enumerate(slots) if slot.converted)
        # Checkpointing is for models that train; nothing here behaves otherwise then.
        self.student.train()
        checkpointing = "activation_checkpointing_enable"  # the name since transformers 5.24
        older = "gradient_checkpointing_enable"
        getattr(self.student, checkpointing if hasattr(self.student, checkpointing) else older)()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that `Matching` computes."""
        with torch.no_grad():
            aims, teacher_BTV = self._run(self.teacher, input_ids, position_ids)
        states, student_BTV = self._run(self.student, input_ids, position_ids)
        p, q = (x.float().log_softmax(-1) for x in (teacher_BTV, student_BTV))
        kl = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
        pairs = list(zip(states, aims, strict=True))[self.first :]
        hidden = torch.stack([relative_distance(x, y) for x, y in pairs]).mean()
        return kl + 0.1 * hidden, {"kl": kl, "hidden": hidden}

    @staticmethod
    def _run(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        states: list[Tensor] = []
        layers = model.model.layers

        def note(module: nn.Module, arguments: object, output: Tensor) -> None:
            if len(states) < len(layers):  # not when a layer is computed again
                states.append(output)

        handles = [layer.register_forward_hook(note) for layer in layers]
        logits = model(input_ids, position_ids=position_ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return states, logits


def smaller(setting: Setting, kept: tuple[int, ...] | None, steps: int | None) -> Setting:
    """The setting with what the command line says."""
    return replace(setting, kept=kept or setting.kept, steps=steps or setting.steps)
