"""What each rank does in the tests of `catalog_softmax.distributed`: steps with a shard of a table that every rank could build."""

import torch
import torch.distributed as dist

import catalog_softmax as cs
from catalog_softmax import _core
from catalog_softmax.distributed import (
    catalog_parallel_row_statistics, catalog_parallel_softmax_loss, catalog_parallel_top_k, catalog_parallel_update, gathered_softmax_loss,
)
from catalog_softmax.torch import _arguments, _ops, _tables

OF_SHARDS = ("log_q", "table_ids")
"""Arguments that each rank has a part of, if the whole shard is the pool; table_ids always."""


def part(tensor, sizes, rank):
    return tensor.split(sizes)[rank]


def options_of(options, sizes, rank):
    """This rank's."""
    mine = dict(options)
    for name in OF_SHARDS:
        whole = name == "table_ids" or not ("candidate_rows" in options or "row_negatives" in options)
        if name in mine and whole:
            mine[name] = part(mine[name], sizes, rank)
    temperature = mine.get("temperature")
    if isinstance(temperature, torch.Tensor):
        mine["temperature"] = temperature.detach().requires_grad_(temperature.requires_grad)
    return mine


def upstream_of(loss):
    """A number of () or (B), with another factor for each row."""
    return (loss * torch.linspace(1, 2, len(loss), dtype=loss.dtype)).sum() if loss.dim() else loss


def step(group, queries, table, sizes, options, double=False):
    """(loss, gradients of queries, shard and temperature) of one step."""
    queries, options = queries.clone().requires_grad_(), options_of(options, sizes, dist.get_rank(group))
    shard = part(table, sizes, dist.get_rank(group)).clone().requires_grad_()
    with float64() if double else torch.enable_grad():
        loss = catalog_parallel_softmax_loss(queries, shard, group=group, **options)
        upstream_of(loss).backward()
    temperature = options.get("temperature")
    if options.get("sparse_gradient"):
        # So that optimisers do not sort it again.
        assert shard.grad.is_sparse and shard.grad.is_coalesced()
    gradient = shard.grad.to_dense() if shard.grad.is_sparse else shard.grad
    return loss.detach(), queries.grad, gradient, temperature.grad if isinstance(temperature, torch.Tensor) else torch.zeros(())


class Reference:
    """The crate's float64 reference in place of its CPU backend."""

    @staticmethod
    def table_forward(batch, extra, options, gradients, threads):
        return _core.reference_table_forward(batch, extra, options, gradients)

    @staticmethod
    def table_statistics(batch, extra, options, requested, threads):
        return _core.reference_table_statistics(batch, extra, options, requested[0])

    @staticmethod
    def table_gradients(batch, extra, options, row_sparse, statistics, upstream, threads):
        return _core.reference_table_gradients(batch, extra, options, row_sparse, statistics, upstream)


class float64:
    """Everything in float64, of embeddings that float32 holds exactly."""

    def __enter__(self):
        self.kept = _arguments.embeddings, _tables._core, _ops._LOSS
        convert = _arguments.embeddings
        _arguments.embeddings = lambda tensor, *others: convert(tensor.to(torch.float32), *others)
        _tables._core, _ops._LOSS = Reference, torch.float64

    def __exit__(self, *_):
        _arguments.embeddings, _tables._core, _ops._LOSS = self.kept


def step_past_tables(group, *args):
    """With the operators that a GPU's tensors go to, on the CPU."""
    from catalog_softmax.distributed import _local

    kept, _local.is_on_device = _local.is_on_device, lambda shard: True
    try:
        return step(group, *args)
    finally:
        _local.is_on_device = kept


def own_loss(group, queries, table, sizes, options):
    """A z-loss beside a margin, of row statistics."""
    queries, options = queries.clone().requires_grad_(), options_of(options, sizes, dist.get_rank(group))
    shard = part(table, sizes, dist.get_rank(group)).clone().requires_grad_()
    z_loss(catalog_parallel_row_statistics(queries, shard, group=group, **options)).backward()
    return queries.grad, shard.grad


def z_loss(rows):
    z = 0.1 * torch.where(rows.num_negatives > 0, rows.lse, 0.0).square().sum()
    return z + (rows.positive * torch.linspace(1, 2, len(rows.positive))).sum()


def gathered(group, batch, sizes, options, of_rows, of_candidates, averaged=False):
    """(loss, gradients of this rank's queries, candidates and temperature)."""
    rank, options = dist.get_rank(group), dict(options)
    queries, candidates = (part(x, n, rank).clone().requires_grad_() for x, n in zip(batch, sizes))
    options |= {name: own_rows(x, sizes[0], rank) for name, x in of_rows.items()}
    options |= {name: part(x, sizes[1], rank) for name, x in of_candidates.items()}
    if "positives" in options:
        options["positives"] = options["positives"] - sum(sizes[1][:rank])
    temperature = options["temperature"].clone().requires_grad_()
    separate = options.get("positive_embeddings")
    if separate is not None:
        separate = options["positive_embeddings"] = separate.clone().requires_grad_()
    loss = gathered_softmax_loss(queries, candidates, group=group, averaged=averaged, **{**options, "temperature": temperature})
    upstream = loss.sum() if loss.dim() else loss
    upstream.backward()
    nothing = torch.zeros(())
    grad = lambda x: nothing if x is None or x.grad is None else x.grad
    return loss.detach(), queries.grad, candidates.grad, grad(temperature), grad(separate)


def own_rows(value, sizes, rank):
    """Of (B, ...) or of a CSR (offsets (B + 1), ids)."""
    start, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    if not isinstance(value, tuple):
        return value[start:end]
    offsets, ids = value
    return offsets[start : end + 1] - offsets[start], ids[offsets[start] : offsets[end]]


def search(group, queries, table, sizes, k, options):
    rank = dist.get_rank(group)
    return tuple(catalog_parallel_top_k(queries, part(table, sizes, rank), k, group=group, **options_of(options, sizes, rank)))


def updates(group, queries, table, sizes, rule, options, steps=3):
    """(losses, gradient of the last step's queries, the shard after the steps, how many were taken)"""
    rank = dist.get_rank(group)
    shard = part(table, sizes, rank).clone()
    optimizer, losses = optimizer_of(rule, shard), []
    for at in range(steps):
        leaf = (queries + 0.1 * at).requires_grad_()
        loss = catalog_parallel_update(leaf, shard, optimizer, group=group, **options_of(options, sizes, rank))
        (2.0 * loss).backward()
        losses.append(loss.item())
    return losses, leaf.grad, shard, optimizer.steps


def optimizer_of(rule, table):
    rows, dim = table.shape
    if rule == "sgd":
        return cs.Optimizer.sgd(0.1, weight_decay=0.01)
    # Of no row there is no state, and no step.
    if rule == "row_adagrad":
        return cs.Optimizer.row_adagrad(max(rows, 1), 0.1)
    return cs.Optimizer.adam(max(rows, 1), dim, 0.1)


def gathered_without_reduce_scatter(group, *args):
    def missing(*_, **__):
        raise RuntimeError("this backend does not support reduce_scatter_tensor")

    kept, dist.reduce_scatter_tensor = dist.reduce_scatter_tensor, missing
    try:
        return gathered(group, *args)
    finally:
        dist.reduce_scatter_tensor = kept


def compiled(group, queries, table, sizes, options):
    """A step in a function that torch.compile traces."""
    rank = dist.get_rank(group)

    def loss_of(queries, shard):
        return 2.0 * catalog_parallel_softmax_loss(torch.tanh(queries), shard, group=group, **options_of(options, sizes, rank))

    results = []
    for function in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        leaf, shard = queries.clone().requires_grad_(), part(table, sizes, rank).clone().requires_grad_()
        loss = function(leaf, shard)
        loss.backward()
        results.append((loss.detach(), leaf.grad, shard.grad))
    return all(torch.equal(a, b) for a, b in zip(*results))
