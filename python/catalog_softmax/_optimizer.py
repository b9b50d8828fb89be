"""Optimisers of a table of embeddings, which step it in place, and the step that needs no gradient of the table's size."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core
from ._arrays import Batch, Extra, array, embeddings, integers, raw, raw_embeddings, threads as _threads
from ._numpy import Correction, Output, Reduction, Similarity, output_over_table


class Optimizer:
    """A rule that steps a table of embeddings (M, D) in place, with its state: `sgd`, `row_adagrad` or `adam` makes one.

    With ``g`` the gradient of a row ``w`` and t the number of the step, counted from 1:

    =========== ================== ==========================================================================================
    rule        state, float32     step
    =========== ================== ==========================================================================================
    sgd         none               w <- (1 - lr decay) w - lr g
    row_adagrad G (M)              G <- G + mean of g^2 over the row; w <- (1 - lr decay) w - lr g / (sqrt(G) + eps)
    adam        m, v (M, D)        m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
                                   w <- (1 - lr decay) w - lr m' / (sqrt(v') + eps), m' = m / (1 - b1^t), v' = v / (1 - b2^t)
    =========== ================== ==========================================================================================

    Tables are float32, float16 or bfloat16 (of ml_dtypes, or as uint16). A step is computed in float32; elements of 16 bits are rounded
    stochastically, by a function of ``rounding_seed``, step, row and column, so that small steps are not lost, unless there is a
    ``master_copy`` in float32, of which the table is then the nearest rounding. The same steps give bitwise the same table for any number
    of threads.

    Sources: Duchi et al., JMLR 2011 (Adagrad); Mudigere et al., ISCA 2022 (one G for a row); Kingma and Ba, ICLR 2015; Loshchilov and
    Hutter, ICLR 2019 (decoupled decay). Pickling, or `to_bytes`, keeps the whole state, for a checkpoint.
    """

    def __init__(self) -> None:
        raise TypeError("an Optimizer is made by Optimizer.sgd, Optimizer.row_adagrad or Optimizer.adam")

    @classmethod
    def _of(cls, core: _core.Optimizer) -> Optimizer:
        made = cls.__new__(cls)
        made._core = core
        return made

    @classmethod
    def _made(cls, rule: str, rows: int, dim: int, learning_rate: float, master_copy: Any, **options: Any) -> Optimizer:
        copied = None if master_copy is None else embeddings(master_copy, "master_copy")
        given = {"eps": None, "betas": None, "initial_accumulator": None, **options}
        given["master_copy"] = None if copied is None else raw_embeddings(copied)
        return cls._of(_core.Optimizer(rule, rows, dim, learning_rate, given))

    @classmethod
    def sgd(
        cls, learning_rate: float, *, weight_decay: float = 0.0, rounding_seed: int = 0, master_copy: Any = None
    ) -> Optimizer:
        """Without a state, for tables of every shape."""
        return cls._made("sgd", 0, 0, learning_rate, master_copy, weight_decay=weight_decay, rounding_seed=rounding_seed)

    @classmethod
    def row_adagrad(
        cls, rows: int, learning_rate: float, *, eps: float = 1e-8, initial_accumulator: float = 0.0, weight_decay: float = 0.0,
        rounding_seed: int = 0, master_copy: Any = None,
    ) -> Optimizer:
        """For tables of M ``rows``: 4 bytes of state for each."""
        return cls._made(
            "row_adagrad", rows, 0, learning_rate, master_copy, eps=eps, initial_accumulator=initial_accumulator,
            weight_decay=weight_decay, rounding_seed=rounding_seed,
        )

    @classmethod
    def adam(
        cls, rows: int, dim: int, learning_rate: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rounding_seed: int = 0, master_copy: Any = None,
    ) -> Optimizer:
        """For tables (M, D): 8 bytes of state for each element."""
        return cls._made(
            "adam", rows, dim, learning_rate, master_copy, betas=betas, eps=eps, weight_decay=weight_decay,
            rounding_seed=rounding_seed,
        )

    def step(self, table: Any, gradient: Any, *, threads: int | None = None) -> None:
        """Steps all rows of ``table`` (M, D) by a gradient (M, D) float32. After an error nothing has changed."""
        writable, gradient = writable_table(table), _single(gradient, "gradient")
        self._core.step(raw_embeddings(writable), raw_embeddings(gradient), _threads(threads))

    def step_rows(self, table: Any, rows: Any, values: Any, *, threads: int | None = None) -> None:
        """Steps the rows ``rows`` (U), ascending and each once, by their gradients ``values`` (U, D) float32: what `value_and_grad` returns
        with ``row_sparse=True``. Other rows and their state stay, as in torch.optim.SparseAdam; the step counts for all."""
        writable, rows, values = writable_table(table), integers(rows, "rows"), _single(values, "values")
        self._core.step_rows(raw_embeddings(writable), raw(rows), raw_embeddings(values), _threads(threads))

    @property
    def learning_rate(self) -> float:
        """Of the next step. May be set, by a schedule."""
        return self._core.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        self._core.learning_rate = learning_rate

    @property
    def steps(self) -> int:
        """How many have been taken."""
        return self._core.steps

    @property
    def accumulator(self) -> np.ndarray | None:
        """G (M) of row-wise Adagrad, copied."""
        return self._core.accumulator()

    @property
    def master_copy(self) -> np.ndarray | None:
        """(M, D) float32, copied, where there is one."""
        return self._core.master_copy()

    def to_bytes(self) -> bytes:
        """Options, number of steps, state and master copy. The table is not among them."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, bytes: bytes) -> Optimizer:
        """An optimiser that goes on bitwise as that one did. A ValueError for bytes of none."""
        return cls._of(_core.Optimizer.from_bytes(bytes))

    def __reduce__(self) -> Any:
        return Optimizer.from_bytes, (self.to_bytes(),)


def update(
    queries: Any, table: Any, optimizer: Optimizer, positives: Any = None, *, similarity: Similarity = "cosine",
    temperature: float = 0.05, correction: Correction = "none", log_q: Any = None, positive_log_q: Any = None, candidates: Any = None,
    candidate_ids: Any = None, positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None, row_weight: Any = None,
    reduction: Reduction = "mean", candidate_gradients: Any = True, moments: bool = False, rank: bool = False, table_ids: Any = None,
    candidate_rows: Any = None, row_negatives: Any = None, row_negatives_log_q: Any = None, positive_offsets: Any = None,
    positive_weight: Any = None, false_negative_margin: float | None = None, false_negative_ratio: float | None = None,
    threads: int | None = None,
) -> Output:
    """The loss, and the optimiser's step on ``table`` in place of returning its gradient, which exists for a few rows at a time: a step
    over a whole catalogue needs no (M, D) memory.

    Args:
        table: (M, D), written in place: an array of numpy's that is writable, float32, float16 or bfloat16 (of ml_dtypes, or as uint16),
            elements of a row side by side, rows at any distance. No other argument may lie in its memory.
        optimizer: the rule and its state. If the candidates are the whole table, every row is stepped; otherwise the rows that the batch
            names, as by `Optimizer.step_rows`.
        others: those of `value_and_grad`.

    Returns:
        What `value_and_grad` returns, of the table before the step; the gradients' ``d_table`` is None.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks. Nothing has changed then.
    """
    writable = writable_table(table)
    extra = Extra(
        writable, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, positive_weight,
        false_negative_margin, false_negative_ratio,
    )
    batch = Batch(
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, excluded, row_weight,
        candidate_gradients, extra,
    )
    options = (similarity, float(temperature), correction, reduction, False)
    found = _core.table_update(batch.raw, batch.raw_extra, options, (moments, rank), optimizer._core, _threads(threads))
    return output_over_table(found, batch)


def writable_table(table: Any) -> np.ndarray:
    """The array itself, which a step can write."""
    found = array(table, "table")
    read = embeddings(found, "table")
    if read is not found:
        raise ValueError(f"table has strides {found.strides}; rule: elements of a row side by side, so that a step can write them")
    if not found.flags.writeable:
        raise ValueError("table is read-only; rule: a writable array, because the step changes it in place")
    return read


def _single(values: Any, argument: str) -> np.ndarray:
    found = array(values, argument)
    if found.ndim != 2 or found.dtype.kind != "f":
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: two axes of floating-point numbers")
    return np.ascontiguousarray(found, np.float32)
