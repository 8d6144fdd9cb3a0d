"""Chat families made in code: small BPE tokenizers of each kind, chat templates in the manner of well-known models, and
conversations to render with them."""

# ruff: noqa: E501 (templates keep the long lines of their kind)
from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from luthier.data.conversation import Conversation, Message, Origin
from luthier.data.tokens import Tokenizer as OurTokenizer

BANK = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "special_tokens.txt").read_text(encoding="utf-8").splitlines()
]

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = """The user asks a question and the assistant answers it. What is the capital of France? The capital is Paris.
def add(a, b):
    return a + b

<|im_start|>system You are a helpful assistant. <|start_header_id|>user [INST] Tell me, in 2 or 3 words: how old are you?
I'm 42 years old, and you're not. "Fine," she said; 'twas 10:30 on 2024-05-17. Visit https://example.org/a_b?c=d&e=f.
{"name": "weather", "arguments": {"city": "Rome", "days": 3}}
### Instruction: ### Response: ### Output: <HUMAN>: <ASSISTANT>: Below is an instruction that describes a task.
Über, naïve café, größer; 你好，世界。 Привет, мир! नमस्ते 🙂
"""


@dataclass(frozen=True)
class Family:
    """`control`: name -> whether it is special; `config`: of tokenizer_config.json."""

    kind: str
    control: dict[str, bool]
    config: dict[str, Any]
    source: str | None = None
    rstrip: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


CHATML = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to these functions:\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.function | tojson }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user, system, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not (message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}{%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- set tool_call = tool_call.function %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MARKED = """{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{%- for message in loop_messages %}
{%- if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

OPEN = """{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_IM = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True}
_THINK = dict.fromkeys(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"], False
)
_LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{k}|>" for k in range(40)),
]
_MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
_PHI3 = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>"]
_S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

FAMILIES = {
    "chatml": Family("gpt2", _IM, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, CHATML),
    "llama3": Family(
        "gpt4-bos",
        dict.fromkeys(_LLAMA3, True),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        LLAMA3,
        generation={"eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
    ),
    "mistral": Family("metaspace", dict.fromkeys([*_MISTRAL, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], True), _S, MISTRAL),
    "gemma": Family(
        "gemma",
        dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], True),
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        GEMMA,
    ),
    "phi3": Family(
        "prepend",
        {"<unk>": True, "<s>": True, "</s>": True, **dict.fromkeys(_PHI3, True)},
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
        PHI3,
        rstrip=True,
    ),
    "qwen3": Family("gpt4", _IM | _THINK, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, QWEN3),
    "marked": Family("gpt2", _IM, {"eos_token": "<|im_end|>"}, MARKED),
    "llama2": Family("prepend", {"<unk>": True, "<s>": True, "</s>": True}, _S, LLAMA2),
    "open": Family("gpt2", _IM, {"eos_token": "<|endoftext|>"}, OPEN),
    "base": Family("gpt2", _IM, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
}


@cache
def folder(name: str) -> Path:
    """A model folder with the family's tokenizer files."""
    family, path = FAMILIES[name], Path(mkdtemp(prefix=f"luthier-{name}-"))
    data = json.loads(_train(family).to_str())
    for token in data["added_tokens"]:
        token["rstrip"] = family.rstrip and token["content"] not in ("<unk>", "<s>")
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **family.config}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    generation = {key: [ids[name] for name in names] for key, names in family.generation.items()}
    (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if family.source:
        (path / "chat_template.jinja").write_text(family.source, encoding="utf-8")
    return path


@cache
def tokenizer(name: str) -> OurTokenizer:
    return OurTokenizer.load(folder(name))


def _train(family: Family) -> Tokenizer:
    """A BPE tokenizer with the family's pre-tokenizer, its control tokens first in the vocabulary."""
    from tokenizers import AddedToken

    made = Tokenizer(models.BPE(unk_token=family.config.get("unk_token")))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if family.kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif family.kind.startswith("gpt4"):
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(GPT4), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:  # SentencePiece's manner; learnt from words, so that no token reaches over a space
        made.pre_tokenizer, alphabet = pre_tokenizers.Metaspace(prepend_scheme="always"), ["▁"]
    names = [name for name, special in family.control.items() if special]
    made.train_from_iterator(
        TEXT.split("\n\n") * 3,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=names, show_progress=False),
    )
    level = len(alphabet) > 1
    if family.kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif family.kind == "gemma":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    elif family.kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = None
    made.decoder = decoders.ByteLevel() if level else decoders.Metaspace(prepend_scheme="never")
    if family.kind == "gpt4-bos":
        bos = family.config["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    made.add_tokens([AddedToken(n, special=False, normalized=False) for n, s in family.control.items() if not s])
    return made


# --- conversations --------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rome", "note": "I'm < 3 days > [x]"}},
}


def chat(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(messages, Origin("chat.jsonl", 1), tools=tools)


SYSTEM = Message("system", "You answer in one sentence.")
ONE = (Message("user", "What is the capital of France?"), Message("assistant", "The capital is Paris."))
TWO = (
    Message("user", "def add(a, b):\n    return a + b\n\nIs a<b & [c]|d fine?"),
    Message("assistant", "Yes: 10 > 2.\nÜber 你好"),
)
TOOLS = (
    Message("user", "How is the weather?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "17 °C"),
    Message("assistant", "It is fine."),
)


def plain(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as transformers wants them."""
    out = []
    for m in messages:
        entry: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.tool_calls:
            entry["tool_calls"] = list(m.tool_calls)
        if m.reasoning is not None:
            entry["reasoning_content"] = m.reasoning
        out.append(entry)
    return out
