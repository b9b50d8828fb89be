"""Softmax losses over large item catalogues, without the B x N logits."""

from ._core import DeviceUnavailable

__all__ = ["DeviceUnavailable"]
