"""Running a recipe: teacher, surgery, stages, each recorded in the lineage, then measurement.

A phase that the lineage already holds is checked and skipped, so a run that was killed goes on where it stopped.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from trihybrid.data import PackedBatches, PreparedData, prepare
from trihybrid.data.section import load_tokenizer
from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import AlignSection, MatchSection
from trihybrid.models.checkpoint import load_student, load_teacher
from trihybrid.models.shapes import TeacherConfig
from trihybrid.pretrain.task import PretrainTask
from trihybrid.recipe.load import dump_recipe, load_conversion
from trihybrid.recipe.measure import measure
from trihybrid.recipe.planned import check_shape, teacher_name
from trihybrid.recipe.schema import NAMES, Recipe
from trihybrid.run import Lineage, RunDirectory, RunLog, hash_folder, hash_json, write_json, write_text
from trihybrid.storage.folder import save_folder
from trihybrid.surgery.layout import window_of
from trihybrid.surgery.operate import operate, read_plan, save_student
from trihybrid.surgery.plan import make_plan
from trihybrid.train import Checkpoints, Task, TrainSection, fit

CALIBRATION_LENGTH = 256


@dataclass
class Run:
    """One execution of a recipe: its folder, lineage and data, and whether it goes on from an earlier one."""

    recipe: Recipe
    directory: RunDirectory
    lineage: Lineage
    data: PreparedData
    resume: bool

    def phase(self, name: str, parent: str, sections: Any, make: Callable[[str], None]) -> str:
        """Run `make` unless the lineage already holds the phase; the hash of the model folder that it leaves.

        Args:
            name: of the phase and its folder.
            parent: hash of the model before it, "" for a teacher.
            sections: what of the recipe decides the phase.
            make: gets the hash of `sections`, leaves the folder.

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
        output = hash_folder(folder)
        self.lineage.append(name, parent, wanted, output, time.perf_counter() - began)
        return output

    def train(self, name: str, parent: str, stage_hash: str, task: Task, section: TrainSection) -> None:
        """Train a task to the end of its stage, from its newest checkpoint on."""
        loop = section.loop
        batches = PackedBatches(self.data.train, loop.sequence_length, loop.batch_size, loop.seed)
        checkpoints = Checkpoints(self.directory.checkpoints(name), stage_hash, parent)
        with RunLog(self.directory.log, name, every=loop.log_every) as log:
            fit(task, batches.batch, section, checkpoints, log, resume=self.resume)


def execute(recipe: Recipe, folder: str | Path, resume: bool = False) -> list[dict[str, Any]]:
    """Run a recipe to its end and measure every model that it makes.

    Args:
        recipe: what to do.
        folder: the run directory; it must be new or empty, unless `resume`.
        resume: go on with what is there.

    Returns:
        The rows of results.json.

    Raises:
        ValueError: the folder holds something and `resume` is False; the recipe was changed; bad input of any kind.
    """
    began = time.perf_counter()
    folder = Path(folder)
    begun = folder.exists() and any(RunDirectory(folder, create=False).path.iterdir())
    if begun and not resume:
        raise ValueError(f"{folder}: not empty; continue with --resume, or name another folder with --out")
    # Everything that can be wrong with the input is found before the first file is written.
    base = check_recipe(recipe)
    if begun:
        _refuse_changes(recipe, RunDirectory(folder, create=False))
    data = _prepare(recipe, base, folder, begun)
    directory = RunDirectory(folder)
    run = Run(recipe, directory, Lineage(directory.lineage), data, resume)
    write_text(directory.recipe, dump_recipe(recipe))
    output = _make_teacher(run)
    output = _operate(run, output)
    names = ["teacher", "operated"]
    for stage in recipe.stages:
        output = _distil(run, stage, names[-1], output)
        names.append(NAMES[stage.kind])
    # Phases that an earlier call made took their time too.
    seconds = max(time.perf_counter() - began, sum(record.seconds for record in run.lineage.records))
    return measure(recipe, directory, data, names, seconds)


def check_recipe(recipe: Recipe) -> TeacherConfig:
    """The teacher's configuration, if teacher, layout and tokenizer go together; writes nothing, reads no text.

    Raises:
        ValueError: a teacher, layout or tokenizer that does not serve.
    """
    tokenizer = load_tokenizer(recipe.data)
    if recipe.teacher.pretrain is not None:
        base = recipe.teacher.pretrain.configuration(tokenizer.vocab_size)
    else:
        base = load_teacher(str(recipe.teacher.folder)).config
        check_shape(recipe, base)
    make_plan(base, recipe.surgery, teacher_name(recipe), contexts=(4096,))
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


def _prepare(recipe: Recipe, base: TeacherConfig, folder: Path, begun: bool) -> PreparedData:
    """The data of a run. Data that no stage could train on, or that cannot be measured on, leaves no file behind."""
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
    return data


def _make_teacher(run: Run) -> str:
    section = run.recipe.teacher.pretrain

    def make(stage_hash: str) -> None:
        if section is None:
            model = load_teacher(str(run.recipe.teacher.folder))
        else:
            torch.manual_seed(section.loop.seed)
            model = Gemma4ForCausalLM(section.configuration(run.data.tokenizer.vocab_size))
            run.train("teacher", "", stage_hash, PretrainTask(model, section.chunk), section)

        def write(partial: Path) -> None:
            model.save_pretrained(partial)
            run.data.tokenizer.save(partial)

        save_folder(run.directory.model("teacher"), write)

    sections = (
        hash_folder(str(run.recipe.teacher.folder)) if section is None else section.model_dump(mode="json")
    )
    return run.phase("teacher", "", sections, make)


def _operate(run: Run, parent: str) -> str:
    section = run.recipe.surgery

    def make(stage_hash: str) -> None:
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


def _distil(run: Run, stage: AlignSection | MatchSection, before: str, parent: str) -> str:
    name = NAMES[stage.kind]

    def make(stage_hash: str) -> None:
        student = load_student(run.directory.model(before))
        pair = Pair(student, load_teacher(run.directory.model("teacher")), stage.train)
        run.train(name, parent, stage_hash, _task(run, stage, pair), stage)
        plan = read_plan(run.directory.model(before))
        save_student(student, plan, run.directory.model(name), run.data.tokenizer.save)

    return run.phase(name, parent, stage.model_dump(mode="json"), make)


def _task(run: Run, stage: AlignSection | MatchSection, pair: Pair) -> Task:
    if isinstance(stage, AlignSection):
        return AlignTask(pair, stage.checkpointing)
    allowed = None
    if stage.vocabulary == "training":
        allowed = torch.unique(
            torch.from_numpy(run.data.train.tokens(0, len(run.data.train)).astype("int64"))
        )
    matching = Matching(
        pair,
        stage.temperature,
        stage.alignment_weight,
        allowed,
        stage.chunk,
        checkpointing=stage.checkpointing,
    )
    return MatchTask(matching)
