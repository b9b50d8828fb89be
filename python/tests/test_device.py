"""Steps on device memory. The arrays are those of small libraries of their own (device.py), with ``__cuda_array_interface__`` or DLPack,
or tensors in device memory that take the way of CUDA tensors. Without a device the tests are skipped; `scripts/test_python.sh` runs
them on the emulated one. Tests of losses run there, too, by `pytest --on-device`."""

import numpy as np
import pytest
import torch

import catalog_softmax as cs
import device
import reference
from catalog_softmax import _core, _device
from catalog_softmax.torch import FullSoftmaxLoss, _arguments, _cuda, check_device, row_statistics, softmax_loss, top_k
from common import check, embeddings, excluded, integers, log_q
from device import DLPack, Interface, Place, needs_device

pytestmark = needs_device
B, N, D, CATALOGUE = 37, 150, 24, 120


@pytest.fixture
def context():
    return device.Context()


@pytest.fixture
def cuda_tensors(context, monkeypatch):
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: Place(context))
    return context


def problem(dtype=torch.float32):
    """Tensors for the reference: queries, pools, positives, and options."""
    q, pools = embeddings(B, D, 1, dtype), [embeddings(N, D, 2, dtype), embeddings(21, D, 3, dtype)]
    options = {
        "candidate_ids": [integers(CATALOGUE, N, 4), integers(CATALOGUE, 21, 5)], "log_q": [log_q(N, 6), log_q(21, 7)],
        "excluded": excluded(B, CATALOGUE, 8),
    }
    return q, pools, integers(N + 21, B, 9), options


def there(value, wrap=Interface):
    """On the device."""
    if isinstance(value, (list, tuple)):
        return type(value)(there(x, wrap) for x in value)
    return wrap(value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy())


def expected(q, pools, positives, options, weight, dtype):
    """Loss, statistics and gradients by PyTorch in a precision."""
    q, *pools = (x.detach().clone().to(dtype).requires_grad_() for x in (q, *pools))
    temperature = torch.tensor(0.2, dtype=dtype, requires_grad=True)
    reference.COEFFICIENTS = dtype if dtype == torch.float32 else None
    options = {**options, "temperature": temperature}
    loss = reference.softmax_loss(q, pools, positives, correction="logq", row_weight=weight, reduction="weighted_mean", **options)
    loss.backward()
    reference.COEFFICIENTS = None
    lse, positive, n = reference.statistics(q, pools, positives, **options)
    return [loss, lse, positive, n, q.grad, pools[0].grad, temperature.grad]


@pytest.mark.parametrize("wrap", [Interface, DLPack])
def test_value_gradients_and_statistics_of_arrays(context, wrap):
    q, pools, positives, options = problem()
    weight = torch.linspace(0.0, 2.0, B)
    found = cs.value_and_grad(
        there(q, wrap), there(pools, wrap), there(positives.int(), wrap), temperature=0.2, correction="logq",
        row_weight=there(weight, wrap), reduction="weighted_mean", candidate_gradients=[True, False], stream=context.stream,
        moments=True, rank=True, **{name: there(x, wrap) for name, x in options.items()},
    )
    cs.check_device(stream=context.stream)
    assert all(isinstance(x, cs.DeviceArray) for x in (found.total, found.gradients.d_queries, found.statistics.entropy))
    assert found.gradients.d_candidates[1] is None and found.total.shape == () and found.loss.shape == (B,)
    s, g = found.statistics, found.gradients
    results = [found.total, s.lse, s.positive, s.num_negatives, g.d_queries, g.d_candidates[0], g.d_temperature]
    wanted = [expected(q, pools, positives, options, weight, dtype) for dtype in (torch.float64, torch.float32)]
    for place, (result, exact, baseline) in enumerate(zip(results, *wanted)):
        result = torch.from_numpy(result.numpy()).reshape(exact.shape)
        if place == 3:
            assert torch.equal(result, exact)
        else:
            check(result, exact.double(), baseline, f"result {place}")
    on_host = cs.value_and_grad(
        q.numpy(), [x.numpy() for x in pools], positives.numpy(), temperature=0.2, correction="logq", rank=True, moments=True,
        **{name: type(x)(y.numpy() for y in x) for name, x in options.items()},
    )
    assert (s.above.numpy() == on_host.statistics.above).all() and (s.ties.numpy() == on_host.statistics.ties).all()
    np.testing.assert_allclose(s.entropy.numpy(), on_host.statistics.entropy, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_arrays_and_strided_ones(context, dtype):
    q, candidates = embeddings(B, D, 1, dtype), embeddings(N, D, 2, dtype)
    arrays = [there(x, DLPack) for x in (q, candidates)]
    if dtype == torch.float16:
        arrays[0] = Interface(q.numpy(), between=D + 7)
    found = cs.value_and_grad(*arrays, temperature=0.1, stream=context.stream)
    results = [found.total, found.gradients.d_queries, found.gradients.d_candidates]
    wanted = []
    for precision in (torch.float64, torch.float32):
        a, c = (x.detach().clone().to(precision).requires_grad_() for x in (q, candidates))
        reference.COEFFICIENTS = dtype if precision == torch.float32 else None
        loss = reference.softmax_loss(a, c, temperature=0.1)
        loss.backward()
        reference.COEFFICIENTS = None
        wanted.append([loss.detach(), a.grad, c.grad])
    for place, (result, exact, baseline) in enumerate(zip(results, *wanted)):
        check(torch.from_numpy(result.numpy()).reshape(exact.shape), exact, baseline, f"result {place}")


def test_statistics_and_gradients_in_two_calls(context):
    q, pools, positives, options = problem()
    args = there(q), there(pools), there(positives.int())
    options = {name: there(x) for name, x in options.items()}
    stream = context.stream
    s = cs.statistics(*args, temperature=0.2, gradients=True, stream=stream, **options)
    margin = s.lse.numpy() - s.positive.numpy()
    d = 1.0 / (1.0 + np.exp(-margin)) / B
    found = cs.gradients(s, Interface(d), Interface(-d), *args, temperature=0.2, stream=stream, **options)
    whole = cs.value_and_grad(*args, temperature=0.2, correction="logq_negatives_only", stream=stream, **options)
    for a, b in ((found.d_queries, whole.gradients.d_queries), (found.d_candidates[1], whole.gradients.d_candidates[1])):
        # One loss in two ways: derivatives differ in the last bits of float64, and products in float32.
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6 * np.abs(b.numpy()).max())


def test_symmetric_loss(context):
    q, c = embeddings(B, D, 1), embeddings(B, D, 2)
    found = cs.value_and_grad(there(q), there(c), symmetric=True, temperature=0.2, stream=context.stream)
    on_host = cs.value_and_grad(q.numpy(), c.numpy(), symmetric=True, temperature=0.2)
    assert abs(found.total.numpy() / on_host.total - 1.0) < 1e-6
    scale = np.abs(on_host.gradients.d_candidates).max()
    assert np.abs(found.gradients.d_candidates.numpy() - on_host.gradients.d_candidates).max() < 2e-6 * scale


@pytest.mark.parametrize("k", [1, 7, N])
def test_top_k(context, cuda_tensors, k):
    q, c, ids = embeddings(B, D, 1), embeddings(N, D, 2), integers(CATALOGUE, N, 3)
    seen = excluded(B, CATALOGUE, 8)
    wanted = cs.top_k(q.numpy(), c.numpy(), k, candidate_ids=ids.numpy(), excluded=tuple(x.numpy() for x in seen))
    found = cs.top_k(there(q), there(c), k, candidate_ids=there(ids), excluded=there(seen), stream=context.stream)
    of_tensors = top_k(q, c, k, candidate_ids=ids, excluded=seen)
    for indices, scores in ((found.indices.numpy(), found.scores.numpy()), (of_tensors.indices.numpy(), of_tensors.values.numpy())):
        # Neighbours whose similarities are a rounding apart may change places.
        same = indices == wanted.indices
        assert same.mean() > 0.98 and ((indices == -1) == (wanted.indices == -1)).all()
        finite = np.isfinite(wanted.scores)
        assert (np.isfinite(scores) == finite).all() and np.abs(scores[finite] - wanted.scores[finite]).max() < 1e-6
    assert of_tensors.indices.dtype == torch.int64


def test_results_are_arrays_for_other_libraries(context):
    found = cs.value_and_grad(there(embeddings(B, D, 1)), there(embeddings(N, D, 2)), stream=context.stream)
    interface = found.gradients.d_queries.__cuda_array_interface__
    assert interface["shape"] == (B, D) and interface["typestr"] == "<f4" and interface["stream"] == context.stream
    assert found.total.device == 0 and "DeviceArray" in repr(found.total) and len(found.loss) == B
    # Results are inputs of further calls, on the stream that they name.
    again = cs.statistics(found.gradients.d_queries, found.gradients.d_candidates)
    assert again.lse.stream == context.stream and np.isfinite(again.lse.numpy()).all()


def test_streams_and_dlpack(context):
    q, c = DLPack(embeddings(B, D, 1).numpy()), DLPack(embeddings(N, D, 2).numpy())
    cs.value_and_grad(q, c, stream=context.stream)
    assert q.asked == [context.stream]  # the producer is told who has to wait
    cs.value_and_grad(q, c)
    assert q.asked[-1] == 1  # the legacy default stream
    other = device.Context()
    mixed = Interface(embeddings(B, D, 1).numpy(), context.stream), Interface(embeddings(N, D, 2).numpy(), other.stream)
    with pytest.raises(ValueError, match=r"the arrays name the streams \[.*\]; rule: one of them, or the argument stream"):
        cs.value_and_grad(*mixed)
    assert np.isfinite(cs.value_and_grad(*mixed, stream=other.stream).total.numpy())


def test_errors(context):
    q, c, positives = there(embeddings(B, D, 1)), there(embeddings(N, D, 2)), there(integers(N, B, 3).int())
    host = embeddings(N, D, 2).numpy()
    for call, message in [
        (lambda: cs.value_and_grad(q, host), "candidates is in host memory; rule: device memory, as queries"),
        (lambda: cs.value_and_grad(host, c), "candidates is in device memory; rule: host memory, as queries"),
        (lambda: cs.value_and_grad(q, there(embeddings(N, D + 1, 2))), "candidates has dim 25; rule: the dim of queries"),
        (lambda: cs.value_and_grad(q, c, there(integers(N, B, 3))), "positives has shape (37,) of int64; rule: one axis of int32"),
        (lambda: cs.value_and_grad(q, c, positives, candidate_ids=there(integers(9, N, 3).int())), "candidate_ids has shape"),
        (lambda: cs.value_and_grad(q, c, positives, log_q=there(log_q(N, 4))), "log_q is given but does not apply"),
        (lambda: cs.value_and_grad(q, c, positives, correction="logq"), "log_q is missing; rule: every correction subtracts it"),
        (lambda: cs.value_and_grad(q, c, positives, temperature=0.0), "temperature is 0; rule: finite and > 0"),
        (lambda: cs.value_and_grad(there(embeddings(B, D, 1).double()), c), "queries has elements of type float64; rule: float32"),
        (lambda: cs.value_and_grad(q, []), "candidates is a list of no pools"),
        (lambda: cs.value_and_grad(q, c, there(integers(N, B - 1, 3).int())), "positives has length 36; rule: length 37"),
        (lambda: cs.top_k(q, c, 0), "k is 0; rule"),
        (lambda: cs.top_k(q, c, N + 1), "k is 151; rule"),
    ]:
        with pytest.raises(ValueError, match=device.start(message)):
            call()
    with pytest.raises(cs.DeviceUnavailable, match="device cuda:7 cannot be used: there are"):
        _core.DeviceArray((7, 0, False), (3,), "float32")


def test_values_that_only_the_device_sees(context, cuda_tensors):
    q, c = embeddings(B, D, 1), embeddings(N, D, 2)
    positives = integers(N, B, 3)
    positives[5] = N
    cs.value_and_grad(there(q), there(c), there(positives.int()), stream=context.stream)
    with pytest.raises(ValueError, match=r"positives\[5\] is no candidate's index; rule: at least 0"):
        cs.check_device(stream=context.stream)
    cs.check_device(stream=context.stream)  # said once
    place = Place(context)
    for wrong in (N, -1, 2**32 + 3):
        positives[5] = wrong
        softmax_loss(q, c, positives)
        with pytest.raises(ValueError, match=r"positives\[5\] is no candidate's index"):
            _core.device_fault(place.raw)
    softmax_loss(q, c, positives, row_weight=(torch.arange(B) != 5).float())  # a row of weight 0 is not looked at
    _core.device_fault(place.raw)


def test_padding_of_weight_0_may_hold_anything(cuda_tensors):
    """As on the CPU, which leaves such rows out."""
    weight = torch.ones(B)
    weight[[2, 11, 30]] = 0.0
    results = []
    for spoiled in (False, True):
        q, c = embeddings(B, D, 1), embeddings(N, D, 2).requires_grad_()
        positives, temperature = integers(N, B, 3), torch.tensor(0.2, requires_grad=True)
        if spoiled:
            q[2], positives[11], q[30, 5] = torch.nan, -100, torch.inf
        q.requires_grad_()
        loss = softmax_loss(q, c, positives, row_weight=weight, reduction="weighted_mean", temperature=temperature)
        loss.backward()
        results.append((loss.detach(), q.grad, c.grad, temperature.grad))
    for clean, spoiled in zip(*results):
        assert torch.equal(clean, spoiled)
    assert (results[1][1][[2, 11, 30]] == 0.0).all()
    rows = softmax_loss(q, c, positives, row_weight=weight, reduction="none")
    assert (rows[[2, 11, 30]] == 0.0).all() and rows.isfinite().all()


class Prepared(Place):
    """Everything from one block that is there before."""

    class Memory:
        def __init__(self):
            self.block, self.used, self.dtypes = device.Block(64 << 20), 0, []

    def __init__(self, context, memory):
        super().__init__(context)
        self.memory = memory

    def empty(self, shape, dtype):
        memory, count = self.memory, int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = memory.used
        memory.used = (start + count + 255) // 256 * 256
        memory.dtypes.append(dtype)
        return torch.from_numpy(memory.block.bytes()[start : start + count].view(dtype).reshape(shape))

    def address(self, tensor):
        if self._lies_in_device_memory(tensor):
            return tensor.data_ptr()
        held = self.empty((tensor.numel() * tensor.element_size(),), "uint8")
        held.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        return held.data_ptr()


def test_a_step_is_captured_and_replayed(context, monkeypatch):
    """In the strictest mode, on a stream that nothing ran on before: as torch.cuda.graph does it after a warm-up elsewhere."""
    memory = Prepared.Memory()
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: Prepared(context, memory))
    arguments = _arguments.Arguments(embeddings(B, D, 1), embeddings(N, D, 2), integers(N, B, 3), *[None] * 8)
    place, raw, loss = arguments.place, arguments.raw(), ("cosine", 0.1, "none", "mean", False)
    wanted = {"loss": ((B,), "float64"), "expected_negative": ((B, D), "float32")}
    eager = _device.compute(place, raw, loss, wanted)
    context.synchronize()
    other = device.Context()
    place.raw = (0, other.stream, True)
    driver = device.driver
    stream, mode = driver.CUstream(other.stream), driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    device.checked(driver.cuStreamBeginCapture(stream, mode))
    captured = _device.compute(place, raw, loss, wanted)
    graph = device.checked(driver.cuStreamEndCapture(stream))
    runnable = device.checked(driver.cuGraphInstantiate(graph, 0))
    for array in captured.values():
        array.fill_(torch.nan)
    device.checked(driver.cuGraphLaunch(runnable, stream))
    context.synchronize()
    for name, array in eager.items():
        assert torch.equal(captured[name], array), name
    # An eager step on another stream, meanwhile, is none of the graph's business.
    place.raw = (0, context.stream, True)
    again = _device.compute(place, raw, loss, wanted)
    context.synchronize()
    assert torch.equal(again["loss"], eager["loss"])


def test_what_a_step_allocates_comes_from_the_place(context, monkeypatch):
    """Of PyTorch's allocator there, so that its reports and its graphs know of all of it."""
    q, c = embeddings(B, D, 1), embeddings(N, D, 2)
    block = Prepared.Memory()
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: Prepared(context, block))
    softmax_loss(q, c)  # opens the device
    q.requires_grad_(), c.requires_grad_()
    before = context.free_bytes()
    softmax_loss(q, c).backward()
    top_k(q, c, 5)
    assert context.free_bytes() == before
    assert q.grad.isfinite().all() and block.dtypes.count("uint8") > 3


def test_tensors_of_several_devices_and_of_others(cuda_tensors):
    q = embeddings(B, D, 1)
    with pytest.raises(ValueError, match="candidates is on meta; rule: cpu, as the rest of the call"):
        _arguments.Arguments(q, torch.empty(N, D, device="meta"), None, None, None, None, None, None, None, None, None)
    rows = row_statistics(q, embeddings(N, D, 2), integers(N, B, 3))
    assert rows.num_negatives.dtype == torch.int64 and (rows.num_negatives == N - 1).all()
    with pytest.raises(ValueError, match="symmetric"):
        softmax_loss(q, embeddings(N, D, 2), symmetric=True)
    hidden = q.reshape(1, B, D)
    targets = integers(N, B, 3).reshape(1, B)
    targets[0, 4] = -100
    loss = FullSoftmaxLoss()(hidden, embeddings(N, D, 2), targets)
    exact = torch.nn.functional.cross_entropy(q.double() @ embeddings(N, D, 2).double().T, targets[0])
    assert abs(loss.item() / exact.item() - 1.0) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA device: its own tensors have not been tried")
def test_cuda_tensors():
    """PyTorch's own: streams, captures, and no wait for the device."""
    q, c = embeddings(B, D, 1).cuda().requires_grad_(), embeddings(N, D, 2).cuda().requires_grad_()
    softmax_loss(q, c).backward()  # opens the device
    wanted = q.grad.clone(), c.grad.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        q.grad = c.grad = None
        softmax_loss(q, c).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(q.grad, wanted[0]) and torch.equal(c.grad, wanted[1])
    graph = torch.cuda.CUDAGraph()
    q.grad = c.grad = None
    with torch.cuda.graph(graph):
        softmax_loss(q, c).backward()
    graph.replay()
    assert torch.equal(q.grad, wanted[0]) and torch.equal(c.grad, wanted[1])
    check_device()
