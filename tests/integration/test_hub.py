"""Getting a model from a hub: the real client against a server on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tiny
from luthier import recipe
from luthier.errors import ModelError
from luthier.model import load

COMMIT = "c0ffee" * 6 + "beef"
BASE = "org/tiny"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the repository `org/tiny`, in the few requests that fetching makes.

    `sizes` overrides what it says of files; `status` and `code` are the answer to everything, if set; `asked` are the
    paths of the files that were sent.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.sizes, self.status, self.code = folder, {}, 0, ""
        self.asked: list[str] = []

    def size(self, name: str) -> int:
        return self.sizes.get(name, (self.folder / name).stat().st_size)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if hub.status:
            self.reply(hub.status, b"", {"X-Error-Code": hub.code, "X-Error-Message": hub.code})
        elif "/tree/" in path:
            names = sorted(p.name for p in hub.folder.iterdir())
            self.json([{"type": "file", "path": n, "size": hub.size(n), "oid": n.encode().hex()} for n in names])
        elif path.startswith(f"/api/models/{BASE}"):
            names = [{"rfilename": p.name, "size": hub.size(p.name)} for p in hub.folder.iterdir()]
            self.json({"id": BASE, "modelId": BASE, "sha": COMMIT, "siblings": names})
        elif path.startswith(f"/{BASE}/resolve/"):
            self.file(path.rpartition("/")[2], body)
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def json(self, tree: Any) -> None:
        self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        if body:
            self.server.asked.append(name)
        size = str(self.server.size(name) if not body else len(data))
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name.encode().hex()}"', "Content-Length": size}
        self.reply(200, data if body else b"", headers)

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub(tiny.base(tmp_path / "repository"))
    (server.folder / "pytorch_model.bin").write_bytes(b"\x80")
    (server.folder / "evil.py").write_text("raise SystemExit")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def model(**options: Any) -> recipe.Model:
    return recipe.Model(base=BASE, **options)


def test_the_needed_files_of_one_commit_are_fetched_once(hub: Hub) -> None:
    said: list[str] = []
    folder = load.model_folder(model(), said.append)
    assert load.loaded_revision(folder) == COMMIT
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "evil.py"}
    assert sorted(hub.asked) == sorted(names)
    assert f"fetching {BASE} at {COMMIT[:12]} from {hub_address(hub)}" in said[1]
    assert len(said) == 2 + len(names)
    hub.asked.clear()
    assert load.model_folder(model()) == folder
    assert hub.asked == []


def hub_address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def test_code_is_fetched_only_where_the_recipe_trusts_it(hub: Hub) -> None:
    assert (load.model_folder(model(trust_remote_code=True)) / "evil.py").is_file()


def test_a_model_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["model.safetensors"] = 10**18
    with pytest.raises(ModelError, match=r"needs 1000000000\d+ bytes \(10000000\d\d\.\d GB\).* has \d+ .*HF_HOME"):
        load.model_folder(model())
    assert hub.asked == []


@pytest.mark.parametrize("read", [load.model_folder, load.model_config], ids=["to train", "to plan"])
def test_pickles_alone_are_refused_before_they_are_fetched(hub: Hub, read: Callable[[recipe.Model], Any]) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickle weights only \(pytorch_model\.bin\).*take a revision"):
        read(model())
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "gated.*accept its licence at http://127.*hf auth login"),
        (401, "RepoNotFound", "no such model, or keeps it private.*hf auth login"),
        (404, "RevisionNotFound", "does not give it.*model.revision"),
        (500, "", "cannot be reached|does not give it"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(hub: Hub, status: int, code: str, reason: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(ModelError, match=reason) as caught:
        load.model_folder(model())
    assert "\n" not in str(caught.value)


def test_a_plan_fetches_the_config_alone_and_the_tokenizer_if_it_is_asked_about_tokens(hub: Hub) -> None:
    assert load.model_config(model())["model_type"] == "llama"
    assert hub.asked == ["config.json"]
    with pytest.raises(ModelError, match="'what' is no new token"):
        load.check_new_tokens(model(), recipe.Lora(new_tokens=["what"]))
    load.check_new_tokens(model(), recipe.Lora(new_tokens=["aspirin"]))
    assert "model.safetensors" not in hub.asked
    hub.status, hub.code = 500, ""
    assert load.model_config(model())["model_type"] == "llama", "from the cache"


def test_what_training_refuses_is_not_planned_from_the_hub_either(hub: Hub) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="quantised by awq"):
        load.model_config(model())
    hub.status, hub.code = 403, "GatedRepo"
    with pytest.raises(ModelError, match="gated"):
        load.model_config(recipe.Model(base="org/other"))


def test_without_the_hub_a_copy_in_the_cache_is_used(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import constants

    folder = load.model_folder(model())
    hub.status, hub.code = 403, "GatedRepo"
    assert load.model_folder(model()) == folder
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(ModelError, match="gated"):
        load.model_folder(model())
