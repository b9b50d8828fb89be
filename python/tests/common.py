"""Inputs and comparisons."""

import torch

import reference

ON_DEVICE = False
"""Whether tensors go the way of CUDA tensors (conftest.py). The kernels round what multiplies embeddings to their type."""
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def embeddings(rows, dim, seed, dtype=torch.float32):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(high, rows, seed, dtype=torch.int64):
    return torch.randint(high, (rows,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def log_q(rows, seed):
    return -1.0 - 4.0 * torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def excluded(b, ids, seed):
    """Up to three ids of the catalogue for each row."""
    counts = integers(4, b, seed)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets, integers(ids, int(offsets[-1]), seed + 1)


def copy_of(value, dtype):
    """The same arguments as leaves of another graph."""
    if isinstance(value, list):
        return [copy_of(x, dtype) for x in value]
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().to(dtype).requires_grad_()
    if isinstance(value, torch.Tensor) and value.dtype in ROUNDING and dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    return value


def leaves(arguments):
    for value in arguments:
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                yield tensor


def compare(function, of_reference, args, options, upstream=lambda loss: loss.sum()):
    """Value and every gradient against float64, each as close as a few times what float32 with logits is."""
    results = []
    for run, dtype in ((function, None), (of_reference, torch.float64), (of_reference, torch.float32)):
        a = args if dtype is None else [copy_of(x, dtype) for x in args]
        o = options if dtype is None else {key: copy_of(x, dtype) for key, x in options.items()}
        inputs = list(leaves([*a, *o.values()]))
        for tensor in inputs:
            tensor.grad = None
        reference.COEFFICIENTS = args[0].dtype if ON_DEVICE and dtype == torch.float32 else None
        value = run(*a, **o)
        upstream(value).backward()
        reference.COEFFICIENTS = None
        assert all(tensor.grad is not None for tensor in inputs)
        results.append([value.detach(), *(tensor.grad for tensor in inputs)])
    for place, (found, wanted, baseline) in enumerate(zip(*results)):
        check(found, wanted, baseline, f"result {place}")


def check(found, wanted, baseline, what):
    assert found.shape == wanted.shape, what
    scale = wanted.abs().max() if wanted.numel() else 0.0
    tolerance = 8.0 * (baseline.double() - wanted).abs().max() + 1e-6 * scale + 1e-9
    # The result itself is rounded to its type.
    tolerance = tolerance + ROUNDING[found.dtype] * wanted.abs() if found.dtype in ROUNDING else tolerance
    tolerance = tolerance + (6e-8 if found.dtype == torch.float16 else 0.0)
    errors = (found.double() - wanted).abs()
    assert (errors <= tolerance).all(), f"{what}: off by {errors.max()}, allowed {torch.as_tensor(tolerance).max()}"


__all__ = ["reference"]
