"""Compact hybrids, trained from scratch under a byte budget."""

from trihybrid.models.compact.model import CompactModel, CompactState
from trihybrid.models.compact.section import CompactSection

__all__ = ["CompactModel", "CompactSection", "CompactState"]
