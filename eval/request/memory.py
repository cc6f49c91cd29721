"""Whether an error means that there is no memory left."""

import torch

NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
"""What torch says when the CPU's allocator fails, on Linux and elsewhere, and when pinned memory cannot be had."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of the device or of the machine has run out; torch has no exception of its own for the latter."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
