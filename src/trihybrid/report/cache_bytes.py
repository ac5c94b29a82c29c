"""Bytes that a model keeps between tokens, against the context length, and where two models keep the same."""

from dataclasses import dataclass

from trihybrid.report.reading import Row, number


@dataclass(frozen=True)
class CacheBytes:
    """per_token: bytes that every further token of context adds (global keys and values).
    fixed: bytes held at any context (recurrent states and full sliding windows)."""

    per_token: float
    fixed: float

    def at(self, context: int) -> float:
        """Bytes at `context` tokens. Sliding windows count as full: a context shorter than one is overstated."""
        return self.per_token * context + self.fixed


def cache_bytes(side: Row) -> CacheBytes | None:
    """From one side ("before" or "after") of plan.json; None when one of its three sizes is missing."""
    names = ("global_kv_bytes_per_token", "recurrent_state_bytes", "sliding_cache_bytes")
    per_token, recurrent, sliding = (number(side, name) for name in names)
    if per_token is None or recurrent is None or sliding is None:
        return None
    return CacheBytes(per_token, recurrent + sliding)


def break_even(teacher: CacheBytes, student: CacheBytes) -> float | None:
    """The context in tokens, one or more, at which both keep the same number of bytes; None when there is none."""
    slope = teacher.per_token - student.per_token
    if slope == 0:
        return None
    context = (student.fixed - teacher.fixed) / slope
    return context if context >= 1 else None


def compare(teacher: CacheBytes, student: CacheBytes) -> str:
    """One sentence that says who keeps fewer bytes, and where."""
    crossing = break_even(teacher, student)
    if crossing is not None:
        side = "beyond" if student.per_token < teacher.per_token else "only below"
        return f"The student keeps fewer bytes than the teacher {side} {crossing:,.0f} tokens of context (break-even)."
    if student == teacher:
        return "The student keeps exactly as many bytes as the teacher at every context."
    # Without a crossing any one context decides for all.
    order = "fewer" if student.at(2) < teacher.at(2) else "more"
    return f"The student keeps {order} bytes than the teacher at every context; there is no break-even."
