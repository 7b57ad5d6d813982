"""The machine: how much memory a process may still fill."""

import os


def free_memory() -> int:
    """Bytes that this process may still fill: of its GPU, or else its part of the memory that is available."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by torch for this process
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    import psutil

    return psutil.virtual_memory().available
