"""One run in several processes, as torchrun starts them: each takes its share of every batch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def started() -> int:
    """How many torchrun started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    """How many have joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes, judges and publishes."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_device(device: str) -> str:
    """`cuda` is another GPU in each process of a machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes, if torchrun started some, for as long as the context lasts."""
    if started() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Make of each tensor the sum of all processes' ones, in one message."""
    if count() == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(whole)
    for tensor, summed in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def agreed(*values: float) -> tuple[float, ...]:
    """What process 0 has."""
    if count() > 1:
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, 0)
        return tuple(told.tolist())
    return values


def wait() -> None:
    """Return once every process has come here."""
    if count() > 1:
        dist.barrier()
