"""The part of a catalogue-parallel call that a rank computes alone: statistics of all rows over its shard, and their gradients.

The operators are those of one process. The shard is their table or pool, positives are embeddings of their own, which are zeros where
another rank has them, and negatives that live elsewhere are left out.
"""

import torch
from torch import Tensor

from ..torch import _cuda, _ops, _tables
from ._problem import Problem
from ._shards import Shards


def is_on_device(shard: Tensor) -> bool:
    return _cuda.place_of(shard, "table_shard") is not None


class Local:
    def __init__(self, problem: Problem, shards: Shards, shard: Tensor, positive_ids: Tensor, positive_embeddings: Tensor | None):
        """``positive_ids`` (P): of the whole table's positives, as excluded ids are. ``positive_embeddings`` (P, D): where the filter of
        false negatives needs those of other ranks too."""
        self.problem, self.shards = problem, shards
        self.owned = shards.owned(problem.positives)
        self.own_rows = problem.positives[self.owned] - shards.start
        if positive_embeddings is None:
            positive_embeddings = shard.new_zeros((problem.num_pairs, shard.shape[1]))
            positive_embeddings[self.owned] = shard[self.own_rows]
        self.positive_embeddings = positive_embeddings
        self.computes = len(shard) > 0 and self._num_rows() > 0
        g = problem.given
        extra = (g.candidate_rows, problem.row_negatives, problem.offsets, g.false_negative_margin, g.false_negative_ratio)
        # On a device a whole shard is an ordinary pool, whose gradient is written where it stays. A table's is summed from parts.
        self.on_device = is_on_device(shard) and all(x is None for x in extra)
        # Without ids of their own, rows of the shard have ids from 0, and what is compared with them is shifted to these.
        shift = shards.start if problem.table_ids is None and not self.on_device else 0
        self.positive_ids = positive_ids - shift
        self.excluded = (None, None) if problem.excluded is None else (problem.excluded[0], problem.excluded[1] - shift)
        if self.computes:
            self._candidates(shard)

    def _num_rows(self) -> int:
        problem = self.problem
        return problem.num_rows if problem.kept is None else len(problem.kept)

    def _candidates(self, shard: Tensor) -> None:
        problem, shards = self.problem, self.shards
        self.log_q, self.row_negatives, self.row_negatives_log_q = problem.log_q, problem.row_negatives, problem.row_negatives_log_q
        self.candidate_rows = []
        if problem.whole_shard:
            return
        mine = [shards.owned(rows) for rows in problem.candidate_rows]
        there = [p for p, of_pool in enumerate(mine) if of_pool.any()]
        self.candidate_rows = [problem.candidate_rows[p][mine[p]] - shards.start for p in there]
        self.log_q = [problem.log_q[p][mine[p]] for p in there] if problem.log_q else []
        if self.row_negatives is not None:
            self.row_negatives = torch.where(shards.owned(self.row_negatives), self.row_negatives - shards.start, -1)
        elif not there:
            # Nothing of the pools is here; positives may be.
            self.row_negatives = torch.full((self._num_rows(), 1), -1, device=shard.device)

    def _arguments(self, queries: Tensor, shard: Tensor, temperature: Tensor | None) -> tuple:
        """Those of the operators of `_ops.py` or of `_tables.py`."""
        problem = self.problem
        has_log_q = bool(self.log_q) or self.row_negatives_log_q is not None
        scores = (temperature, problem.tau, f"{problem.options[0]} {'logq_negatives_only' if has_log_q else 'none'}")
        if self.on_device:
            ids = problem.table_ids
            ids = torch.arange(self.shards.start, self.shards.end, device=shard.device) if ids is None else ids
            return (
                queries, [shard], None, self.positive_embeddings, [ids], self.log_q, self.positive_ids, None, *self.excluded, None, *scores
            )
        g = problem.given
        positives, positive_embeddings, positive_ids = None, self.positive_embeddings, self.positive_ids
        if problem.num_pairs == 0:
            # The core takes no empty embeddings. Rows without a positive have an lse all the same, and positives may be no row of a table.
            positives, positive_embeddings, positive_ids = problem.positives, None, None
        return (
            queries, [], positives, positive_embeddings, [], self.log_q, positive_ids, None, *self.excluded, None, shard,
            problem.table_ids, self.candidate_rows, self.row_negatives, self.row_negatives_log_q, problem.offsets, None,
            g.false_negative_margin, g.false_negative_ratio, *scores,
        )

    def statistics(self, queries: Tensor, shard: Tensor, temperature: Tensor | None, gradients: bool) -> tuple[Tensor, ...]:
        """(lse (B), num_negatives (B), positive (P), expected negatives (B, D)), float64 but the last. Without candidates: -inf, 0, 0."""
        if not self.computes:
            b = queries.shape[0]
            zeros = lambda rows: torch.zeros(rows, dtype=torch.float64, device=queries.device)
            return zeros(b) - torch.inf, zeros(b), zeros(self.problem.num_pairs), queries.new_empty(0)
        arguments = self._arguments(queries, shard, temperature)
        if self.on_device:
            rows, expected = _ops._row_statistics(*arguments, gradients)
            return rows[0], rows[2], rows[1], expected
        rows, positive, expected = _tables._row_statistics(*arguments, False, gradients)
        return rows[0], rows[1], positive, expected

    def gradients(self, statistics, d_lse, d_positive, queries, shard, temperature, wanted: tuple[bool, bool, bool]) -> list:
        """Of queries, temperature and shard, those that are wanted, as the core has them, in float32: what is summed is rounded once,
        behind the sum. The shard's is (M_r, D), or (rows, values) with ``sparse_gradient``."""
        arguments = self._arguments(queries, shard, temperature)
        lse, num_negatives, positive, expected = statistics
        of_queries, of_temperature, of_shard = wanted
        if self.on_device:
            rows = torch.stack([lse, positive, num_negatives])
            found = _ops._gradients(
                rows, expected, d_lse, d_positive, *arguments, [of_queries, of_shard, of_temperature, of_shard], rounded=False
            )
            d_queries, d_positives, d_temperature, d_shard = found
        else:
            sparse = self.problem.given.sparse_gradient and of_shard
            d_queries, d_positives, d_temperature, d_shard = _tables.gradients_of(
                torch.stack([lse, num_negatives]), positive, expected, d_lse, d_positive, *arguments,
                [of_queries, of_shard, of_temperature, of_shard], sparse=sparse, rounded=False,
            )
        if of_shard:
            d_shard = self._with_positives(d_shard, d_positives[self.owned])
        return [d_queries, d_temperature, d_shard]

    def _with_positives(self, d_shard, d_positives: Tensor):
        """Rows of the shard that are positives have both gradients, added in the order of the positives."""
        d_positives = d_positives.reshape(len(self.own_rows), self.positive_embeddings.shape[1])
        if isinstance(d_shard, Tensor) and d_shard.layout == torch.strided:
            return add_rows(d_shard, self.own_rows, d_positives)
        rows, places = torch.unique(torch.cat([d_shard._indices()[0], self.own_rows]), return_inverse=True)
        values = torch.cat([d_shard._values(), d_positives])
        return rows, add_rows(values.new_zeros((len(rows), values.shape[1])), places, values)


def add_rows(into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """In place, repeats in their order. On the CPU index_add_ goes row by row; on a GPU only index_put_ has one order."""
    if into.is_cuda:
        return into.index_put_((rows,), values, accumulate=True)
    return into.index_add_(0, rows, values)
