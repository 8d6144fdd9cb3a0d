"""Shared fixtures. Also puts this folder on the path, so that tests can import `tiny`."""

import signal

from hypothesis import settings

settings.register_profile("luthier", deadline=None)  # a busy machine is no failure
settings.load_profile("luthier")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Tests are run in the background, where Ctrl-C is ignored; the processes that they start are to heed it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
