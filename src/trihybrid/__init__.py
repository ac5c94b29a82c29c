"""trihybrid: language models whose layers mix attention, sliding windows and recurrence."""

__version__ = "0.1.0"
