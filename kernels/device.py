"""Copies of tensors to a device."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; a copy from CPU to a GPU does not wait for what runs there."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
