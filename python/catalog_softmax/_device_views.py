"""Arrays in device memory of libraries that the package does not know, by ``__cuda_array_interface__`` or DLPack: what the core needs of
them, checked. Nothing is copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _core

_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType


def on_device(values: Any) -> bool:
    """Whether an array says that it is in a CUDA device's memory."""
    if isinstance(values, np.ndarray):
        return False
    if hasattr(values, "__dlpack_device__"):
        return values.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED)
    return hasattr(values, "__cuda_array_interface__")


def stream_of(arrays: Sequence[Any], stream: int | None) -> int:
    """The stream that a call runs on: the one that is asked for, else the one that the arrays name, else the legacy default one."""
    if stream is not None:
        return stream
    # DLPack names none: there, the producer is told the one that has to wait.
    plain = [values for values in arrays if values is not None and not hasattr(values, "__dlpack_device__") and on_device(values)]
    named = {values.__cuda_array_interface__.get("stream") for values in plain} - {None}
    if len(named) > 1:
        raise ValueError(f"the arrays name the streams {sorted(named)}; rule: one of them, or the argument stream")
    return named.pop() if named else 0


class View:
    """An array in device memory: what the core needs of it. It keeps the array."""

    def __init__(self, values: Any, argument: str, stream: int):
        if not on_device(values):
            raise ValueError(f"{argument} is in host memory; rule: device memory, as queries")
        described = _of_dlpack(values, argument, stream) if hasattr(values, "__dlpack__") else _of_interface(values)
        self.address, self.shape, strides, self.dtype, self.ordinal, self.owner = described
        if any(n == 0 for n in self.shape):
            self.strides = tuple(strides or (0,) * len(self.shape))
            return
        contiguous = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        self.strides = tuple(contiguous if strides is None else strides)
        if self.ordinal is None:
            self.ordinal = _core.device_of(self.address)


def _of_interface(values: Any) -> tuple:
    """Address, shape, strides in elements or None, type, and the device, which this interface does not say."""
    interface = values.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ValueError("an array has a mask; rule: none")
    dtype = np.dtype(interface["typestr"])
    if not dtype.isnative:
        raise ValueError(f"an array has elements of type {dtype}, which are not this machine's; rule: native byte order")
    strides = interface.get("strides")
    if strides is not None and any(between % dtype.itemsize for between in strides):
        raise ValueError(f"an array has strides of {strides} bytes; rule: multiples of an element")
    strides = None if strides is None else [between // dtype.itemsize for between in strides]
    return interface["data"][0], tuple(interface["shape"]), strides, dtype.name, None, values


def _of_dlpack(values: Any, argument: str, stream: int) -> tuple:
    # The producer makes this stream wait for its own work; 1 is the legacy default stream there.
    capsule = values.__dlpack__(stream=stream or 1)
    address, kind, ordinal, shape, strides, dtype = _core.dlpack(capsule)
    if kind not in (_CUDA, _CUDA_MANAGED):
        raise ValueError(f"{argument} is on a device of DLPack's type {kind}; rule: CUDA")
    return address, tuple(shape), strides, dtype, ordinal, capsule


def embeddings(values: Any, argument: str, stream: int) -> View:
    """(rows, dim), elements of a row side by side, rows at any distance. Nothing is copied: what does not fit is an error."""
    found = View(values, argument, stream)
    if found.dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{argument} has elements of type {found.dtype}; rule: float32, float16 or bfloat16")
    if len(found.shape) != 2:
        raise ValueError(f"{argument} has shape {found.shape}; rule: two axes, (rows, dim)")
    (rows, dim), (between, within) = found.shape, found.strides
    if (dim > 1 and within != 1) or (rows > 1 and between < dim):
        raise ValueError(f"{argument} has strides {found.strides}; rule: elements of a row side by side, in device memory")
    return found


def column(allowed: Sequence[str]) -> Callable[[Any, str, int], View]:
    """Views of one axis of a type, contiguous."""
    return lambda values, argument, stream: _contiguous(values, argument, stream, allowed, "one axis")


def matrix(allowed: Sequence[str]) -> Callable[[Any, str, int], View]:
    """Views of (B, K), contiguous."""
    return lambda values, argument, stream: _contiguous(values, argument, stream, allowed, "two axes, (B, K),")


def _contiguous(values: Any, argument: str, stream: int, allowed: Sequence[str], axes: str) -> View:
    found = View(values, argument, stream)
    if len(found.shape) != (1 if axes == "one axis" else 2) or found.dtype not in allowed:
        rule = f"{axes} of {' or '.join(allowed)}, in device memory"
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: {rule}")
    expected = [math.prod(found.shape[axis + 1 :]) for axis in range(len(found.shape))]
    apart = [between for between, side, n in zip(found.strides, expected, found.shape) if n > 1 and between != side]
    if apart and 0 not in found.shape:
        raise ValueError(f"{argument} has elements {apart[0]} apart; rule: side by side, in device memory")
    return found


def raw_embeddings(found: View) -> tuple[int, int, int, int, str]:
    rows, dim = found.shape
    return (found.address, rows, dim, found.strides[0] if rows > 1 else dim, found.dtype)


def raw_column(found: View | None) -> tuple[int, int] | None:
    return None if found is None else (found.address, math.prod(found.shape))


INT64, INT32 = ("int64", "uint64"), ("int32", "uint32")
