"""Applying a plan to a teacher's folder: the student's files are written from ranges of the teacher's.

The header of the student's weights follows from its configuration alone. Behind it come the retained tensors, byte for
byte and in the order in which they lie in the teacher's files, and then the slots of `build_slots`, each made when its
turn comes. So a model of any size passes through a few buffers, one slot, and what scales are fitted on.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.families import family_of
from trihybrid.models.inventory import converted_prefixes, wanted_tensors
from trihybrid.models.teacher.published import PublishedTeacher
from trihybrid.models.teacher.source import FileSource
from trihybrid.storage.folder import Written, save_folder
from trihybrid.storage.tensor_files import DTYPES, StoredTensor
from trihybrid.storage.tensor_writer import TensorShape, TensorWriter, file_bytes, file_order
from trihybrid.surgery.ahead import Ahead
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.operate import write_plan
from trihybrid.surgery.plan import check_plan
from trihybrid.surgery.slots import Block, BuiltSlot, build_slots
from trihybrid.surgery.tensors import TOWERS, TensorReport

WEIGHTS = "model.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
FLOATING = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
"""safetensors' names of the dtypes that a teacher's weights may have."""
SPARE_BYTES = 1 << 28
"""What must be free beyond the weights: tokenizer, plan, manifest."""


def stream_student(
    teacher: PublishedTeacher,
    plan: dict[str, Any],
    folder: str | Path,
    tokens: Sequence[Block] = (),
    seed: int = 0,
    towers: bool = True,
    beside: Callable[[Path], object] = lambda folder: None,
    finish: Callable[[Path, TensorReport], object] = lambda folder, report: None,
) -> TensorReport:
    """Write the student that `plan` makes of a teacher, whole or not at all.

    Args:
        teacher: its folder.
        plan: see `make_plan`.
        folder: the student's.
        tokens: calibration blocks (see `build_slots`).
        seed: of what is drawn.
        towers: carry the towers for images and sound along, where there are some.
        beside: puts files of its own into the folder, in a thread, while the weights are written.
        finish: does so when the weights are written.

    Raises:
        ValueError: the plan of another teacher; tensors that are missing, do not fit or are no floating point; a disk
            without the space that is needed, or one that becomes full. Nothing is left then.
    """
    section = check_plan(plan, teacher.base)
    contents = _contents(teacher, student_config(teacher.base, section), towers)
    _check_space(Path(folder), contents.size())
    reports: list[TensorReport] = []

    def write(partial: Path) -> Written:
        slots = build_slots(FileSource(teacher.text), teacher.base, section, tokens, seed)
        entries, report = _write_tensors(contents, slots, partial, beside)
        reports.append(report)
        write_plan(partial, plan)
        _write_generation(teacher, partial)
        finish(partial, report)
        # Last, for a folder without a configuration is no model's.
        config = contents.config
        config.architectures, config.dtype = [family_of(teacher.base).student.__name__], contents.dtype
        config.save_pretrained(partial)
        return Written(entries, {"tensors": vars(report)})

    save_folder(folder, write)
    return reports[-1]


@dataclass(frozen=True)
class _Contents:
    """What the student's files hold.

    Attributes:
        teacher: the folder that it comes from.
        config: the student's.
        dtype: of the tensors that are made here: the teacher's.
        kept: the student's name of a retained tensor -> where it lies.
        slots: name of a tensor that is made here -> what it will be.
        carried: the towers' tensors that go along.
    """

    teacher: PublishedTeacher
    config: HybridConfig
    dtype: torch.dtype
    kept: dict[str, StoredTensor]
    slots: dict[str, TensorShape]
    carried: dict[str, StoredTensor]

    def weights(self) -> dict[str, TensorShape]:
        """All tensors of the model, in the order of its file."""
        return _shapes(self.kept) | self.slots

    def size(self) -> int:
        """Bytes of both files."""
        return file_bytes(self.weights()) + (file_bytes(_shapes(self.carried)) if self.carried else 0)


def _contents(teacher: PublishedTeacher, config: HybridConfig, towers: bool) -> _Contents:
    wanted = wanted_tensors(config)
    converted = converted_prefixes(config)
    made_here = {name for name in wanted if name.startswith(converted)}
    kept = _retained(teacher, {name: shape for name, shape in wanted.items() if name not in made_here})
    _check_floating(teacher, [*kept, *(name for name in teacher.text if name.startswith(converted))])
    dtype = DTYPES[kept["model.embed_tokens.weight"].dtype]
    slots = {name: TensorShape.of(dtype, shape) for name, shape in wanted.items() if name in made_here}
    return _Contents(teacher, config, dtype, kept, slots, _in_file_order(teacher.towers) if towers else {})


def _write_tensors(
    contents: _Contents, slots: Iterator[BuiltSlot], partial: Path, beside: Callable[[Path], object]
) -> tuple[dict[str, dict[str, Any]], TensorReport]:
    """Write weights and towers; returns the manifest's entries of both files, and what became of every tensor."""
    made: set[str] = set()
    used: set[str] = set()
    converted = sum(slot.converted for slot in contents.config.slot_list())
    length = sum(tensor.length for tensor in contents.slots.values())
    files: dict[str, TensorWriter] = {}
    # Both files are closed together at the end, for each close waits for the disk.
    with ExitStack() as stack:
        ahead = stack.enter_context(Ahead(slots, converted, length))
        ahead.also(lambda: beside(partial))
        files[WEIGHTS] = stack.enter_context(TensorWriter(partial / WEIGHTS, contents.weights()))
        for name, place in contents.kept.items():
            files[WEIGHTS].copy(name, place)
            ahead.check()
        if contents.carried:
            _carry_settings(contents.teacher.folder, partial / TOWERS)
            path = f"{TOWERS}/{WEIGHTS}"
            files[path] = stack.enter_context(TensorWriter(partial / path, _shapes(contents.carried)))
            for name, place in contents.carried.items():
                files[path].copy(name, place)
        for built in ahead:
            prefix = f"model.layers.{built.index}.self_attn."
            for name, parameter in built.slot.named_parameters():
                files[WEIGHTS].put(prefix + name, parameter.to(contents.dtype))
            made |= {prefix + name for name in built.inherited}
            used |= built.sources
        ahead.finish()
    teacher = contents.teacher
    idle = teacher.text.keys() - contents.kept.keys() - used
    unused = [published for name in idle for published in teacher.names[name]]
    report = TensorReport(
        copied=len(contents.kept),
        made=sorted(made),
        fresh=sorted(contents.slots.keys() - made),
        carried=sorted(contents.carried),
        left_out=sorted(teacher.towers.keys() - contents.carried.keys()),
        unused=sorted(unused + teacher.strangers),
    )
    return {path: file.entry for path, file in files.items()}, report


def _carry_settings(source: Path, target: Path) -> None:
    """The files that belong to the towers, beside their weights."""
    target.mkdir()
    for name in ("config.json", *PROCESSOR_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _shapes(ranges: dict[str, StoredTensor]) -> dict[str, TensorShape]:
    return {name: TensorShape.like(place) for name, place in ranges.items()}


def _retained(teacher: PublishedTeacher, wanted: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Ranges of the tensors that the student has from the teacher, in the order of the file.

    Raises:
        ValueError: some are missing or have another shape.
    """
    wrong = [
        name
        for name, shape in wanted.items()
        if name not in teacher.text or teacher.text[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{teacher.folder}: {len(wrong)} tensors are missing or have another shape than config.json says, first "
            f"{wrong[0]}"
        )
    return _in_file_order({name: teacher.text[name] for name in wanted})


def _check_floating(teacher: PublishedTeacher, names: Iterable[str]) -> None:
    """Refuse quantised weights: without their scales, which we do not know, their numbers mean nothing."""
    for name in names:
        dtype = teacher.text[name].dtype
        if dtype not in FLOATING:
            raise ValueError(
                f"{teacher.folder}: {teacher.names[name][0]} is {dtype}; a teacher's weights are "
                f"{', '.join(sorted(FLOATING))}; take the checkpoint that is not quantised"
            )


def _in_file_order(ranges: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(ranges.items(), key=lambda item: file_order(item[1])))


def _check_space(folder: Path, size: int) -> None:
    disk = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(disk).free
    if free < size + SPARE_BYTES:
        raise ValueError(
            f"{folder}: needs {(size + SPARE_BYTES) / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB; free some, or "
            "name a folder on another disk"
        )


def _write_generation(teacher: PublishedTeacher, partial: Path) -> None:
    name = "generation_config.json"
    if (teacher.folder / name).exists():
        shutil.copyfile(teacher.folder / name, partial / name)
    else:
        GenerationConfig.from_model_config(teacher.base).save_pretrained(partial)
