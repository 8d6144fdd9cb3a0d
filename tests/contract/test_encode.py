"""Rows encoded by several processes are what one process makes of them, whatever happens to the others."""

import random

import pytest

from luthier.data import encode, prepare
from luthier.data.conversation import Conversation, Message, Origin
from luthier.data.encode import attempt
from luthier.data.templates import load_template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.errors import LuthierError
from luthier.model.load import model_folder
from luthier.recipe import Data, Model

# A chat template that has no place for a system message.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = Tokenizer.load(model_folder(Model(base="smollm2-135m")))
    spec = tokenizer.spec | {"config": {**tokenizer.spec["config"], "chat_template": STRICT}}
    tokenizer = Tokenizer(**spec)
    return Encoder(tokenizer, load_template("tokenizer", tokenizer), system=None)


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(3)
    texts = [
        "plain words",
        "ünïcödé — 漢字 🎻",
        "<|im_end|> as text",
        " spaces  kept ",
        "\ud800 half a character",
        "x" * 3000,
    ]
    made = []
    for line in range(200):
        messages = [Message("user", f"{rng.choice(texts)} {line}"), Message("assistant", rng.choice(texts))]
        if line % 17 == 0:
            messages.insert(0, Message("system", "refused by the template"))
        made.append(Conversation(tuple(messages), Origin("rows.jsonl", line), meta={"not": object()}))
    return made


@pytest.fixture
def started(monkeypatch):
    """The worker processes that a test starts."""
    made, start = [], encode._start
    monkeypatch.setattr(encode, "_start", lambda: made.append(start()) or made[-1])
    return made


def chunks(rows, size=16):
    return (rows[i : i + size] for i in range(0, len(rows), size))


def comparable(results):
    return [(type(r), str(r)) if isinstance(r, LuthierError) else r for r in results]


def encoded(encoder, rows, processes):
    return [r for _, results in encode.encode(encoder, chunks(rows), processes) for r in comparable(results)]


def test_processes_give_the_examples_and_errors_of_one_process(encoder, rows, started):
    alone = comparable(attempt(encoder, rows))
    assert len(alone) == 200
    assert sum(isinstance(r, tuple) for r in alone) >= 12, "the errors must be there to be compared"
    assert encoded(encoder, rows, 2) == alone
    assert len(started) == 2
    assert all(worker.poll() is not None for worker in started)


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_worker_loses_no_row(encoder, rows, started, after):
    results = []
    for number, (_, part) in enumerate(encode.encode(encoder, chunks(rows), 2)):
        if number == after:
            started[0].kill()
        results += comparable(part)
    assert results == comparable(attempt(encoder, rows))


def test_stopping_early_ends_the_workers(encoder, rows, started):
    running = encode.encode(encoder, chunks(rows), 2)
    next(running)
    assert [worker.poll() for worker in started] == [None, None]
    running.close()
    assert all(worker.poll() is not None for worker in started)


def test_few_rows_start_no_process(encoder, rows, started):
    assert encoded(encoder, rows, None) == comparable(attempt(encoder, rows))
    assert started == []


def test_many_rows_are_prepared_by_processes_as_by_one(encoder, tmp_path, monkeypatch, started):
    lines = "".join(f'{{"question": "What is {i}?", "answer": "It is {i}."}}\n' for i in range(300))
    (tmp_path / "rows.jsonl").write_text(lines)
    data = Data.model_validate({"train": [{"path": "rows.jsonl"}], "heldout": {"rows": 20}})
    monkeypatch.setattr(prepare, "_CHUNK", 32)
    alone = prepare.prepare(data, encoder.tokenizer, seed=1, folder=tmp_path / "alone", root=tmp_path)
    assert started == []
    monkeypatch.setattr(encode, "WORTH", 2)
    together = prepare.prepare(data, encoder.tokenizer, seed=1, folder=tmp_path / "together", root=tmp_path)
    assert started
    assert together.report == alone.report
    files = sorted(p.relative_to(alone.folder) for p in alone.folder.rglob("*") if p.is_file())
    assert [(together.folder / f).read_bytes() for f in files] == [(alone.folder / f).read_bytes() for f in files]


def test_a_module_in_the_working_folder_is_not_run(encoder, rows, tmp_path, monkeypatch, started):
    (tmp_path / "json.py").write_text("raise SystemExit('the user has a file of this name')\n")
    monkeypatch.chdir(tmp_path)
    assert encoded(encoder, rows[:32], 1) == comparable(attempt(encoder, rows[:32]))
    assert started[0].returncode == -9, "the worker answered until it was ended, and did not fall over the file"
