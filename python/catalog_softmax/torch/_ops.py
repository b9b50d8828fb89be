"""The operators that PyTorch sees: the stream, the loss, and the stream back.

Each is a `torch.library.custom_op`: opaque to torch.compile, with a fake implementation for shapes and an autograd formula. A
forward keeps the rows' statistics and the expected negatives, B x (4 + D) numbers; `gradients` runs the stream back with them. No
gradient of a gradient exists.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _core
from ._arguments import Arguments, raw

_CPU = {"dtype": torch.float64, "device": "cpu"}


def _temperature(temperature, tau):
    return tau if temperature is None else float(temperature)



@torch.library.custom_op("catalog_softmax::softmax_loss", mutates_args=())
def softmax_loss(
    queries: Tensor, candidates: Sequence[Tensor], positives: Tensor | None, positive_embeddings: Tensor | None,
    candidate_ids: Sequence[Tensor], log_q: Sequence[Tensor], positive_ids: Tensor | None, positive_log_q: Tensor | None,
    excluded_offsets: Tensor | None, excluded_ids: Tensor | None, row_weight: Tensor | None,
    temperature: Tensor | None, tau: float, similarity: str, correction: str,
    reduction: str, symmetric: bool, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss () or (B), rows (4, B): lse, positive, num_negatives, derivative by lse; expected negatives (B, D), or (0) without
    `gradients`). Of a symmetric loss, the direction that the arguments say."""
    arguments = Arguments(
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q,
        excluded_offsets, excluded_ids, row_weight, all_rows=symmetric,
    )
    b, dim = arguments.num_rows, queries.shape[1]
    kept = b if arguments.kept is None else len(arguments.kept)
    if arguments.kept is not None and kept == 0 and reduction != "weighted_mean":
        loss = torch.zeros(b if reduction == "none" else ())
        return loss, torch.zeros(4, b, **_CPU), torch.zeros((b, dim) if gradients else 0)
    # A mean is one over all rows, those that were left out too.
    scale, reduction_of_kept = (1.0 / b, "sum") if kept < b and reduction == "mean" else (1.0, reduction)
    options = (similarity, _temperature(temperature, tau), correction, reduction_of_kept, symmetric)
    if arguments.kept is not None and kept == 0:
        raise ValueError('the sum of row_weight is 0; rule: > 0 with reduction="weighted_mean"')
    total, losses, rows, expected = _core.forward(arguments.raw(), options, gradients, torch.get_num_threads())
    rows = torch.from_numpy(rows)
    if scale != 1.0:
        rows[3] *= scale
    if reduction == "none":
        loss = arguments.spread(torch.from_numpy(losses).to(torch.float32), 0)
    else:
        loss = torch.tensor(total * scale, dtype=torch.float32)
    expected = torch.empty(0) if expected is None else arguments.spread(torch.from_numpy(expected), 0)
    return loss, arguments.spread(rows, 1), expected


@softmax_loss.register_fake
def _(queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, excluded_offsets,
      excluded_ids, row_weight, temperature, tau, similarity, correction, reduction, symmetric, gradients):
    b, dim = queries.shape
    loss = queries.new_empty((b,) if reduction == "none" else (), dtype=torch.float32)
    rows = queries.new_empty((4, b), dtype=torch.float64)
    return loss, rows, queries.new_empty((b, dim) if gradients else (0,), dtype=torch.float32)


@torch.library.custom_op("catalog_softmax::row_statistics", mutates_args=())
def row_statistics(
    queries: Tensor, candidates: Sequence[Tensor], positives: Tensor | None, positive_embeddings: Tensor | None,
    candidate_ids: Sequence[Tensor], log_q: Sequence[Tensor], positive_ids: Tensor | None, positive_log_q: Tensor | None,
    excluded_offsets: Tensor | None, excluded_ids: Tensor | None, row_weight: Tensor | None,
    temperature: Tensor | None, tau: float, similarity: str, correction: str, gradients: bool,
) -> tuple[Tensor, Tensor]:
    """(rows (3, B): lse, positive, num_negatives; expected negatives (B, D), or (0) without `gradients`)."""
    arguments = Arguments(
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q,
        excluded_offsets, excluded_ids, row_weight,
    )
    options = (similarity, _temperature(temperature, tau), correction, "sum", False)
    found = _core.statistics(arguments.raw(), options, (gradients, False, False), torch.get_num_threads())
    lse, positive, num_negatives, _, _, expected = found
    rows = torch.stack([torch.from_numpy(column).to(torch.float64) for column in (lse, positive, num_negatives)])
    return rows, torch.empty(0) if expected is None else torch.from_numpy(expected)


@row_statistics.register_fake
def _(queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, excluded_offsets,
      excluded_ids, row_weight, temperature, tau, similarity, correction, gradients):
    b, dim = queries.shape
    rows = queries.new_empty((3, b), dtype=torch.float64)
    return rows, queries.new_empty((b, dim) if gradients else (0,), dtype=torch.float32)


@torch.library.custom_op("catalog_softmax::gradients", mutates_args=())
def gradients_op(
    rows: Tensor, expected: Tensor, d_lse: Tensor, d_positive: Tensor,
    queries: Tensor, candidates: Sequence[Tensor], positives: Tensor | None, positive_embeddings: Tensor | None,
    candidate_ids: Sequence[Tensor], log_q: Sequence[Tensor], positive_ids: Tensor | None, positive_log_q: Tensor | None,
    excluded_offsets: Tensor | None, excluded_ids: Tensor | None, row_weight: Tensor | None,
    temperature: Tensor | None, tau: float, similarity: str, correction: str, wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of a function of lse and positive, given its derivatives (B) by them: of queries, positive_embeddings, temperature
    and each pool, in the type of each; empty where `wanted`, in that order, says no."""
    arguments = Arguments(
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q,
        excluded_offsets, excluded_ids, row_weight,
    )
    if arguments.kept is not None and len(arguments.kept) == 0:
        return _nothing(queries, candidates, positive_embeddings, temperature, wanted)
    gathered = [arguments.gather(rows, 1), arguments.gather(expected, 0)]
    upstream = [arguments.gather(d.to(torch.float64), 0) for d in (d_lse, d_positive)]
    options = (similarity, _temperature(temperature, tau), correction, "sum", False)
    d_queries, d_pools, d_positives, d_temperature = _core.gradients(
        arguments.raw(wanted[3:]), options, raw(gathered[0]), raw(gathered[1]), (raw(upstream[0]), raw(upstream[1])),
        torch.get_num_threads(),
    )

    def of(found, like, wanted, spread=False):
        if not wanted or found is None:
            return like.new_empty(0)
        found = torch.from_numpy(found)
        return (arguments.spread(found, 0) if spread else found).to(like.dtype)

    result = [of(d_queries, queries, wanted[0], True)]
    result.append(_empty(queries) if positive_embeddings is None else of(d_positives, positive_embeddings, wanted[1], True))
    if temperature is not None and wanted[2]:
        result.append(torch.full_like(temperature, d_temperature))
    else:
        result.append(_empty(queries))
    return result + [of(d, pool, wanted[3 + p]) for p, (d, pool) in enumerate(zip(d_pools, candidates))]


def _empty(tensor):
    return tensor.new_empty(0)


def _nothing(queries, candidates, positive_embeddings, temperature, wanted):
    """The gradients of no rows."""
    like = [queries, positive_embeddings, temperature, *candidates]
    return [torch.zeros_like(x) if w and x is not None else _empty(queries) for x, w in zip(like, wanted)]


@gradients_op.register_fake
def _(rows, expected, d_lse, d_positive, queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids,
      positive_log_q, excluded_offsets, excluded_ids, row_weight, temperature, tau, similarity, correction, wanted):
    def like(x, wanted):
        if x is None or not wanted:
            return queries.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    inputs = [queries, positive_embeddings, temperature, *candidates]
    return [like(x, w) for x, w in zip(inputs, wanted)]


def _no_second_gradient(ctx, *_):
    raise RuntimeError(
        "catalog_softmax has no double backward: the gradients of a loss are not differentiable (create_graph=True, gradient "
        "penalties). Write the loss out in PyTorch where you need them"
    )


gradients_op.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)

# Arguments of a batch, as all three operators have them in their order; then temperature, tau, similarity, correction.
_BATCH, _COMMON = 11, 15


def _save(ctx, inputs, rows, expected):
    """Tensors of any nesting go through save_for_backward, which finds changes in place; the rest is as it is."""
    flat, shape = [], []
    for value in inputs[:_COMMON]:
        if isinstance(value, (list, tuple)):
            flat += value
            shape.append(len(value))
        elif isinstance(value, Tensor):
            flat.append(value)
            shape.append(-1)
        else:
            shape.append(None)
    ctx.constants = inputs[_BATCH + 1 : _COMMON]
    ctx.shape = shape
    ctx.save_for_backward(rows, expected, *flat)
    ctx.set_materialize_grads(False)


def _saved(ctx):
    rows, expected, *flat = ctx.saved_tensors
    flat, inputs = iter(flat), []
    for count in ctx.shape[: _BATCH + 1]:
        if count is None:
            inputs.append(None)
        else:
            inputs.append(next(flat) if count < 0 else [next(flat) for _ in range(count)])
    return rows, expected, [*inputs, *ctx.constants]


def _back(ctx, d_lse, d_positive, num_inputs):
    rows, expected, inputs = _saved(ctx)
    needs = ctx.needs_input_grad
    wanted = [bool(needs[0]), bool(needs[3]), bool(needs[_BATCH]), *map(bool, needs[1])]
    if d_lse is None or not any(wanted):
        return _gradients_in_place([None] * len(wanted), num_inputs)
    if expected.numel() == 0:
        raise RuntimeError("the operator was called with gradients=False; rule: True where a gradient is wanted")
    found = torch.ops.catalog_softmax.gradients(rows, expected, d_lse, d_positive, *inputs, wanted)
    return _gradients_in_place([d if w else None for d, w in zip(found, wanted)], num_inputs)


def _gradients_in_place(found, num_inputs):
    result = [None] * num_inputs
    result[0], result[3], result[_BATCH], result[1] = found[0], found[1], found[2], found[3:]
    # As many Nones as there are tensors in the lists that have no gradient: autograd compares the structure.
    return result


def _loss_context(ctx, inputs, output):
    _, rows, expected = output
    _save(ctx, inputs, rows, expected)
    ctx.lists = (len(inputs[4]), len(inputs[5]))
    ctx.mark_non_differentiable(rows, expected)


def _loss_backward(ctx, d_loss, _d_rows, _d_expected):
    d_lse = None
    if d_loss is not None:
        # The operator's rows have the derivative with weights and reduction; `d_loss` is () or (B).
        d_lse = ctx.saved_tensors[0][3] * d_loss
    result = _back(ctx, d_lse, None if d_lse is None else -d_lse, 18)
    result[4], result[5] = ([None] * length for length in ctx.lists)
    return tuple(result)


softmax_loss.register_autograd(_loss_backward, setup_context=_loss_context)


def _statistics_context(ctx, inputs, output):
    rows, expected = output
    _save(ctx, inputs, rows, expected)
    ctx.lists = (len(inputs[4]), len(inputs[5]))
    ctx.mark_non_differentiable(expected)


def _statistics_backward(ctx, d_rows, _d_expected):
    d_lse, d_positive = (None, None) if d_rows is None else (d_rows[0], d_rows[1])
    result = _back(ctx, d_lse, d_positive, 16)
    result[4], result[5] = ([None] * length for length in ctx.lists)
    return tuple(result)


row_statistics.register_autograd(_statistics_backward, setup_context=_statistics_context)


@torch.library.custom_op("catalog_softmax::top_k", mutates_args=())
def top_k(
    queries: Tensor, candidates: Sequence[Tensor], k: int, candidate_ids: Sequence[Tensor],
    excluded_offsets: Tensor | None, excluded_ids: Tensor | None, similarity: str,
) -> tuple[Tensor, Tensor]:
    """(similarities (B, K) float32, indices (B, K) int64)."""
    arguments = Arguments(
        queries, candidates, None, None, candidate_ids, [], None, None, excluded_offsets, excluded_ids, None
    )
    indices, scores = _core.top_k(arguments.raw(), similarity, k, torch.get_num_threads())
    return torch.from_numpy(scores), torch.from_numpy(indices)


@top_k.register_fake
def _(queries, candidates, k, candidate_ids, excluded_offsets, excluded_ids, similarity):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)
