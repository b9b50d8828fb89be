"""The compiled module: its classes and functions as the package exports them, and those that the package's own modules call."""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

class DeviceUnavailable(RuntimeError):
    """A device that this build cannot compute on, and why."""

class DeviceArray:
    """An array in device memory, contiguous: a result of the calls on such arrays. Other libraries read it where it is, by
    ``__cuda_array_interface__``; torch.as_tensor and cupy.asarray do."""
    def __new__(cls, place: tuple[int, int, bool], shape: tuple[int, ...], dtype: str) -> Self: ...
    @staticmethod
    def of_bytes(place: tuple[int, int, bool], shape: tuple[int, ...], dtype: str, bytes: bytes) -> DeviceArray: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """As numpy names it: "float32"."""
    @property
    def device(self) -> int:
        """The device's ordinal."""
    @property
    def stream(self) -> int:
        """The handle of the stream that it is written on."""
    @property
    def address(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def numpy(self) -> NDArray:
        """A copy in host memory. Waits for all work of the device."""
    def __len__(self) -> int: ...

class RandomStream:
    """A stream of random numbers: the same on every platform; streams of one seed never overlap. One for each worker."""
    def __new__(cls, seed: int, stream: int = 0) -> Self: ...

class Sample:
    """Drawn ids and the log_q of how they were drawn."""
    @property
    def ids(self) -> NDArray[np.int64]:
        """In the order in which they came."""
    @property
    def log_q(self) -> NDArray[np.float32]:
        """Of each id, finite."""
    def __len__(self) -> int: ...
    def log_q_of(self, distribution: Distribution, ids: ArrayLike) -> NDArray[np.float32]:
        """log_q of any other ids in the same terms: of the positives. ``distribution`` is the one that was drawn from."""

class Distribution:
    """A distribution Q over the items ``0..num_items``, and the ways to draw negatives from it."""
    @property
    def num_items(self) -> int:
        """N: ids are below it."""
    @property
    def support(self) -> int:
        """How many ids have a probability above 0."""
    def probability(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Q of each id."""
    def log_q(self, ids: ArrayLike) -> NDArray[np.float32]:
        """log Q of each id. ValueError for an id that is never drawn."""
    def log_probabilities(self, ids: ArrayLike) -> NDArray[np.float32]:
        """log Q of each id, and -inf of one that is never drawn: what `union_log_q` takes."""
    def draw(self, draws: int, random: RandomStream) -> Sample:
        """Independent draws, with repetitions. log_q is log Q."""
    def draw_deduplicated(self, draws: int, random: RandomStream) -> Sample:
        """The distinct ids among ``draws`` draws. log_q is log(1 - (1 - Q)^draws): not for "corrected_logq"."""
    def draw_distinct(self, count: int, random: RandomStream) -> Sample:
        """Exactly ``count`` distinct ids, with a conditional probability that corrects exactly (Cohen and Kaplan, PODC 2007)."""

class Uniform(Distribution):
    """Each of ``num_items`` items with the same probability."""
    def __new__(cls, num_items: int) -> Self: ...

class Unigram(Distribution):
    """Items in proportion to ``counts ** distortion``. An item of count 0 is never drawn."""
    def __new__(cls, counts: ArrayLike, distortion: float = 1.0) -> Self: ...

class LogUniform(Distribution):
    """TensorFlow's log-uniform (Zipf) sampler: items in the order of their popularity, the most popular first."""
    def __new__(cls, num_items: int) -> Self: ...

class Mixture(Distribution):
    """A draw from one of several distributions of the same items, chosen with the weight of each."""
    def __new__(cls, components: list[tuple[float, Distribution]]) -> Self: ...

class _Estimator:
    def observe(self, ids: ArrayLike) -> None:
        """Takes the ids of a batch in, repetitions and all. Before `log_q` of the same batch (Yi et al. 2019)."""
    def probability(self, ids: ArrayLike) -> NDArray[np.float64]:
        """The estimate of Q of each id, in (0, 1]."""
    def log_q(self, ids: ArrayLike) -> NDArray[np.float32]:
        """log Q of each id, per draw: for a pool that holds every position of the batch. Never -inf."""
    def log_q_deduplicated(self, ids: ArrayLike, batch_size: int) -> NDArray[np.float32]:
        """log of the probability to be in a batch of ``batch_size`` draws: for a pool that holds each distinct id once."""
    def to_bytes(self) -> bytes:
        """The whole state, for a checkpoint. Pickling uses it, too."""
    @staticmethod
    def from_bytes(bytes: bytes) -> Any:
        """An estimator from its state. ValueError for bytes that are none."""

class ExactCounts(_Estimator):
    """Exact counts of every id: Q is its share of the stream. Memory grows with the distinct ids."""
    def __new__(cls) -> Self: ...

class CountMin(_Estimator):
    """A count-min sketch of ``depth`` rows of ``width`` cells (Cormode and Muthukrishnan 2005): fixed memory."""
    def __new__(cls, width: int, depth: int = 4, seed: int = 0) -> Self: ...

class GapEstimator(_Estimator):
    """The streaming estimator of Yi et al., RecSys 2019: fixed memory, follows a drift at the rate ``alpha``."""
    def __new__(cls, width: int, depth: int = 2, alpha: float = 0.01, seed: int = 0) -> Self: ...

class TemperatureSchedule:
    """A temperature that moves from ``start`` to ``end`` in the course of the training."""
    def __new__(cls, kind: Literal["constant", "linear", "cosine", "exponential"], start: float, end: float | None = None) -> Self: ...
    def at(self, step: int, steps: int) -> float:
        """The temperature of step ``step``, counted from 0, of ``steps``."""
    def at_progress(self, progress: float) -> float:
        """The temperature when ``progress`` of the training, 0 to 1, is done."""

class Ranking:
    """Places of relevant items, and the metrics of them. Rows without a relevant item are left out of means."""
    @staticmethod
    def of_positives(above: ArrayLike, ties: ArrayLike, lse: ArrayLike, positive: ArrayLike) -> Ranking:
        """Of the positive of each row over the whole catalogue, from `statistics` with ``rank=True``."""
    @staticmethod
    def in_lists(indices: NDArray[np.int64], scores: NDArray[np.float32], offsets: ArrayLike, relevant: ArrayLike) -> Ranking:
        """Of relevant items in lists, as `top_k` returns them: those of row i are ``relevant[offsets[i]:offsets[i + 1]]``."""
    def append(self, other: Ranking) -> None:
        """Adds the rows of another ranking, of the next block of queries."""
    def __len__(self) -> int: ...
    @property
    def k(self) -> int | None:
        """K of the lists that the places come from. None where places are exact, over the whole catalogue."""
    def rows(self) -> list[tuple[list[int], int]]:
        """Of each row, the places of its relevant items that have one, ascending from 0, and how many relevant items there are."""
    def recall_at(self, k: int) -> float:
        """The share of a row's relevant items among the first ``k``, the mean over rows."""
    def ndcg_at(self, k: int) -> float:
        """NDCG of the first ``k`` with relevance 0 or 1."""
    def mrr(self) -> float:
        """The mean of 1 / (1 + place) of the first relevant item."""

class Recommended:
    """How often each item is in the lists that were added."""
    def __new__(cls, num_items: int) -> Self: ...
    def add(self, indices: NDArray[np.int64]) -> None:
        """Counts the items of lists (B, K), as `top_k` returns them."""
    def coverage(self) -> float:
        """The share of all items that are in some list."""
    def mean_popularity(self, popularity: ArrayLike) -> float:
        """The mean of ``popularity`` (num_items) over all places of all lists."""

def union_log_q(pools: list[tuple[float, ArrayLike]]) -> NDArray[np.float32]:
    """One log_q for candidates of several pools, ``log sum over pools of draws * exp(log_q)``: an expected count."""

def union_gradient_weight(pools: list[tuple[float, ArrayLike, bool]]) -> NDArray[np.float32]:
    """What to multiply candidates' gradients by where some pools of a union (a queue) have none."""

class Queue:
    """What `catalog_softmax.NegativeQueue` and `catalog_softmax.torch.NegativeQueue` are around."""
    def __new__(cls, capacity: int, dim: int, dtype: str, ids: bool, log_q: bool, max_age: int | None) -> Self: ...
    def enqueue(self, rows: tuple) -> None: ...
    def options(self) -> tuple[int, int, str, bool, bool, int | None]: ...
    def rows(self) -> tuple[NDArray, NDArray[np.int64] | None, NDArray[np.float32] | None]: ...
    def ages(self) -> NDArray[np.int64]: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(bytes: bytes) -> Queue: ...

class Optimizer:
    """What `catalog_softmax.Optimizer` is around."""
    learning_rate: float
    def __new__(cls, rule: str, rows: int, dim: int, learning_rate: float, options: dict[str, Any]) -> Self: ...
    def step(self, table: tuple, gradient: tuple, threads: int) -> None: ...
    def step_rows(self, table: tuple, rows: tuple, values: tuple, threads: int) -> None: ...
    @property
    def steps(self) -> int: ...
    def accumulator(self) -> NDArray[np.float32] | None: ...
    def master_copy(self) -> NDArray[np.float32] | None: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(bytes: bytes) -> Optimizer: ...

# Of addresses: what the package's modules call. `src/loss.rs` describes them.
def forward(batch: tuple, loss: tuple, gradients: bool, threads: int) -> tuple: ...
def statistics(batch: tuple, loss: tuple, requested: tuple[bool, bool, bool], threads: int) -> tuple: ...
def gradients(batch: tuple, loss: tuple, rows: tuple, expected: tuple, upstream: tuple, threads: int) -> tuple: ...
def compute(batch: tuple, loss: tuple, requested: tuple[bool, bool, bool], threads: int) -> tuple: ...
def top_k(batch: tuple, similarity: str, k: int, threads: int) -> tuple: ...
def alignment(x: tuple, y: tuple, alpha: float) -> float: ...
def uniformity(x: tuple, t: float, threads: int) -> float: ...

# With what `src/extra.rs` describes: tables, several positives, filters.
def table_forward(batch: tuple, extra: dict, loss: tuple, gradients: bool, threads: int) -> tuple: ...
def table_statistics(batch: tuple, extra: dict, loss: tuple, requested: tuple[bool, bool, bool], threads: int) -> tuple: ...
def table_gradients(
    batch: tuple, extra: dict, loss: tuple, row_sparse: bool, statistics: tuple, upstream: tuple, threads: int
) -> tuple: ...
def table_compute(batch: tuple, extra: dict, loss: tuple, row_sparse: bool, requested: tuple[bool, bool, bool], threads: int) -> tuple: ...
def table_update(batch: tuple, extra: dict, loss: tuple, requested: tuple[bool, bool], optimizer: Optimizer, threads: int) -> tuple: ...
def hardest_negatives(batch: tuple, extra: dict, similarity: str, k: int, threads: int) -> tuple: ...

# In float64, for tests of the operators' formulas.
def reference_forward(batch: tuple, loss: tuple, gradients: bool) -> tuple: ...
def reference_statistics(batch: tuple, loss: tuple, gradients: bool) -> tuple: ...
def reference_gradients(batch: tuple, loss: tuple, rows: tuple, expected: tuple, upstream: tuple) -> tuple: ...
def reference_table_forward(batch: tuple, extra: dict, loss: tuple, gradients: bool) -> tuple: ...
def reference_table_statistics(batch: tuple, extra: dict, loss: tuple, gradients: bool) -> tuple: ...
def reference_table_gradients(batch: tuple, extra: dict, loss: tuple, row_sparse: bool, statistics: tuple, upstream: tuple) -> tuple: ...

# Of device addresses: what `_device.py` calls. `place`: (ordinal, handle of the stream, whether workspaces are given).
def device_plan(place: tuple, batch: tuple, extra: dict | None, loss: tuple, requested: tuple[bool, bool, bool]) -> int: ...
def device_compute(
    place: tuple, workspace: tuple | None, batch: tuple, extra: dict | None, loss: tuple, output: dict[str, Any]
) -> None: ...
def device_gradients(
    place: tuple, workspace: tuple | None, batch: tuple, extra: dict | None, loss: tuple, upstream: tuple, gradients: tuple
) -> None: ...
def device_plan_hardest_negatives(place: tuple, batch: tuple, extra: dict | None, similarity: str, k: int) -> int: ...
def device_hardest_negatives(
    place: tuple, workspace: tuple | None, batch: tuple, extra: dict | None, similarity: str, k: int, output: tuple
) -> None: ...
def device_plan_top_k(place: tuple, batch: tuple, similarity: str, k: int) -> int: ...
def device_top_k(place: tuple, workspace: tuple | None, batch: tuple, similarity: str, k: int, output: tuple) -> None: ...
def device_fault(place: tuple) -> None: ...
def device_of(address: int) -> int: ...
def dlpack(capsule: Any) -> tuple[int, int, int, list[int], list[int] | None, str]: ...
