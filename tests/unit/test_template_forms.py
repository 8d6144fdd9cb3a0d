"""Each form letter by letter, what templates refuse, and the limits on strangers' Jinja."""

from __future__ import annotations

import json
import time

import pytest

import chats
from luthier.data.conversation import Message, Segment
from luthier.data.templates import FORMS, Template, load_template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.errors import RecipeError, TemplateError

QUESTION, ANSWER = Message("user", "Sum up.\n\nA: hi\n\nB: ho"), Message("assistant", "They greet.")
BELOW = "Below is an instruction that describes a task"
APPROPRIATE = "Write a response that appropriately completes the request.\n\n"


def written(segments: list[Segment]) -> str:
    """Supervised parts in guillemets, control tokens in braces."""
    parts = [f"{{{s.text}}}" if s.control else s.text for s in segments]
    marked = [f"«{part}»" if s.supervised else part for part, s in zip(parts, segments, strict=True)]
    return "".join(marked).replace("»«", "")


def render(name: str, *messages: Message, supervise: str = "answers", tokenizer: str = "base") -> str:
    return written(load_template(name, chats.tokenizer(tokenizer)).render(chats.chat(*messages), supervise))


def jinja(source: str, tokenizer: str = "base") -> Template:
    spec = {"version": 1, "name": "tokenizer", "source": source, "date": "2026-02-03"}
    return Template.from_spec(spec, chats.tokenizer(tokenizer))


def test_chatml() -> None:
    assert render("chatml", chats.SYSTEM, QUESTION, ANSWER, Message("user", "?"), Message("assistant", "!")) == (
        "{<|im_start|>}system\nYou answer in one sentence.{<|im_end|>}\n"
        "{<|im_start|>}user\nSum up.\n\nA: hi\n\nB: ho{<|im_end|>}\n"
        "{<|im_start|>}assistant\n«They greet.{<|im_end|>}»\n"
        "{<|im_start|>}user\n?{<|im_end|>}\n{<|im_start|>}assistant\n«!{<|im_end|>}»"
    )


def test_alpaca_with_input() -> None:
    assert render("alpaca", QUESTION, ANSWER) == (
        f"{BELOW}, paired with an input that provides further context. {APPROPRIATE}"
        "### Instruction:\nSum up.\n\n### Input:\nA: hi\n\nB: ho\n\n### Response:\n«They greet.{<|im_end|>}»"
    )


def test_alpaca_without_input_and_in_turns() -> None:
    assert render("alpaca", Message("user", "Hi"), ANSWER, Message("user", "Ho"), ANSWER) == (
        f"{BELOW}. {APPROPRIATE}### Instruction:\nHi\n\n### Response:\n«They greet.{{<|im_end|>}}»\n\n"
        "### Instruction:\nHo\n\n### Response:\n«They greet.{<|im_end|>}»"
    )


def test_human_assistant_keeps_the_space_with_the_answer() -> None:
    assert render("human-assistant", chats.SYSTEM, Message("user", "Hi"), ANSWER, tokenizer="llama3") == (
        "{<|begin_of_text|>}You answer in one sentence.\n<HUMAN>: Hi\n<ASSISTANT>:« They greet.{<|end_of_text|>}»"
    )


def test_instruct_output() -> None:
    assert render("instruct-output", QUESTION, ANSWER) == (
        f"{BELOW}. {APPROPRIATE}### Instruct: Sum up.\n\nA: hi\n\nB: ho\n\n"
        "### Output:\n«They greet.\n\n### End{<|im_end|>}»"
    )


def test_plain() -> None:
    assert render("plain", chats.SYSTEM, Message("user", "Hi"), ANSWER, Message("user", "Ho"), ANSWER) == (
        "You answer in one sentence.\nHi\n«They greet.{<|im_end|>}»\nHo\n«They greet.{<|im_end|>}»"
    )


def test_auto_is_the_tokenizer_s_own_else_plain() -> None:
    assert load_template("auto", chats.tokenizer("llama3")).name == "tokenizer"
    assert load_template("auto", chats.tokenizer("base")).name == "plain"


def test_rendered_text_has_its_control_tokens_parsed_and_its_answers_found() -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\nHa"
    rendered = Message("rendered", text)
    user = "{<|im_start|>}user\nHi{<|im_end|>}\n{<|im_start|>}assistant\n"
    assert render("chatml", rendered) == user + "«Ho{<|im_end|>}»\n{<|im_start|>}assistant\n«Ha{<|im_end|>}»"
    assert render("chatml", rendered, supervise="last").count("«") == 1
    assert render("chatml", rendered, supervise="all").startswith("«{<|im_start|>}user")
    with pytest.raises(TemplateError, match="supervise=all"):
        render("alpaca", rendered)


def test_a_generated_answer_is_cut_where_the_form_writes_its_own_marks() -> None:
    tokenizer = chats.tokenizer("base")
    for name, text in {
        "instruct-output": "Yes.\n\n### End\n\n### Instruct: more",
        "human-assistant": " Yes.\n<HUMAN>: more",
        "alpaca": "Yes.\n\n### Instruction:\nmore",
        "plain": "Yes. ",
    }.items():
        encoder = Encoder(tokenizer, load_template(name, tokenizer))
        assert encoder.decode([*tokenizer.ids([text])[0], tokenizer.control["<|im_end|>"]]) == "Yes."


def test_the_end_of_turn_of_a_tokenizer_s_own_template_is_found_by_rendering() -> None:
    stops = {name: load_template("auto", chats.tokenizer(name)).stops for name in ("llama3", "gemma", "phi3", "open")}
    assert stops == {
        "llama3": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "gemma": ("<end_of_turn>", "<eos>"),
        "phi3": ("<|end|>", "<|endoftext|>"),
        "open": ("<|endoftext|>",),
    }


def test_a_template_whose_turns_have_no_end_gets_eos() -> None:
    assert render("tokenizer", *chats.ONE, *chats.ONE, tokenizer="open") == (
        "User: What is the capital of France?\nAssistant:« The capital is Paris.{<|endoftext|>}»\n"
        "User: What is the capital of France?\nAssistant:« The capital is Paris.{<|endoftext|>}»\n"
    )


def test_the_newline_after_the_end_of_turn_is_not_learned() -> None:
    assert render("tokenizer", *chats.ONE, tokenizer="gemma").endswith("«The capital is Paris.{<end_of_turn>}»\n")


def test_a_system_message_that_a_template_shows_only_when_asking_is_trained_as_it_is_asked() -> None:
    assert render("tokenizer", chats.SYSTEM, *chats.ONE, tokenizer="mistral") == (
        "{<s>}{[INST]} You answer in one sentence.\n\nWhat is the capital of France?{[/INST]}"
        "« The capital is Paris.{</s>}»"
    )


def test_thinking_is_learned_in_the_last_answer_and_refused_in_earlier_ones() -> None:
    thoughtful = Message("assistant", "Paris.", reasoning="France?")
    assert render("tokenizer", chats.ONE[0], thoughtful, tokenizer="qwen3").endswith(
        "assistant\n«{<think>}\nFrance?\n{</think>}\n\nParis.{<|im_end|>}»\n"
    )
    row = (chats.ONE[0], thoughtful, chats.ONE[0], thoughtful)
    assert render("tokenizer", *row, supervise="last", tokenizer="qwen3").count("France?\n{</think>}") == 1
    with pytest.raises(TemplateError, match=r"rewrites answer 1 .* set data.supervise=last"):
        render("tokenizer", *row, tokenizer="qwen3")


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_cannot_say_is_refused_not_left_out(form: str) -> None:
    template = load_template(form, chats.tokenizer("base"))
    with pytest.raises(TemplateError, match="has no form for tools"):
        template.prompt([chats.ONE[0]], (chats.WEATHER,))
    with pytest.raises(TemplateError, match="has no form for tool calls"):
        template.render(chats.chat(*chats.TOOLS), "answers")
    with pytest.raises(TemplateError, match="has no form for reasoning"):
        template.render(chats.chat(chats.ONE[0], Message("assistant", "a", reasoning="b")), "answers")


def test_what_a_tokenizer_s_template_would_leave_out_is_refused() -> None:
    template = load_template("tokenizer", chats.tokenizer("chatml"))
    with pytest.raises(TemplateError, match="would leave out tools"):
        template.prompt([chats.ONE[0]], (chats.WEATHER,))
    with pytest.raises(TemplateError, match="would leave out reasoning"):
        template.render(chats.chat(chats.ONE[0], Message("assistant", "a", reasoning="b")), "answers")


def test_a_message_that_a_template_is_silent_about_is_refused() -> None:
    silent = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}\n{% endif %}{% endfor %}"
    for role in ("system", "tool"):
        with pytest.raises(TemplateError, match=f"would leave out the {role} message"):
            jinja(silent).prompt([Message(role, "Be brief."), chats.ONE[0]])


def test_what_does_not_fit_is_said_when_the_template_is_loaded() -> None:
    with pytest.raises(RecipeError, match="did you mean 'alpaca'"):
        load_template("alpacca", chats.tokenizer("base"))
    with pytest.raises(TemplateError, match="no chat template"):
        load_template("tokenizer", chats.tokenizer("base"))
    with pytest.raises(TemplateError, match=r"needs the control token <\|im_start\|>"):
        load_template("chatml", chats.tokenizer("mistral"))
    with pytest.raises(TemplateError, match="of version 2"):
        Template.from_spec({"version": 2}, chats.tokenizer("base"))
    with pytest.raises(TemplateError, match="is damaged"):
        Template.from_spec({"version": 1, "name": "x", "form": {"colour": "red"}}, chats.tokenizer("base"))


def test_the_template_s_own_refusal_names_the_row() -> None:
    tokenizer = chats.tokenizer("gemma")
    with pytest.raises(TemplateError, match=r"chat\.jsonl:1: the chat template refuses: System role not supported"):
        Encoder(tokenizer, load_template("auto", tokenizer)).examples([chats.chat(chats.SYSTEM, *chats.ONE)])


def test_a_row_whose_prompt_fails_is_named_too() -> None:
    tokenizer = chats.tokenizer("gemma")
    rows = [chats.chat(*chats.ONE), chats.chat(chats.SYSTEM, *chats.ONE)]
    with pytest.raises(TemplateError, match=r"chat\.jsonl:1: the chat template refuses"):
        Encoder(tokenizer, load_template("auto", tokenizer)).prompts(rows)


def test_an_end_of_turn_that_is_not_special_is_still_no_part_of_an_answer() -> None:
    """Some tokenizers forget to call their turn markers special."""
    source = "{% for m in messages %}<tool_call>{{ m.content }}</tool_call>{% endfor %}"
    template = jinja(source + "{% if add_generation_prompt %}<tool_call>{% endif %}", "qwen3")
    assert template.stops[0] == "</tool_call>"
    row = chats.chat(Message("user", "a"), Message("assistant", "b</tool_call><tool_call>c"))
    assert written(template.render(row, "last")).endswith("«b</tool_call><tool_call>c{</tool_call>}»")


def test_a_control_token_without_brackets_stays_text_too() -> None:
    data = json.loads((chats.folder("base") / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"].append({"id": max(data["model"]["vocab"].values()) + 1, "content": "sop", **flags})
    tokenizer = Tokenizer(data, config={"eos_token": "<|im_end|>"})
    source = "sop{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    template = Template.from_spec({"version": 1, "name": "t", "source": source, "date": "2026-02-03"}, tokenizer)
    assert written(template.prompt([Message("user", "a soprano <b>")])) == "{sop}a soprano <b>{<|im_end|>}"


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(TemplateError, match="no messages"):
        render("plain")


def test_the_day_is_the_one_the_template_was_loaded_on() -> None:
    template = jinja("{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert written(template.prompt([chats.ONE[0]])).startswith("03 February 2026")


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in [1] * 50 %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='xx') %}{% for i in [1] * 50 %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='a') %}{% for i in [1] * 9 %}{% set ns.s %}{{ ns.s * 99 }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in [1] * 9 %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in [1] * 9 %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ 'x'.ljust(10000000000) }}{{ 'x' | center(10000000000) }}",
        "{{ lipsum(n=1000000) }}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x, n) %}{% if n %}{{ f(x + x, n - 1) }}{% endif %}{% endmacro %}{{ f('xxxxxxxxxx', 99) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% for %}",
        "{% include 'x' %}",
        "{{ undefined.attribute }}",
    ],
)
def test_a_hostile_template_ends_in_an_error_quickly(hostile: str) -> None:
    began = time.process_time()
    with pytest.raises(TemplateError):
        jinja(hostile)
    assert time.process_time() - began < 5


def test_generation_marks_are_read_and_ignored() -> None:
    assert render("tokenizer", *chats.ONE, tokenizer="marked").endswith(
        "assistant\n«The capital is Paris.{<|im_end|>}»\n"
    )
