"""The recipe's section on where a run's numbers go besides its log."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrackingSection(BaseModel):
    """Trackers beside log.jsonl, which is always written."""

    model_config = ConfigDict(extra="forbid")
    to: list[TrackerName] = Field(
        default_factory=list,
        max_length=3,
        description="trackers that get every row: tensorboard, wandb, trackio",
    )
    project: str = Field(
        default="trihybrid", min_length=1, description="project that wandb and trackio file the run under"
    )
