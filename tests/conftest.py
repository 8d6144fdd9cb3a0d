"""Shared fixtures. Also puts this folder on the path, so that tests can import `tiny`."""

from hypothesis import settings

settings.register_profile("luthier", deadline=None)  # a busy machine is no failure
settings.load_profile("luthier")
