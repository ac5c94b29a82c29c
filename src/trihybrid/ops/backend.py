"""One registry for the implementations (backends) of every operator in this package.

An operator such as "wkv7" has one reference backend and any number of faster ones. A backend is chosen once for each
operator, name and device type, and the choice is logged. One that was asked for by name and cannot run is an error:
nothing falls back to a slower path silently.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    operator: the operator that it implements, for instance "wkv7".
    name: unique among the backends of that operator, for instance "chunked".
    function: the implementation; all backends of one operator take and return the same things.
    available: given a device, None when the backend can run there, else the reason why it cannot.
    priority: among the available backends of an operator the highest priority is taken when no name is asked for.
    takes: given what the operator says of a call (its sizes and dtypes), None when the backend can work on it, else the
        reason why it cannot; None for a backend that takes all that its operator does.
    foreign: somebody else's, for comparisons: taken by name alone, and not examined by `doctor`.
    """

    operator: str
    name: str
    function: Callable
    available: Callable[[torch.device], str | None]
    priority: int
    takes: Callable[..., str | None] | None = None
    foreign: bool = False


_registry: dict[tuple[str, str], Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend. ValueError when its operator already has another backend of that name."""
    key = (backend.operator, backend.name)
    if key in _registry:
        raise ValueError(
            f"backend {backend.name!r} of operator {backend.operator!r} is registered already; pick another name"
        )
    _registry[key] = backend
    _choose.cache_clear()
    _next.cache_clear()


def backends(operator: str) -> list[Backend]:
    """All backends of an operator, highest priority first. ValueError for an operator that nobody registered."""
    found = [backend for backend in _registry.values() if backend.operator == operator]
    if not found:
        known = sorted({backend.operator for backend in _registry.values()})
        raise ValueError(f"operator {operator!r} has no backend; operators with backends: {known}")
    return sorted(found, key=lambda backend: (-backend.priority, backend.name))


def choose(operator: str, name: str | None, device: torch.device) -> Backend:
    """The backend of an operator that runs on a device.

    operator: an operator with registered backends.
    name: None for the available backend of the highest priority, or the name of the one that is wanted.
    device: only its type ("cpu", "cuda") counts; the choice is made, and logged at INFO, once for each type.

    ValueError when the operator or the name is unknown, or when the backend is not available on the device; the
    message gives the reason and the names that are available.
    """
    return _choose(operator, name, device.type)


def choose_for(operator: str, name: str | None, device: torch.device, *call: object) -> Backend:
    """As `choose`, for one call: without a name, a backend that does not take it leaves it to the next one, which is
    logged once for each reason. ValueError for a backend that was asked for by name and does not take it.

    call: what `Backend.takes` of this operator is given.
    """
    chosen = choose(operator, name, device)
    reason = None if chosen.takes is None else chosen.takes(*call)
    if reason is None:
        return chosen
    if name is not None:
        raise ValueError(f"backend {name!r} of operator {operator!r} cannot do this: {reason}")
    return _next(operator, device.type, chosen.name, reason)


@functools.cache
def _next(operator: str, device_type: str, refusing: str, reason: str) -> Backend:
    """The backend after one that does not take a call."""
    device = torch.device(device_type)
    usable = [b for b in backends(operator) if not b.foreign and b.available(device) is None]
    after = [backend.name for backend in usable].index(refusing) + 1
    chosen = next((backend for backend in usable[after:] if backend.takes is None), None)
    if chosen is None:
        raise ValueError(f"operator {operator!r} has no backend on {device_type} but {refusing!r}: {reason}")
    logger.info(
        "operator %s on %s: backend %s, because %s: %s", operator, device_type, chosen.name, refusing, reason
    )
    return chosen


@functools.cache
def _choose(operator: str, name: str | None, device_type: str) -> Backend:
    device = torch.device(device_type)
    candidates = backends(operator)
    reasons = {backend.name: backend.available(device) for backend in candidates}
    usable = [backend for backend in candidates if reasons[backend.name] is None]
    names = [backend.name for backend in usable]
    if name is not None and name not in reasons:
        raise ValueError(
            f"operator {operator!r} has no backend {name!r}; available on {device_type}: {names}, "
            f"registered: {sorted(reasons)}"
        )
    if name is not None and reasons[name] is not None:
        raise ValueError(
            f"backend {name!r} of operator {operator!r} is not available on {device_type}: {reasons[name]}; "
            f"available: {names}"
        )
    own = [backend for backend in usable if not backend.foreign]
    if not own and name is None:
        raise ValueError(f"operator {operator!r} has no backend available on {device_type}: {reasons}")
    chosen = own[0] if name is None else next(backend for backend in usable if backend.name == name)
    logger.info("operator %s on %s: backend %s", operator, device_type, chosen.name)
    return chosen
