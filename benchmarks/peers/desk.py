"""A process that answers one task after the other: the parent's end of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK = 0.02  # seconds between looks for an answer: the parent sleeps while a row is measured


class Desk:
    """Starts `command`, which reads tasks line by line. What it prints is appended to `log`; in `folder` it leaves what
    it compiles, as Unsloth does, for the next."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, options = log, {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with log.open("ab") as file:
            self.process: Any = subprocess.Popen(
                command, stdout=file, env=environment, cwd=folder, start_new_session=True, **options
            )

    @property
    def open(self) -> bool:
        return self.process.poll() is None

    def tell(self, task: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; `hear` says why
            self.process.stdin.write(f"{task}\n")
            self.process.stdin.flush()

    def hear(self, answer: Path, limit: float) -> dict[str, Any]:
        """What it wrote to `answer`, or under `failed` why it did not within so many seconds."""
        until, ended = time.monotonic() + limit, False
        while not answer.exists():
            if ended:  # looked for once more since
                return {"failed": f"exit code {self.process.returncode}: {self._said()}"}
            if time.monotonic() > until:
                self.close()
                return {"failed": f"took longer than {limit:.0f} s: {self._said()}"}
            ended = not self.open
            time.sleep(LOOK)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def close(self) -> None:
        """Ends it, and all that it started; nothing is lost but what was not answered."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]
