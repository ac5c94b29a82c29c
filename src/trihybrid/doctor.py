"""What is installed, which backend each operator takes, and whether the numbers are right: a few seconds.

Every backend that is available here runs WKV-7 forward and backward against the token-by-token reference in
float64, fed the same rounded inputs; the softcapped divergence and attention are held to their dense formulas.
The error is norm(x - reference) / max(norm(reference), 1e-6 sqrt(n)).

Shapes: B batch, T queries or time, S keys, H query heads, G key/value heads, E query heads of one key/value head,
K key width, V value width or vocabulary, N tokens, D head or model width.
"""

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trihybrid import __version__
from trihybrid.ops.attention import attention
from trihybrid.ops.backend import backends, choose
from trihybrid.ops.divergence import softcapped_divergence
from trihybrid.ops.rates import DECAY_FLOOR
from trihybrid.ops.wkv7 import wkv7

DISTRIBUTIONS = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "peft",
    "accelerate",
    "triton",
    "fla-core",
)
OPERATORS = ("wkv7",)
# The project's meaning of "==", as a relative rms error.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
CHECKED_DTYPES = {"cpu": (torch.float64, torch.float32), "cuda": (torch.float32, torch.bfloat16)}
WKV7_WIDTH = 64
WKV7_INPUTS = ("r", "log_w", "k", "v", "a", "b", "state")


@dataclass(frozen=True)
class Device:
    """One device: its torch name, what it is in words, and its memory in bytes (0 where unknown)."""

    name: str
    description: str
    memory_bytes: int


@dataclass(frozen=True)
class Choice:
    """What one operator runs on one device.

    `backend` is None when nothing is available; `others` lists the remaining backends, with the reason of each
    that is not available.
    """

    operator: str
    device: str
    backend: str | None
    others: str


@dataclass(frozen=True)
class Check:
    """One comparison with a reference: the relative rms `error` of its worst tensor against `limit`.

    `detail` names that tensor, or the exception that came instead of a result (the error is then infinite).
    """

    name: str
    error: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        """True when the error is within the limit; NaN never is."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Examination:
    """All findings. `versions` maps a distribution to its version or "not installed"."""

    versions: Mapping[str, str]
    devices: tuple[Device, ...]
    choices: tuple[Choice, ...]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """True when every operator has a backend on every kind of device and every check passed."""
        return all(choice.backend for choice in self.choices) and all(check.passed for check in self.checks)


def examine() -> Examination:
    """Look at this installation.

    Deterministic, and the global random state is left alone. A backend that raises is a failed check, no exception.
    """
    devices = _devices()
    kinds = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    choices = tuple(_choice(operator, device) for operator in OPERATORS for device in kinds)
    checks: list[Check] = []
    for device in kinds:
        checks += _check_wkv7(device)
        checks.append(_check("divergence", device, torch.float64, _divergence))
        checks.append(_check("attention", device, torch.float32, _attention))
    return Examination(_versions(), devices, choices, tuple(checks))


def render(examination: Examination, console: Console) -> None:
    """Print the findings as tables, and one line of verdict."""
    versions = Table("package", "version", title="Versions")
    for name, number in examination.versions.items():
        versions.add_row(name, number)
    devices = Table("device", "what", "memory", title="Devices")
    for device in examination.devices:
        memory = f"{device.memory_bytes / 2**30:.1f} GiB" if device.memory_bytes else "unknown"
        devices.add_row(device.name, device.description, memory)
    choices = Table("operator", "device", "backend", "others", title="Backends")
    for choice in examination.choices:
        choices.add_row(choice.operator, choice.device, choice.backend or "none", choice.others)
    checks = Table("check", "error", "limit", "result", "worst", title="Checks: relative rms error")
    for check in examination.checks:
        result = "pass" if check.passed else "FAIL"
        checks.add_row(check.name, f"{check.error:.1e}", f"{check.limit:.0e}", result, check.detail)
    for table in (versions, devices, choices, checks):
        console.print(table)
    failed = sum(not check.passed for check in examination.checks)
    failed += sum(choice.backend is None for choice in examination.choices)
    console.print("healthy" if examination.healthy else f"NOT healthy: {failed} of the findings above failed")


def main() -> int:
    """Examine, print to standard output, and return the exit code: 0 healthy, 1 not."""
    examination = examine()
    render(examination, Console())
    return 0 if examination.healthy else 1


def relative_error(value: Tensor, reference: Tensor) -> float:
    """norm(value - reference) / max(norm(reference), 1e-6 sqrt(n)), in float64 on the CPU.

    ValueError when the two shapes differ.
    """
    if value.shape != reference.shape:
        raise ValueError(f"shape {tuple(value.shape)} differs from the reference's {tuple(reference.shape)}")
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-6 * math.sqrt(reference.numel())))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "trihybrid": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> tuple[Device, ...]:
    physical = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if physical else 0
    instructions = torch.backends.cpu.get_cpu_capability()
    words = f"{platform.machine()}, {instructions}, {torch.get_num_threads()} threads"
    found = [Device("cpu", words, memory)]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        words = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found.append(Device(f"cuda:{number}", words, properties.total_memory))
    return tuple(found)


def _choice(operator: str, device: torch.device) -> Choice:
    try:
        chosen = choose(operator, None, device).name
    except ValueError:
        chosen = None
    others = [
        f"{backend.name}: {backend.available(device) or 'available'}"
        for backend in backends(operator)
        if backend.name != chosen
    ]
    return Choice(operator, device.type, chosen, "; ".join(others))


def _check(
    name: str, device: torch.device, dtype: torch.dtype, measure: Callable[[torch.device], dict[str, float]]
) -> Check:
    """One check: `measure` gives a relative error for each tensor that it compares."""
    label = f"{name}, {device.type}, {str(dtype).removeprefix('torch.')}"
    try:
        errors = measure(device)
    except Exception as problem:  # whatever a backend dies of is a finding here
        first_line = (str(problem).splitlines() or [""])[0]
        return Check(label, math.inf, LIMITS[dtype], f"{type(problem).__name__}: {first_line}")
    worst = max(errors, key=lambda tensor: math.inf if math.isnan(errors[tensor]) else errors[tensor])
    return Check(label, errors[worst], LIMITS[dtype], worst)


def _check_wkv7(device: torch.device) -> list[Check]:
    return [
        _check(f"wkv7 {backend.name}", device, dtype, partial(_wkv7_errors, backend.name, dtype))
        for backend in backends("wkv7")
        if not backend.foreign and backend.available(device) is None
        for dtype in CHECKED_DTYPES[device.type]
        if (backend.name, dtype) != ("reference", torch.float64)
        if backend.takes is None or backend.takes(WKV7_WIDTH, WKV7_WIDTH, dtype) is None
    ]


def _wkv7_errors(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Outputs, final state and every gradient of one backend, on random keys and on one key repeated."""
    errors: dict[str, float] = {}
    for case, repeated in (("random keys", False), ("repeated keys", True)):
        inputs = _wkv7_inputs(dtype, repeated)
        wanted = _wkv7_results("reference", {name: value.double() for name, value in inputs.items()})
        found = _wkv7_results(backend, {name: value.to(device) for name, value in inputs.items()})
        errors |= {f"{name}, {case}": relative_error(found[name], wanted[name]) for name in wanted}
    return errors


def _wkv7_inputs(dtype: torch.dtype, repeated: bool) -> dict[str, Tensor]:
    """r, k, v, a, b [2, 100, 2, 64] in dtype; log_w and the state [2, 2, 64, 64] at least float32."""
    random = torch.Generator().manual_seed(7)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    shape = (2, 100, 2, WKV7_WIDTH)
    r_BTHK, k_BTHK, v_BTHV, w_BTHK, a_BTHK = torch.randn(
        5, *shape, generator=random, dtype=torch.float64
    ).unbind(0)
    if repeated:
        k_BTHK, w_BTHK, a_BTHK = k_BTHK[:, :1].expand(shape), w_BTHK - 7, a_BTHK + 9
    direction_BTHK = k_BTHK / k_BTHK.norm(dim=-1, keepdim=True)
    values = {
        "r": r_BTHK,
        "log_w": DECAY_FLOOR * w_BTHK.sigmoid(),
        "k": direction_BTHK,
        "v": v_BTHV,
        "a": -direction_BTHK,
        "b": direction_BTHK * a_BTHK.sigmoid(),
        "state": torch.randn(2, 2, WKV7_WIDTH, WKV7_WIDTH, generator=random, dtype=torch.float64),
    }
    return {name: value.to(wide if name in ("log_w", "state") else dtype) for name, value in values.items()}


def _wkv7_results(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = [inputs[name].detach().clone().requires_grad_() for name in WKV7_INPUTS]
    r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV = leaves
    reset_BT = torch.zeros(r_BTHK.shape[:2], dtype=torch.bool, device=r_BTHK.device)
    reset_BT[1, 70] = True
    o_BTHV, final_BHKV = wkv7(
        r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV, reset_BT=reset_BT, backend=backend
    )
    random = torch.Generator().manual_seed(8)
    # Rounded to bfloat16, so that every dtype is given the very same slopes.
    slopes = [
        torch.randn(value.shape, generator=random).bfloat16().to(value.device, value.dtype)
        for value in (o_BTHV, final_BHKV)
    ]
    gradients = torch.autograd.grad([o_BTHV, final_BHKV], leaves, slopes)
    return {"o": o_BTHV, "final state": final_BHKV} | {
        f"gradient of {name}": gradient for name, gradient in zip(WKV7_INPUTS, gradients, strict=True)
    }


def _divergence(device: torch.device) -> dict[str, float]:
    """KL(p_T || p_S) of softcapped logits and its gradients, against the formula on all logits at once."""
    random = torch.Generator().manual_seed(9)
    student_ND, teacher_ND, head_VD = (
        torch.randn(rows, 32, generator=random, dtype=torch.float64).to(device).requires_grad_()
        for rows in (70, 70, 300)
    )
    cap = 3.0
    found = softcapped_divergence(student_ND, teacher_ND, head_VD, softcap=cap, chunk=32).kl
    log_student_NV = (cap * torch.tanh(student_ND @ head_VD.T / cap)).log_softmax(-1)
    log_teacher_NV = (cap * torch.tanh(teacher_ND @ head_VD.T / cap)).log_softmax(-1).detach()
    wanted = (log_teacher_NV.exp() * (log_teacher_NV - log_student_NV)).sum(-1).mean()
    found_gradients = torch.autograd.grad(found, [student_ND, head_VD])
    wanted_gradients = torch.autograd.grad(wanted, [student_ND, head_VD])
    return {
        "kl": relative_error(found, wanted),
        "gradient of student_hidden": relative_error(found_gradients[0], wanted_gradients[0]),
        "gradient of head": relative_error(found_gradients[1], wanted_gradients[1]),
    }


def _attention(device: torch.device) -> dict[str, float]:
    """A window of 16 over 60 tokens, 4 query heads on 2 key/value heads, against explicit softmax in float64."""
    random = torch.Generator().manual_seed(10)
    q_BTHD = torch.randn(2, 60, 4, 32, generator=random)
    k_BGSD, v_BGSD = torch.randn(2, 2, 2, 60, 32, generator=random).unbind(0)
    distance_TS = torch.arange(60)[:, None] - torch.arange(60)[None, :]
    visible_BTS = ((distance_TS >= 0) & (distance_TS < 16))[None]
    scale = 32**-0.5

    def explicit(q_BTHD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        q_BGETD = q_BTHD.transpose(1, 2).unflatten(1, (2, 2))
        scores_BGETS = scale * torch.einsum("bgetd,bgsd->bgets", q_BGETD, k_BGSD)
        weights_BGETS = scores_BGETS.masked_fill(~visible_BTS[:, None, None], -math.inf).softmax(-1)
        return torch.einsum("bgets,bgsd->bgetd", weights_BGETS, v_BGSD).flatten(1, 2).transpose(1, 2)

    given = [value.to(device).requires_grad_() for value in (q_BTHD, k_BGSD, v_BGSD)]
    exact = [value.detach().cpu().double().requires_grad_() for value in given]
    found = attention(given[0], given[1], given[2], visible_BTS.to(device), scale)
    wanted = explicit(*exact)
    slope = torch.randn(wanted.shape, generator=random)
    found_gradients = torch.autograd.grad(found, given, slope.to(device))
    wanted_gradients = torch.autograd.grad(wanted, exact, slope.double())
    errors = {"o": relative_error(found, wanted)}
    for name, one, other in zip("qkv", found_gradients, wanted_gradients, strict=True):
        errors[f"gradient of {name}"] = relative_error(one, other)
    return errors
