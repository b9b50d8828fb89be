"""The operators on CUDA tensors: PyTorch's memory, current stream and allocator, and the steps of `_device.py`.

Nothing here waits for the device, with one exception: a temperature that is a tensor on the device is read by the host (`_ops.py`).
"""

import torch
from torch import Tensor

from .. import DeviceUnavailable, _device

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


class Place:
    """A CUDA device as `_device.Place`: its current stream, and memory of PyTorch's caching allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        self.raw = (device.index, torch.cuda.current_stream(device).cuda_stream, True)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=_DTYPES[dtype], device=self.device)

    def address(self, tensor: Tensor) -> int:
        return tensor.data_ptr()

    def guard(self) -> torch.cuda.device:
        """Makes the device the current one, and afterwards the one that was."""
        return torch.cuda.device(self.device)


def place_of(tensor: Tensor, argument: str) -> Place | None:
    """Where a call on this tensor runs: None is the CPU."""
    if tensor.device.type == "cpu":
        return None
    if tensor.device.type == "cuda" and torch.version.cuda is not None:
        return Place(tensor.device)
    raise DeviceUnavailable(f"{argument} is on {tensor.device}; rule: the CPU, or a GPU of NVIDIA's")


def softmax_loss(arguments, options: tuple, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_ops._softmax_loss` returns."""
    place, raw, b = arguments.place, arguments.raw(), arguments.num_rows
    *_, reduction, symmetric = options
    if symmetric:
        # Checks that the other direction exists. This one is computed.
        _device.plan(place, raw, options, (gradients, False, False))
    of_rows = {name: ((b,), "float64") for name in ("loss", "lse", "positive", "d_lse")}
    wanted = {**of_rows, "num_negatives": ((b,), "int64"), **_expected(arguments, gradients)}
    found = _device.compute(place, raw, (*options[:-1], False), wanted)
    rows = torch.stack([found["lse"], found["positive"], found["num_negatives"].to(torch.float64), found["d_lse"]])
    loss = found["total"] if reduction != "none" else _weighted(arguments, found["loss"])
    return loss.to(torch.float32), rows, found.get("expected_negative", _nothing(arguments))


def row_statistics(arguments, options: tuple, gradients: bool) -> tuple[Tensor, Tensor]:
    """What `_ops._row_statistics` returns."""
    place, b = arguments.place, arguments.num_rows
    of_rows = {"lse": ((b,), "float64"), "positive": ((b,), "float64"), "num_negatives": ((b,), "int64")}
    found = _device.compute(place, arguments.raw(), options, {**of_rows, **_expected(arguments, gradients)})
    rows = torch.stack([found["lse"], found["positive"], found["num_negatives"].to(torch.float64)])
    return rows, found.get("expected_negative", _nothing(arguments))


def _expected(arguments, gradients: bool) -> dict:
    return {"expected_negative": (tuple(arguments.queries.shape), "float32")} if gradients else {}


def gradients(arguments, options: tuple, rows: Tensor, expected: Tensor, d_lse: Tensor, d_positive: Tensor, wanted: list) -> list:
    """Gradients as the core has them: of queries, positive_embeddings, temperature, and each pool or None."""
    upstream = [rows[0], rows[2].to(torch.int64), expected, d_lse.to(torch.float64), d_positive.to(torch.float64)]
    upstream = [tensor.contiguous() for tensor in upstream]
    found = _device.gradients(arguments.place, arguments.raw(wanted[3:]), options, upstream)
    d_queries, d_positives = found["d_queries"], found["d_positive_embeddings"]
    if arguments.absent is not None:
        # Whatever padding holds, it has no gradient.
        d_queries = d_queries.masked_fill(arguments.absent[:, None], 0.0)
        d_positives = None if d_positives is None else d_positives.masked_fill(arguments.absent[:, None], 0.0)
    return [d_queries, d_positives, found["d_temperature"], *found["d_candidates"]]


def table_softmax_loss(arguments, options: tuple, gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_tables._softmax_loss` returns."""
    place, raw, extra, b, p = arguments.place, arguments.raw(), arguments.raw_extra(), arguments.num_rows, arguments.num_pairs
    *_, reduction, symmetric = options
    if symmetric:
        # Checks that the other direction exists. This one is computed.
        _device.plan(place, raw, options, (gradients, False, False), extra)
    of_rows = {name: ((b,), "float64") for name in ("loss", "lse", "d_lse")}
    of_pairs = {name: ((p,), "float64") for name in ("positive", "d_positive")}
    wanted = {**of_rows, **of_pairs, "num_negatives": ((b,), "int64"), **_expected(arguments, gradients)}
    found = _device.compute(place, raw, (*options[:-1], False), wanted, extra=extra)
    rows = torch.stack([found["lse"], found["num_negatives"].to(torch.float64), found["d_lse"]])
    loss = found["total"] if reduction != "none" else _weighted(arguments, found["loss"])
    pairs = torch.stack([found["positive"], found["d_positive"]])
    return loss.to(torch.float32), rows, pairs, found.get("expected_negative", _nothing(arguments))


def _weighted(arguments, loss: Tensor) -> Tensor:
    """A row of weight 0 is absent, whatever its loss."""
    weight = arguments.row_weight
    return loss if weight is None else torch.where(weight == 0.0, 0.0, loss * weight)


def _nothing(arguments) -> Tensor:
    return arguments.queries.new_empty(0, dtype=torch.float32)


def table_row_statistics(arguments, options: tuple, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_tables._row_statistics` returns."""
    b = arguments.num_rows
    wanted = {"lse": ((b,), "float64"), "positive": ((arguments.num_pairs,), "float64"), "num_negatives": ((b,), "int64")}
    wanted |= _expected(arguments, gradients)
    found = _device.compute(arguments.place, arguments.raw(), options, wanted, extra=arguments.raw_extra())
    rows = torch.stack([found["lse"], found["num_negatives"].to(torch.float64)])
    return rows, found["positive"], found.get("expected_negative", _nothing(arguments))


def table_gradients(arguments, options: tuple, upstream: tuple, wanted: list, sparse: bool) -> list:
    """Gradients as the core has them: of queries, positive_embeddings, temperature, table, and each pool, or None. A row-sparse one of a
    table is (rows int64, values): how many they are, the host waits for."""
    rows, positive, expected, d_lse, d_positive = upstream
    upstream = [rows[0], rows[1].to(torch.int64), expected, d_lse.to(torch.float64), d_positive.to(torch.float64)]
    upstream = [tensor.contiguous() for tensor in upstream]
    raw, extra = arguments.raw(wanted[4:]), arguments.raw_extra(wanted[3])
    found = _device.gradients(arguments.place, raw, options, upstream, extra, sparse and wanted[3])
    d_queries, d_positives, d_table = found["d_queries"], found["d_positive_embeddings"], found["d_table"]
    if arguments.absent is not None:
        d_queries = d_queries.masked_fill(arguments.absent[:, None], 0.0)
        d_positives = None if d_positives is None else d_positives.masked_fill(arguments.absent_pairs[:, None], 0.0)
    if isinstance(d_table, tuple):
        rows, values, num_rows = d_table
        count = int(num_rows)
        d_table = rows[:count].to(torch.int64), values[:count]
    return [d_queries, d_positives, found["d_temperature"], d_table, *found["d_candidates"]]


def hardest_negatives(arguments, similarity: str, k: int) -> tuple[Tensor, Tensor]:
    """As `top_k`."""
    return _top(_device.hardest_negatives(arguments.place, arguments.raw(), arguments.raw_extra(), similarity, k))


def top_k(arguments, similarity: str, k: int) -> tuple[Tensor, Tensor]:
    """Similarities, and int64 indices with -1 for none."""
    return _top(_device.top_k(arguments.place, arguments.raw(), similarity, k))


def _top(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    indices, scores = found
    # As unsigned numbers, all ones aside.
    return scores, torch.where(indices == -1, -1, indices.to(torch.int64) & 0xFFFF_FFFF)
