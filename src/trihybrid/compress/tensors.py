"""What an artifact holds: matrices as integers with a scale a row, other tensors as plain floating-point values.
R rows, C columns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantisedTensor:
    """A matrix as integers: its value is `integers_RC.float() * scales_R.float()[:, None]`.

    Attributes:
        name: of the model's parameter.
        integers_RC: int8 [R, C], in -2**(bits - 1)..2**(bits - 1) - 1.
        scales_R: float16 [R], finite and not negative.
        bits: 2..8.

    Raises:
        ValueError: a tensor of another shape, dtype or range.
    """

    name: str
    integers_RC: Tensor
    scales_R: Tensor
    bits: int

    def __post_init__(self) -> None:
        integers, scales, half = self.integers_RC, self.scales_R, 2 ** (self.bits - 1)
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.name}: bits is {self.bits}, expected 2 to 8")
        if integers.dtype != torch.int8 or integers.ndim != 2 or integers.numel() == 0:
            raise ValueError(f"{self.name}: integers are {_describe(integers)}, expected an int8 matrix")
        if scales.dtype != torch.float16 or scales.shape != integers.shape[:1]:
            raise ValueError(
                f"{self.name}: scales are {_describe(scales)}, expected float16 [{integers.shape[0]}]"
            )
        if int(integers.min()) < -half or int(integers.max()) >= half:
            raise ValueError(
                f"{self.name}: integers lie in {int(integers.min())}..{int(integers.max())}, {self.bits} bits "
                f"hold {-half}..{half - 1}"
            )
        if not torch.isfinite(scales).all() or (scales < 0).any():
            raise ValueError(f"{self.name}: a scale is negative or not finite")

    def dequantised(self) -> Tensor:
        """The values, float32 [R, C], exactly as a reader of the artifact gets them."""
        return self.integers_RC.float() * self.scales_R.float()[:, None]


@dataclass(frozen=True)
class PlainTensor:
    """A tensor kept as it is.

    Attributes:
        name: of the model's parameter.
        values: float16 or float32, up to 8 dimensions, not empty, finite.

    Raises:
        ValueError: a tensor of another shape or dtype, or NaN or infinity in it.
    """

    name: str
    values: Tensor

    def __post_init__(self) -> None:
        values = self.values
        if values.dtype not in (torch.float16, torch.float32) or values.numel() == 0 or values.ndim > 8:
            raise ValueError(
                f"{self.name}: values are {_describe(values)}, expected float16 or float32, not empty"
            )
        if not torch.isfinite(values).all():
            raise ValueError(f"{self.name}: a value is NaN or infinite; the model has diverged")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
