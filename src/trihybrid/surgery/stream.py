"""Applying a plan to a teacher's folder: the student's files are written from ranges of the teacher's.

The header of the student's weights follows from its configuration alone. Behind it come the retained tensors, byte for
byte and in the order in which they lie in the teacher's files, and then the slots of `build_slots`, each made when its
turn comes. So a model of any size passes through a few buffers, one slot, and what scales are fitted on.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4TextConfig, GenerationConfig

from trihybrid.models.checkpoint import Written, save_folder
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.models.published import PublishedTeacher
from trihybrid.models.source import FileSource
from trihybrid.models.tensor_files import DTYPES, TensorRange
from trihybrid.models.tensor_writer import TensorShape, TensorWriter, file_bytes
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.operate import converted_prefixes, empty_student, write_plan
from trihybrid.surgery.plan import check_plan
from trihybrid.surgery.slots import Block, BuiltSlot, build_slots
from trihybrid.surgery.tensors import TOWERS, TensorReport

WEIGHTS = "model.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
AHEAD_BYTES = 1 << 30
"""What slots may take that were built before their turn."""
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
        ValueError: the plan of another teacher; tensors that are missing or do not fit; a disk without the space that
            is needed, or one that becomes full. Nothing is left then.
    """
    assert isinstance(teacher.base, Gemma4TextConfig)
    section = check_plan(plan, teacher.base)
    config = student_config(teacher.base, section)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_student(config).state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    made_here = {name for name in wanted if name.startswith(converted_prefixes(config))}
    kept = _retained(teacher, {name: shape for name, shape in wanted.items() if name not in made_here})
    dtype = DTYPES[kept["model.embed_tokens.weight"].dtype]
    slots = {name: TensorShape.of(dtype, shape) for name, shape in wanted.items() if name in made_here}
    weights = {name: TensorShape.like(place) for name, place in kept.items()} | slots
    carried = _in_file_order(teacher.towers) if towers else {}
    aside = {name: TensorShape.like(place) for name, place in carried.items()}
    _check_space(Path(folder), file_bytes(weights) + (file_bytes(aside) if aside else 0))
    reports: list[TensorReport] = []

    def write(partial: Path) -> Written:
        made: set[str] = set()
        used: set[str] = set()
        built_slots = build_slots(FileSource(teacher.text), teacher.base, section, tokens, seed)
        converted = sum(slot.converted for slot in config.slot_list())
        files: dict[str, TensorWriter] = {}
        # Both files are closed together at the end, for each close waits for the disk.
        with ExitStack() as stack:
            ahead = _Ahead(built_slots, converted, sum(tensor.length for tensor in slots.values()))
            stack.enter_context(ahead)
            others = ahead.also(beside, partial)
            file = files[WEIGHTS] = stack.enter_context(TensorWriter(partial / WEIGHTS, weights))
            for name, place in kept.items():
                file.copy(name, place)
            if carried:
                (partial / TOWERS).mkdir()
                path = f"{TOWERS}/{WEIGHTS}"
                side = files[path] = stack.enter_context(TensorWriter(partial / path, aside))
                for name, place in carried.items():
                    side.copy(name, place)
                for name in ("config.json", *PROCESSOR_FILES):
                    if (teacher.folder / name).exists():
                        shutil.copyfile(teacher.folder / name, partial / TOWERS / name)
            for built in ahead:
                prefix = f"model.layers.{built.index}.self_attn."
                for name, parameter in built.slot.named_parameters():
                    file.put(prefix + name, parameter.to(dtype))
                made |= {prefix + name for name in built.inherited}
                used |= built.sources
            others.result()
        reports.append(
            TensorReport(
                copied=len(kept),
                made=sorted(made),
                fresh=sorted(slots.keys() - made),
                carried=sorted(carried),
                left_out=sorted(teacher.towers.keys() - carried.keys()),
                unused=sorted(
                    [teacher.names[name] for name in teacher.text.keys() - kept.keys() - used]
                    + teacher.strangers
                ),
            )
        )
        write_plan(partial, plan)
        _write_generation(teacher, partial)
        finish(partial, reports[-1])
        # Last, for a folder without a configuration is no model's.
        config.architectures, config.dtype = [TrihybridGemma4ForCausalLM.__name__], dtype
        config.save_pretrained(partial)
        entries = {path: written.entry for path, written in files.items()}
        return Written(entries, {"tensors": vars(reports[-1])})

    save_folder(folder, write)
    return reports[-1]


class _Ahead:
    """Slots that a thread builds while tensors are copied, as many ahead as memory is set aside for; and other work.

    Args:
        slots: the iterator that builds them.
        count: how many it gives.
        length: bytes of all of them in the file.
    """

    def __init__(self, slots: Iterator[BuiltSlot], count: int, length: int) -> None:
        self._slots, self._count = slots, count
        self._thread = ThreadPoolExecutor(1)
        # While it waits, a slot is in float32, twice the bytes that it has in most files.
        ahead = max(1, min(count, AHEAD_BYTES * count // max(2 * length, 1)))
        self._pending = deque(self._thread.submit(next, slots) for _ in range(min(ahead, count)))

    def also(self, work: Callable[[Path], object], folder: Path) -> Future[object]:
        """Let the thread do something else when it has built what it may."""
        return self._thread.submit(work, folder)

    def __iter__(self) -> Iterator[BuiltSlot]:
        for left in range(self._count, 0, -1):
            built = self._pending.popleft().result()
            if left - 1 > len(self._pending):
                self._pending.append(self._thread.submit(next, self._slots))
            yield built

    def __enter__(self) -> "_Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _retained(teacher: PublishedTeacher, wanted: dict[str, tuple[int, ...]]) -> dict[str, TensorRange]:
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


def _in_file_order(ranges: dict[str, TensorRange]) -> dict[str, TensorRange]:
    """Ranges as they lie on the disk; wide dtypes first, so that each begins at a multiple of its own width."""

    def order(item: tuple[str, TensorRange]) -> tuple[int, Path, int]:
        place = item[1]
        return -DTYPES.get(place.dtype, torch.uint8).itemsize, place.path, place.start

    return dict(sorted(ranges.items(), key=order))


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
