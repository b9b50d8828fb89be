"""The collectives of this package, on any `ProcessGroup`: tensors of rows of any number, none too, in the order of the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch.distributed is not initialized; rule: torch.distributed.init_process_group() before this call")
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(f"group has no rank {dist.get_rank()}; rule: a group that this process belongs to")
    return group


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R, ...) of tensors of one shape."""
    ranks = dist.get_world_size(group)
    out = tensor.new_empty(ranks * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.contiguous().reshape(-1), group=group)
    return out.reshape(ranks, *tensor.shape)


def gather_rows(tensor: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, one rank's after the other's, in memory of their own. Rank r has ``sizes[r]``; shorter ones are padded on
    their way."""
    longest = max(sizes)
    if longest == 0:
        return tensor.clone()
    every = all_gather(_padded(tensor, longest), group)
    if min(sizes) == longest:
        return every.flatten(0, 1)
    return torch.cat([of_rank[:n] for of_rank, n in zip(every, sizes)])


def reduce_scatter_rows(tensor: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of (sum of sizes, ...), of which each rank gets its rows: what takes the gradient of `gather_rows` back."""
    rank, longest = dist.get_rank(group), max(sizes)
    if longest == 0:
        return tensor
    parts = tensor.contiguous()
    if min(sizes) < longest:
        parts = torch.cat([_padded(part, longest) for part in tensor.split(sizes)])
    mine = parts.new_empty((longest, *tensor.shape[1:]))
    try:
        dist.reduce_scatter_tensor(mine, parts, group=group)
    except (NotImplementedError, RuntimeError) as error:
        if not _is_missing(error):
            raise
        # `parts` may be the caller's.
        parts = parts.clone()
        dist.all_reduce(parts, group=group)
        mine = parts[rank * longest : (rank + 1) * longest]
    return mine[: sizes[rank]]


def _is_missing(error: Exception) -> bool:
    """Whether a backend says that it has no such collective. It says so on every rank alike, before anything is sent."""
    said = str(error).lower()
    return isinstance(error, NotImplementedError) or "not support" in said or "not implemented" in said or "unsupported" in said


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])
