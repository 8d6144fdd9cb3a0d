import pytest

from luthier.data.conversation import Message, Origin, Row
from luthier.data.formats import Detection, converter, detect, resolve
from luthier.errors import DataError
from luthier.recipe import Data, Source


def rows(*values):
    return [Row(v, Origin("data.jsonl", i)) for i, v in enumerate(values, 1)]


def data(**fields):
    return Data(train=[Source(path="data.jsonl")], **fields)


def convert(values, answers=True, **fields):
    recipe = data(**fields)
    return converter(recipe, resolve(recipe, rows(values), answers=answers), answers=answers)(rows(values)[0])


def turns(conversation):
    return [(m.role, m.content) for m in conversation.messages]


def fault(values, **fields):
    with pytest.raises(DataError) as caught:
        convert(values, **fields)
    return str(caught.value)


# --- detection


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"instruction": "a", "output": "b", "text": "### Instruction: a"}, "alpaca"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, "alpaca"),
        ({"prompt": "a", "prompt_id": "1", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "messages"),
        ({"dialog": [{"role": "user", "content": "a"}]}, "messages"),
        ({"id": "1", "article": "a", "highlights": "b"}, "summary"),
        ({"text": "a", "summary": "b"}, "summary"),
        ({"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}, "multiple-choice"),
        ({"question": "a", "option_1": "b", "option_2": "c", "answer": "option_1"}, "multiple-choice"),
        ({"question": "a", "Option A": "b", "Option B": "c", "label": "A"}, "multiple-choice"),
        ({"ctx": 1, "question": "a", "ending0": "b", "ending1": "c", "label": 0}, "multiple-choice"),
        (
            {
                "instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\n"
                "Answer format: answer1/answer2",
                "input": "",
                "output": "the correct answer is answer2",
                "answer": "answer2",
            },
            "listed-choices",
        ),
        ({"instruction": "Write about Option1: a thing.", "output": "b", "answer": "c"}, "alpaca"),
        ({"text": "human: a\nassistant: b"}, "text"),
        ({"text": "### Human: a### Assistant: b"}, "text"),
        ({"text": "Assistant: what a text starts with is no question"}, "document"),
        ({"text": "Note: this holds no roles."}, "document"),
    ],
)
def test_the_shape_of_well_known_data_sets_is_recognised(values, found):
    assert detect(rows(values)).format == found


def test_a_broken_row_among_many_does_not_hide_the_format():
    good = {"messages": [{"role": "user", "content": "a"}]}
    assert detect(rows({"messages": None}, good, good, {"messages": []}, good)).format == "messages"


def test_a_detection_says_what_was_found():
    assert (
        str(Detection("summary", {"document": "d", "summary": ["s1", "s2"]}))
        == "summary (document = d; summary = s1, s2)"
    )


def test_columns_of_two_formats_are_ambiguous():
    with pytest.raises(DataError, match="can be read as prompt-completion or question-answer"):
        detect(rows({"prompt": "a", "completion": "b", "question": "c", "answer": "d"}))


def test_unknown_columns_are_listed_with_a_map_that_would_do():
    with pytest.raises(DataError) as caught:
        detect(rows({"id": "7", "frage": "Wie viel ist zwei und zwei?", "antwort": "Es ist vier, wie immer."}))
    assert "columns id, frage, antwort" in str(caught.value)
    assert "data.columns: {prompt: frage, completion: antwort}" in str(caught.value)


def test_a_file_without_answers_is_named_as_such():
    with pytest.raises(DataError, match="looks like multiple-choice, but no column is the answer"):
        detect(rows({"prompt": "a", "A": "b", "B": "c"}))


# --- the column map


def test_a_map_names_the_format_by_its_parts():
    values = {"q": "a", "a": "b"}
    assert turns(convert(values, columns={"question": "q", "answer": "a"})) == [("user", "a"), ("assistant", "b")]


def test_a_column_that_is_not_there_is_refused_with_the_nearest():
    message = fault({"frage": "a", "antwort": "b"}, columns={"question": "fragen", "answer": "antwort"})
    assert "data.columns.question names a column 'fragen' that is not there; did you mean 'frage'?" in message


def test_an_unknown_part_is_refused_with_the_parts_that_are_known():
    assert "is not the parts of any format" in fault({"a": "b"}, columns={"nonsense": "a"})
    assert "format alpaca has no such part" in fault({"a": "b"}, format="alpaca", columns={"instructions": "a"})
    assert "lacks output" in fault({"a": "b"}, format="alpaca", columns={"instruction": "a"})


def test_of_a_list_of_columns_the_ones_that_are_there_count():
    columns = {"document": "d", "summary": ["summary", "summary1", "summary2"]}
    assert convert({"d": "x", "summary": "a"}, columns=columns).references == ("a",)
    assert convert({"d": "x", "summary1": "a", "summary2": "b"}, columns=columns).references == ("a", "b")


def test_a_named_format_that_does_not_fit_says_what_it_needs():
    assert "has no columns for format alpaca (columns: a)" in fault({"a": "b"}, format="alpaca")


# --- choices in the text


def test_choices_listed_in_the_text_become_multiple_choice():
    text = "Please choose the correct ending to complete the given sentence: He eats\n\nEnding1: soup Ending2: a chair"
    asked = convert({"instruction": f"{text}\n\nAnswer format: ending1/ending2", "answer": "ending1"})
    assert asked.choices == ("soup", "a chair")
    assert (asked.answer, asked.references) == (0, ("A",))
    assert asked.messages[0].content.endswith("He eats\nA. soup\nB. a chair")


def test_a_cloze_asks_the_question_alone_and_answers_with_the_text():
    values = {"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"}
    asked = convert(values, labels="cloze")
    assert turns(asked) == [("user", "2 + 2?"), ("assistant", "4")]
    assert (asked.choices, asked.answer) == (("3", "4"), 1)
    assert turns(convert(values, labels="cloze", instruction="Answer."))[0] == ("user", "Answer.\n\n2 + 2?")


def test_a_row_whose_choices_are_not_counted_up_is_refused():
    values = {"instruction": "Q? Answer1: a Answer3: b", "answer": "answer1"}
    assert "lists no choices" in fault(
        values, format="listed-choices", columns={"text": "instruction", "answer": "answer"}
    )


# --- messages


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_tool_calls_reasoning_and_tools_are_kept():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    values = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [call]},
            {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        "tools": TOOLS,
    }
    conversation = convert(values)
    parsed = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "", reasoning="I add.", tool_calls=(parsed,)),
        Message("tool", "4", name="add"),
        Message("assistant", "4"),
    )
    assert conversation.tools == tuple(TOOLS)


def test_sharegpt_calls_become_tool_calls():
    values = {
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
    }
    conversation = convert(values)
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert conversation.tools == ({"name": "add"},)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (chat(), "messages: is empty"),
        (chat(("user", "a")), "messages: has no answer: the last turn is user's"),
        (chat(("system", "a")), "messages: has no user turn"),
        (chat(("assistant", "a")), "messages[0]: the first turn is assistant's"),
        (chat(("user", "a"), ("user", "b")), "messages[1]: two user turns in a row"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "messages[2]: two assistant turns in a row"),
        (chat(("user", "a"), ("tool", "b")), "messages[1]: tool after user"),
        (chat(("user", "a"), ("system", "b")), "messages[1]: system after user"),
        (chat(("user", "a"), ("narrator", "b")), "messages[1].role: unknown role 'narrator'"),
        (chat(("user", "a"), (None, "b")), "messages[1].role: unknown role null"),
        (chat(("user", "a"), ("assistant", None)), "messages[1].content: is null, not text"),
        (chat(("user", "a"), ("assistant", "")), "messages[1].content: is empty"),
        (chat(("user", "a"), ("assistant", 5)), "messages[1].content: is a number, not text"),
        (
            chat(("user", [{"type": "image_url"}]), ("assistant", "b")),
            "messages[0].content[0]: is 'image_url', not text",
        ),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "messages[1]: is text, not an object"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0}]},
            "messages[0].weight: a turn that is not learned",
        ),
        (chat(("user", "a"), ("assistant", "b"), tools="{"), "tools: is not JSON"),
        (chat(("user", "a"), ("assistant", "b"), tools={"a": 1}), "tools: is not a list of tools"),
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused_by_turn(values, message):
    assert f"data.jsonl:1: {message}" in fault(values, format="messages")


def test_a_call_without_a_name_is_refused():
    values = chat(("user", "a"), ("assistant", ""))
    values["messages"][1]["tool_calls"] = [{"function": {}}]
    assert "messages[1].tool_calls[0]: is not a tool call" in fault(values)


def test_a_conversation_that_ends_with_a_question_is_a_prompt():
    conversation = convert(chat(("user", "a"), ("assistant", "b"), ("user", "c")), answers=False)
    assert conversation.prompt == conversation.messages
    assert conversation.references == ()


def test_prompt_and_completion_may_be_lists_of_messages():
    values = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert turns(convert(values)) == [("user", "a"), ("assistant", "b")]


# --- text with role markers


@pytest.mark.parametrize(
    "text",
    [
        "<HUMAN>: a\n<ASSISTANT>: b: c",
        "<human>:a\n<assistant>:b: c",
        "<User>: a <Bot>: b: c",
        "### Human: a### Assistant: b: c",
        "Human: a\n\nAssistant: b: c\n",
        "USER: a\nASSISTANT: b: c",
    ],
)
def test_role_markers_of_many_styles_are_read(text):
    assert turns(convert({"text": text})) == [("user", "a"), ("assistant", "b: c")]


def test_markers_give_as_many_turns_as_there_are():
    text = "<SYSTEM>: s\n<HUMAN>: a\n<ASSISTANT>: b\n<HUMAN>: c\n<ASSISTANT>: d"
    assert [role for role, _ in turns(convert({"text": text}))] == ["system", "user", "assistant", "user", "assistant"]


def test_a_text_that_ends_with_the_marker_of_the_answer_is_a_prompt():
    text = "<HUMAN>: a\n<ASSISTANT>:"
    assert turns(convert({"text": text}, answers=False)) == [("user", "a")]
    assert "text[1]: is empty" in fault({"text": text})


def test_a_text_without_markers_among_marked_ones_is_refused():
    assert "starts with no role marker" in fault({"text": "no markers here"}, format="text")


# --- multiple choice

CHOICES = {"question": "2 + 2?", "A": "3", "B": "4", "C": "five"}


@pytest.mark.parametrize("answer", ["B", "b", " B ", "(B)", "4", 1])
def test_an_answer_may_be_a_letter_an_index_or_the_text(answer):
    conversation = convert({**CHOICES, "answer": answer})
    assert (conversation.answer, conversation.choices) == (1, ("3", "4", "five"))
    assert conversation.messages[-1].content == "B"


@pytest.mark.parametrize("answer", ["D", 3, -1, "six", True, None, ""])
def test_an_answer_that_is_no_choice_is_refused(answer):
    assert "data.jsonl:1: answer: " in fault({**CHOICES, "answer": answer})


@pytest.mark.parametrize(
    ("labels", "line", "answer"),
    [("letter", "B. 4", "B"), ("option_n", "option_2: 4", "option_2"), ("text", "B. 4", "4")],
)
def test_options_and_answers_are_written_as_the_recipe_says(labels, line, answer):
    conversation = convert({**CHOICES, "answer": "B"}, labels=labels)
    prompt, reply = conversation.messages
    assert line in prompt.content.splitlines()
    assert reply.content == answer
    assert conversation.references == (answer,)


@pytest.mark.parametrize(
    "values",
    [
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"question": "q", "choices": '["x", "y"]', "answer": "B"},
        {"question": "q", "choices": {"A": "x", "B": "y"}, "answer": "B"},
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "q", "options": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], "answer": "B"},
        {"question": "q", "option1": "x", "option2": "y", "answer": "option2"},
        {"question": "q", "Option A": "x", "Option B": "y", "answer": "option_b"},
    ],
)
def test_choices_come_in_columns_lists_and_objects(values):
    conversation = convert(values)
    assert (conversation.choices, conversation.answer) == (("x", "y"), 1)


def test_the_recipes_instruction_takes_the_place_of_the_default():
    assert (
        convert({**CHOICES, "answer": "B"}, instruction="Choose.").messages[0].content.startswith("Choose.\n\n2 + 2?")
    )
    assert convert({"article": "a", "summary": "b"}, instruction="Sum up:").messages[0].content == "Sum up:\n\na"
