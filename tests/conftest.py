"""Shared fixtures. Also puts this folder on the path, so that tests can import `tiny`."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("luthier", deadline=None)  # a busy machine is no failure
settings.load_profile("luthier")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Tests are run in the background, where Ctrl-C is ignored; the processes that they start are to heed it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A memory group of the kernel's of 8 MiB without swap, which takes root and a cgroup that may be written. Its
    folder is LUTHIER_TEST_CAGE, too."""
    limits = {"memory.limit_in_bytes": "8M", "memory.memsw.limit_in_bytes": "8M"}
    folder = Path("/sys/fs/cgroup/memory")
    if not folder.exists():
        limits, folder = {"memory.max": "8M", "memory.swap.max": "0"}, folder.parent
    folder /= f"luthier-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        for name, limit in limits.items():
            if not (folder / name).exists():
                pytest.skip(f"this cgroup has no {name}")
            (folder / name).write_text(limit)
        monkeypatch.setenv("LUTHIER_TEST_CAGE", str(folder))
        yield folder
    finally:
        folder.rmdir()
