"""Towers under DDP and FSDP2, and tables as DTensors, beside the losses of `catalog_softmax.distributed`: what ranks do in tests."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from catalog_softmax.distributed import (
    catalog_parallel_softmax_loss, catalog_parallel_update, gather_queries, gathered_softmax_loss, sum_over_ranks,
)
from sharded import optimizer_of, own_rows, part


def tower(dim):
    made = torch.nn.Sequential(torch.nn.Linear(dim, 8), torch.nn.Tanh(), torch.nn.Linear(8, dim))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


def wrapped(kind, module, group):
    if kind == "ddp":
        return DistributedDataParallel(module, process_group=group)
    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(group),)))


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def catalog_parallel(group, kind, users, table, items, sizes, of_ranks):
    """(loss, gradients of the tower's parameters, of the shard). Each rank's tower has a part of the batch."""
    rank = dist.get_rank(group)
    module = tower(users.shape[1])
    made = wrapped(kind, module, group)
    shard = torch.nn.Parameter(part(table, of_ranks, rank).clone())
    queries = gather_queries(made(own_rows(users, sizes, rank)), group=group, averaged=True)
    loss = catalog_parallel_softmax_loss(queries, shard, items, group=group)
    loss.backward()
    return loss.detach(), [whole(p.grad) for p in module.parameters()], shard.grad


def gathered(group, kind, users, candidates, sizes, **options):
    """The same of both towers, with everybody's candidates as negatives."""
    rank = dist.get_rank(group)
    both = torch.nn.ModuleDict({"users": tower(users.shape[1]), "texts": tower(users.shape[1])})
    made = {name: wrapped(kind, module, group) for name, module in both.items()}
    queries, items = (made[name](own_rows(x, sizes, rank)) for name, x in (("users", users), ("texts", candidates)))
    loss = gathered_softmax_loss(queries, items, group=group, averaged=True, **options)
    loss.backward()
    return loss.detach(), [whole(p.grad) for p in both.parameters()]


def dtensor(group, queries, table, items, step):
    """(loss, the gradient that the DTensor has or the table after a step, whether it is a DTensor of the table's placements)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    sharded = distribute_tensor(table, mesh, [Shard(0)])
    if step:
        loss = catalog_parallel_update(queries, sharded, optimizer_of("row_adagrad", sharded.to_local()), items)
        return loss.detach(), sharded.full_tensor(), True
    leaf = torch.nn.Parameter(sharded)
    loss = catalog_parallel_softmax_loss(queries, leaf, items)
    loss.backward()
    return loss.detach(), leaf.grad.full_tensor(), isinstance(leaf.grad, DTensor) and leaf.grad.placements == (Shard(0),)


def refused_dtensors(group, table):
    from torch.distributed.tensor import Replicate

    mesh, said = init_device_mesh("cpu", (dist.get_world_size(group),)), []
    queries, items = table[:3].clone(), torch.arange(3)
    for placement, options in ((Shard(1), {}), (Replicate(), {}), (Shard(0), {"sparse_gradient": True, "candidate_rows": items})):
        try:
            catalog_parallel_softmax_loss(queries, distribute_tensor(table, mesh, [placement]), items, **options)
        except ValueError as error:
            said.append(str(error))
    return said


def pooled(group, table, rows, sizes):
    """A tower that pools rows of the shard: the sum over ranks is that over the whole table. (loss, gradient of the shard)"""
    rank = dist.get_rank(group)
    shard = torch.nn.Parameter(part(table, sizes, rank).clone())
    mine = (rows >= sum(sizes[:rank])) & (rows < sum(sizes[: rank + 1]))
    local = torch.where(mine, rows - sum(sizes[:rank]), 0)
    own = shard[local] if len(shard) else shard.new_zeros((*rows.shape, shard.shape[1])) + shard.sum()
    queries = sum_over_ranks((own * mine[..., None]).sum(1), group=group)
    loss = catalog_parallel_softmax_loss(queries, shard, rows[:, 0], group=group)
    loss.backward()
    return loss.detach(), shard.grad


def open_clip(group, users, candidates, sizes, local_loss):
    """What OpenCLIP's ClipLoss computes with gather_with_grad=True under DDP: the gradients of the towers' parameters."""
    from torch.distributed.nn.functional import all_gather

    rank = dist.get_rank(group)
    both = torch.nn.ModuleDict({"users": tower(users.shape[1]), "texts": tower(users.shape[1])})
    made = {name: wrapped("ddp", module, group) for name, module in both.items()}
    own = [F.normalize(made[name](own_rows(x, sizes, rank))) for name, x in (("users", users), ("texts", candidates))]
    every = [torch.cat(all_gather(x, group=group)) for x in own]
    if local_loss:
        labels = torch.arange(sizes[rank]) + sum(sizes[:rank])
        logits = own[0] @ every[1].T / 0.2, own[1] @ every[0].T / 0.2
    else:
        labels = torch.arange(sum(sizes))
        logits = every[0] @ every[1].T / 0.2, every[1] @ every[0].T / 0.2
    (0.5 * sum(F.cross_entropy(x, labels) for x in logits)).backward()
    return [p.grad for p in both.parameters()]
