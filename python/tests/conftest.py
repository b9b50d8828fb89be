"""`pytest --on-device` runs the tests of losses with the code for CUDA tensors: see device.py."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--on-device", action="store_true", help="tensors go the way of CUDA tensors, through a device's memory")


@pytest.fixture(autouse=True)
def tensors_on_a_device(request, monkeypatch):
    if not request.config.getoption("--on-device"):
        return
    import common
    import device
    from catalog_softmax.torch import _cuda

    context = device.Context()
    monkeypatch.setattr(common, "ON_DEVICE", True)
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: device.Place(context))


@pytest.fixture(scope="session")
def processes():
    """Four ranks, for all tests of `catalog_softmax.distributed`."""
    from processes import Processes

    with Processes(4) as started:
        yield started
