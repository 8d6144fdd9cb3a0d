"""Every registered format: its sample is recognised without configuration and becomes the conversation it means; a bad
row is refused by file, line and field. A new format adds one entry to SAMPLES."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Origin, Row
from luthier.data.formats import FORMATS, converter, detect, resolve
from luthier.errors import DataError
from luthier.recipe import Data, Source

ASK, REPLY = "What is 2 + 2?", "It is 4."
TURNS = [("user", ASK), ("assistant", REPLY)]

# name: (row, turns, references, the answer's column)
SAMPLES = {
    "messages": (
        {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}]},
        TURNS,
        (REPLY,),
        None,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": REPLY}]},
        TURNS,
        (REPLY,),
        None,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        [("user", "Add.\n\n2 + 2"), ("assistant", "4")],
        ("4",),
        "output",
    ),
    "prompt-completion": ({"prompt": ASK, "completion": REPLY}, TURNS, (REPLY,), "completion"),
    "question-answer": ({"Questions": ASK, "Answers": REPLY}, TURNS, (REPLY,), "Answers"),
    "summary": (
        {"dialogue": "A: Hi. B: Bye.", "summary1": "They greet.", "summary2": "They part.", "topic": "greeting"},
        [("user", "Summarize the following conversation.\n\nA: Hi. B: Bye."), ("assistant", "They greet.")],
        ("They greet.", "They part."),
        "summary1",
    ),
    "multiple-choice": (
        {"prompt": ASK, "A": "3", "B": "4", "answer": "B"},
        [
            (
                "user",
                f"Answer the question with the letter of the right option, nothing else.\n\n{ASK}\nA. 3\nB. 4",
            ),
            ("assistant", "B"),
        ],
        ("B",),
        "answer",
    ),
    "listed-choices": (
        {"instruction": f"{ASK} Answer1: 3 Answer2: 4\n\nAnswer format: answer1/answer2", "answer": "answer2"},
        [
            (
                "user",
                f"Answer the question with the letter of the right option, nothing else.\n\n{ASK}\nA. 3\nB. 4",
            ),
            ("assistant", "B"),
        ],
        ("B",),
        "answer",
    ),
    "text": ({"text": f"<HUMAN>: {ASK}\n<ASSISTANT>: {REPLY}"}, TURNS, (REPLY,), None),
    "document": ({"text": "Once upon a time."}, [("document", "Once upon a time.")], (), None),
    "rendered": ({"text": "<|im_start|>user"}, [("rendered", "<|im_start|>user")], (), None),
}
OPT_IN = {"rendered"}

names = pytest.mark.parametrize("name", SAMPLES)


def rows(*values):
    return [Row(v, Origin("data.jsonl", i)) for i, v in enumerate(values, 1)]


def data(**fields):
    return Data(train=[Source(path="data.jsonl")], **fields)


def convert(name, values, **fields):
    recipe = data(format=name, **fields)
    sample = rows(SAMPLES[name][0])
    return converter(recipe, resolve(recipe, sample))(rows(values)[0])


def test_every_format_has_a_sample():
    assert set(FORMATS.names()) == set(SAMPLES)


@names
def test_a_sample_is_recognised_without_configuration(name):
    if name in OPT_IN:
        assert detect(rows(SAMPLES[name][0])).format != name
    else:
        assert detect(rows(SAMPLES[name][0])).format == name


@names
def test_a_sample_becomes_the_conversation_it_means(name):
    values, turns, references, _ = SAMPLES[name]
    conversation = convert(name, values)
    assert [(m.role, m.content) for m in conversation.messages] == turns
    assert conversation.references == references
    assert conversation.origin == Origin("data.jsonl", 1)


@names
def test_a_column_map_finds_the_parts_under_any_name(name):
    values, turns, _, _ = SAMPLES[name]
    columns = resolve(data(format=name), rows(values)).columns
    renamed = {f"col {k}": v for k, v in values.items()}
    renamed_map = {p: f"col {c}" if isinstance(c, str) else [f"col {x}" for x in c] for p, c in columns.items()}
    recipe = data(format="auto" if name not in OPT_IN else name, columns=renamed_map)
    detection = resolve(recipe, rows(renamed))
    assert detection.format == name
    said = converter(recipe, detection)(rows(renamed)[0]).messages
    assert said[-1].content == turns[-1][1]


@names
@pytest.mark.parametrize("bad", [None, "", " \n", 7, True, [], {}, ["x"]])
def test_a_bad_value_in_any_needed_column_is_refused_by_file_line_and_field(name, bad):
    values = SAMPLES[name][0]
    columns = resolve(data(format=name), rows(values)).columns
    needed = {p: c if isinstance(c, str) else c[0] for p, c in columns.items() if p != "input"}
    for column in needed.values():
        with pytest.raises(DataError) as caught:
            convert(name, {**values, column: bad})
        assert str(caught.value).startswith(f"data.jsonl:1: {column}")
        assert caught.value.fix


@names
def test_a_missing_column_is_refused_by_name(name):
    values = SAMPLES[name][0]
    column = next(iter(resolve(data(format=name), rows(values)).columns.values()))
    column = column if isinstance(column, str) else column[0]
    with pytest.raises(DataError, match=f"data.jsonl:1: {column}: is missing"):
        convert(name, {k: v for k, v in values.items() if k != column})


@names
def test_a_row_without_an_answer_is_good_only_where_prompts_are_enough(name):
    values, turns, _, answer = SAMPLES[name]
    if answer is None:
        return
    bare = {k: v for k, v in values.items() if k != answer and not k.startswith("summary")}
    detection = detect(rows(bare), answers=False)
    assert detection.format == name
    conversation = converter(data(), detection, answers=False)(rows(bare)[0])
    assert [(m.role, m.content) for m in conversation.messages] == turns[:-1]
    assert conversation.references == ()
    with pytest.raises(DataError):
        detect(rows(bare))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda v: (
        st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "x"]), v, max_size=3)
    ),
    max_leaves=6,
)


@names
@settings(deadline=None)
@given(value=json_values, which=st.integers(0, 4))
def test_a_value_of_any_type_is_a_conversation_or_a_data_error(name, value, which):
    values = dict(SAMPLES[name][0])
    column = list(values)[which % len(values)]
    place = ""
    try:
        conversation = convert(name, {**values, column: value})
    except DataError as error:
        place = error.where
    else:
        assert all(isinstance(m.content, str) for m in conversation.messages)
    assert place == "" or place.startswith(f"data.jsonl:1: {column}")
