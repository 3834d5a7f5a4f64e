"""The server from its start to its end: ports, hosts, models that cannot be served, signals, log, metrics."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from serving import Running, running
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from halfbyte.deploy.address import bound
from halfbyte.deploy.serve.log import Log
from halfbyte.deploy.serve.options import ServeOptions
from halfbyte.deploy.serve.running import opened
from halfbyte.errors import InputError

LONG: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "logit_bias": {"256": -100},
}  # fmt: skip


def eventually(true: Callable[[], Any]) -> Any:
    """Wait for what is true in a moment: lines are logged, and requests counted, behind their answers."""
    until = time.monotonic() + 20
    while not (found := true()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def refuses(url: str) -> bool:
    """Whether nothing listens there (any more)."""
    at = urlsplit(url)
    with socket.socket() as asking:
        return asking.connect_ex((at.hostname, at.port)) != 0


def options(**given: Any) -> ServeOptions:
    return ServeOptions.from_yaml(None, given)


def test_a_host_that_others_reach_demands_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(InputError, match="so a key is needed"):
            options(host=host)
    assert options(host="0.0.0.0", api_key="a").keys() == ("a",)
    for key in ("", "a b", "\u00e4"):
        with pytest.raises(InputError, match="printable ASCII"):
            options(api_key=key).keys()
    empty = tmp_path / "keys"
    empty.write_text("\n \n")
    with pytest.raises(InputError, match="holds no key"):
        options(api_key_file=empty).keys()
    with pytest.raises(InputError, match="give one of them"):
        options(api_key="a", api_key_file=empty)
    with pytest.raises(InputError, match="NAME=PATH"):
        options(adapter=["only"]).adapters()


def test_a_port_in_use_is_told() -> None:
    with bound("127.0.0.1", 0) as taken, pytest.raises(InputError, match="in use by another program"):
        taken.listen()
        bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="no address"):
        bound("nowhere.invalid", 8000)


def test_models_that_cannot_be_served_are_refused(
    base: Path, adapters: Path, task_folder: Callable[[str], Path]
) -> None:
    def tried(model: Path, **given: Any) -> None:
        with opened(str(model), options(**given), Log(None)):
            pass

    with pytest.raises(InputError, match="does not fit the base model"):
        tried(base, adapter=[f"a={adapters / 'stranger'}"])
    with pytest.raises(InputError, match="no adapter in"):
        tried(base, adapter=[f"a={base}"])
    with pytest.raises(InputError, match="Two models are called red"):
        tried(base, name="red", adapter=[f"red={adapters / 'red'}"])
    with pytest.raises(InputError, match="encoder"):
        tried(task_folder("bert"), adapter=[f"red={adapters / 'red'}"])
    with pytest.raises(InputError, match="do not hold two tokens"):
        tried(base, memory="10")


def test_answers_may_end_in_the_time_of_grace(base: Path) -> None:
    with running(base, name="tiny", grace=30) as server, server.client() as client:
        stream = client.chat.completions.create(**LONG, max_tokens=200, stream=True)
        chunks = [next(iter(stream))]
        server.server.handle_exit(signal.SIGTERM, None)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            client.chat.completions.create(**LONG, max_tokens=1)


@pytest.mark.parametrize("grace", [0, 30])
def test_answers_that_cannot_end_say_so(base: Path, grace: int) -> None:
    """After the time of grace, or at a second signal."""
    with running(base, name="tiny", grace=grace) as server, server.client() as client:
        stream = client.chat.completions.create(**LONG, max_tokens=1000, stream=True)
        next(iter(stream))
        whole: list[Any] = []

        def ask() -> None:
            try:
                whole.append(client.chat.completions.create(**LONG, max_tokens=1000))
            except openai.APIError as error:
                whole.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while server.service.engine.figures().rows < 2:
            time.sleep(0.002)
        server.server.handle_exit(signal.SIGTERM, None)
        if grace:
            time.sleep(0.05)
            server.server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        asking.join()
        assert isinstance(whole[0], openai.InternalServerError) and whole[0].status_code == 503


def test_the_log_has_a_line_a_request_and_nothing_that_was_said(served: Running) -> None:
    asked = {"model": "red", "messages": [{"role": "user", "content": "SECRET"}], "max_tokens": 4}
    answer = served.post("/v1/chat/completions?key=HIDDEN", asked | {"logit_bias": {"256": -100}})
    line = eventually(lambda: [line for line in served.log if line.get("id") == answer.headers["x-request-id"]])[0]
    assert (line["event"], line["model"], line["status"], line["written_tokens"]) == ("request", "red", 200, 4)
    assert line["seconds"] >= line["first_token_seconds"] > 0 and line["prompt_tokens"] > 6
    text = served.written.getvalue()
    assert "SECRET" not in text and "HIDDEN" not in text


def test_metrics_are_what_prometheus_reads(served: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def values() -> dict[tuple[str, ...], float]:
        with served.http() as http:
            page = http.get("/metrics").text
        families = text_string_to_metric_families(page)
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    before = values()
    served.post("/v1/completions", {"model": "blue", "prompt": "abc", "max_tokens": 5, "logit_bias": {"256": -100}})
    counted = "halfbyte_requests_total", "blue", "/v1/completions", "200"  # labels by their names
    eventually(lambda: counted in values())
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["halfbyte_written_tokens_total",] == 5 and grown["halfbyte_prompt_tokens_total",] == 3
    assert grown["halfbyte_answers_total", "length"] == 1
    assert grown["halfbyte_step_seconds_count",] == 4  # the first token comes of the prompt
    assert grown[counted] == 1
    assert after["halfbyte_rows",] == 0


def save_brief(base: Path, folder: Path) -> Path:
    """Save a model that ends its answers, strings and objects after some twenty tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 50  # so the last norm gives about 8 here and 0 elsewhere
        model.lm_head.weight[:, 0] = 0
        for token in (tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(['"', "}"])):
            model.lm_head.weight[token, 0] = 0.4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_conformance_tests_of_llm_comply(base: Path, tmp_path: Path) -> None:
    """All but pictures, which the model does not take, and OpenAI's own reasoning models."""
    with running(save_brief(base, tmp_path / "brief"), name="brief") as server:
        arguments = [
            "--format",
            "openai-chat",
            "--base-url",
            server.url,
            "--api-key",
            "none",
            "--model",
            "brief",
            "--json",
        ]
        run = [sys.executable, "-c", "import sys; from llm_comply.cli import main; sys.exit(main())", *arguments]
        surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=surroundings)
    results = json.loads(done.stdout[done.stdout.index("{") :])["results"]
    assert {one["id"]: one["status"] for one in results if one["status"] != "passed"} == {
        "chat-image-input": "failed",
        "chat-reasoning-summary": "skipped",
    }, done.stdout
    assert len(results) == 9 and not [one for one in results if one["id"] != "chat-image-input" and one.get("warnings")]


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_the_command_serves_until_a_signal(base: Path, adapters: Path, tmp_path: Path, signals: int) -> None:
    command = [
        sys.executable, "-m", "halfbyte", "serve", str(base), "--port", "0", "--adapter", f"red={adapters / 'red'}",
        "--access-log", str(tmp_path / "log"),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        about, url = process.stderr.readline(), process.stderr.readline()
        assert about.startswith("Serving tiny-chat, red: decoded natively")
        found = re.search(r"http://\S+", url)
        assert found
        with openai.OpenAI(base_url=found[0], api_key="none", max_retries=0) as client:
            many = LONG | {"model": "red", "n": 1 if signals == 1 else 16}  # many take longer than the signals
            stream = client.chat.completions.create(**many, max_tokens=900, stream=True)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses(found[0]))
            if signals == 1:
                assert list(stream)[-1].choices[0].finish_reason == "length"
            else:
                process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == (0 if signals == 1 else 130) and "Traceback" not in rest, rest
    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == ["request"]


def test_the_command_tells_what_is_wrong(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "serve", str(base), "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("Error: host 0.0.0.0") and "--api-key-file" in done.stderr
