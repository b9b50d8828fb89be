"""The step of a table in place of its gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _core
from .._optimizer import Optimizer
from . import _cuda
from ._arguments import embeddings
from ._functional import Correction, Pools, Similarity, _check_constants, _Extra, _options, _pair, _pools, _temperature
from ._ops import outside_of_graphs, refuse_transforms
from ._table_arguments import TableArguments


def update_table(
    queries: Tensor,
    table: Tensor,
    optimizer: Optimizer,
    positives: Tensor | None = None,
    *,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    correction: Correction = "none",
    log_q: Pools | None = None,
    positive_log_q: Tensor | None = None,
    candidates: Pools | None = None,
    candidate_ids: Pools | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    row_negatives: Tensor | None = None,
    row_negatives_log_q: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    positive_weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
) -> Tensor:
    """The loss, and the optimiser's step on ``table``, now and in place: its gradient exists for a few rows at a time, and a step over a
    whole catalogue needs no (M, D) memory. For everything else the loss is as any other, and its backward has the gradients:

        optimizer = catalog_softmax.Optimizer.row_adagrad(num_items, 0.1)
        for users, items in batches:
            loss = update_table(tower(users), table, optimizer, items)   # steps the table
            tower_optimizer.zero_grad()
            loss.backward()                                              # the tower's gradients
            tower_optimizer.step()

    The table is stepped by the gradient of the returned loss itself. What you do to the loss afterwards, such as a factor, a second term, a
    gradient scaler or clipping, does not reach the table: weigh it here by ``row_weight`` and the learning rate. Gradients are those of the
    table before the step. Whoever reads the table between this call and the backward reads the new one: where your tower saves rows of the
    same table for its backward, autograd raises its error about tensors that were modified in place. One step counts for each call, even
    if no backward follows; with torch.no_grad() the table is stepped all the same. Call it once for each batch: checkpointing would
    call it twice.

    Args:
        table: (M, D), a CPU tensor, float32, float16 or bfloat16, elements of a row side by side. A parameter gets no ``grad`` from this,
            so keep it out of the other optimisers, or leave it out of your parameters by ``register_buffer``.
        optimizer: a `catalog_softmax.Optimizer`, whose state ``to_bytes`` saves. If the candidates are the whole table, every row is
            stepped; otherwise the rows that the batch names.
        reduction: "mean", "weighted_mean" or "sum".
        others: those of `softmax_loss`. If every row has weight 0, no step is taken.

    Returns:
        float32, (). Gradients of queries, candidates, positive_embeddings and temperature.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks. The table and the optimiser are as before then.
    """
    if reduction == "none":
        raise ValueError('reduction is "none"; rule: mean, weighted_mean or sum, because the table is stepped by one loss')
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}; rule: a catalog_softmax.Optimizer")
    extra = _Extra(
        (table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, positive_weight),
        (false_negative_margin, false_negative_ratio), False,
    )
    pools, log_q, candidate_ids = _pools(candidates, log_q, candidate_ids, extra)
    temperature, tau = _temperature(temperature)
    _check_constants(
        log_q=log_q, positive_log_q=positive_log_q, row_weight=row_weight, row_negatives_log_q=row_negatives_log_q,
        positive_weight=positive_weight,
    )
    refuse_transforms(queries, pools, positive_embeddings, temperature)
    constants = (positives, candidate_ids, log_q, positive_ids, positive_log_q, *_pair(excluded), row_weight)
    options = _options(similarity=similarity, correction=correction, reduction=reduction).split()
    return _outside_of_graphs(
        optimizer, constants, extra, tau, options, queries, positive_embeddings, temperature, *pools
    )


@outside_of_graphs
def _outside_of_graphs(*args):
    return _Update.apply(*args)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx, optimizer, constants, extra, tau, options, queries, positive_embeddings, temperature, *pools):
        positives, candidate_ids, log_q, positive_ids, positive_log_q, offsets, excluded_ids, row_weight = constants
        batch = (
            queries, list(pools), positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, offsets,
            excluded_ids, row_weight,
        )
        if _cuda.place_of(queries, "queries") is not None:
            rule = "the step runs on the CPU; on a device, take the gradient, and an optimiser of PyTorch's"
            raise ValueError(f"update_table does not apply to tensors on {queries.device}; rule: {rule}")
        arguments = TableArguments(batch, extra.tensors, *extra.filter)
        _check_writable(extra.tensors[0])
        leaves = [queries, positive_embeddings, temperature, *pools]
        ctx.needs = ctx.needs_input_grad[-len(leaves) :]
        options = [options[0], tau if temperature is None else float(temperature), *options[1:], False]
        if arguments.kept is not None:
            if len(arguments.kept) == 0:
                return _no_row(ctx, leaves, options[3])
            if options[3] == "mean":
                # A mean over all rows, those that were left out too.
                arguments.row_weight, options[3] = arguments.row_weight / arguments.num_rows, "sum"
        total, _, _, _, (found, _) = _core.table_update(
            arguments.raw([bool(w) for w in ctx.needs[3:]]), arguments.raw_extra(), tuple(options), (False, False), optimizer._core,
            torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(extra.tensors[0])
        d_queries, d_pools, d_positives, d_temperature = found
        tensor = lambda d: None if d is None else torch.from_numpy(d)
        gradients = [arguments.spread(tensor(d_queries), 0), None, None, *(tensor(d) for d in d_pools[: len(pools)])]
        if d_positives is not None:
            gradients[1] = arguments.spread_pairs(tensor(d_positives), 0)
        if temperature is not None:
            gradients[2] = torch.full_like(temperature, d_temperature)
        _keep(ctx, gradients, leaves)
        return torch.tensor(total, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        kept = iter(ctx.saved_tensors)
        gradients = [next(kept) if there else None for there in ctx.there]
        return (None,) * 5 + tuple(None if d is None else (d * d_loss).to(dtype) for d, dtype in zip(gradients, ctx.dtypes))


def _keep(ctx, gradients, leaves):
    gradients = [d if wanted else None for d, wanted in zip(gradients, ctx.needs)]
    ctx.there = [d is not None for d in gradients]
    ctx.dtypes = [None if x is None else x.dtype for x in leaves]
    ctx.save_for_backward(*(d for d in gradients if d is not None))


def _no_row(ctx, leaves, reduction):
    if reduction == "weighted_mean":
        raise ValueError('the sum of row_weight is 0; rule: > 0 with reduction="weighted_mean"')
    _keep(ctx, [None if x is None else torch.zeros_like(x) for x in leaves], leaves)
    return torch.zeros(())


def _check_writable(table):
    if not table.is_leaf:
        raise ValueError("table is a result of other operators; rule: a tensor of its own, because the step changes it in place")
    read = embeddings(table.detach(), "table")
    if read.data_ptr() != table.data_ptr() or table.is_neg():
        raise ValueError(
            f"table has strides {tuple(table.stride())}; rule: elements of a row side by side, so that a step can write them"
        )
