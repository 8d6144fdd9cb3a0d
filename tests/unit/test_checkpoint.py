"""Promise 3: a torn or changed checkpoint is never resumed from; the last good one is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.errors import CheckpointError
from luthier.train import checkpoint
from luthier.train.checkpoint import Checkpoint, Progress, newest, prune, publish, published, read

FILES = ("adapter.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")


def at(step: int) -> Checkpoint:
    torch.manual_seed(step)
    return Checkpoint({"w": torch.randn(3, 4)}, {"0.step": torch.tensor(float(step))}, Progress(step, 512))


def silent(text: str) -> None:
    pass


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_published_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    saved = at(50)
    found = read(publish(tmp_path, saved))
    assert torch.equal(found.adapter["w"], saved.adapter["w"])
    assert torch.equal(found.optimizer["0.step"], saved.optimizer["0.step"])
    assert found.progress == saved.progress


def test_the_newest_is_the_highest_step_whatever_the_file_times_say(tmp_path: Path) -> None:
    for step in (50, 100):
        publish(tmp_path, at(step))
    os.utime(tmp_path / "step-00000050", (2e9, 2e9))
    found = newest(tmp_path, silent)
    assert found is not None
    assert found.progress.step == 100


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path, silent) is None
    assert newest(tmp_path / "absent", silent) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_torn_file_is_never_resumed_from(tmp_path: Path, name: str, kept: float) -> None:
    publish(tmp_path, at(50))
    path = publish(tmp_path, at(100)) / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.progress.step == 50
    assert name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    path = publish(tmp_path, at(50)) / name
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 37):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=name):
            read(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = publish(tmp_path, at(50))
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read(folder)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, at(50)).rename(tmp_path / "step-00000099")
    with pytest.raises(CheckpointError, match="step 50"):
        read(tmp_path / "step-00000099")


def test_a_damaged_checkpoint_is_kept_aside_and_its_step_can_be_saved_again(tmp_path: Path) -> None:
    for _ in range(2):
        (publish(tmp_path, at(50)) / "adapter.safetensors").write_bytes(b"")
        assert newest(tmp_path, silent) is None
    assert names(tmp_path) == ["damaged-step-00000050", "damaged-step-00000050-1"]


def test_resuming_sweeps_what_a_crash_left_and_touches_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path, at(50))
    for name in (".partial-step-00000100", ".trash-step-00000020", "notes"):
        (tmp_path / name).mkdir()
    newest(tmp_path, silent)
    assert names(tmp_path) == ["notes", "step-00000050"]


class Killed(BaseException):
    """Stands for the end of the process: not an Exception, so that nothing handles it."""


@pytest.mark.parametrize("death", range(1, 7))
def test_death_at_any_file_operation_leaves_a_sound_checkpoint(
    tmp_path: Path, death: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, at(50))
    calls = 0

    def dying(operation: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == death:
                raise Killed
            operation(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_file", "rename", "remove"):
            patch.setattr(checkpoint, name, dying(getattr(checkpoint, name)))
        with pytest.raises(Killed):
            publish(tmp_path, at(100))
    found = newest(tmp_path, silent)
    assert found is not None
    assert found.progress.step == 50
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_death_half_way_through_a_deletion_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (50, 100):
        publish(tmp_path, at(step))

    def half(folder: Path) -> None:
        if folder.exists():
            (folder / "adapter.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", half)
        with pytest.raises(Killed):
            prune(tmp_path, keep=1, best=None)
    assert [path.name for path in published(tmp_path)] == ["step-00000100"]
    assert newest(tmp_path, pytest.fail) is not None
    assert names(tmp_path) == ["step-00000100"]


def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path, at(50))
    (tmp_path / ".partial-step-00000100").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="step 100 could not be written"):
        publish(tmp_path, at(100))
    assert [path.name for path in published(tmp_path)] == ["step-00000050"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, None, [5]), (2, 4, [4, 5]), (2, 1, [1, 4, 5]), (9, 3, [1, 2, 3, 4, 5])]
)
def test_pruning_spares_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        publish(tmp_path, at(step))
    prune(tmp_path, keep, best)
    assert [int(path.name[-8:]) for path in published(tmp_path)] == left
    assert len(names(tmp_path)) == len(left)


def test_progress_remembers_the_best_evaluation_and_counts_those_since() -> None:
    progress = Progress(step=0, micro_tokens=512)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0)):
        progress.step = step
        progress.judge(loss)
    assert (progress.best_step, progress.best_loss, progress.stale, progress.evaluated) == (20, 2.0, 2, 40)
