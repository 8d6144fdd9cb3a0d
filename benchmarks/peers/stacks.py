"""Where the time of a start goes: a look at the main thread's stack every few milliseconds, by a thread beside it."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

EVERY = 0.005  # seconds between looks
SHOWN = 250  # lines


class Stacks:
    """Looks until `write`. A call that lets no other thread run is counted when it is over, with all that it took."""

    def __init__(self) -> None:
        self.within, self.itself = Counter[str](), Counter[str]()
        self._main, self._ended = threading.main_thread().ident, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._ended.wait(EVERY):
            names = list(_names(sys._current_frames().get(self._main or 0)))
            last, passed = time.perf_counter(), time.perf_counter() - last
            for name in dict.fromkeys(names):  # a recursive function once
                self.within[name] += passed
            self.itself[names[0] if names else "-"] += passed

    def write(self, path: Path) -> None:
        """Seconds in each function with all that it calls, and in itself."""
        self._ended.set()
        self._thread.join()
        path.parent.mkdir(parents=True, exist_ok=True)
        most = self.within.most_common(SHOWN)
        path.write_text("".join(f"{s:8.2f} {self.itself[name]:8.2f}  {name}\n" for name, s in most))


def _names(frame: FrameType | None) -> list[str]:
    """`file:function` of each frame, the innermost first; what imports do themselves is left out."""
    names = []
    while frame is not None:
        code = frame.f_code
        if "importlib" not in code.co_filename:
            names.append(f"{'/'.join(Path(code.co_filename).parts[-3:])}:{code.co_qualname}")
        frame = frame.f_back
    return names
