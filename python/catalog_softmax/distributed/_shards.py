"""Where the rows of a sharded table are: contiguous parts in the order of the ranks."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from ._collectives import group_of


class Shards:
    """Rank r of ``group`` holds ``sizes[r]`` rows, those behind the rows of the ranks before it."""

    def __init__(self, group: dist.ProcessGroup, sizes: list[int]):
        self.group, self.sizes, self.rank = group, sizes, dist.get_rank(group)
        ends = list(itertools.accumulate(sizes))
        self.ends, self.total = ends, ends[-1]
        self.start, self.end = ends[self.rank] - sizes[self.rank], ends[self.rank]

    def owned(self, rows: Tensor) -> Tensor:
        """Whether this rank holds each of these rows of the whole table."""
        return (rows >= self.start) & (rows < self.end)

    def owner(self, rows: Tensor) -> Tensor:
        """The rank that holds each of these rows."""
        return torch.searchsorted(torch.tensor(self.ends, device=rows.device), rows, right=True)

    def check(self, rows: Tensor, argument: str, none: int = 0) -> None:
        """``none``: -1 where that is no row, and allowed."""
        wrong = ((rows < none) | (rows >= self.total)).nonzero()
        if len(wrong):
            place = wrong[0].tolist()
            where = ", ".join(str(x) for x in place)
            raise ValueError(
                f"{argument}[{where}] is {int(rows[tuple(place)])}; rule: from {none} to {self.total - 1}, a row of the whole table"
                + (" or -1 for none" if none else "")
            )


def own_part(table_shard: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.ProcessGroup]:
    """The rows of this rank, and the group that has the others. Of a DTensor both are its own, and gradients come back as a DTensor."""
    if type(table_shard) in (Tensor, torch.nn.Parameter):
        return table_shard, group_of(group)
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(table_shard, DTensor):
        return table_shard, group_of(group)
    mesh, placements = table_shard.device_mesh, table_shard.placements
    if mesh.ndim != 1 or placements[0] != Shard(0):
        raise ValueError(
            f"table_shard is a DTensor placed as {placements} on a mesh of {mesh.ndim} axes; rule: (Shard(0),) on one axis"
        )
    of_mesh = mesh.get_group()
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(of_mesh):
        raise ValueError("group is not that of table_shard's mesh; rule: None for a DTensor, or the group of its mesh")
    if mesh.mesh.tolist() != dist.get_process_group_ranks(of_mesh):
        raise ValueError(f"table_shard's mesh is {mesh.mesh.tolist()}; rule: ranks in ascending order, as its group has them")
    return table_shard.to_local(), of_mesh


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"
