"""Adapters that come and go while the server answers."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running

from test_errors import check

LOAD, UNLOAD, CHAT = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12, "temperature": 0}


def answer(server: Running, model: str) -> str:
    return str(server.post(CHAT, ASKED | {"model": model}).json()["choices"][0]["message"]["content"])


def names(server: Running) -> list[str]:
    with server.http() as http:
        return [card["id"] for card in http.get("/v1/models").json()["data"]]


@pytest.fixture(params=["natively", "through transformers"])
def bare(
    request: pytest.FixtureRequest, base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    """A server that begins without an adapter."""
    if request.param != "natively":
        from halfbyte.deploy.serve import running as module
        from halfbyte.generate.transformers_decoder import TransformersDecoder
        from halfbyte.hf import fuse

        def slow(model: Any, **_: Any) -> TransformersDecoder:
            fuse(model)
            return TransformersDecoder(model)

        monkeypatch.setattr(module, "decoder_for", slow)
    with running(base, name="tiny", adapter_folder=[str(adapters)]) as server:
        assert type(server.service.engine.decoder).__name__.startswith("Native") == (request.param == "natively")
        yield server


def test_an_adapter_loaded_at_run_time_answers_as_one_given_at_the_start(
    bare: Running, base: Path, adapters: Path
) -> None:
    before = answer(bare, "tiny")
    assert bare.post(LOAD, {"lora_name": "b.lue", "lora_path": "blue"}).status_code == 200
    assert bare.post(LOAD, {"lora_name": "green", "lora_path": str(adapters / "green")}).status_code == 200
    assert names(bare) == ["tiny", "b.lue", "green"]
    found = {name: answer(bare, name) for name in names(bare)}
    assert found["tiny"] == before and len(set(found.values())) == 3
    with running(base, name="tiny", adapter=[f"{name}={adapters / name}" for name in ("green", "blue")]) as other:
        assert found["green"] == answer(other, "green") and found["b.lue"] == answer(other, "blue")
    assert bare.post(UNLOAD, {"lora_name": "b.lue"}).status_code == 200
    assert (answer(bare, "green"), answer(bare, "tiny")) == (found["green"], before)
    assert check(bare.post(CHAT, ASKED | {"model": "b.lue"}), 404)["code"] == "model_not_found"
    assert bare.post(UNLOAD, {"lora_name": "green"}).status_code == 200
    assert names(bare) == ["tiny"] and answer(bare, "tiny") == before
    assert bare.post(LOAD, {"lora_name": "green", "lora_path": "green"}).status_code == 200
    assert answer(bare, "green") == found["green"]


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(bare: Running, adapters: Path) -> None:
    before = answer(bare, "tiny")
    for _ in range(2):  # over the bare base, then beside another adapter
        error = check(bare.post(LOAD, {"lora_name": "odd", "lora_path": "stranger"}), 400)
        assert "does not fit" in error["message"] and str(adapters) not in error["message"]
        assert "odd" in error["message"] and "tiny" in error["message"] and "/" not in error["message"]
        assert "odd" not in names(bare) and answer(bare, "tiny") == before
        assert bare.post(LOAD, {"lora_name": "red", "lora_path": "red"}).status_code in (200, 400)
    assert "already" in check(bare.post(LOAD, {"lora_name": "red", "lora_path": "red"}), 400)["message"]


def test_paths_outside_of_the_folders_are_refused_alike(served: Running, base: Path, adapters: Path) -> None:
    (adapters / "link").symlink_to(base)
    paths = ["../other", str(base), "/etc", "nothing", "link", "", "red/../../tiny-chat", "a\0b", "x" * 5000]
    found = [served.post(LOAD, {"lora_name": "a", "lora_path": path}) for path in paths]
    told = {check(one)["message"] for one in found if one.status_code == 403}
    assert [one.status_code for one in found].count(403) == 7 and len(told) == 1
    for name in ("tiny", "nobody"):
        check(served.post(UNLOAD, {"lora_name": name}), 400 if name == "tiny" else 404)


def test_run_time_loading_is_off_unless_asked_for(base: Path, adapters: Path) -> None:
    with running(base, name="tiny", adapter=[f"red={adapters / 'red'}"]) as server:
        check(server.post(LOAD, {"lora_name": "blue", "lora_path": str(adapters / "blue")}), 403)
        check(server.post(UNLOAD, {"lora_name": "red"}), 403)
        assert names(server) == ["tiny", "red"]


def test_an_adapter_goes_when_its_last_answer_has_ended(served: Running, adapters: Path) -> None:
    assert served.post(LOAD, {"lora_name": "short", "lora_path": "green"}).status_code == 200
    with served.client() as client:
        options: dict[str, Any] = {"messages": ASKED["messages"], "temperature": 0, "logit_bias": {"256": -100}}
        stream = client.chat.completions.create(model="short", max_tokens=300, stream=True, **options)
        chunks = [next(iter(stream))]
        unloading = threading.Thread(target=served.post, args=(UNLOAD, {"lora_name": "short"}))
        unloading.start()
        while "short" in names(served):
            pass
        chunks += list(stream)
        unloading.join()
    assert chunks[-1].choices[0].finish_reason == "length"
