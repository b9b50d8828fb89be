"""Rows of all ranks on every rank, and how gradients come back."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..torch._ops import outside_of_graphs
from ._agreement import agree, fingerprint
from ._collectives import gather_rows, group_of, reduce_scatter_rows


@outside_of_graphs
def gather_queries(queries: Tensor, *, group=None, averaged: bool = False) -> Tensor:
    """The rows of all ranks, in their order: what catalogue-parallel losses take, of towers that each compute a part of the batch.

    The loss of the result must be the same on every rank, as that of `catalog_parallel_softmax_loss` is: each rank then has the whole
    gradient of all rows already, and takes that of its own rows, with no communication.

    Args:
        queries: (B_r, D), of any B_r, 0 too.
        averaged: True where DDP or FSDP averages the gradients of what made the queries: the gradient is multiplied by the number of
            ranks, so that their mean is the gradient of the one loss.

    Returns:
        (sum of B_r, D), the same on every rank.
    """
    group = group_of(group)
    sizes = sizes_of(queries, group, "queries")
    return _Replicated.apply(queries, sizes, group, float(len(sizes)) if averaged else 1.0)


@outside_of_graphs
def sum_over_ranks(values: Tensor, *, group=None) -> Tensor:
    """The sum over ranks, the same on every rank, for what each computes from its shard: pooled rows of a table, for example. What follows
    must be the same on every rank, as a catalogue-parallel loss is; so each rank has the whole gradient of the sum already, and passes it
    on without communication."""
    return _Sum.apply(values, group_of(group))


def sizes_of(rows: Tensor, group: dist.ProcessGroup, argument: str) -> list[int]:
    """How many each rank has, of one type and width."""
    grad = torch.is_grad_enabled() and rows.requires_grad
    alike = {f"type, width or requires_grad of {argument}": fingerprint(rows.dtype, tuple(rows.shape[1:]), grad)}
    return [size for (size,) in agree(group, rows.device, None, alike, (rows.shape[0],))]


class _Replicated(torch.autograd.Function):
    """Each rank goes on alike, and so has the whole gradient."""

    @staticmethod
    def forward(ctx, rows, sizes, group, factor):
        rank = dist.get_rank(group)
        ctx.start, ctx.rows, ctx.factor = sum(sizes[:rank]), sizes[rank], factor
        return gather_rows(rows.detach(), sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        mine = d[ctx.start : ctx.start + ctx.rows]
        return mine * ctx.factor if ctx.factor != 1.0 else mine.clone(), None, None, None


class Gathered(torch.autograd.Function):
    """Each rank goes on with a loss of its own, and gradients of all of them are summed, in float32, where the rows came from."""

    @staticmethod
    def forward(ctx, rows, sizes, group):
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, rows.dtype
        return gather_rows(rows.detach(), sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        d = d.to(torch.promote_types(d.dtype, torch.float32))
        return reduce_scatter_rows(d, ctx.sizes, ctx.group).to(ctx.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, d):
        return d, None
