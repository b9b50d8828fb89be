"""The operators of batches over a table, of several positives for a row, and of the filter of false negatives.

They are made as those of `_ops.py`, which compute batches without any of these faster: they have fewer arguments and no lists. Here
statistics of rows (B) and of positives (P) are apart. A dense gradient of a table comes from an operator. The size of a row-sparse one
depends on data, which a traced operator cannot have; so its backward calls the core, and torch.compile leaves the whole call out of its
graphs (`_functional.py`).
"""

import torch

from .. import _core
from . import _cuda, _ops
from ._ops import _empty, _no_second_gradient, _temperature
from ._arguments import raw
from ._table_arguments import NAMES, TableArguments, row_of_pairs

_BATCH = _ops._BATCH.format(**_ops._POOLS)
_EXTRA = (
    "Tensor? table, Tensor? table_ids, Tensor[] candidate_rows, Tensor? row_negatives, Tensor? row_negatives_log_q, "
    "Tensor? positive_offsets, Tensor? positive_weight"
)
_FILTER = "float? false_negative_margin, float? false_negative_ratio"
_NUM_BATCH = _ops._NUM_BATCH
_NUM_TENSORS = _NUM_BATCH + len(NAMES)
"""Arguments up to here are tensors, and behind it two of the filter and three of `_SCORES`."""
_NUM_COMMON = _NUM_TENSORS + 5
_QUERIES, _CANDIDATES, _POSITIVE_EMBEDDINGS, _TABLE, _TEMPERATURE = 0, 1, 3, _NUM_BATCH, _NUM_TENSORS + 2
_COMMON = f"{_BATCH}, {_EXTRA}, {_FILTER}, {_ops._SCORES}"


def _split(args):
    """(arguments, (similarity, temperature, other options...), rest)"""
    batch, extra = args[:_NUM_BATCH], args[_NUM_BATCH:_NUM_TENSORS]
    margin, ratio, temperature, tau, options = args[_NUM_TENSORS:_NUM_COMMON]
    similarity, *others = options.split()
    arguments = TableArguments(batch, extra, margin, ratio)
    return arguments, (similarity, _temperature(temperature, tau), *others), args[_NUM_COMMON:]


def num_pairs(args):
    positives, positive_embeddings = args[2], args[3]
    found = positives if positives is not None else positive_embeddings
    return args[0].shape[0] if found is None else found.shape[0]


def _softmax_loss(*args):
    """(loss () or (B), rows (3, B): lse, num_negatives, derivative by lse; pairs (2, P): positive, derivative by it; expected negatives
    (B, D), or (0) without `gradients`)."""
    arguments, (similarity, temperature, correction, reduction, *symmetric), (_, gradients) = _split(args)
    if arguments.place is not None:
        with arguments.guard():
            options = (similarity, temperature, correction, reduction, bool(symmetric))
            return _cuda.table_softmax_loss(arguments, options, gradients)
    queries, b, scale = args[0], arguments.num_rows, 1.0
    if arguments.kept is not None:
        if len(arguments.kept) == 0:
            loss, rows, expected = _ops._loss_of_no_row(queries, reduction, gradients)
            return loss, rows[:3].clone(), torch.zeros(2, arguments.num_pairs, dtype=torch.float64), expected
        if reduction == "mean":
            # A mean over all rows, those that were left out too.
            scale, reduction = 1.0 / b, "sum"
    options = (similarity, temperature, correction, reduction, bool(symmetric))
    total, losses, rows, pairs, expected = _core.table_forward(
        arguments.raw(), arguments.raw_extra(), options, gradients, torch.get_num_threads()
    )
    rows, pairs = torch.from_numpy(rows), torch.from_numpy(pairs)
    if scale != 1.0:
        rows[2] *= scale
        pairs[1] *= scale
    if reduction == "none":
        loss = arguments.spread(torch.from_numpy(losses).to(_ops._LOSS), 0)
    else:
        loss = torch.tensor(total * scale, dtype=_ops._LOSS)
    expected = torch.empty(0) if expected is None else arguments.spread(torch.from_numpy(expected), 0)
    return loss, arguments.spread(rows, 1), arguments.spread_pairs(pairs, 1), expected


def _softmax_loss_fake(*args):
    queries, (_, gradients) = args[0], args[_NUM_COMMON:]
    b = queries.shape[0]
    loss = queries.new_empty((b,) if args[_NUM_COMMON - 1].split()[2] == "none" else (), dtype=_ops._LOSS)
    rows, pairs = (queries.new_empty(shape, dtype=torch.float64) for shape in ((3, b), (2, num_pairs(args))))
    return loss, rows, pairs, queries.new_empty(queries.shape if gradients else (0,), dtype=torch.float32)


def _row_statistics(*args):
    """(rows (2, B): lse, num_negatives; positive (P); expected negatives (B, D), or (0) without `gradients`)."""
    arguments, (similarity, temperature, correction), (_, gradients) = _split(args)
    options = (similarity, temperature, correction, "sum", False)
    if arguments.place is not None:
        with arguments.guard():
            return _cuda.table_row_statistics(arguments, options, gradients)
    lse, positive, num_negatives, _, _, expected = _core.table_statistics(
        arguments.raw(), arguments.raw_extra(), options, (gradients, False, False), torch.get_num_threads()
    )
    rows = torch.stack([torch.from_numpy(column).to(torch.float64) for column in (lse, num_negatives)])
    return rows, torch.from_numpy(positive), torch.empty(0) if expected is None else torch.from_numpy(expected)


def _row_statistics_fake(*args):
    queries, (_, gradients) = args[0], args[_NUM_COMMON:]
    rows, positive = (queries.new_empty(shape, dtype=torch.float64) for shape in ((2, queries.shape[0]), (num_pairs(args),)))
    return rows, positive, queries.new_empty(queries.shape if gradients else (0,), dtype=torch.float32)


def _like(args):
    """What has a gradient, in the order of `wanted`."""
    return [args[_QUERIES], args[_POSITIVE_EMBEDDINGS], args[_TEMPERATURE], args[_TABLE], *args[_CANDIDATES]]


def _gradients(rows, positive, expected, d_lse, d_positive, *args):
    """Gradients of a function of lse (B) and positive (P), given its derivatives by them: of queries, positive_embeddings, temperature,
    table, and each pool, in the type of each; empty where `wanted`, in that order, says no."""
    return gradients_of(rows, positive, expected, d_lse, d_positive, *args, sparse=False)


def gradients_of(rows, positive, expected, d_lse, d_positive, *args, sparse, rounded=True):
    """`rounded`: each in the type of what it is the gradient of, and else as the core has it, in float32."""
    arguments, (similarity, temperature, correction, *_), (wanted,) = _split(args)
    like = _like(args)
    if arguments.place is not None:
        options = (similarity, temperature, correction, "sum", False)
        with arguments.guard():
            found = _cuda.table_gradients(arguments, options, (rows, positive, expected, d_lse, d_positive), wanted, sparse)
        return [_gradient_on_device(d, x, rounded) if w and x is not None else _empty(expected) for d, x, w in zip(found, like, wanted)]
    if arguments.kept is not None and len(arguments.kept) == 0:
        zeros = [torch.zeros_like(x) if w and x is not None else _empty(expected) for x, w in zip(like, wanted)]
        if sparse and wanted[3]:
            zeros[3] = sparse_rows(torch.empty(0, dtype=torch.int64), like[3].new_empty(0, like[3].shape[1]), like[3])
        return zeros
    options = (similarity, temperature, correction, "sum", False)
    rows, expected = arguments.gather(rows, 1), arguments.gather(expected, 0)
    positive = arguments.gather_pairs(positive, 0)
    d_lse, d_positive = arguments.gather(d_lse.to(torch.float64), 0), arguments.gather_pairs(d_positive.to(torch.float64), 0)
    statistics = (raw(rows[0]), raw(positive), raw(rows[1]), raw(expected))
    extra = arguments.raw_extra(wanted[3])
    (d_queries, d_pools, d_positives, d_temperature), d_table = _core.table_gradients(
        arguments.raw(wanted[4:]), extra, options, sparse and wanted[3], statistics, (raw(d_lse), raw(d_positive)),
        torch.get_num_threads(),
    )
    found = [d_queries, d_positives, d_temperature, d_table, *d_pools]
    return [_gradient(arguments, rounded, *of) if of[-1] else _empty(expected) for of in zip(range(len(found)), found, like, wanted)]


def _gradient(arguments, rounded, place, found, like, _):
    if like is None:
        return _empty(arguments.queries)
    if place == 2:
        return torch.full_like(like, found, dtype=like.dtype if rounded else torch.float64)
    if isinstance(found, tuple):
        rows, values = (torch.from_numpy(x) for x in found)
        return sparse_rows(rows, values.to(like.dtype) if rounded else values, like)
    found = torch.from_numpy(found)
    spread = {0: arguments.spread, 1: arguments.spread_pairs}.get(place)
    found = found if spread is None else spread(found, 0)
    return found.to(like.dtype) if rounded else found


def _gradient_on_device(found, like, rounded):
    to = lambda x: x.to(like.device, like.dtype if rounded else x.dtype)
    if isinstance(found, tuple):
        rows, values = found
        return sparse_rows(rows, to(values), like)
    return to(found).reshape(like.shape)


def sparse_rows(rows, values, like):
    """Of a matrix like that: these rows, ascending and each once, so it is coalesced."""
    return torch.sparse_coo_tensor(rows[None], values, tuple(like.shape), is_coalesced=True, check_invariants=False)


def _stays_coalesced(table, gradient):
    """Autograd hands a sparse gradient on to a leaf's .grad without the mark that says each row is there once, and optimisers would sort
    it again. At the end of the backward, a .grad that is this gradient, and not a sum with another, gets the mark back."""
    if not table.is_leaf:
        return
    # Held, so that nothing else can have its memory until then.
    values = gradient._values()

    def mark():
        found = table.grad
        if found is not None and found.layout == torch.sparse_coo and not found.is_coalesced():
            if found._values().data_ptr() == values.data_ptr() and found._nnz() == len(values):
                found._coalesced_(True)

    torch.autograd.Variable._execution_engine.queue_callback(mark)


gradients = torch.library.custom_op(
    "catalog_softmax::table_gradients",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor rows, Tensor positive, Tensor expected, Tensor d_lse, Tensor d_positive, {_COMMON}, bool[] wanted) -> Tensor[]",
)


@gradients.register_fake
def _(rows, positive, expected, d_lse, d_positive, *args):
    return [
        expected.new_empty(0) if x is None or not w else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, w in zip(_like(args), args[_NUM_COMMON])
    ]


gradients.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)


def _save(ctx, inputs, *results):
    flat, lengths = [], []
    for value in (*inputs[:_NUM_TENSORS], inputs[_TEMPERATURE]):
        tensors = _ops._list(value)
        flat += tensors
        lengths.append(len(tensors) if isinstance(value, (list, tuple)) else None if value is None else -1)
    ctx.lengths, ctx.inputs = lengths, [x if place >= _NUM_TENSORS else None for place, x in enumerate(inputs)]
    ctx.inputs[_TEMPERATURE] = None
    ctx.save_for_backward(*results, *flat)
    ctx.set_materialize_grads(False)


def _back(ctx, rows, positive, expected, flat, d_lse, d_positive):
    """What autograd wants of each input."""
    flat, args = iter(flat), list(ctx.inputs)
    sparse, args = args[_NUM_COMMON], args[:_NUM_COMMON]
    for place, n in zip((*range(_NUM_TENSORS), _TEMPERATURE), ctx.lengths):
        args[place] = None if n is None else next(flat) if n < 0 else [next(flat) for _ in range(n)]
    needs = ctx.needs_input_grad
    of_pools = needs[_CANDIDATES] if isinstance(needs[_CANDIDATES], (list, tuple)) else [needs[_CANDIDATES]] * len(args[_CANDIDATES])
    wanted = [bool(needs[place]) for place in (_QUERIES, _POSITIVE_EMBEDDINGS, _TEMPERATURE, _TABLE)] + [bool(w) for w in of_pools]
    # Of a list without gradients, as many Nones as it has tensors: autograd compares the structure.
    result = [[None] * n if n is not None and n >= 0 else None for n in ctx.lengths[:_NUM_TENSORS]]
    result += [None] * (len(ctx.inputs) - len(result))
    if (d_lse is None and d_positive is None) or not any(wanted):
        return tuple(result)
    if expected.numel() == 0:
        raise RuntimeError("the operator was called with gradients=False; rule: True where a gradient is wanted")
    d_lse = rows.new_zeros(rows.shape[1]) if d_lse is None else d_lse
    d_positive = positive.new_zeros(positive.shape) if d_positive is None else d_positive
    if sparse:
        if torch.is_grad_enabled():
            _no_second_gradient(ctx)
        found = gradients_of(rows, positive, expected, d_lse, d_positive, *args, wanted, sparse=True)
        if wanted[3]:
            _stays_coalesced(args[_TABLE], found[3])
    else:
        # With create_graph=True gradients are enabled here, and only the operator has the error that says there are none of these.
        direct = not torch.is_grad_enabled() and _ops.is_plain(rows, expected, d_lse, d_positive)
        run = _gradients if direct else torch.ops.catalog_softmax.table_gradients
        found = run(rows, positive, expected, d_lse, d_positive, *args, wanted)
    found = [d if w else None for d, w in zip(found, wanted)]
    result[_QUERIES], result[_POSITIVE_EMBEDDINGS], result[_TEMPERATURE], result[_TABLE] = found[:4]
    result[_CANDIDATES] = found[4:]
    return tuple(result)


def _loss_context(ctx, inputs, output):
    _, rows, pairs, expected = output
    _save(ctx, inputs, rows, pairs, expected)
    ctx.mark_non_differentiable(rows, pairs, expected)


def _loss_backward(ctx, d_loss, *_):
    rows, pairs, expected, *flat = ctx.saved_tensors
    d_lse = d_positive = None
    if d_loss is not None:
        # The operator's derivatives have weights and reduction; `d_loss` is () or (B).
        d_lse, d_positive = rows[2] * d_loss, pairs[1] * of_pairs(d_loss, pairs.shape[1], ctx, flat)
    return _back(ctx, rows, pairs[0], expected, flat, d_lse, d_positive)


def of_pairs(d_loss, pairs, ctx, flat):
    """() or (B) as () or (P): each pair's is that of its row."""
    place = NAMES.index("positive_offsets") + _NUM_BATCH
    if d_loss.dim() == 0 or ctx.lengths[place] is None:
        return d_loss
    before = sum(1 if n == -1 else n or 0 for n in ctx.lengths[:place])
    return d_loss[row_of_pairs(flat[before].to(torch.int64), pairs)]


def _statistics_context(ctx, inputs, output):
    rows, positive, expected = output
    _save(ctx, inputs, rows, positive, expected)
    ctx.mark_non_differentiable(expected)


def _statistics_backward(ctx, d_rows, d_positive, _d_expected):
    rows, positive, expected, *flat = ctx.saved_tensors
    return _back(ctx, rows, positive, expected, flat, None if d_rows is None else d_rows[0], d_positive)


def _define(name, returns, forward, fake, context, backward):
    schema = f"({_COMMON}, bool sparse_gradient, bool gradients) -> {returns}"
    operator = torch.library.custom_op(f"catalog_softmax::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=context)


_define(
    "table_softmax_loss", "(Tensor, Tensor, Tensor, Tensor)", _softmax_loss, _softmax_loss_fake, _loss_context, _loss_backward
)
_define(
    "table_row_statistics", "(Tensor, Tensor, Tensor)", _row_statistics, _row_statistics_fake, _statistics_context,
    _statistics_backward,
)


@torch.library.custom_op(
    "catalog_softmax::hardest_negatives", mutates_args=(), schema=f"({_BATCH}, {_EXTRA}, int k, str similarity) -> (Tensor, Tensor)"
)
def hardest_negatives(*args):
    """(similarities (B, K) float32, indices (B, K) int64)."""
    k, similarity = args[_NUM_TENSORS:]
    arguments = TableArguments(args[:_NUM_BATCH], args[_NUM_BATCH:_NUM_TENSORS])
    if arguments.place is not None:
        with arguments.guard():
            return _cuda.hardest_negatives(arguments, similarity, k)
    indices, scores = _core.hardest_negatives(arguments.raw(), arguments.raw_extra(), similarity, k, torch.get_num_threads())
    return torch.from_numpy(scores), torch.from_numpy(indices)


@hardest_negatives.register_fake
def _(*args):
    queries, (k, _) = args[0], args[_NUM_TENSORS:]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)
