"""The operators that PyTorch sees: the loss, row statistics, the stream back, the search.

Each is a `torch.library.custom_op`: opaque to torch.compile, with a fake implementation for shapes and an autograd formula. A
forward keeps the rows' statistics and the expected negatives, B x (4 + D) numbers; `gradients` runs the stream back with them. No
gradient of a gradient exists.

Operators that have an autograd formula come twice: for one pool of candidates, and with `_pools` for lists of them. PyTorch takes
lists of tensors apart and puts them together again at each call, which costs more than a small loss does (docs/python.md).

A loss of one pool that nothing traces or watches goes past the dispatcher, by `direct_loss`, with the same forward and backward.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _core
from . import _cuda
from ._arguments import Arguments, raw

# A batch: the first 11 arguments of every operator but the search. {one} and {any}: tensors of one pool, or lists.
_BATCH = (
    "Tensor queries, {one} candidates, Tensor? positives, Tensor? positive_embeddings, {any} candidate_ids, {any} log_q, "
    "Tensor? positive_ids, Tensor? positive_log_q, Tensor? excluded_offsets, Tensor? excluded_ids, Tensor? row_weight"
)
_NUM_BATCH = 11
# `temperature` or, where there is none, `tau`; `options`: similarity, correction and, of a loss, reduction and symmetric, by spaces.
_SCORES = "Tensor? temperature, float tau, str options"
_NUM_COMMON = _NUM_BATCH + 3
_TEMPERATURE = _NUM_BATCH
_LOSS = torch.float32
"""The type of losses. (Tests replace it, with the core, to check formulas in float64.)"""
_ONE_POOL, _POOLS = {"one": "Tensor", "any": "Tensor?"}, {"one": "Tensor[]", "any": "Tensor[]"}


def _temperature(temperature, tau):
    """As the core takes it, a number: of a tensor on a device, the host waits for it."""
    return tau if temperature is None else float(temperature)


def _list(tensors):
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _softmax_loss(*args):
    """(loss () or (B), rows (4, B): lse, positive, num_negatives, derivative by lse; expected negatives (B, D), or (0) without
    `gradients`). Of a symmetric loss, the direction that the arguments say."""
    (queries, *_), (temperature, tau, options, gradients) = args[:_NUM_BATCH], args[_NUM_BATCH:]
    similarity, correction, reduction, *symmetric = options.split()
    arguments = Arguments(*args[:_NUM_BATCH], all_rows=bool(symmetric))
    if arguments.place is not None:
        with arguments.guard():
            options = (similarity, _temperature(temperature, tau), correction, reduction, bool(symmetric))
            return _cuda.softmax_loss(arguments, options, gradients)
    b, scale = arguments.num_rows, 1.0
    if arguments.kept is not None:
        if len(arguments.kept) == 0:
            return _loss_of_no_row(queries, reduction, gradients)
        if reduction == "mean":
            # A mean over all rows, those that were left out too.
            scale, reduction = 1.0 / b, "sum"
    options = (similarity, _temperature(temperature, tau), correction, reduction, bool(symmetric))
    total, losses, rows, expected = _core.forward(arguments.raw(), options, gradients, torch.get_num_threads())
    rows = torch.from_numpy(rows)
    if scale != 1.0:
        rows[3] *= scale
    if reduction == "none":
        loss = arguments.spread(torch.from_numpy(losses).to(_LOSS), 0)
    else:
        loss = torch.tensor(total * scale, dtype=_LOSS)
    expected = torch.empty(0) if expected is None else arguments.spread(torch.from_numpy(expected), 0)
    return loss, arguments.spread(rows, 1), expected


def _loss_of_no_row(queries, reduction, gradients):
    if reduction == "weighted_mean":
        raise ValueError('the sum of row_weight is 0; rule: > 0 with reduction="weighted_mean"')
    b = queries.shape[0]
    rows = torch.zeros(4, b, dtype=torch.float64)
    return torch.zeros(b if reduction == "none" else ()), rows, torch.zeros(queries.shape if gradients else 0)


def _softmax_loss_fake(queries, *args):
    options, gradients = args[-2:]
    b = queries.shape[0]
    loss = queries.new_empty((b,) if options.split()[2] == "none" else (), dtype=_LOSS)
    rows = queries.new_empty((4, b), dtype=torch.float64)
    return loss, rows, queries.new_empty(queries.shape if gradients else (0,), dtype=torch.float32)


def _row_statistics(*args):
    """(rows (3, B): lse, positive, num_negatives; expected negatives (B, D), or (0) without `gradients`)."""
    temperature, tau, options, gradients = args[_NUM_BATCH:]
    arguments = Arguments(*args[:_NUM_BATCH])
    similarity, correction = options.split()
    options = (similarity, _temperature(temperature, tau), correction, "sum", False)
    if arguments.place is not None:
        with arguments.guard():
            return _cuda.row_statistics(arguments, options, gradients)
    found = _core.statistics(arguments.raw(), options, (gradients, False, False), torch.get_num_threads())
    lse, positive, num_negatives, _, _, expected = found
    rows = torch.stack([torch.from_numpy(column).to(torch.float64) for column in (lse, positive, num_negatives)])
    return rows, torch.empty(0) if expected is None else torch.from_numpy(expected)


def _row_statistics_fake(queries, *args):
    rows = queries.new_empty((3, queries.shape[0]), dtype=torch.float64)
    return rows, queries.new_empty(queries.shape if args[-1] else (0,), dtype=torch.float32)


def _gradients(rows, expected, d_lse, d_positive, *args, rounded=True):
    """Gradients of a function of lse and positive, given its derivatives (B) by them: of queries, positive_embeddings, temperature
    and each pool; empty where `wanted`, in that order, says no. `rounded`: each in the type of what it is the gradient of, and else as the
    core has it, in float32."""
    batch, (temperature, tau, options, wanted) = args[:_NUM_BATCH], args[_NUM_BATCH:]
    arguments = Arguments(*batch)
    like = [batch[0], batch[3], temperature, *batch[1]]
    if arguments.kept is not None and len(arguments.kept) == 0:
        return [torch.zeros_like(x) if w and x is not None else _empty(expected) for x, w in zip(like, wanted)]
    similarity, correction, *_ = options.split()
    options = (similarity, _temperature(temperature, tau), correction, "sum", False)
    if arguments.place is not None:
        with arguments.guard():
            found = _cuda.gradients(arguments, options, rows, expected, d_lse, d_positive, wanted)
        of = lambda d, x: d.to(x if rounded else x.device).reshape(x.shape)
        return [of(d, x) if w and x is not None else _empty(expected) for d, x, w in zip(found, like, wanted)]
    rows, expected = arguments.gather(rows, 1), arguments.gather(expected, 0)
    d_lse, d_positive = (arguments.gather(d.to(torch.float64), 0) for d in (d_lse, d_positive))
    d_queries, d_pools, d_positives, d_temperature = _core.gradients(
        arguments.raw(wanted[3:]), options, raw(rows), raw(expected), (raw(d_lse), raw(d_positive)), torch.get_num_threads()
    )
    found = [d_queries, d_positives, d_temperature, *d_pools]
    found = zip(found, like, wanted)
    return [_gradient(arguments, rounded, place, *of) if of[-1] else _empty(expected) for place, of in enumerate(found)]


def _gradient(arguments, rounded, place, found, like, wanted):
    if like is None:
        return _empty(arguments.queries)
    if place == 2:
        return torch.full_like(like, found, dtype=like.dtype if rounded else torch.float64)
    found = torch.from_numpy(found)
    found = arguments.spread(found, 0) if place < 2 else found
    return found.to(like.dtype) if rounded else found


def _empty(beside):
    return beside.new_empty(0, dtype=torch.float32)


gradients = torch.library.custom_op(
    "catalog_softmax::gradients",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor rows, Tensor expected, Tensor d_lse, Tensor d_positive, {_BATCH.format(**_POOLS)}, {_SCORES}, bool[] wanted) "
    "-> Tensor[]",
)


@gradients.register_fake
def _(rows, expected, d_lse, d_positive, *args):
    batch, (temperature, _, _, wanted) = args[:_NUM_BATCH], args[_NUM_BATCH:]
    return [
        expected.new_empty(0) if x is None or not w else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, w in zip([batch[0], batch[3], temperature, *batch[1]], wanted)
    ]


def _no_second_gradient(ctx, *_):
    raise RuntimeError(
        "catalog_softmax has no double backward: the gradients of a loss are not differentiable (create_graph=True, gradient "
        "penalties). Write the loss out in PyTorch where you need them"
    )


gradients.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)


def _save(ctx, inputs, rows, expected):
    """Tensors go through save_for_backward, which finds changes in place; lists are taken apart for it."""
    flat, lengths = [], []
    for value in inputs[: _NUM_BATCH + 1]:
        tensors = _list(value)
        flat += tensors
        lengths.append(len(tensors) if isinstance(value, (list, tuple)) else None if value is None else -1)
    ctx.lengths, ctx.constants, ctx.num_inputs = lengths, inputs[_NUM_BATCH + 1 : _NUM_COMMON], len(inputs)
    ctx.save_for_backward(rows, expected, *flat)
    ctx.set_materialize_grads(False)


def _back(ctx, rows, expected, flat, d_lse, d_positive):
    """What autograd wants of each input."""
    flat = iter(flat)
    inputs = [None if n is None else next(flat) if n < 0 else [next(flat) for _ in range(n)] for n in ctx.lengths]
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3], needs[_TEMPERATURE], *(needs[1] if isinstance(needs[1], (list, tuple)) else [needs[1]])]
    # Of a list without gradients, as many Nones as it has tensors: autograd compares the structure.
    result = [[None] * n if n is not None and n >= 0 else None for n in ctx.lengths]
    result += [None] * (ctx.num_inputs - len(result))
    if d_lse is None or not any(wanted):
        return tuple(result)
    if expected.numel() == 0:
        raise RuntimeError("the operator was called with gradients=False; rule: True where a gradient is wanted")
    one_pool = isinstance(inputs[1], Tensor)
    for place in (1, 4, 5):
        inputs[place] = _list(inputs[place])
    wanted = [bool(w) for w in wanted]
    # With create_graph=True gradients are enabled here, and only the operator has the error that says there are none of these.
    direct = not torch.is_grad_enabled() and is_plain(rows, expected, d_lse, d_positive)
    run = _gradients if direct else torch.ops.catalog_softmax.gradients
    found = run(rows, expected, d_lse, d_positive, *inputs, *ctx.constants, wanted)
    found = [d if w else None for d, w in zip(found, wanted)]
    result[0], result[3], result[_TEMPERATURE], result[1] = found[0], found[1], found[2], found[3] if one_pool else found[3:]
    return tuple(result)


def _loss_context(ctx, inputs, output):
    _, rows, expected = output
    _save(ctx, inputs, rows, expected)
    ctx.mark_non_differentiable(rows, expected)


def _loss_backward(ctx, d_loss, _d_rows, _d_expected):
    rows, expected, *flat = ctx.saved_tensors
    # The operator's rows have the derivative with weights and reduction; `d_loss` is () or (B).
    d_lse = None if d_loss is None else rows[3] * d_loss
    return _back(ctx, rows, expected, flat, d_lse, None if d_lse is None else -d_lse)


def _statistics_context(ctx, inputs, output):
    rows, expected = output
    _save(ctx, inputs, rows, expected)
    ctx.mark_non_differentiable(expected)


def _statistics_backward(ctx, d_rows, _d_expected):
    rows, expected, *flat = ctx.saved_tensors
    d_lse, d_positive = (None, None) if d_rows is None else (d_rows[0], d_rows[1])
    return _back(ctx, rows, expected, flat, d_lse, d_positive)


_PLAIN = (Tensor, torch.nn.Parameter)
try:
    _WATCHERS = (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        lambda: torch._C._functorch.peek_interpreter_stack() is not None,
        lambda: forward_ad._current_level >= 0,
    )
    any(watching() for watching in _WATCHERS)
except AttributeError:
    # Another PyTorch than this was tried with (README.md): every call goes through the dispatcher.
    _WATCHERS = (lambda: True,)


def is_plain(*values):
    """Whether a call may go past PyTorch's dispatcher: nobody traces or watches it, and its tensors have memory of their own."""
    return (
        not torch.compiler.is_compiling()
        and not any(watching() for watching in _WATCHERS)
        and not any(isinstance(value, Tensor) and (type(value) not in _PLAIN or value.device.type == "meta") for value in values)
    )


def refuse_transforms(*values):
    """What would have no derivative, or a wrong one. `torch.func.vmap` works: PyTorch calls the operator once for each element."""
    if torch.compiler.is_compiling():
        return
    try:
        transforms = {interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
    except AttributeError:
        transforms = set()
    if "Grad" in transforms:
        raise RuntimeError(
            "catalog_softmax has no torch.func.grad, vjp, jacrev or hessian; rule: loss.backward() or torch.autograd.grad, once"
        )
    tensors = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]
    if "Jvp" in transforms or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "catalog_softmax has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); rule: loss.backward() or "
            "torch.autograd.grad"
        )


def outside_of_graphs(function):
    """torch.compile leaves calls of it out of its graphs."""
    try:
        # torch.compiler.disable without the import of torch._dynamo, which takes seconds.
        return torch._disable_dynamo(function)
    except AttributeError:
        return function


class _DirectLoss(torch.autograd.Function):
    """`softmax_loss` of one pool without the dispatcher, which takes longer than a small loss does (docs/python.md)."""

    @staticmethod
    def forward(ctx, *args):
        loss, rows, expected = _softmax_loss(*args)
        _save(ctx, args, rows, expected)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        return _loss_backward(ctx, d_loss, None, None)


def direct_loss(*args):
    """The loss alone, of the operator's arguments, which `is_plain` has seen."""
    if args[-1]:
        return _DirectLoss.apply(*args)
    with torch.no_grad():
        return _softmax_loss(*args)[0]


def _define(name, returns, forward, fake, context, backward):
    for suffix, pools in (("", _ONE_POOL), ("_pools", _POOLS)):
        schema = f"({_BATCH.format(**pools)}, {_SCORES}, bool gradients) -> {returns}"
        operator = torch.library.custom_op(f"catalog_softmax::{name}{suffix}", forward, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        operator.register_autograd(backward, setup_context=context)


_define("softmax_loss", "(Tensor, Tensor, Tensor)", _softmax_loss, _softmax_loss_fake, _loss_context, _loss_backward)
_define("row_statistics", "(Tensor, Tensor)", _row_statistics, _row_statistics_fake, _statistics_context, _statistics_backward)


@torch.library.custom_op(
    "catalog_softmax::top_k",
    mutates_args=(),
    schema="(Tensor queries, Tensor[] candidates, int k, Tensor[] candidate_ids, Tensor? excluded_offsets, Tensor? excluded_ids, "
    "str similarity) -> (Tensor, Tensor)",
)
def top_k(queries, candidates, k, candidate_ids, excluded_offsets, excluded_ids, similarity):
    """(similarities (B, K) float32, indices (B, K) int64)."""
    batch = (queries, candidates, None, None, candidate_ids, None, None, None, excluded_offsets, excluded_ids, None)
    arguments = Arguments(*batch, search=True)
    if arguments.place is not None:
        with arguments.guard():
            return _cuda.top_k(arguments, similarity, k)
    indices, scores = _core.top_k(arguments.raw(), similarity, k, torch.get_num_threads())
    return torch.from_numpy(scores), torch.from_numpy(indices)


@top_k.register_fake
def _(queries, candidates, k, candidate_ids, excluded_offsets, excluded_ids, similarity):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)
