"""Running a recipe: teacher, surgery, stages, each recorded in the lineage, then measurement.

A phase that the lineage already holds is checked and skipped, so a run that was killed goes on where it stopped.
Under torchrun all processes train, and the first of them does the rest: it alone writes models, lineage and log.
"""

import gc
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from trihybrid.data import Batch, PackedBatches, Prefetch, PreparedData, prepare
from trihybrid.data.section import load_tokenizer
from trihybrid.distill.align import check_converted
from trihybrid.distill.host_table import check_apart
from trihybrid.distill.trained import set_parameters
from trihybrid.models.checkpoint import load_student, load_teacher
from trihybrid.models.shapes import TeacherConfig
from trihybrid.pretrain.task import PretrainTask
from trihybrid.recipe.load import dump_recipe, load_conversion
from trihybrid.recipe.measure import measure
from trihybrid.recipe.planned import check_shape, teacher_name
from trihybrid.recipe.schema import NAMES, Recipe, Stage
from trihybrid.recipe.stage_task import stage_task
from trihybrid.recipe.workers import recipe_workers
from trihybrid.run import Lineage, RunDirectory, RunLog, hash_folder, hash_json, write_json, write_text
from trihybrid.run.tracking import Tracker, check_trackers, open_trackers
from trihybrid.storage.folder import save_folder
from trihybrid.surgery.layout import layout, window_of
from trihybrid.surgery.operate import operate, read_plan, save_student
from trihybrid.surgery.plan import make_plan
from trihybrid.train import Checkpoints, CompletesBatches, Task, TrainSection, Workers, check_division, fit

_logger = logging.getLogger(__name__)

CALIBRATION_LENGTH = 256


@dataclass
class Run:
    """One execution of a recipe: its folder, lineage and data, whether it goes on from an earlier one, and who works
    on it."""

    recipe: Recipe
    directory: RunDirectory
    lineage: Lineage
    data: PreparedData
    resume: bool
    workers: Workers
    trackers: list[Tracker]

    def phase(self, name: str, parent: str, sections: Any, make: Callable[[str], None]) -> str:
        """Run `make` unless the lineage already holds the phase; the hash of the model folder that it leaves.

        Args:
            name: of the phase and its folder.
            parent: hash of the model before it, "" for a teacher.
            sections: what of the recipe decides the phase.
            make: gets the hash of `sections`; called by every worker, leaves the folder on the first.

        Raises:
            ValueError: the phase was made with another recipe or from another parent, or its folder was changed.
        """
        wanted = hash_json({"sections": sections, "data": self.data.train.manifest.source_hash})
        folder = self.directory.model(name)
        done = self.lineage.record(name)
        if done is not None:
            if done.recipe != wanted or done.parent != parent:
                raise ValueError(
                    f"{folder}: this stage was made with another recipe or parent; restore the recipe, or start "
                    "a new run directory"
                )
            if not folder.is_dir() or hash_folder(folder) != done.output:
                raise ValueError(f"{folder}: changed since it was made; start a new run directory")
            return done.output
        began = time.perf_counter()
        make(wanted)
        self.workers.wait()
        output = hash_folder(folder)
        if self.workers.first:
            self.lineage.append(name, parent, wanted, output, time.perf_counter() - began)
        return output

    def train(
        self,
        name: str,
        parent: str,
        stage_hash: str,
        task: Task,
        section: TrainSection,
        workers: Workers,
    ) -> None:
        """Train a task to the end of its stage, from its newest checkpoint on. Workers take the rows of a step in turn,
        alone or those who share rows together: all of them see the same rows, however many they are."""
        loop = section.loop
        packed = PackedBatches(self.data.train, loop.sequence_length, loop.batch_size, loop.seed)
        place = workers.rank % workers.context

        def batch(step: int) -> Batch:
            made = packed.batch(step, workers.share, workers.shares).part(place, workers.context)
            return task.complete(made) if isinstance(task, CompletesBatches) else made

        def name_batch(step: int) -> str:
            rows = packed.name(step, workers.share, workers.shares)
            return rows if workers.context == 1 else f"part {place} of {workers.context} of {rows}"

        checkpoints = Checkpoints(self.directory.checkpoints(name), stage_hash, parent)
        with ExitStack() as stack:
            batches = stack.enter_context(Prefetch(batch, device=workers.device))
            log = None
            if workers.first:
                log = RunLog(self.directory.log, name, every=loop.log_every, trackers=self.trackers)
                stack.enter_context(log)
            fit(task, batches, section, checkpoints, log, self.resume, workers, name_batch)


def execute(recipe: Recipe, folder: str | Path, resume: bool = False) -> list[dict[str, Any]] | None:
    """Run a recipe to its end and measure every model that it makes.

    Args:
        recipe: what to do.
        folder: the run directory; it must be new or empty, unless `resume`.
        resume: go on with what is there.

    Returns:
        The rows of results.json; None in the other processes of torchrun.

    Raises:
        ValueError: the folder holds something and `resume` is False; the recipe was changed; bad input of any kind.
    """
    with recipe_workers() as workers, ExitStack() as stack:
        return _execute(recipe, Path(folder), resume, workers, stack)


def _execute(
    recipe: Recipe, folder: Path, resume: bool, workers: Workers, stack: ExitStack
) -> list[dict[str, Any]] | None:
    began = time.perf_counter()
    begun = False
    if workers.first:
        begun = folder.exists() and any(RunDirectory(folder, create=False).path.iterdir())
        if begun and not resume:
            raise ValueError(
                f"{folder}: not empty; continue with --resume, or name another folder with --out"
            )
    # Everything that can be wrong with the input is found before the first file is written.
    base = check_recipe(recipe, workers.count)
    if begun:
        _refuse_changes(recipe, RunDirectory(folder, create=False))
    data = _prepare(recipe, base, folder, begun, workers)
    directory = RunDirectory(folder)
    trackers = open_trackers(recipe.tracking, folder, recipe.name) if workers.first else []
    for tracker in trackers:
        stack.callback(tracker.close)
    run = Run(recipe, directory, Lineage(directory.lineage), data, resume, workers, trackers)
    if workers.first:
        write_text(directory.recipe, dump_recipe(recipe))
    # Nobody changes the lineage before everybody has read it.
    workers.wait()
    output = _make_teacher(run)
    output = _operate(run, output)
    names = ["teacher", "operated"]
    for stage in recipe.stages:
        output = _distil(run, stage, names[-1], output)
        names.append(NAMES[stage.kind])
    if not workers.first:
        return None
    # Phases that an earlier call made took their time too.
    seconds = max(time.perf_counter() - began, sum(record.seconds for record in run.lineage.records))
    return measure(recipe, directory, data, names, seconds, workers.device)


def check_recipe(recipe: Recipe, workers: int = 1) -> TeacherConfig:
    """The teacher's configuration, if teacher, layout and tokenizer go together; writes nothing, reads no text.

    Raises:
        ValueError: a teacher, layout, tokenizer or tracker that does not serve, a layout that leaves a stage nothing
            to align, or a batch or rows that do not divide among so many workers.
    """
    if recipe.teacher.pretrain is not None:
        check_division(recipe.teacher.pretrain.loop, workers)
    for stage in recipe.stages:
        check_division(stage.loop, workers // stage.sharers(workers))
    check_trackers(recipe.tracking)
    tokenizer = load_tokenizer(recipe.data)
    if recipe.teacher.pretrain is not None:
        base = recipe.teacher.pretrain.configuration(tokenizer.vocab_size)
    else:
        base = load_teacher(str(recipe.teacher.folder)).config
        check_shape(recipe, base)
    make_plan(base, recipe.surgery, teacher_name(recipe), contexts=(4096,))
    if any(stage.kind == "align" for stage in recipe.stages):
        check_converted(layout(base, recipe.surgery))
    if any(stage.tables == "host" for stage in recipe.stages):
        check_apart(base)
    if base.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, the teacher knows {base.vocab_size}; "
            "give the teacher's own tokenizer.json"
        )
    return base


def _refuse_changes(recipe: Recipe, directory: RunDirectory) -> None:
    """Raise where a phase that has begun would now be another one. Text and models are held by their hashes."""
    if not directory.recipe.exists():
        return
    wanted = _phases(recipe)
    for name, decision in _phases(load_conversion(directory.recipe)).items():
        started = directory.model(name).is_dir() or directory.checkpoints(name).is_dir()
        if started and wanted.get(name) != decision:
            raise ValueError(
                f"{directory.model(name)}: this stage began with another recipe ({directory.recipe}); restore "
                "the recipe, or start a new run directory"
            )


def _phases(recipe: Recipe) -> dict[str, Any]:
    """Phase -> what in the recipe decides it, the phase before it included."""
    pretrain = recipe.teacher.pretrain
    phases: dict[str, Any] = {
        "teacher": None if pretrain is None else pretrain.model_dump(mode="json"),
        "operated": recipe.surgery.model_dump(mode="json"),
    }
    before = "operated"
    for stage in recipe.stages:
        phases[NAMES[stage.kind]] = (before, stage.model_dump(mode="json"))
        before = NAMES[stage.kind]
    return phases


def _prepare(
    recipe: Recipe, base: TeacherConfig, folder: Path, begun: bool, workers: Workers
) -> PreparedData:
    """The data of a run. The first worker makes it, then the others open it. Data that no stage could train on, or that
    cannot be measured on, leaves no file behind."""
    if not workers.first:
        workers.wait()
        return prepare(recipe.data, folder / "data", replace=False)
    existed = folder.exists()
    data = prepare(recipe.data, folder / "data", replace=False)
    try:
        for section in filter(None, [recipe.teacher.pretrain, *recipe.stages]):
            loop = section.loop
            PackedBatches(data.train, loop.sequence_length, loop.batch_size, loop.seed)
        farthest, window = int(data.recall.distance_NT.max()), window_of(base, recipe.surgery)
        if window is not None and farthest < window:
            raise ValueError(
                f"data.recall: no answer lies beyond the window of {window} tokens (the farthest is {farthest} back); "
                "ask for more pairs or a wider gap"
            )
    except ValueError:
        if not begun:
            shutil.rmtree(folder / "data" if existed else folder)
        raise
    workers.wait()
    return data


def _make_teacher(run: Run) -> str:
    section = run.recipe.teacher.pretrain

    def make(stage_hash: str) -> None:
        if section is None:
            # A published teacher becomes memory of each process that reads it, and one of them writes.
            if not run.workers.first:
                return
            model = load_teacher(str(run.recipe.teacher.folder))
        else:
            torch.manual_seed(section.loop.seed)
            model = Gemma4ForCausalLM(section.configuration(run.data.tokenizer.vocab_size))
            model.to(run.workers.device)
            task = PretrainTask(model, section.chunk, section.dtype)
            run.train("teacher", "", stage_hash, task, section, run.workers)
            if section.dtype is not None:
                model.to(section.dtype)

        def write(partial: Path) -> None:
            model.save_pretrained(partial)
            run.data.tokenizer.save(partial)

        if run.workers.first:
            save_folder(run.directory.model("teacher"), write)

    sections = (
        hash_folder(str(run.recipe.teacher.folder)) if section is None else section.model_dump(mode="json")
    )
    return run.phase("teacher", "", sections, make)


def _operate(run: Run, parent: str) -> str:
    section = run.recipe.surgery

    def make(stage_hash: str) -> None:
        if not run.workers.first:
            return
        teacher = load_teacher(run.directory.model("teacher"))
        plan = make_plan(teacher.config, section, teacher_name(run.recipe))
        write_json(run.directory.plan, plan)
        student = operate(teacher, plan, calibration_blocks(run.data, plan["surgery"]["calibration_tokens"]))
        save_student(student, plan, run.directory.model("operated"), run.data.tokenizer.save)

    return run.phase("operated", parent, section.model_dump(mode="json"), make)


def calibration_blocks(data: PreparedData, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, position_ids) of about `tokens` training tokens, in rows of at most `CALIBRATION_LENGTH`; none where
    none are wanted."""
    if not tokens:
        return []
    length = min(CALIBRATION_LENGTH, len(data.train) - 1)
    rows = max(1, min(tokens // length, (len(data.train) - 1) // length))
    batch = PackedBatches(data.train, length, rows, seed=0).batch(0)
    return [(batch.inputs, batch.positions)]


def _distil(run: Run, stage: Stage, before: str, parent: str) -> str:
    name = NAMES[stage.kind]

    def make(stage_hash: str) -> None:
        student = load_student(run.directory.model(before))
        workers = replace(run.workers, context=stage.sharers(run.workers.count))
        if stage.context > workers.context:
            _logger.warning(
                "context: %d, but one process is alone and computes whole rows; torchrun starts several",
                stage.context,
            )
        task = stage_task(stage, student, run.directory.model("teacher"), run.data.train, workers)
        run.train(name, parent, stage_hash, task, stage, workers)
        trained = task.whole_parameters()
        if run.workers.first:
            if not task.whole:
                # What is shared out or left on the host is whole no more; what did not train is as it was.
                student = load_student(run.directory.model(before))
                set_parameters(student, trained)
            plan = read_plan(run.directory.model(before))
            save_student(student, plan, run.directory.model(name), run.data.tokenizer.save)
        if task.rows():
            # FSDP's hooks and modules hold each other, and the next stage wants their memory.
            del task
            gc.collect()

    return run.phase(name, parent, stage.model_dump(mode="json"), make)
