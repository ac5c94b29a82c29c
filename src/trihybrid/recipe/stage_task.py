"""From a stage's section to its task: losses over student and teacher, on the device, in parts or shared out."""

import logging
from pathlib import Path

import torch

from trihybrid.data.shards import TokenShards
from trihybrid.distill.align import AlignTask
from trihybrid.distill.extend import ExtendTask, Extension
from trihybrid.distill.host_table import leave_tables
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import AlignSection, ExtendSection, MatchSection
from trihybrid.distill.task import LossTask
from trihybrid.models.checkpoint import load_teacher
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.recipe.schema import Stage
from trihybrid.train import Workers

_logger = logging.getLogger(__name__)


def stage_task(
    stage: Stage, student: HybridForCausalLM, teacher: Path, train: TokenShards, workers: Workers
) -> LossTask:
    """The task of a stage, on this worker. All workers ask at once.

    Args:
        stage: its section.
        student: what is trained, in place.
        teacher: folder of the model that it was made from; read where the stage wants it.
        train: the training text, whose tokens `vocabulary: training` compares.
        workers: those who train, in groups that share rows where the stage says so.

    Raises:
        ValueError: the section asks for what these models cannot do.
    """
    shard = stage.parallel == "shard" and workers.count > 1
    task = _whole_task(stage, student, teacher, train, workers, shard)
    if shard:
        task.shard(workers)
    elif stage.parallel == "shard":
        _logger.info("parallel: one process holds all weights, there is nobody to share them with")
    return task


def _whole_task(
    stage: Stage,
    student: HybridForCausalLM,
    teacher: Path,
    train: TokenShards,
    workers: Workers,
    shard: bool,
) -> LossTask:
    part = workers.part()
    if isinstance(stage, ExtendSection) and stage.loss == "cross_entropy":
        sizes = (stage.chunk, stage.block, stage.checkpointing, stage.kept_layers)
        extension = Extension(student, stage.train, *sizes, part=part)
        _place(extension, stage, workers.device, shard)
        return ExtendTask(extension)
    pair = Pair(student, load_teacher(teacher), stage.train, part)
    _place(pair, stage, workers.device, shard)
    if isinstance(stage, AlignSection):
        return AlignTask(pair, stage.checkpointing)
    if isinstance(stage, ExtendSection):
        stage = MatchSection(**stage.model_dump(exclude={"kind", "loss"}), alignment_weight=0.0)
    allowed = None
    if stage.vocabulary == "training":
        every_N = torch.from_numpy(train.tokens(0, len(train)).astype("int64"))
        allowed = torch.unique(every_N).to(workers.device)
    matching = Matching(
        pair,
        stage.temperature,
        stage.alignment_weight,
        allowed,
        stage.chunk,
        checkpointing=stage.checkpointing,
        kept_layers=stage.kept_layers,
        top_k=stage.top_k,
        block=stage.block,
    )
    return MatchTask(matching, stage.graph)


def _place(module: Pair | Extension, stage: Stage, device: torch.device, shard: bool) -> None:
    """Move what a loss needs to the device, but for tables that stay on the host; weights that will be shared out go
    there in parts."""
    if stage.tables == "host":
        leave_tables(module.student, device)
    module.to("cpu" if shard else device)
