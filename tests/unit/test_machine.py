"""Facts about the machine, and what follows from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from luthier.machine import Machine, machine, memory_kills

PLAIN = Machine(cores=4, busy=0, memory=8, available=6, flags=(), compiler=None, all_cores=8)


@pytest.mark.parametrize(
    ("cores", "busy", "all_cores", "free"),
    [
        (4, 0, 4, 4),
        (4, 1, 4, 3),
        (4, 9, 4, 1),  # never none
        (2, 6, 8, 2),  # others are busy on cores that are not ours
        (2, 7, 8, 1),
        (4, 0, 2, 2),  # never more than there are
        (3, 1, 0, 2),  # not told how many there are
    ],
)
def test_free_cores_are_ours_that_others_leave(cores: int, busy: int, all_cores: int, free: int) -> None:
    assert replace(PLAIN, cores=cores, busy=busy, all_cores=all_cores).free_cores == free


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_a_processor_that_multiplies_bfloat16_says_so(flag: str) -> None:
    assert replace(PLAIN, flags=("avx2", flag)).multiplies("bfloat16")


@pytest.mark.parametrize("flag", ["amx_fp16", "avx512_fp16", "asimdhp"])
def test_a_processor_that_multiplies_float16_says_so(flag: str) -> None:
    assert replace(PLAIN, flags=("avx2", flag)).multiplies("float16")
    assert not replace(PLAIN, flags=("avx2", flag)).multiplies("bfloat16")


@pytest.mark.parametrize("flags", [(), ("avx2", "avx512f", "avx512_vnni"), ("amx_tile",), ("asimd",)])
def test_a_processor_that_only_has_other_instructions_is_not(flags: tuple[str, ...]) -> None:
    made = replace(PLAIN, flags=flags)
    assert [name for name in ("float32", "bfloat16", "float16") if made.multiplies(name)] == ["float32"]


def test_facts_become_plain_values_and_back() -> None:
    assert Machine(**PLAIN.as_dict()) == PLAIN


def test_the_facts_of_this_machine_are_possible() -> None:
    here = machine()
    assert 1 <= here.free_cores <= here.cores
    assert 0 <= here.available <= here.memory
    assert here.busy >= 0


def test_kills_for_want_of_memory_are_those_of_the_container_then_those_of_the_machine(tmp_path: Path) -> None:
    container, whole = tmp_path / "memory.events", tmp_path / "vmstat"
    assert memory_kills((container, whole)) is None
    whole.write_text("nr_free_pages 9\noom_kill 7\nnuma_hit 1\n")
    assert memory_kills((container, whole)) == 7
    container.write_text("low 0\nhigh 0\nmax 12\noom 5\noom_kill 3\noom_group_kill 0\n")
    assert memory_kills((container, whole)) == 3
    container.write_text("low 0\n")  # of an older kernel
    assert memory_kills((container, whole)) == 7
