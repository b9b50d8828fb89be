"""What few batches have, in device memory: a table with what names its rows, several positives for a row, a filter."""

from __future__ import annotations

from typing import Any

from ._device_views import INT32, INT64, View, column, embeddings, matrix, raw_column, raw_embeddings


class Extra:
    """As `_arrays.Extra`, of arrays that `Batch` holds. Rows of the table are int32, and -1 for none in ``row_negatives``."""

    def __init__(
        self, table: Any = None, table_ids: Any = None, candidate_rows: Any = None, row_negatives: Any = None,
        row_negatives_log_q: Any = None, positive_offsets: Any = None, positive_weight: Any = None,
        false_negative_margin: float | None = None, false_negative_ratio: float | None = None, table_gradient: bool = True,
    ):
        rows = [] if candidate_rows is None else list(candidate_rows) if isinstance(candidate_rows, (list, tuple)) else [candidate_rows]
        self.named = {
            "table": table, "table_ids": table_ids, "row_negatives": row_negatives, "row_negatives_log_q": row_negatives_log_q,
            "positive_offsets": positive_offsets, "positive_weight": positive_weight,
        }
        self.rows = {f"candidate_rows[{p}]" if len(rows) > 1 else "candidate_rows": values for p, values in enumerate(rows)}
        self.filter = {"false_negative_margin": false_negative_margin, "false_negative_ratio": false_negative_ratio}
        self.table_gradient = table_gradient
        self.given = bool(self.arrays()) or any(value is not None for value in self.filter.values())
        self._check()

    def arrays(self) -> list[Any]:
        return [values for values in (*self.named.values(), *self.rows.values()) if values is not None]

    def _check(self) -> None:
        given = [name for name in ("table_ids", "row_negatives") if self.named[name] is not None]
        given += ["candidate_rows"] if self.rows else []
        if given and self.named["table"] is None:
            raise ValueError(f"table is missing; rule: {given[0]} are of a table")
        if self.named["row_negatives_log_q"] is not None and self.named["row_negatives"] is None:
            raise ValueError("row_negatives is missing; rule: row_negatives_log_q is theirs")

    def pools_of_table(self, own: int) -> int:
        """How many pools there are beside those of embeddings of their own."""
        alone = self.named["table"] is not None and own == 0 and self.named["row_negatives"] is None
        return max(len(self.rows), 1 if alone else 0)

    def views(self, stream: int) -> list[View]:
        """Of all arrays, checked. `raw` needs them."""
        of = {
            "table": embeddings, "table_ids": column(INT64), "row_negatives": matrix(INT32), "row_negatives_log_q": matrix(("float32",)),
            "positive_offsets": column(("int64",)), "positive_weight": column(("float32",)),
        }
        named = {name: None if values is None else of[name](values, name, stream) for name, values in self.named.items()}
        rows = [column(INT32)(values, name, stream) for name, values in self.rows.items()]
        if named["row_negatives_log_q"] is not None and named["row_negatives_log_q"].shape != named["row_negatives"].shape:
            shape, rule = named["row_negatives_log_q"].shape, named["row_negatives"].shape
            raise ValueError(f"row_negatives_log_q has shape {shape}; rule: {rule}, that of row_negatives")
        self.viewed = named, rows
        return [view for view in (*named.values(), *rows) if view is not None]

    def raw(self, own: int, log_q: list[tuple | None]) -> dict[str, Any]:
        """What the core takes, given how many pools have embeddings of their own, and the log_q of all."""
        named, rows = self.viewed
        pools = [raw_column(view) for view in rows]
        if self.pools_of_table(own) > len(pools) and log_q:
            pools = [None]
        negatives = named["row_negatives"]
        if negatives is not None:
            negatives = (raw_column(negatives), negatives.shape[1], raw_column(named["row_negatives_log_q"]))
        return {
            "table": None if named["table"] is None else raw_embeddings(named["table"]), "table_ids": raw_column(named["table_ids"]),
            "table_gradient": self.table_gradient,
            "candidate_rows": [(rows, log_q[own + p] if log_q else None) for p, rows in enumerate(pools)],
            "row_negatives": negatives, "positive_offsets": raw_column(named["positive_offsets"]),
            "positive_weight": raw_column(named["positive_weight"]), **self.filter,
        }
