"""What every template must keep (promise 5): the template travels with the adapter, the inference prompt is the
beginning of the training text, end of turn is supervised and stops generation, and content is content."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chats
from luthier.data.conversation import Conversation, Message, Segment
from luthier.data.templates import FORMS, Template, load_template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.errors import TemplateError

OWN = [name for name, family in chats.FAMILIES.items() if family.source]
"""Tokenizers that bring a template of their own."""
ALL = [
    *((name, "tokenizer") for name in OWN),
    *(("base", form) for form in FORMS),
    *(("llama3", f) for f in FORMS if f != "chatml"),
]
NO_SYSTEM = {"gemma"}
REWRITES = {"mistral", "qwen3"}
"""Templates that write history differently, so that only the last answer can be learned."""
every_template = pytest.mark.parametrize(("tokenizer", "name"), ALL)
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def encoder(tokenizer: str, name: str, supervise: str = "answers") -> Encoder:
    ours = chats.tokenizer(tokenizer)
    return Encoder(ours, load_template(name, ours), supervise)


def conversations(tokenizer: str) -> Iterator[Conversation]:
    yield chats.chat(*chats.ONE)
    yield chats.chat(*chats.ONE, *chats.TWO)
    yield chats.chat(*chats.ONE, *chats.ONE, *chats.TWO)
    if tokenizer not in NO_SYSTEM:
        yield chats.chat(chats.SYSTEM, *chats.TWO)


def controls(segments: list[Segment]) -> list[str]:
    return [s.text for s in segments if s.control]


# --- content is content ---------------------------------------------------------------------------------------------


def test_the_bank_of_special_token_strings_is_large_enough() -> None:
    assert len(set(chats.BANK)) >= 200


@every_template
def test_special_token_text_in_content_yields_no_control_token(tokenizer: str, name: str) -> None:
    """Every string of the bank as user, system and earlier and last answer: the control tokens of the row are those of
    the same row with harmless content, and in the same number of ids."""
    chosen = encoder(tokenizer, name, "all")
    kept = set(chosen.tokenizer.control) - chosen.tokenizer.special
    ids = set(chosen.tokenizer.control.values()) - {chosen.tokenizer.control.get("<unk>")}
    system = () if tokenizer in NO_SYSTEM else ("system",)
    for role in (*system, "user", "assistant"):
        plain = controls(chosen.template.render(_with("harmless", role), "all"))
        for text in chats.BANK:
            row = _with(text, role)
            segments = chosen.template.render(row, "all")
            made = controls(segments)
            if role == "assistant":
                # An answer's own thinking is markup for the template; nothing else is.
                assert [c for c in made if c not in kept] == [c for c in plain if c not in kept], text
            else:
                assert made == plain, text
            found = [i for i in chosen.examples([row])[0].ids if i in ids]
            assert found == [chosen.tokenizer.control[c] for c in made if chosen.tokenizer.control[c] in ids], text


def _with(text: str, role: str) -> Conversation:
    texts = {"system": "s", "user": "u", "assistant": "a"} | {role: text}
    messages = [Message("user", texts["user"]), Message("assistant", texts["assistant"])]
    if role == "system":
        messages.insert(0, Message("system", text))
    return chats.chat(*messages)


@pytest.mark.parametrize("tokenizer", ["llama3", "mistral", "qwen3"])
def test_special_token_text_in_tools_calls_and_results_yields_no_control_token(tokenizer: str) -> None:
    template = encoder(tokenizer, "tokenizer").template
    plain = controls(template.render(_with_tools("harmless"), "last"))
    for text in chats.BANK:
        assert controls(template.render(_with_tools(text), "last")) == plain, text


def _with_tools(text: str) -> Conversation:
    function = {
        **chats.WEATHER["function"],
        "description": text,
        "parameters": {"type": "object", "title": text, text: 1},
    }
    call = {"type": "function", "function": {"name": f"x{text}", "arguments": {text: [text]}}}
    messages = (Message("user", "u"), Message("assistant", "", tool_calls=(call,)), Message("tool", text, name=text))
    return chats.chat(*messages, Message("assistant", "a"), tools=({"type": "function", "function": function},))


@pytest.mark.parametrize(
    "source",
    [
        "{{ m.content | trim }}",
        "{{ m.content[1:-1] }}",
        "{{ m.content.split('x') | join('') }}",
        "{{ m.content.replace('<think></think>', '') }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m.content[::-1] }}{{ m.content[::-1][::-1] }}",
        "{{ m | tojson }}{{ m | tojson(ensure_ascii=True) }}",
        "{{ m.content | upper | lower }}{{ m.content * 2 }}",
        "{{ m.content.split('</think>')[-1] }}{{ m.content[:5] + m.content[5:] }}",
    ],
)
def test_content_stays_content_whatever_the_template_does_with_it(source: str) -> None:
    ours = chats.tokenizer("qwen3")
    ours_template = (
        "{% for m in messages %}<|im_start|>"
        + source
        + "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    probe = (
        "{% if messages[0].content == 'QUESTION' %}QUESTION<|im_start|>ANSWER<|im_end|>{% else %}"
        + ours_template
        + "{% endif %}"
    )
    template = Template.from_spec({"version": 1, "name": "tokenizer", "source": probe, "date": "2026-01-01"}, ours)
    for text in chats.BANK:
        assert controls(template.prompt([Message("user", f"x{text}")])) == [
            "<|im_start|>",
            "<|im_end|>",
            "<|im_start|>",
        ]


@pytest.mark.parametrize("tokenizer", OWN)
def test_content_is_put_back_as_it_was(tokenizer: str) -> None:
    template = encoder(tokenizer, "tokenizer").template
    for text in chats.BANK:
        rendered = "".join(s.text for s in template.prompt([Message("user", f"a{text}b")]))
        assert f"a{text}b" in rendered


# --- the prompt is a prefix -----------------------------------------------------------------------------------------


@every_template
@pytest.mark.parametrize("supervise", ["answers", "last", "all"])
def test_the_inference_prompt_is_a_prefix_of_the_training_text(tokenizer: str, name: str, supervise: str) -> None:
    if name == "tokenizer" and tokenizer in REWRITES and supervise == "answers":
        pytest.skip("learns last answers only")
    chosen = encoder(tokenizer, name, supervise)
    for conversation in conversations(tokenizer):
        example, prompt = chosen.examples([conversation])[0], chosen.prompts([conversation])[0]
        assert example.ids[: len(prompt)] == prompt
        assert example.prompt == len(prompt) < len(example.ids)


@every_template
@given(question=st.text(max_size=12), answer=st.text(st.sampled_from("\n aB1.,<é"), max_size=6) | st.text(max_size=8))
@quick
def test_the_prompt_is_a_prefix_whatever_the_answer_begins_with(
    tokenizer: str, name: str, question: str, answer: str
) -> None:
    chosen = encoder(tokenizer, name)
    row = chats.chat(Message("user", question), Message("assistant", answer))
    example, prompt = chosen.examples([row])[0], chosen.prompts([row])[0]
    assert example.ids[: len(prompt)] == prompt
    assert sum(example.supervised[: len(prompt)]) == 0
    assert sum(example.supervised) >= 1


def test_a_token_over_the_border_is_split_there_and_counted() -> None:
    chosen, row = encoder("chatml", "tokenizer"), chats.chat(Message("user", "q"), Message("assistant", "    return a"))
    prompt, (example, _) = chosen.prompts([row])[0], chosen.examples([row, row])
    assert chosen.apart == 2
    assert example.ids[: len(prompt)] == prompt
    assert chosen.tokenizer.decode(example.ids[len(prompt) :]) == "    return a\n"


# --- what is supervised ---------------------------------------------------------------------------------------------


@every_template
def test_end_of_turn_is_supervised_and_is_a_stop_token(tokenizer: str, name: str) -> None:
    chosen = encoder(tokenizer, name, "last" if tokenizer in REWRITES else "answers")
    for conversation in conversations(tokenizer):
        answers = sum(m.role == "assistant" for m in conversation.messages)
        segments = chosen.template.render(conversation, chosen.supervise)
        ends = [s.text for s in segments if s.control and s.supervised and s.text in chosen.template.stops]
        assert ends == [chosen.template.stops[0]] * (answers if chosen.supervise == "answers" else 1)
        example = chosen.examples([conversation])[0]
        assert [i for i, on in zip(example.ids, example.supervised, strict=True) if on][-1] in chosen.stop_ids


@every_template
def test_only_answers_are_supervised_and_all_of_them(tokenizer: str, name: str) -> None:
    template = encoder(tokenizer, name).template
    row = chats.chat(*chats.ONE, *chats.TWO)
    answers = [chats.ONE[1].content, chats.TWO[1].content]
    if tokenizer != "qwen3":
        assert [_bare(text) for text in learned(template.render(row, "answers"))] == answers
    assert _bare("".join(learned(template.render(row, "last")))) == answers[1]
    assert all(s.supervised for s in template.render(row, "all"))


def learned(segments: list[Segment]) -> list[str]:
    return [s.text for s in segments if s.supervised and not s.control]


def _bare(text: str) -> str:
    return text.removesuffix("\n\n### End").strip()


@every_template
def test_supervision_does_not_change_the_ids(tokenizer: str, name: str) -> None:
    row = chats.chat(*chats.ONE, *chats.TWO)
    first, second = (encoder(tokenizer, name, s).examples([row])[0].ids for s in ("last", "all"))
    assert first == second
    if tokenizer not in REWRITES:
        assert first == encoder(tokenizer, name, "answers").examples([row])[0].ids


def test_pad_that_is_eos_hides_nothing_since_masking_is_by_structure() -> None:
    chosen = encoder("base", "plain")
    assert chosen.tokenizer.names["pad_token"] == chosen.tokenizer.eos
    example = chosen.examples([chats.chat(*chats.ONE, *chats.TWO)])[0]
    eos = chosen.tokenizer.control["<|im_end|>"]
    assert [on for i, on in zip(example.ids, example.supervised, strict=True) if i == eos] == [1, 1]


# --- the tokenizer's own rendering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [name for name in OWN if name != "open"])
def test_ids_equal_transformers_apply_chat_template(tokenizer: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(chats.folder(tokenizer))
    chosen = encoder(tokenizer, "tokenizer", "last")
    rows = [c for c in conversations(tokenizer) if tokenizer != "mistral" or c.messages[0].role != "system"]
    if tokenizer == "qwen3":
        rows.append(chats.chat(chats.ONE[0], Message("assistant", "Paris.", reasoning="France <b>: [Paris] | Lyon?")))
        rows.append(chats.chat(chats.ONE[0], Message("assistant", "<think>\nhm\n</think>\n\nParis.")))
    if tokenizer in ("llama3", "mistral", "qwen3"):
        rows.append(chats.chat(*chats.TOOLS, tools=(chats.WEATHER,)))
        rows.append(chats.chat(*chats.TOOLS[:2], tools=(chats.WEATHER,)))
    for row in rows:
        how = {"tools": list(row.tools) or None, "tokenize": True, "return_dict": False}
        expected = theirs.apply_chat_template(chats.plain(row.messages), **how)
        assert chosen.examples([row])[0].ids == expected
        asked = theirs.apply_chat_template(chats.plain(row.prompt), add_generation_prompt=True, **how)
        assert chosen.prompts([row])[0] == asked


@pytest.mark.embedded
def test_the_embedded_model_s_ids_equal_transformers_apply_chat_template() -> None:
    from transformers import PreTrainedTokenizerFast

    from luthier.model.embedded import embedded_folder

    theirs, ours = PreTrainedTokenizerFast.from_pretrained(embedded_folder()), Tokenizer.load(embedded_folder())
    chosen = Encoder(ours, load_template("auto", ours))
    for row in conversations("chatml"):
        expected = theirs.apply_chat_template(chats.plain(row.messages), tokenize=True, return_dict=False)
        assert chosen.examples([row])[0].ids == expected
    assert ours.ids(chats.BANK) == [ids for ids, _ in ours.encode(chats.BANK)]


# --- the template travels -------------------------------------------------------------------------------------------


@every_template
def test_a_template_comes_back_from_its_spec_as_json(tokenizer: str, name: str) -> None:
    ours = chats.tokenizer(tokenizer)
    template = load_template(name, ours)
    again = Template.from_spec(json.loads(json.dumps(template.spec())), ours)
    assert (again.name, again.stops, again.reply, again.cuts) == (name, template.stops, template.reply, template.cuts)
    for row in conversations(tokenizer):
        assert again.render(row, "last") == template.render(row, "last")
        assert again.prompt(row.prompt) == template.prompt(row.prompt)


@every_template
def test_documents_and_rendered_text_need_no_template(tokenizer: str, name: str) -> None:
    template = load_template(name, chats.tokenizer(tokenizer))
    document = template.render(chats.chat(Message("document", "Long <|im_end|> text")), "answers")
    assert [s.text for s in document if not s.control] == ["Long <|im_end|> text"]
    assert all(s.supervised for s in document)
    assert document[-1].control
    assert document[-1].text in template.stops
    with pytest.raises(TemplateError, match="stands among other messages"):
        template.render(chats.chat(Message("document", "a"), *chats.ONE), "all")
