"""A model whose weights wait in host memory is compared as one whose weights stay: the same answers and likelihoods, to
the bit. The CPU stands for the GPU that they come to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from luthier.evaluate.asking.answers import Memo, sampling_of, work
from luthier.evaluate.asking.fit import Fit
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import entries, open_sides, with_bases
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.asking.workers import Turn, needed, turns
from luthier.runs import Run
from luthier.train.launch import train

KINDS = {
    "packed": ("model.quantize={kind: nf4}", "run.kernels=eager"),
    "wider": ("model.quantize={kind: nf4}", "run.kernels=eager", "adapter.rank=8"),
    "turned": ("model.quantize={kind: nf4}", "run.kernels=reference", "adapter.dora=true"),
    "dense": ("run.kernels=eager",),
}
STREAMED = Fit(offload=2, offload_embedding=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, on one base."""
    folder = tmp_path_factory.mktemp("streamed")
    test = ("data.test=[{path: sums.jsonl}]", "data.leaks=keep", "evaluate.metrics=[rougeL, perplexity]")
    for name, overrides in KINDS.items():
        train(tiny.run(folder, *test, f"run.dir={folder / name}", "train.epochs=1", "adapter.dropout=0", *overrides))
    return folder


def asked(folder: Path, names: list[str], fit: Fit, seat: Seat) -> list[Turn]:
    """What the runs of these names, and their base, have to answer, fitted so."""
    asker = Run.open(folder / names[0])
    sides = with_bases(open_sides(entries([folder / name for name in names], asker), seat, asker), True)
    for side in sides:
        vars(side.subject)["fit"] = fit  # as a GPU that is too small would have it
    return turns(sides, suite(asker).questions, sampling_of(asker), needed(asker))


def results(folder: Path, names: list[str], fit: Fit, out: Path) -> tuple[dict[str, object], Seat]:
    seat, memo = Seat(), Memo(out / "answers.jsonl")
    for turn in asked(folder, names, fit, seat):
        work(turn.side.subject, turn.tasks, sampling_of(turn.side.subject.run), memo, lambda label, count: None)
        model = turn.side.subject.model
        assert (model.streamed is not None) == bool(fit.offload)
    lines = (out / "answers.jsonl").read_text().splitlines()
    shutil.rmtree(out)
    return {record["key"]: record for record in map(json.loads, lines)}, seat


@pytest.mark.parametrize("names", [["packed", "wider"], ["turned"]], ids=str)
def test_base_and_adapter_answer_the_same_from_weights_that_come_and_go(
    trained: Path, names: list[str], tmp_path: Path
) -> None:
    whole, _ = results(trained, names, Fit(), tmp_path / "whole")
    streamed, seat = results(trained, names, STREAMED, tmp_path / "streamed")
    assert len(whole) == (1 + len(names)) * 2 * 24
    assert streamed == whole
    assert seat.reads == 1  # the next adapter is put on the same weights


def test_an_adapter_that_starts_from_weights_has_them_read_again(trained: Path, tmp_path: Path) -> None:
    whole, _ = results(trained, ["packed", "turned"], Fit(), tmp_path / "whole")
    streamed, seat = results(trained, ["packed", "turned"], STREAMED, tmp_path / "streamed")
    assert streamed == whole
    assert seat.reads == 2


def test_dense_weights_that_our_block_cannot_stream_are_streamed_by_the_module(trained: Path, tmp_path: Path) -> None:
    (base, _) = asked(trained, ["dense"], STREAMED, Seat())
    (whole, _) = asked(trained, ["dense"], Fit(), Seat())
    assert (base.side.subject.kernels, whole.side.subject.kernels) == ("reference", "eager")
    results(trained, ["dense"], STREAMED, tmp_path / "streamed")
