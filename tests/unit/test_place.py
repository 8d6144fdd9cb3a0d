"""A GPU, a torch and kernels that do not fit together are told apart before anything is loaded."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from luthier.errors import RecipeError
from luthier.machine import machine
from luthier.model.place import Build, check_place, free_memory, installed, problem, wake

BUILT = {"version": "2.13.0", "cuda": "12.8", "archs": ("sm_75", "sm_80", "sm_90a", "compute_90")}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Build("2.13.0+cpu"), r"torch 2.13.0\+cpu is built for the CPU"),
        (Build(**BUILT, why_no_gpu="The NVIDIA driver on your system is too old"), r"CUDA 12.8 .*driver .* too old"),
        (Build(**BUILT, capability=(5, 2)), r"capability 5.2 is not among .* \(sm_75 sm_80 sm_90a compute_90\)"),
        (Build("2.13.0", "12.8", ("sm_90",), (10, 0)), "capability 10.0"),
        (Build("2.13.0", "12.8", ("sm_86",), (8, 0)), "capability 8.0"),
    ],
)
def test_what_keeps_torch_from_a_gpu_is_named(build: Build, reason: str) -> None:
    import re

    found = problem("cuda", build)
    assert found is not None
    assert re.search(reason, found[0])


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_that_the_kernels_reach_is_no_problem(capability: tuple[int, int]) -> None:
    assert problem("cuda", Build(**BUILT, capability=capability)) is None


def test_amd_gpus_are_not_held_against_nvidia_capabilities() -> None:
    assert problem("cuda", Build("2.13.0", "6.4", ("gfx90a",), (9, 4), rocm=True)) is None


def test_the_cpu_is_always_there_and_the_others_as_torch_finds_them() -> None:
    check_place("cpu")
    for place, there in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items():
        if not there:
            with pytest.raises(RecipeError, match=rf"run\.place: {place}.*run\.place to cpu|nvidia-smi"):
                check_place(place)
    assert installed().version == torch.__version__


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_gpu_is_woken_in_a_thread_that_says_nothing_of_what_is_in_the_way(place: str) -> None:
    before = set(threading.enumerate())
    wake(place)
    woken = [thread for thread in threading.enumerate() if thread.name == "wake" and thread not in before]
    for thread in woken:
        thread.join()  # what it raises would fail this test
    assert place == "cuda" or not woken


def test_a_look_at_free_memory_asks_no_driver_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before every answer, and a driver's tool takes longer than a short answer."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path / 'asked'}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert free_memory(torch.device("cpu")) > 0
    assert not (tmp_path / "asked").exists()
    assert machine().available > 0
    assert (tmp_path / "asked").exists()
