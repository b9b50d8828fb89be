"""Device memory for tests, from the driver's interface: of a GPU, or of the emulated device (docs/emulator.md) where its library comes
first on LD_LIBRARY_PATH.

All of it is managed memory, which the host reads and writes at the same addresses. So CPU tensors can lie in it, and the code for CUDA
tensors can be run with them: all of it but PyTorch's own part in it.
"""

import contextlib
import ctypes
import functools
import math
import os
import re

import numpy as np
import pytest
import torch

import catalog_softmax as cs
from catalog_softmax.torch import _cuda

try:
    cs.check_device()
    driver = pytest.importorskip("cuda.bindings.driver")
    WHY_NOT = None
except cs.DeviceUnavailable as error:
    WHY_NOT = str(error)
    if os.environ.get("REQUIRE_GPU") == "1":
        raise

needs_device = pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA device: {WHY_NOT}")


def checked(result):
    code, *values = result
    assert code == driver.CUresult.CUDA_SUCCESS, code
    return values[0] if values else None


@functools.cache
def primary():
    """The device's primary context, which is kept."""
    checked(driver.cuInit(0))
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(0))))


def make_current():
    """In this thread."""
    checked(driver.cuCtxSetCurrent(primary()))


class Context:
    """The primary context, current in this thread, and a stream."""

    def __init__(self):
        make_current()
        self.stream = int(checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def synchronize(self):
        checked(driver.cuCtxSynchronize())

    def free_bytes(self):
        code, free, _ = driver.cuMemGetInfo()
        assert code == driver.CUresult.CUDA_SUCCESS
        return free


class Block:
    """Bytes of device memory."""

    def __init__(self, count):
        flags = driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value
        make_current()
        self.address, self.count = int(checked(driver.cuMemAllocManaged(max(count, 1), flags))), count

    def bytes(self):
        """As numpy sees them. The array keeps the block."""
        buffer = (ctypes.c_ubyte * self.count).from_address(self.address)
        buffer.block = self
        return np.frombuffer(buffer, np.uint8)

    def __del__(self):
        make_current()
        driver.cuCtxSynchronize()
        driver.cuMemFree(self.address)


class Interface:
    """An array in device memory of a library that has nothing but ``__cuda_array_interface__``."""

    def __init__(self, values, stream=None, between=None):
        """`between`: elements between the starts of rows."""
        values = np.ascontiguousarray(values)
        self.shape, self.dtype = values.shape, values.dtype
        width = values.shape[-1] if between is None else between
        padded = np.full((math.prod(values.shape[:-1]), width), 0x7F, values.dtype)
        padded[:, : values.shape[-1]] = values.reshape(padded.shape[0], -1)
        self.block, self.stream = Block(padded.nbytes), stream
        self.strides = None if between is None else (width * values.itemsize, values.itemsize)
        self.block.bytes()[:] = padded.reshape(-1).view(np.uint8)

    @property
    def __cuda_array_interface__(self):
        stream = {} if self.stream is None else {"stream": self.stream}
        data, typestr = (self.block.address, True), self.dtype.str
        return {"shape": self.shape, "typestr": typestr, "data": data, "version": 3, "strides": self.strides, **stream}


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]


class DLPack:
    """An array in device memory of a library that has nothing but DLPack. 16-bit integers are the bits of bfloat16."""

    CODES = {"float32": (2, 32), "float16": (2, 16), "int16": (4, 16), "int32": (0, 32), "int64": (0, 64)}

    def __init__(self, values):
        self.under, self.asked = Interface(values), []
        self.shape = (ctypes.c_int64 * values.ndim)(*values.shape)
        code, bits = self.CODES[values.dtype.name]
        address, shape = self.under.block.address, ctypes.addressof(self.shape)
        self.tensor = _Tensor(address, 2, 0, values.ndim, code, bits, 1, shape, None, 0, None, None)

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None):
        self.asked.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


_NUMPY = {"float64": np.float64, "float32": np.float32, "int64": np.int64, "int32": np.int32, "uint8": np.uint8}


class Place(_cuda.Place):
    """`_cuda.Place` of CPU tensors: what it makes lies in device memory, and what it is given is copied there."""

    def __init__(self, context):
        self.raw, self.device, self.kept = (0, context.stream, True), torch.device("cpu"), []

    def empty(self, shape, dtype):
        block = Block(math.prod(shape) * np.dtype(dtype).itemsize)
        # Whoever forgets to write it is found.
        block.bytes()[:] = 0xFF
        return torch.from_numpy(block.bytes().view(_NUMPY[dtype]).reshape(shape))

    def address(self, tensor):
        count = 1 + sum((n - 1) * between for n, between in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        block = Block(count * tensor.element_size())
        if not self._lies_in_device_memory(tensor):
            flat = torch.as_strided(tensor.detach(), (count,), (1,), tensor.storage_offset()).contiguous()
            block.bytes()[:] = flat.view(torch.uint8).numpy()
            self.kept.append(block)
            return block.address
        return tensor.data_ptr()

    @staticmethod
    def _lies_in_device_memory(tensor):
        kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED
        code, managed = driver.cuPointerGetAttribute(kind, tensor.data_ptr())
        return code == driver.CUresult.CUDA_SUCCESS and bool(managed)

    def guard(self):
        return contextlib.nullcontext()


def start(message):
    """A pattern for pytest.raises."""
    return re.escape(message)
