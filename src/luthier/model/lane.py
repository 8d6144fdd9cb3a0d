"""Copies between a GPU and the host that run beside what the GPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Lane:
    """A queue of copies. They wait for what was computed before them, by events; the host waits for nothing. On other
    devices copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Inside, copies are queued, behind all that is queued to be computed so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> Any:
        """What `wait` waits for: all copies so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """What is queued to be computed from now on comes after those copies."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)
