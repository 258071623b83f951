"""What devices do differently: copies to them, and how they say that their memory is full."""

import torch
from torch import Tensor

CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# How it is said where there is no error class for it: MPS, XPU, HIP, cuBLAS, ComfyUI's allocator, the CPU's.
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "allocation on device",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)


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
