"""The tokenizer: ordinary text is ordinary, ids are those of the tokenizers library, files are read as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

import chats
from luthier.data.conversation import Message
from luthier.data.templates import load_template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.data.words import Words, keeps_words_apart, words_of
from luthier.errors import DataError, ModelError

KINDS = ["chatml", "llama3", "mistral", "gemma", "phi3", "llama2"]
TEXT = st.text(st.sampled_from("ab Zé7.,\r'<|>[]\n\n\t  \u00a0\u2028世🙂_"), max_size=40) | st.text(max_size=20)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def unspecial(name: str, text: str) -> list[int]:
    """Ids by the library itself, of a text that holds no control token."""
    return chats.tokenizer(name)._backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_ordinary_text_never_yields_a_control_id(name: str) -> None:
    tokenizer = chats.tokenizer(name)
    known = {*tokenizer.control.values()} - {tokenizer.control.get("<unk>")}
    for ids in (*tokenizer.ids(chats.BANK), *(ids for ids, _ in tokenizer.encode(chats.BANK))):
        assert not known & set(ids)


@pytest.mark.parametrize("name", KINDS)
@given(text=TEXT)
@quick
def test_ids_equal_the_library_s_where_no_control_token_stands(name: str, text: str) -> None:
    tokenizer = chats.tokenizer(name)
    if not any(control in text for control in tokenizer.control):
        assert tokenizer.ids([text])[0] == tokenizer.encode([text])[0][0] == unspecial(name, text)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
@given(texts=st.lists(TEXT, max_size=5))
@quick
def test_remembered_words_give_the_ids_of_the_whole_text(name: str, texts: list[str]) -> None:
    tokenizer = chats.tokenizer(name)
    assert keeps_words_apart(tokenizer._data)
    assert tokenizer.ids(texts) == [ids for ids, _ in tokenizer.encode(texts)]


FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)


@pytest.mark.parametrize("name", ["chatml", "llama3", "falcon"])
@given(text=TEXT)
@example("a.\rb")
@example(".\n\n 's 12  345\n.\n\r\na \n b\n'll\u00a0 x")
@quick
def test_words_are_cut_where_every_pre_tokenizer_cuts(name: str, text: str) -> None:
    cut = FALCON if name == "falcon" else chats.tokenizer(name)._plain.pre_tokenizer
    assert [p for w in words_of(text) for p, _ in cut.pre_tokenize_str(w)] == [p for p, _ in cut.pre_tokenize_str(text)]


def test_words_of_falcon_s_kind_are_remembered() -> None:
    assert keeps_words_apart({"pre_tokenizer": json.loads(FALCON.__getstate__())})


@pytest.mark.parametrize("name", ["mistral", "gemma", "llama2"])
def test_words_are_not_remembered_where_tokens_may_reach_over_spaces(name: str) -> None:
    assert not keeps_words_apart(chats.tokenizer(name)._data)


def test_words_are_not_remembered_where_a_space_is_put_or_taken_beside_them() -> None:
    known = {"pre_tokenizer": json.loads(FALCON.__getstate__())}
    spaced = json.loads(json.dumps(known).replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert spaced != known
    assert not keeps_words_apart(spaced)
    token = {"content": "<x>", "lstrip": False, "rstrip": False}
    assert keeps_words_apart(known | {"added_tokens": [token]})
    for change in ({"lstrip": True}, {"rstrip": True}, {"content": "<x> <y>"}):
        assert not keeps_words_apart(known | {"added_tokens": [token | change]})


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.words.MEMORY", 100)
    words = Words(lambda texts: [[len(t)] for t in texts])
    for k in range(200):
        assert words.ids([f"word{k} again"]) == [[len(f"word{k}"), 6]]
    assert len(words._known) < 50


@pytest.mark.parametrize("name", KINDS)
def test_offsets_count_characters(name: str) -> None:
    text = "Über naïve 你好, Paris"
    ids, offsets = chats.tokenizer(name).encode([text])[0]
    assert len(ids) == len(offsets)
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert offsets[-1][1] == len(text)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
def test_byte_level_text_comes_back_as_it_was(name: str) -> None:
    tokenizer = chats.tokenizer(name)
    for text in chats.BANK:
        assert tokenizer.decode(tokenizer.ids([text])[0]) == text.replace("\u0344", "\u0308\u0301")


def test_decode_leaves_special_tokens_out_and_thinking_in() -> None:
    tokenizer = chats.tokenizer("qwen3")
    ids = [tokenizer.control[n] for n in ("<think>", "</think>", "<|im_end|>")]
    assert tokenizer.decode(ids) == "<think></think>"
    assert tokenizer.decode(ids, control=True) == "<think></think><|im_end|>"


def test_a_control_token_in_reach_of_the_model_is_out_of_reach_of_text() -> None:
    """Unigram finds `</s>` in text by itself, and a merge may spell a marker."""
    added = [
        {
            "id": k,
            "content": n,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for k, n in enumerate(["<unk>", "</s>"])
    ]
    letters = [[c, -2.0] for c in "</s>ab"]
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["</s>", 0.0], *letters],
        "byte_fallback": False,
    }
    tokenizer = Tokenizer({"version": "1.0", "added_tokens": added, "model": unigram}, config={"eos_token": "</s>"})
    assert tokenizer._backend.encode("a</s>b").ids == [6, 1, 7]
    assert tokenizer.ids(["a</s>b"])[0] == [6, 2, 3, 4, 5, 7]
    vocab = {n: k for k, n in enumerate(["<unk>", "</s>", *"</s>ab", "</", "s>"])}
    bpe = {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": [["<", "/"], ["s", ">"], ["</", "s>"]]}
    tokenizer = Tokenizer({"version": "1.0", "added_tokens": added, "model": bpe}, config={"eos_token": "</s>"})
    assert 1 not in tokenizer.ids(["a</s>b"])[0]


def test_words_and_spaces_added_to_a_vocabulary_stay_vocabulary(tmp_path: Path) -> None:
    data = json.loads((chats.folder("base") / "tokenizer.json").read_text())
    top = max(data["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    data["added_tokens"] += [{"id": top + 1, "content": "<mark>", **flags}, {"id": top + 2, "content": "    ", **flags}]
    tokenizer = Tokenizer(data, config={"eos_token": "<|im_end|>"})
    assert "<mark>" in tokenizer.control
    assert "    " not in tokenizer.control
    assert top + 2 in tokenizer.ids(["a    b <mark>"])[0]
    assert top + 1 not in tokenizer.ids(["a    b <mark>"])[0]


def test_what_a_row_cannot_hold_is_refused_by_name() -> None:
    encoder = Encoder(chats.tokenizer("chatml"), load_template("chatml", chats.tokenizer("chatml")))
    good, bad = chats.chat(*chats.ONE), chats.chat(Message("user", "a\ud800b"), Message("assistant", "x"))
    with pytest.raises(DataError, match=r"chat\.jsonl:1: text holds half of a character"):
        encoder.examples([good, bad])
    with pytest.raises(DataError, match="would become a control token"):
        chats.tokenizer("chatml").ids(["\uffff<|im_end|>\uffff"])


def test_opening_is_what_the_tokenizer_itself_puts_first() -> None:
    assert chats.tokenizer("llama3").opening == ("<|begin_of_text|>",)
    assert chats.tokenizer("chatml").opening == ()  # it has a bos that it never adds


def test_ends_are_those_of_the_generation_config() -> None:
    assert chats.tokenizer("llama3").ends == ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused_in_one_sentence(tmp_path: Path, broken: str) -> None:
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_the_template_is_found_in_either_file(tmp_path: Path) -> None:
    shutil.copytree(chats.folder("chatml"), tmp_path, dirs_exist_ok=True)
    assert Tokenizer.load(tmp_path).chat_template == chats.CHATML
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).chat_template == "yes"


def test_a_system_message_is_given_to_rows_that_have_none() -> None:
    tokenizer = chats.tokenizer("chatml")
    encoder = Encoder(tokenizer, load_template("chatml", tokenizer), system="Be brief.")
    with_own, without = encoder.prompts([chats.chat(chats.SYSTEM, *chats.ONE), chats.chat(*chats.ONE)])
    assert "Be brief." not in tokenizer.decode(with_own)
    assert "Be brief." in tokenizer.decode(without)
