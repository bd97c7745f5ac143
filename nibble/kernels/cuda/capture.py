"""A step of many launches as one: recorded once as a CUDA graph, then launched as often as wanted."""

from __future__ import annotations

from collections.abc import Callable

from nibble.kernels.cuda.device import Device


def capture(device: Device, step: Callable[[], None]) -> Callable[[], None]:
    """See `Kernels.capture`. The graph uses the workspace from its present top on, at every launch."""
    with device.arena.scope():
        step()  # for real: loads kernels, raises their limits and makes library handles, which a capture must not do
    device.stream.begin_capture()
    try:
        with device.arena.scope():
            step()
    finally:
        graph = device.stream.end_capture()
    graph.upload(device.stream)
    return lambda: graph.launch(device.stream)
