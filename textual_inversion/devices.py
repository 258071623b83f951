"""What devices do differently: copies to them, and how they say that their memory is full."""

import torch
from torch import Tensor

from .errors import UserError

CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# ComfyUI's sub-quadratic attention, in the ways that it takes where memory is short.
NO_BACKWARD = "exp(): functions with out=... arguments don't support automatic differentiation"
# How it is said where there is no error class for it: MPS, XPU, HIP, cuBLAS, ComfyUI's allocator, the CPU's.
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "allocation on device",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    NO_BACKWARD,
)


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where there is none here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        known = ", ".join(["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])])
        raise UserError(f"This machine has no device {name!r} that PyTorch can use: choose from {known}.") from error
    return device


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a card that computes in it, float16 on an older one, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, differentiable. On CUDA without waiting for what is queued there."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # others have had bugs with it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no room left, whatever the backend calls it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY:  # torch.AcceleratorError
        return True
    return any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)
