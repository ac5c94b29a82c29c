"""The devices that a model can run on here."""

import torch


def present_device(name: str) -> torch.device:
    """The device of that name, asked for before anything is loaded onto it.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: no such device is here.
    """
    count = torch.cuda.device_count()
    present = ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
    if name not in present:
        cure = "" if count else "; cuda needs an NVIDIA GPU and a torch built for it"
        raise ValueError(f'device is "{name}", here it may be {", ".join(present)}{cure}')
    return torch.device(name)
