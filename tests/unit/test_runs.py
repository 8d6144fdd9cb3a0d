import json
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from luthier.errors import RunError
from luthier.recipe import Recipe
from luthier.runs import Run, refusal, replacing, vacant, write_atomic

TEXT = "model: {{base: b}}\ndata: {{train: [{{path: a}}]}}\nrun: {{dir: '{}'}}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.parse(TEXT.format(tmp_path / "run"))


def test_a_run_opens_as_it_was_created(recipe: Recipe) -> None:
    run = Run.create(recipe)
    assert Run.open(run.folder).recipe == recipe
    assert run.manifest["versions"]["python"]


def step(run: Run) -> None:
    run.metrics.write_text('{"step": 1}\n')


def checkpoint(run: Run) -> None:
    (run.checkpoints / "step-00000001").mkdir(parents=True)


def adapter(run: Run) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").touch()


@pytest.mark.parametrize("begin", [step, checkpoint, adapter])
def test_another_experiment_in_the_same_folder_is_refused_by_key(recipe: Recipe, begin: Callable[[Run], None]) -> None:
    begin(Run.create(recipe))
    with pytest.raises(RunError, match=r"train.lr: 0.0002 there, 0.1 now; train.max_steps: null there, 4 now"):
        Run.create(Recipe.parse(recipe.dump(), "train.lr=0.1", "train.max_steps=4"))
    assert Run.open(str(recipe.run.dir)).recipe == recipe


def prepared(run: Run) -> Path:
    run.data.mkdir()
    report = run.data / "report.json"
    report.write_text("{}")
    return report


def test_a_run_that_has_not_begun_takes_another_recipe_and_keeps_data_that_are_the_same(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = Run.create(recipe)
    report = prepared(run)
    run.update_manifest(asked={}, decisions={})
    Run.create(Recipe.parse(recipe.dump(), "train.lr=0.1", "adapter.targets=[q_proj]"), root=tmp_path)
    assert Run.open(run.folder).recipe.train.lr == 0.1
    assert report.exists()
    assert not {"asked", "decisions"} & run.manifest.keys(), "what was decided was for the other recipe"
    assert run.root == tmp_path


@pytest.mark.parametrize(
    "change",
    ["data.length=99", "model.base=other", "adapter.new_tokens=[a]", "train.seed=3", "evaluate.slices=[topic]"],
)
def test_data_that_another_recipe_would_change_are_prepared_again(recipe: Recipe, change: str) -> None:
    report = prepared(Run.create(recipe))
    Run.create(Recipe.parse(recipe.dump(), change))
    assert not report.exists()


@pytest.mark.parametrize("begin", [step, checkpoint, adapter])
def test_a_run_that_has_begun_takes_columns_to_slice_by_and_keeps_its_data(
    recipe: Recipe, begin: Callable[[Run], None]
) -> None:
    run = Run.create(recipe)
    begin(run)
    report = prepared(run)
    Run.create(Recipe.parse(recipe.dump(), "evaluate.slices=[topic]"))
    assert Run.open(run.folder).recipe.evaluate.slices == ["topic"]
    assert report.exists()


def test_data_that_cannot_be_had_again_are_not_given_up(recipe: Recipe) -> None:
    piped = Recipe.parse(recipe.dump(), "data.train=[{path: '-'}]")
    report = prepared(Run.create(piped))
    with pytest.raises(RunError, match="another recipe"):
        Run.create(Recipe.parse(piped.dump(), "data.length=99"))
    assert report.exists()
    Run.create(Recipe.parse(piped.dump(), "train.lr=0.1"))


def test_another_recipe_does_not_get_under_a_run_that_is_starting(recipe: Recipe) -> None:
    run = Run.create(recipe)
    with run.lock(), pytest.raises(RunError, match="is in use by process"):
        Run.create(Recipe.parse(recipe.dump(), "train.lr=0.1"))
    assert Run.open(run.folder).recipe == recipe


def test_a_change_of_how_it_is_run_is_taken_over(recipe: Recipe) -> None:
    Run.create(recipe)
    Run.create(Recipe.parse(recipe.dump(), "run.log_every=7"))
    assert Run.open(str(recipe.run.dir)).recipe.run.log_every == 7


def test_a_folder_with_other_things_is_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        Run.create(recipe)


def test_a_missing_run_lists_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Run.create(Recipe.parse(TEXT.format("runs/mine")))
    with pytest.raises(RunError, match="runs/mine"):
        Run.open("runs/other")


def _hold(folder: str, held: object, leave: object) -> None:
    with Run.open(folder).lock():
        held.set()  # type: ignore[attr-defined]
        leave.wait(30)  # type: ignore[attr-defined]


def test_a_second_writer_is_told_who_has_the_run(recipe: Recipe) -> None:
    run = Run.create(recipe)
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(run.folder), held, leave))
    other.start()
    assert held.wait(30)
    with pytest.raises(RunError, match=f"in use by process {other.pid}"), run.lock():
        pass
    leave.set()
    other.join(30)
    with run.lock():
        pass


def test_metrics_torn_by_a_crash_are_read_up_to_the_tear(recipe: Recipe) -> None:
    run = Run.create(recipe)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert run.steps() == [{"step": 1}, {"step": 2}]


def test_an_atomic_write_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", json.dumps({"a": 1}))
    write_atomic(tmp_path / "a.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"{}"


@contextmanager
def full_disk(most: int = 8) -> Iterator[None]:
    """Inside, no file can be written beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_finds_no_room_names_its_file_keeps_what_was_there_and_leaves_nothing_beside(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"whole")
    with full_disk(), pytest.raises(OSError, match="too large") as raised:
        write_atomic(path, b"longer than eight bytes")
    told = refusal(raised.value)
    assert str(told).startswith(f"{path}: the disk takes no more (File too large); make room, or write elsewhere")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"whole", [path])
    assert refusal(OSError("of a library")) is None


def test_a_write_that_has_no_folder_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as raised:
        write_atomic(tmp_path / "file" / "x.json", b"{}")
    assert raised.value.filename == str(tmp_path / "file" / "x.json")


@contextmanager
def no_place_for_the_manifest(run: Run) -> Iterator[None]:
    path = run.folder / "manifest.json"
    before = path.rename(run.folder / "before.json")
    path.mkdir()
    yield
    path.rmdir()
    before.rename(path)


@contextmanager
def no_room_for_the_recipe(run: Run) -> Iterator[None]:
    with full_disk((run.folder / "recipe.yaml").stat().st_size * 3 // 4):
        yield


@pytest.mark.parametrize("stop", [no_place_for_the_manifest, no_room_for_the_recipe])
def test_a_start_that_stops_midway_leaves_no_data_and_no_decisions_to_another_recipe(
    recipe: Recipe, stop: Callable[[Run], AbstractContextManager[None]]
) -> None:
    run = Run.create(recipe)
    report = prepared(run)
    run.update_manifest(decisions={"of": "the recipe that was there"})
    other = Recipe.parse(recipe.dump(), "data.supervise=all")
    with stop(run), pytest.raises(OSError, match=r"too large|directory"):
        Run.create(other)
    assert Run.create(other).recipe == Run.open(run.folder).recipe == other
    assert (report.exists(), "decisions" in run.manifest) == (False, False)


@pytest.mark.parametrize("left", [["recipe.yaml"], [".recipe.yaml.123.tmp"], ["recipe.yaml", ".manifest.json.77.tmp"]])
def test_a_start_that_ended_before_its_manifest_was_there_is_made_again(recipe: Recipe, left: list[str]) -> None:
    """By a full disk or a kill. The manifest knows where the data's paths count from."""
    run = Run.create(recipe, root=Path("/somewhere"))
    (run.folder / "manifest.json").unlink()
    (run.folder / "recipe.yaml").rename(run.folder / left[0])
    for name in left[1:]:
        (run.folder / name).touch()
    assert Run.create(recipe, root=Path("/somewhere")).root == Path("/somewhere")


def test_only_what_we_leave_ourselves_is_taken_for_nothing(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.12.tmp").touch()
    assert vacant(tmp_path)
    for name in ("notes.tmp", ".hidden", ".recipe.yaml.tmp", "recipe.yaml.12.tmp"):
        (tmp_path / name).touch()
        assert not vacant(tmp_path)
        (tmp_path / name).unlink()


def test_a_file_that_is_missing_while_another_is_written_is_told_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as told, replacing(tmp_path / "page.html"):
        (tmp_path / "rows.jsonl").read_bytes()
    assert told.value.filename == str(tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []
