"""The RWKV-7 mixer of the hxa07 family: grouped keys and values, QK-norm, no token shift.

`mixer` has the equations and the module, `options` what can be chosen, `revisions` what the published revisions chose,
`start` where training starts.
"""

from trihybrid.mixers.rwkv7.mixer import Operands, Prepare, Rates, Rwkv7, prepared
from trihybrid.mixers.rwkv7.options import Rwkv7Options
from trihybrid.mixers.rwkv7.revisions import REVISIONS, Revision
from trihybrid.mixers.rwkv7.start import scaled_orthogonal, write_gate

__all__ = [
    "REVISIONS",
    "Operands",
    "Prepare",
    "Rates",
    "Revision",
    "Rwkv7",
    "Rwkv7Options",
    "prepared",
    "scaled_orthogonal",
    "write_gate",
]
