import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from luthier.data.conversation import Conversation, Message, Origin, from_json, to_json
from luthier.data.prepare import Prepared, heldout_conversations, prepare, test_conversations
from luthier.data.tokens import Tokenizer
from luthier.errors import DataError
from luthier.recipe import Data

test_conversations.__test__ = False

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "glade",
    "heath",
    "islet",
    "jetty",
    "knoll",
    "ledge",
    "marsh",
    "north",
    "oasis",
    "plain",
    "quay",
    "ridge",
]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte: lengths in the tests can be counted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(json.loads(backend.to_str()), config={"eos_token": "<|im_end|>", "chat_template": CHATML})


def chat(question, answer="Yes.", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def questions(count, seed=0):
    """Questions of ten random words: no two are alike."""
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=10))} {i}?" for i in range(count)]


@pytest.fixture
def made(tmp_path, tokenizer):
    """Writes training and test rows, prepares them, and gives back what came of it."""

    def make(rows, tests=None, seed=1, folder="out", keep=(), **fields):
        data = {"train": [{"path": "train.jsonl"}], **fields}
        write(tmp_path / "train.jsonl", rows)
        if tests is not None:
            write(tmp_path / "test.jsonl", tests)
            data["test"] = [{"path": "test.jsonl"}]
        out = tmp_path / folder
        return prepare(Data.model_validate(data), tokenizer, seed=seed, folder=out, root=tmp_path, keep=keep)

    return make


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")


def lines(prepared, name):
    return [json.loads(line) for line in (prepared.folder / name).read_text().splitlines()]


def texts(prepared, store):
    return [prepared.encoder.tokenizer.decode(store.example(i)[0].tolist(), control=True) for i in range(len(store))]


# --- the journey


def test_rows_become_tokens_with_only_the_answer_and_its_end_supervised(made):
    prepared = made([chat("Is it so?", "It is.")])
    ids, supervised = prepared.train.example(0)
    decode = prepared.encoder.tokenizer.decode
    assert decode(ids.tolist(), control=True).startswith(
        "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decode(ids[supervised == 1].tolist(), control=True) == "It is.<|im_end|>"
    assert (
        ids[: prepared.train.prompts[0]].tolist()
        == prepared.encoder.prompts([Conversation((Message("user", "Is it so?"),), Origin("", 0))])[0]
    )


def test_prepared_data_is_opened_as_it_was_made(made, tokenizer):
    prepared = made([chat(q) for q in questions(9)], heldout={"rows": 2}, system="Be brief.", supervise="last")
    opened = Prepared.open(prepared.folder, tokenizer)
    assert opened.report == prepared.report
    assert texts(opened, opened.train) == texts(prepared, prepared.train)
    assert (opened.encoder.system, opened.encoder.supervise) == ("Be brief.", "last")
    assert opened.encoder.template.spec() == prepared.encoder.template.spec()


def test_a_folder_without_prepared_data_says_so(tmp_path, tokenizer):
    with pytest.raises(DataError, match="holds no prepared data"):
        Prepared.open(tmp_path, tokenizer)


def test_a_column_to_keep_that_no_test_row_has_is_refused_with_the_nearest_name(made):
    asked, learned = [chat(q, topic="rain", tags=["wet"]) for q in questions(9)], [chat("Is it so?", tpoic="snow")]
    for name in ("tpoic", "tags"):
        with pytest.raises(DataError, match=f"evaluate.slices: no test row has a value of '{name}'.*topic"):
            made(learned, asked, keep=[name])
    kept = made(learned, [*asked[1:], chat("Is it late?", hour=3)], keep=["topic", "hour"])
    assert [c.meta["columns"] for c in test_conversations(kept.folder)] == [{"topic": "rain"}] * 8 + [{"hour": 3}]


def test_a_column_to_keep_of_rows_that_have_none_is_to_be_left_out(made):
    with pytest.raises(DataError, match="no test row has a value of 'topic'; leave it out: no row has such columns"):
        made([chat("Is it so?")], [chat(q) for q in questions(9)], keep=["topic"])


def test_a_bad_test_row_that_alone_has_a_column_to_keep_is_what_is_told(made):
    asked = [*[chat(q) for q in questions(9)], chat("", topic="rain")]
    with pytest.raises(DataError, match=r"test\.jsonl:10: (.|\n)*data\.bad_rows=drop"):
        made([chat("Is it so?")], asked, keep=["topic"])


def test_without_test_rows_the_columns_to_keep_are_those_of_the_rows(made):
    rows = [chat(q, topic="rain") for q in questions(9)]
    with pytest.raises(DataError, match="no row has a value of 'topics'; did you mean 'topic'"):
        made(rows, heldout={"rows": 2}, keep=["topics"])
    assert heldout_conversations(made(rows, heldout={"rows": 2}, keep=["topic"]).folder)[0].meta["columns"]


def test_the_same_data_and_seed_give_the_same_bytes(made):
    rows = [chat(q) for q in questions(40)]
    first, second = (made(rows, heldout={"rows": 9}, folder=f) for f in ("one", "two"))
    for path in sorted(p for p in first.folder.rglob("*") if p.is_file()):
        assert path.read_bytes() == (second.folder / path.relative_to(first.folder)).read_bytes()


def test_progress_is_told(tmp_path, tokenizer):
    told = []
    write(tmp_path / "r.jsonl", [chat("a?")])
    data = Data.model_validate({"train": [{"path": "r.jsonl"}]})
    prepare(data, tokenizer, seed=1, folder=tmp_path / "o", root=tmp_path, progress=lambda *what: told.append(what))
    assert told[-1] == ("encoding", 1)


# --- nothing is lost silently


BAD = ["broken", chat("a?", None), chat("", "b"), "[]"]


def test_bad_rows_are_refused_by_the_first_places_and_their_number(made):
    with pytest.raises(DataError) as caught:
        made([chat("fine?"), *BAD, *BAD])
    assert [f"train.jsonl:{line}:" in str(caught.value) for line in range(1, 10)] == [False] + [True] * 5 + [False] * 3
    assert "8 rows in all" in str(caught.value)
    assert "data.bad_rows=drop" in caught.value.fix
    assert "train.jsonl:2: column 1: broken JSON" in str(caught.value)


def test_dropped_rows_are_counted_by_reason_and_named_by_line(made):
    long = "x" * 300
    rows = [chat("one?"), *BAD, chat("one?"), chat("two?", long), chat("\x07", "b"), chat("ONE?")]
    prepared = made(rows, bad_rows="drop", length=100)
    assert prepared.report["rows"] == {
        "read": 9,
        "kept": 1,
        "dropped": {"bad_row": 5, "duplicate": 2, "too_long": 1},
        "cut": 0,
    }
    dropped = {d["line"]: (d["file"], d["reason"]) for d in lines(prepared, "dropped.jsonl")}
    assert dropped == {
        **dict.fromkeys((2, 3, 4, 5, 8), ("train.jsonl", "bad_row")),
        **dict.fromkeys((6, 9), ("train.jsonl", "duplicate")),
        7: ("train.jsonl", "too_long"),
    }
    details = {d["line"]: d["detail"] for d in lines(prepared, "dropped.jsonl")}
    assert details[6] == "the same text as train.jsonl:1"
    assert details[7].endswith("tokens, data.length is 100")
    assert "messages[1].content: is null" in details[3]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "same", "bad", "long", "leak", "near"]), min_size=1, max_size=12))
def test_every_row_read_is_kept_or_dropped_for_one_reason(made, kinds):
    asked = questions(len(kinds) + 1)
    row = {
        "good": lambda q: chat(q),
        "same": lambda q: chat("same?"),
        "bad": lambda q: "{",
        "long": lambda q: chat(q * 9),
    }
    row |= {"leak": lambda q: chat(asked[-1]), "near": lambda q: chat(asked[-1] + " now")}
    rows = [chat("at least this?"), *(row[k](q) for k, q in zip(kinds, asked, strict=False))]
    prepared = made(rows, tests=[chat(asked[-1])], bad_rows="drop", length=256)
    found = prepared.report["rows"]
    assert found["read"] == len(rows)
    assert found["kept"] == len(prepared.train) == found["read"] - sum(found["dropped"].values())
    assert len(lines(prepared, "dropped.jsonl")) == sum(found["dropped"].values())
    kept = {prepared.train.origin(i).line for i in range(len(prepared.train))}
    assert kept.isdisjoint(d["line"] for d in lines(prepared, "dropped.jsonl"))


def test_no_rows_left_says_why(made):
    with pytest.raises(DataError, match=r"no rows are left to train on: 2 read; too_long 2"):
        made([chat("a?"), chat("b?")], length=8)


def test_a_refusal_leaves_what_was_there_before(made):
    before = texts(prepared := made([chat("a?")]), prepared.train)
    with pytest.raises(DataError):
        made(["broken"])
    opened = Prepared.open(prepared.folder, prepared.encoder.tokenizer)
    assert texts(opened, opened.train) == before
    assert [p.name for p in prepared.folder.parent.iterdir() if p.is_dir()] == ["out"]


def test_duplicates_are_counted_also_where_they_are_kept(made):
    prepared = made([chat("a?")] * 3, clean={"duplicates": "keep"})
    assert prepared.report["duplicates"] == {"exact": 2, "near": 0}
    assert len(prepared.train) == 3


def test_near_duplicates_are_dropped_where_asked(made):
    (asked,) = questions(1)
    rows = [chat(asked, "The same long answer to it."), chat(f"{asked} now", "The same long answer to it.")]
    assert made(rows).report["rows"]["kept"] == 2
    prepared = made(rows, clean={"near_duplicates": 0.6})
    assert prepared.report["duplicates"] == {"exact": 0, "near": 1}
    assert lines(prepared, "dropped.jsonl")[0]["detail"] == "much like train.jsonl:1"


# --- lengths


def test_rows_that_are_too_long_are_refused_with_the_length(made):
    with pytest.raises(DataError) as caught:
        made([chat("a?"), chat("x" * 99)], length=64, too_long="refuse")
    assert "train.jsonl:2:" in str(caught.value)
    assert "larger data.length" in caught.value.fix


@pytest.mark.parametrize(("question", "answer"), [("q" * 200, "yes"), ("q?", "a" * 200), ("q" * 200, "a" * 200)])
def test_a_row_that_is_cut_keeps_its_end_of_turn_and_every_cut_token_is_counted(made, question, answer):
    whole = made([chat(question, answer)], folder="whole").train.lengths[0]
    prepared = made([chat(question, answer)], length=80, too_long="cut")
    (text,) = texts(prepared, prepared.train)
    assert prepared.train.lengths[0] <= 80
    assert text.rstrip().endswith("<|im_end|>")
    assert "<|im_start|>assistant\n" + answer[0] in text
    cut = prepared.report["tokens"]["cut"]
    assert cut == whole - prepared.train.lengths[0] > 0
    assert lines(prepared, "cut.jsonl") == [{"file": "train.jsonl", "line": 1, "tokens": cut}]
    ids, supervised = prepared.train.example(0)
    assert supervised[ids == prepared.encoder.tokenizer.control["<|im_end|>"]][-1] == 1


def test_the_question_is_cut_before_the_answer(made):
    prepared = made([chat("q" * 200, "the whole answer")], length=80, too_long="cut")
    assert "the whole answer<|im_end|>" in texts(prepared, prepared.train)[0]


def test_a_row_that_cannot_be_cut_enough_is_dropped(made):
    turns = [
        {"role": r, "content": c * 50}
        for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    prepared = made([chat("fine?"), {"messages": turns}], length=80, too_long="cut")
    assert prepared.report["rows"]["dropped"] == {"too_long": 1}


def test_text_that_is_rendered_already_is_never_cut(made):
    text = f"<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n{'b' * 99}<|im_end|>"
    rows = [{"text": text}, {"text": text.replace("b" * 99, "b")}]
    prepared = made(rows, format="rendered", length=80, too_long="cut")
    assert prepared.report["rows"]["dropped"] == {"too_long": 1}


@pytest.mark.parametrize("size", [9, 63, 64, 65, 127, 128, 400])
def test_a_long_document_is_cut_into_windows_in_which_every_token_is_learned_once(made, size):
    text = "".join(random.Random(size).choices("abcdef ", k=size)).strip() + "."
    prepared = made([{"text": text}], supervise="all", length=64)
    windows = [prepared.train.example(i)[0].tolist() for i in range(len(prepared.train))]
    assert all(2 <= len(w) <= 64 for w in windows)
    joined = windows[0] + [i for w in windows[1:] for i in w[1:]]
    assert text in prepared.encoder.tokenizer.decode(joined)
    assert prepared.report["tokens"]["supervised"] == len(joined) - 1
    assert prepared.report["tokens"]["cut"] == 0
    assert prepared.report["rows"]["kept"] == 1


# --- leaks


def leaky(count=3):
    asked = questions(30)
    tests = [chat(q) for q in asked[:count]]
    train = [chat(asked[0], "Other."), chat(asked[1] + " now"), *(chat(q) for q in asked[count:])]
    return train, tests


def test_training_rows_that_are_in_the_test_set_are_dropped_counted_and_listed(made):
    train, tests = leaky()
    prepared = made(train, tests)
    assert prepared.report["leaks"] == {"exact": 1, "near": 1}
    assert prepared.report["rows"]["dropped"] == {"leak": 1, "near_leak": 1}
    exact, near = lines(prepared, "leaks.jsonl")
    assert (exact["line"], exact["of"], exact["similarity"]) == (1, "test.jsonl:1", 1.0)
    assert (near["line"], near["of"]) == (2, "test.jsonl:2")
    assert near["similarity"] >= 0.8


def test_leaks_are_counted_where_they_are_kept_and_refused_where_they_are_not_wanted(made):
    train, tests = leaky()
    prepared = made(train, tests, leaks="keep")
    assert prepared.report["leaks"] == {"exact": 1, "near": 1}
    assert len(prepared.train) == len(train)
    with pytest.raises(DataError, match=r"train.jsonl:1: has the prompt of test.jsonl:1"):
        made(train, tests, leaks="refuse")


def test_test_rows_may_lack_answers_and_still_show_leaks(made, tmp_path):
    write(tmp_path / "test.jsonl", [{"messages": chat(q)["messages"][:1]} for q in questions(5)])
    prepared = made([chat(q) for q in questions(9)], test=[{"path": "test.jsonl"}])
    assert prepared.report["leaks"]["exact"] == 5
    assert prepared.report["test"] == {"read": 5, "rows": 5, "answered": 0, "dropped": {}}


def test_test_rows_are_kept_as_conversations(made):
    prepared = made([chat("a?")], [chat("b?", "So."), {"messages": [{"role": "user", "content": "c?"}]}])
    first, second = test_conversations(prepared.folder)
    assert (first.prompt[0].content, first.references, first.origin) == ("b?", ("So.",), Origin("test.jsonl", 1))
    assert second.references == ()


@pytest.mark.parametrize("spoilt", ["torn", '{"line": 3}', "[]", '{"messages": [3], "file": "", "line": 1}'])
def test_a_spoilt_file_of_prepared_questions_is_told_by_its_line(made, spoilt):
    folder = made([chat("a?")], [chat("b?", "So.")]).folder
    with (folder / "test.jsonl").open("a") as file:
        file.write(spoilt + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl:2: is no conversation; restore it; or move .* luthier data "):
        test_conversations(folder)


def test_bad_test_rows_are_refused_too(made):
    with pytest.raises(DataError, match=r"test.jsonl:2: "):
        made([chat("a?")], [chat("b?"), "broken"])


# --- the split


def test_held_out_rows_are_a_function_of_rows_and_seed_not_of_their_order(made):
    rows = [chat(q) for q in questions(60)]
    mixed = random.Random(5).sample(rows, 60)
    first, second, other = made(rows, heldout={"rows": 12}), made(mixed, heldout={"rows": 12}), None
    assert set(texts(first, first.heldout)) == set(texts(second, second.heldout))
    other = made(rows, heldout={"rows": 12}, seed=2)
    assert set(texts(other, other.heldout)) != set(texts(first, first.heldout))


@pytest.mark.parametrize(
    ("heldout", "count"), [({"fraction": 0.1}, 6), ({"rows": 7}, 7), ({"fraction": 0.5, "rows": 7}, 30)]
)
def test_as_many_rows_are_held_out_as_asked_and_none_is_trained_on(made, heldout, count):
    prepared = made([chat(q) for q in questions(60)], heldout=heldout)
    assert (len(prepared.heldout), len(prepared.train)) == (count, 60 - count)
    assert not set(texts(prepared, prepared.heldout)) & set(texts(prepared, prepared.train))
    said = [c.messages[0].content for c in heldout_conversations(prepared.folder)]
    assert sorted(said) == sorted(
        t.split("user\n")[1].split("<|im_end|>")[0] for t in texts(prepared, prepared.heldout)
    )


def test_rows_that_ask_the_same_are_held_out_together(made):
    rows = [chat(q, a) for q in questions(20) for a in ("One.", "Two.", "Three.")]
    prepared = made(rows, heldout={"rows": 10})
    held = {c.messages[0].content for c in heldout_conversations(prepared.folder)}
    assert len(prepared.heldout) == 3 * len(held) == 12


def test_rows_much_like_a_held_out_row_are_not_trained_on(made):
    rows = [chat(q) for asked in questions(20) for q in (asked, f"{asked} now")]
    prepared = made(rows, heldout={"rows": 8}, leaks="refuse")  # which speaks of test rows
    dropped = prepared.report["rows"]["dropped"].get("near_leak", 0)
    assert dropped > 0
    assert len(prepared.train) + len(prepared.heldout) + dropped == 40


def test_all_windows_of_a_document_are_on_one_side(made):
    rows = [{"text": " ".join(random.Random(i).choices(WORDS, k=60))} for i in range(8)]
    prepared = made(rows, supervise="all", length=64, heldout={"rows": 3})
    sides = [{store.origin(i).line for i in range(len(store))} for store in (prepared.train, prepared.heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == prepared.report["heldout"]["rows"] == 3


def test_holding_everything_out_is_refused(made):
    with pytest.raises(DataError, match="no rows are left to train on: 2 read; none were dropped; 2 held out"):
        made([chat("a?"), chat("b?")], heldout={"rows": 2})


# --- weights and the report


def test_weights_reach_the_rows_of_their_file(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [chat(q) for q in questions(3)])
    write(tmp_path / "b.jsonl", [chat(q) for q in questions(2, seed=9)])
    data = Data.model_validate({"train": [{"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl"}]})
    prepared = prepare(data, tokenizer, seed=1, folder=tmp_path / "out", root=tmp_path)
    assert prepared.weights.tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert prepared.weights.dtype == np.float64


def test_rows_of_weight_one_need_no_weights(made):
    assert made([chat("a?")]).weights is None


def test_the_report_counts_the_tokens_that_are_stored(made):
    prepared = made([chat(q) for q in questions(30)], [chat("t?")], heldout={"rows": 4})
    report = prepared.report
    stores = (prepared.train, prepared.heldout)
    assert report["tokens"]["total"] == sum(len(s.ids) for s in stores)
    assert report["tokens"]["supervised"] == sum(s.targets(i) for s in stores for i in range(len(s)))
    assert report["supervised_share"] == report["tokens"]["supervised"] / report["tokens"]["total"]
    assert report["lengths"]["max"] == max(int(s.lengths.max()) for s in stores)
    assert sum(report["lengths"]["histogram"]["counts"]) == 30
    assert [(f["path"], f["part"], f["format"], f["rows"]) for f in report["files"]] == [
        ("test.jsonl", "test", "messages", 1),
        ("train.jsonl", "train", "messages", 30),
    ]
    assert all(len(f["sha256"]) == 64 for f in report["files"])


def test_what_was_cleaned_is_counted(made):
    assert made([chat("a\x07b?")]).report["cleaned"] == {"control": 1}


def test_a_conversation_survives_its_file():
    conversation = Conversation(
        (
            Message("user", "a"),
            Message("assistant", "", reasoning="r", tool_calls=({"function": {"name": "f"}},)),
            Message("tool", "x", name="f"),
        ),
        Origin("f", 7),
        references=("b", "c"),
        tools=({"name": "f"},),
        choices=("x", "y"),
        answer=0,
    )
    assert from_json(json.loads(json.dumps(to_json(conversation)))) == conversation
