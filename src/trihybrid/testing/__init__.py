"""What every mixer must obey, as functions: `laws` holds the laws, `compare` says when two tensors are equal.

from trihybrid.testing import LAWS, Subject, randomise

def build(dtype, seed):
    return randomise(MyMixer(width=32), seed).to(dtype)

subject = Subject("mine", build, width=32)
for law in LAWS.values():
    if law.applies(subject):
        for dtype in law.dtypes:
            law.check(subject, dtype)
"""

from trihybrid.testing.compare import TOLERANCE, relative_error
from trihybrid.testing.laws import LAWS, Law
from trihybrid.testing.trial import LawBroken, Subject, randomise

__all__ = ["LAWS", "TOLERANCE", "Law", "LawBroken", "Subject", "randomise", "relative_error"]
