"""Shared fixtures. Also puts this folder on the path, so that tests can import `tiny`."""
