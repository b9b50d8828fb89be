"""Ranks agree on a call before they compute: an error on one of them is an error on all, instead of a wait for the one that left."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._collectives import all_gather


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(the result, None) or (None, the error)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def fingerprint(*values: Any) -> int:
    """64 bits of options that must be alike."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def checksum(*tensors: Tensor | None) -> int:
    """64 bits of what tensors hold: each row's bits are added, and rows are weighted by their place. Sums of integers wrap, and do not
    depend on their order."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        bits = tensor.detach().contiguous()
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        of_rows = bits.reshape(len(bits), bits.shape[1:].numel()).sum(1, dtype=torch.int64)
        places = torch.arange(1, len(of_rows) + 1, device=bits.device)
        total = 31 * total + int((of_rows * places).sum())
    # Into 64 bits, signed.
    return (total + 2**63) % 2**64 - 2**63


def agree(
    group: dist.ProcessGroup, device: torch.device, error: Exception | None, alike: dict[str, int], own: tuple[int, ...] = ()
) -> list[list[int]]:
    """Gathers a few numbers of each rank, and returns those of ``own`` of every rank.

    Args:
        error: what this rank found wrong. It is raised here, and the other ranks raise that this one refused the call.
        alike: by name, what every rank must have the same.
        own: what each rank has of its own.

    Raises:
        ValueError: a rank refused the call, or ranks were called with different things.
    """
    values = [0] * (len(alike) + len(own)) if error is not None else [*alike.values(), *own]
    table = all_gather(torch.tensor([int(error is not None), *values], dtype=torch.int64).to(device), group).tolist()
    if error is not None:
        raise error
    refused = [rank for rank, row in enumerate(table) if row[0]]
    if refused:
        raise ValueError(f"rank {refused[0]} of the group refused its arguments; rule: those that every rank accepts. Its error says more")
    for place, name in enumerate(alike, 1):
        for rank, row in enumerate(table):
            if row[place] != table[0][place]:
                raise ValueError(f"{name} of rank {rank} differ from those of rank 0; rule: the same on every rank of the group")
    return [row[1 + len(alike) :] for row in table]
