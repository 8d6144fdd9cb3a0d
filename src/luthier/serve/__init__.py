"""Talking to a run."""
