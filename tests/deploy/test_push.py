"""What is pushed arrives byte for byte, and nothing else; the hub's refusals are sentences; the interrupted go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Fault, Hub, Repository, served
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from theirs import by_values
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte import cli
from halfbyte.deploy.merge import merge
from halfbyte.deploy.uploads import parcel
from halfbyte.errors import InputError
from halfbyte.hf.models import shards
from halfbyte.runs.config import TrainConfig
from halfbyte.train import fine_tune

IDS = torch.arange(5, 25).view(1, 20)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one, where ``me`` is logged in."""
    with served() as here:
        monkeypatch.setattr(constants, "ENDPOINT", here.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "good")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield here
        close_session()


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with all that a run leaves."""
    folder = tmp_path_factory.mktemp("work")
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) + "\n" for n in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "held.jsonl").write_text("".join(rows[:2]))
    options: dict[str, Any] = {
        "model": str(tiny_model_folder), "data": [str(folder / "rows.jsonl")], "preset": "quick", "rank": 4,
        "eval_data": str(folder / "held.jsonl"), "output": str(folder / "run"), "max_steps": 4, "save_steps": 2,
        "keep": 2, "sample_prompts": ["say a"], "max_new_tokens": 4,
    }  # fmt: skip
    return fine_tune(TrainConfig.from_yaml(None, options)).output


@pytest.fixture
def halfbyte_says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    return invoke


def listed(out: str) -> dict[str, str]:
    """The files of the table that is shown, and their sizes."""
    return dict(re.findall(r"^ (\S+) +([\d.,]+ (?:[KMG]i)?B) ", out, re.MULTILINE))


def test_what_is_shown_arrives_byte_for_byte_private_and_nothing_else(
    run: Path, tiny_model_folder: Path, hub: Hub, halfbyte_says: Any, tmp_path: Path
) -> None:
    assert {"checkpoints", "metrics.jsonl", "config.yaml", "run.json", "report.html"} <= set(os.listdir(run))
    code, out, _ = halfbyte_says("push", run, "me/mine", "--dry-run")
    assert code == 0 and not hub.seen
    shown = listed(out)
    assert set(shown) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "checkpoints/" in out and "metrics.jsonl" in out and "give its hub id with --base" in out
    code, out, error = halfbyte_says("push", run, "me/mine")
    assert code == 0, error
    assert f"{hub.url}/me/mine (private), commit {hub.repositories['me/mine'].heads['main'][:7]}" in out
    assert listed(out) == shown
    arrived = hub.files("me/mine")
    expected = {upload.name: upload.source for upload in parcel(run, "me/mine").uploads}
    assert arrived == {
        name: source if isinstance(source, bytes) else source.read_bytes() for name, source in expected.items()
    }
    assert set(arrived) == set(shown)
    assert hub.repositories["me/mine"].private and hub.repositories["me/mine"].messages == ["Upload an adapter"]
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert arrived[name] == (run / name).read_bytes()
    here = {str(run.parent), str(tiny_model_folder.parent), str(run.parent.parent), str(Path.home()) + "/"}
    for method, path, body in hub.seen:
        assert not [secret for secret in here if secret.encode() in body], (method, path)
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == tiny_model_folder.name
    for name, data in arrived.items():
        assert not [secret for secret in here if secret.encode() in data], name
        assert b"it is a" not in data, name  # a row

    got = tmp_path / "got"
    got.mkdir()
    for name, data in arrived.items():
        (got / name).write_bytes(data)
    about = json.loads((got / "adapter_config.json").read_text())
    (got / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(tiny_model_folder)}))
    found, wanted = (halfbyte.load(folder)(input_ids=IDS).logits for folder in (got, run))
    assert torch.equal(found, wanted)

    before = len(hub.seen)
    code, out, _ = halfbyte_says("push", run, "me/mine")
    assert code == 0 and "has all of it already" in out
    assert not [one for one in hub.seen[before:] if "/commit/" in one[1] or one[0] == "PUT"]
    assert hub.files("me/mine") == arrived


def test_the_card_says_how_it_was_made_and_how_it_is_opened(
    run: Path, tiny_model_folder: Path, hub: Hub, halfbyte_says: Any, tmp_path: Path
) -> None:
    hub.cards["somebody/tiny-base"] = {"license": "apache-2.0"}
    code, out, _ = halfbyte_says("push", run, "me/mine", "--base", "somebody/tiny-base", "--message", "First try")
    assert code == 0 and "--base" not in out
    assert hub.repositories["me/mine"].messages == ["First try"]
    arrived = hub.files("me/mine")
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "somebody/tiny-base"
    _, head, body = arrived["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "somebody/tiny-base", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["qlora", "lora", "halfbyte"],
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[key]["loss"] for key in ("evaluation_before", "evaluation"))
    line = next(line for line in body.splitlines() if line.startswith("| loss"))
    assert [float(cell) for cell in line.split("|")[2:4]] == [round(float(f"{x:.4g}"), 6) for x in (before, after)]
    assert "LORA adapter of rank 4" in body and "`rows.jsonl`: 8 examples" in body and "in nf4" in body
    assert "```\nhalfbyte chat me/mine\n```" in body

    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0]
    code = code.replace('"me/mine"', repr(str(run))).replace('"somebody/tiny-base"', repr(str(tiny_model_folder)))
    found: dict[str, Any] = {}
    exec(code, found)
    assert isinstance(found["model"], PeftModel) and found["tokenizer"].chat_template
    assert by_values(found["model"]) == 14
    theirs, ours = found["model"](input_ids=IDS).logits.float(), halfbyte.load(run)(input_ids=IDS).logits.float()
    over_16_bits = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), run)
    other = over_16_bits(input_ids=IDS).logits.float()
    assert (theirs - ours).abs().mean() < 0.1 * (other - ours).abs().mean()


def test_a_base_s_licence_is_told_as_its_folder_or_the_hub_has_it(run: Path, hub: Hub, tmp_path: Path) -> None:
    adapter = shutil.copytree(run, tmp_path / "run")
    for name, licence in (("somebody/tiny-base", "mit"), ("somebody/unknown", None)):
        hub.cards |= {name: {"license": licence}} if licence else {}
        edited(adapter / "adapter_config.json", base_model_name_or_path=name)
        card = parcel(adapter, "me/mine").uploads[0]
        assert isinstance(card.source, bytes)
        assert yaml.safe_load(card.source.split(b"---\n")[1]).get("license") == licence
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    edited(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    card = parcel(adapter, "me/mine").uploads[0]
    assert isinstance(card.source, bytes) and b"license: gemma" in card.source


def test_answers_stand_in_a_card_only_where_their_prompts_were_named(run: Path, hub: Hub, tmp_path: Path) -> None:
    adapter = shutil.copytree(run, tmp_path / "run")
    for is_named in (True, False):
        card = parcel(adapter, "me/mine").uploads[0]
        assert isinstance(card.source, bytes) and (b"Asked:\n\n```\nsay a\n```" in card.source) == is_named
        assert is_named or b"say " not in card.source
        options = yaml.safe_load((adapter / "config.yaml").read_text())
        options.pop("sample_prompts", None)  # then they are rows that were held out
        (adapter / "config.yaml").write_text(yaml.safe_dump(options))


def edited(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2))


def test_no_path_of_this_machine_goes(run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run, tmp_path / "somewhere" / "run")
    cached = "/home/eve/.cache/huggingface/hub/models--some-org--Tiny-1B/snapshots/0123abc"
    edited(adapter / "adapter_config.json", base_model_name_or_path=cached)
    edited(
        adapter / "tokenizer_config.json",
        special_tokens_map_file="/home/eve/models/special_tokens_map.json", name_or_path=cached,
        extra={"deep": ["C:\\Users\\eve\\model", "/think", "a / b", "https://example.org/a"]},
        added_tokens_decoder={"7": {"content": "/usr/bin"}},
    )  # fmt: skip
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    uploads = {upload.name: upload for upload in parcel(adapter, "me/mine").uploads}
    about = {name: json.loads(uploads[name].source) for name in ("adapter_config.json", "tokenizer_config.json")}  # type: ignore[arg-type]
    assert about["adapter_config.json"]["base_model_name_or_path"] == "some-org/Tiny-1B"
    settings = about["tokenizer_config.json"]
    assert settings["special_tokens_map_file"] == "special_tokens_map.json"
    assert settings["name_or_path"] == "some-org/Tiny-1B"
    assert settings["extra"] == {"deep": ["model", "/think", "a / b", "https://example.org/a"]}
    assert settings["added_tokens_decoder"] == {"7": {"content": "/usr/bin"}}
    assert "special_tokens_map_file: special_tokens_map.json" in uploads["tokenizer_config.json"].note
    assert all(b"/home/eve" not in upload.source for upload in uploads.values() if isinstance(upload.source, bytes))
    assert before == {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}

    file = adapter / "chat_template.jinja"
    text = file.read_text()
    file.write_text(f"{{# {adapter}/mine #}}{text}")
    with pytest.raises(
        InputError, match=rf"chat_template.jinja holds .*{adapter.parent.name}.*, so nothing is uploaded"
    ):
        parcel(adapter, "me/mine")
    file.write_text(text)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt", "data": f"{adapter}/rows"})
    with pytest.raises(InputError, match=r"adapter_model.safetensors holds .*, a folder of this machine"):
        parcel(adapter, "me/mine")


def test_a_merged_model_goes_in_all_its_files(
    run: Path, hub: Hub, halfbyte_says: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    merge(run, tmp_path / "merged")
    (tmp_path / "merged" / "LICENSE").write_text("words")
    for name in ("optimizer.safetensors", "training_args.bin", "trainer_state.json", "rows.jsonl", "converted.json"):
        (tmp_path / "merged" / name).write_bytes(b"mine")
    code, _, error = halfbyte_says("push", tmp_path / "merged", "me/mine", "--base", "somebody/tiny-base")
    assert code == 0, error
    arrived = hub.files("me/mine")
    kept = {file.name for file in (tmp_path / "merged").iterdir()} - set(arrived)
    assert kept == {"optimizer.safetensors", "training_args.bin", "trainer_state.json", "rows.jsonl", "converted.json"}
    assert len([name for name in arrived if name.endswith(".safetensors")]) > 3
    card = arrived.pop("README.md").decode()
    assert 'pipeline("text-generation", model="me/mine")' in card and "base_model: somebody/tiny-base" in card
    assert arrived == {name: (tmp_path / "merged" / name).read_bytes() for name in arrived}
    got = tmp_path / "got"
    got.mkdir()
    for name, data in arrived.items():
        (got / name).write_bytes(data)
    found, wanted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (got, tmp_path / "merged"))
    assert torch.equal(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    assert AutoTokenizer.from_pretrained(got).chat_template


def test_gguf_files_go_with_their_modelfile(hub: Hub, halfbyte_says: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in ("model-q4_k_m.gguf", "model-f16.gguf"):
        (folder / name).write_bytes(b"GGUF" + os.urandom(250_000))
    (folder / "Modelfile").write_text("FROM ./model-q4_k_m.gguf\n")
    (folder / "imatrix.dat").write_bytes(b"mine")
    hub.in_parts = True
    code, out, error = halfbyte_says("push", folder, "me/files", "--card", tmp_path / "none.md")
    assert code == 2 and "none.md cannot be read" in error
    (tmp_path / "card.md").write_text("# Mine\n")
    code, out, error = halfbyte_says("push", folder, "me/files", "--card", tmp_path / "card.md", "--public")
    assert code == 0, error
    assert "Stays here: imatrix.dat." in out and "(public)" in out
    assert not hub.repositories["me/files"].private
    names = ("model-q4_k_m.gguf", "model-f16.gguf", "Modelfile")
    assert hub.files("me/files") == {name: (folder / name).read_bytes() for name in names} | {"README.md": b"# Mine\n"}
    assert len(hub.requests(r"PUT /lfs/\w+/\d+")) == 6
    (folder / "model-f16.gguf").write_bytes(b"GGUF" + f"{folder}/imatrix.dat".encode() + os.urandom(1000))
    code, _, error = halfbyte_says("push", folder, "me/files", "--public")
    assert code == 2 and f"model-f16.gguf holds {tmp_path}" in error


def test_a_branch_is_made_and_main_stays(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    for _ in range(2):
        code, out, error = halfbyte_says("push", run, "me/mine", "--revision", "v1/first")
        assert code == 0 and "/me/mine/tree/v1/first (private)" in out, error
    assert hub.files("me/mine") == {} and "adapter_config.json" in hub.files("me/mine", "v1/first")
    assert len(hub.requests("POST .*/branch/")) == 1


def test_what_everybody_sees_is_said_and_meant(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    hub.repositories |= {"me/open": Repository(private=False), "me/closed": Repository(private=True)}
    code, _, error = halfbyte_says("push", run, "me/open")
    assert code == 2 and "me/open is public; say that you mean it with --public" in error
    code, _, error = halfbyte_says("push", run, "me/closed", "--public")
    assert code == 2 and "me/closed is private, and all that it has ever held would be seen" in error
    assert not hub.files("me/open") and not hub.files("me/closed") and not hub.requests("preupload|lfs|commit")
    assert halfbyte_says("push", run, "me/open", "--public")[0] == 0
    assert halfbyte_says("push", run, "me/closed")[0] == 0
    assert hub.repositories["me/closed"].private


def test_other_weights_there_are_not_left_beside_these(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    there = Repository(private=True)
    there.branches["main"] |= {"model.safetensors": b"old", "README.md": b"old", "notes.txt": b"mine", "in/x.bin": b""}
    hub.repositories["me/mine"] = there
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "me/mine holds other weights (model.safetensors)" in error and "--revision" in error
    assert there.branches["main"]["README.md"] == b"old"
    del there.branches["main"]["model.safetensors"]
    assert halfbyte_says("push", run, "me/mine")[0] == 0
    assert there.branches["main"]["notes.txt"] == b"mine" and there.branches["main"]["README.md"] != b"old"


def test_what_did_not_arrive_is_told(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    hub.repositories["me/mine"] = Repository(private=True, ignored={"tokenizer.json"})
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "tokenizer.json did not arrive in me/mine" in error and ".gitignore" in error


REFUSALS: dict[str, tuple[Fault, str]] = {
    "no write": (
        Fault("POST /api/repos/create", 403, 1, "no rights"),
        r"may not write to me/mine \(.*no rights.*hf auth login",
    ),
    "quota": (Fault("objects/batch", 403, 1, "Private storage limit reached"), "no more room for me .*storage"),
    "payment": (Fault("/commit/", 402, 1, "pay"), "no more room for me"),
    "gone": (Fault("/preupload/", 404, 1), "has no me/mine, or none that you may write to"),
    "conflict": (Fault("/commit/", 409, 1, "busy"), r"changed at the same time \(.*busy.*run the same again"),
    "moved on": (Fault("/commit/", 412, 1), "changed at the same time"),
    "too large": (Fault("/commit/", 413, 1), "no files of this size in one commit"),
    "too often": (Fault("GET /api/models/me/mine", 429, 1), "asks for a pause"),
    "broken": (Fault("/commit/", 500, 1, "oops"), r"does not work now \(500.*oops"),
    "teapot": (Fault("/commit/", 418, 1), r"refuses me/mine \(418"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_the_hub_s_refusals_are_one_sentence_and_nothing_is_half_there(
    case: str, run: Path, hub: Hub, halfbyte_says: Any
) -> None:
    fault, told = REFUSALS[case]
    hub.faults.append(fault)
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and fault.times == 0
    [line] = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert re.search(told, line), line
    assert error.rstrip().endswith(line)
    assert "me/mine" not in hub.repositories or hub.files("me/mine") == {}
    assert halfbyte_says("push", run, "me/mine")[0] == 0
    assert "adapter_model.safetensors" in hub.files("me/mine")


def test_who_is_not_logged_in_or_not_known_is_told(
    run: Path, hub: Hub, halfbyte_says: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        code, _, error = halfbyte_says("push", run, "me/mine")
        assert code == 2 and "Nobody is logged in to the hub, so nothing was uploaded; run hf auth login." in error
        assert not hub.seen
    monkeypatch.setenv("HF_TOKEN", "another")
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "does not know your token" in error and "HF_TOKEN" in error
    monkeypatch.setenv("HF_TOKEN", "reader")
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "may not write to me/mine" in error and "don't have the rights" in error
    assert not hub.repositories
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "HF_HUB_OFFLINE is set" in error


def test_a_network_that_is_gone_is_told(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 2 and "The hub cannot be reached" in error and "run the same again" in error


def test_errors_that_pass_are_tried_again(run: Path, hub: Hub, halfbyte_says: Any) -> None:
    hub.faults += [Fault("/preupload/", 503), Fault("PUT /lfs/", 500), Fault("objects/batch", 429)]
    code, _, error = halfbyte_says("push", run, "me/mine")
    assert code == 0, error
    assert not [fault for fault in hub.faults if fault.times]
    assert hub.files("me/mine")["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()


def test_who_was_killed_in_the_middle_sends_the_rest(
    run: Path, hub: Hub, halfbyte_says: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    merge(run, tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "good", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "halfbyte", "push", str(tmp_path / "merged"), "me/mine"]

    def kill(method: str, path: str) -> None:
        if method == "PUT" and hub.objects:
            process.send_signal(signal.SIGKILL)
            process.wait()

    hub.hook = kill
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        assert process.wait(120) == -signal.SIGKILL
    hub.hook = lambda method, path: None
    assert hub.files("me/mine") == {} and hub.objects
    sent, before = set(hub.objects), len(hub.seen)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    again = [path.removeprefix("/lfs/") for method, path, _ in hub.seen[before:] if method == "PUT"]
    assert not sent & set(again)
    arrived = hub.files("me/mine")
    assert all(arrived[file.name] == file.read_bytes() for file in files)


def test_what_cannot_be_pushed_is_told(run: Path, tmp_path: Path, hub: Hub, halfbyte_says: Any) -> None:
    adapter = shutil.copytree(run, tmp_path / "run")
    (adapter / "adapter_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    cut, damaged = (shutil.copytree(run, tmp_path / name) for name in ("cut", "damaged"))
    whole = (run / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    weights = load_file(run / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: torch.full_like(weights[first], float("inf"))}, damaged / "adapter_model.safetensors")
    cases = [
        ([cut, "me/mine"], r"adapter_model.safetensors is damaged \(.*\); copy it again"),
        ([damaged, "me/mine"], r"lora_A.* holds inf"),
        ([tmp_path / "none", "me/mine"], "is not there"),
        ([run / "adapter_config.json", "me/mine"], "is a file; give the folder"),
        ([tmp_path / "empty", "me/mine"], "holds no adapter .*, no model .* and no GGUF file"),
        ([adapter, "me/mine"], r"holds no adapter_model.safetensors"),
        ([pickled, "me/mine"], r"as pickles \(pytorch_model.bin\)"),
        ([run, "mine"], "does not say whose it is; give USER/NAME"),
        ([run, "me/not a name"], "is no name of a repository"),
        ([run, "me/mine", "--base", "../base"], "is no name of a repository"),
    ]  # fmt: skip
    for arguments, told in cases:
        code, _, error = halfbyte_says("push", *arguments)
        assert code == 2 and re.search(told, error), (arguments, error)
    assert not hub.seen


def test_what_was_pushed_opens_by_its_name_also_without_the_hub(
    run: Path, tiny_model_folder: Path, hub: Hub, halfbyte_says: Any, tmp_path: Path
) -> None:
    assert halfbyte_says("push", tiny_model_folder, "me/base")[0] == 0
    assert halfbyte_says("push", run, "me/mine", "--base", "me/base")[0] == 0
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "good", "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip

    def generated(model: Any, **more: str) -> str:
        command = [sys.executable, "-m", "halfbyte", "generate", str(model), "say a", "--max-new-tokens", "4"]
        result = subprocess.run(command, env=environment | more, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    expected = generated(run)
    assert generated("me/mine") == expected
    hub.repositories.clear()
    assert generated("me/mine", HF_HUB_OFFLINE="1") == expected


def test_a_plain_peft_adapter_of_a_model_on_the_hub_has_a_card_too(
    tiny_model_folder: Path, tmp_path: Path, hub: Hub, halfbyte_says: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "plain")  # PEFT writes a card of its own, which names the base's folder
    edited(tmp_path / "plain" / "adapter_config.json", base_model_name_or_path="somebody/tiny-base")
    assert str(tiny_model_folder) in (tmp_path / "plain" / "README.md").read_text()
    code, _, error = halfbyte_says("push", tmp_path / "plain", "me/plain")
    assert code == 0, error
    arrived = hub.files("me/plain")
    card = arrived["README.md"].decode()
    assert str(tiny_model_folder) not in card and "base_model: somebody/tiny-base" in card
    assert 'AutoTokenizer.from_pretrained("somebody/tiny-base")' in card and "BitsAndBytesConfig" not in card
    assert arrived["adapter_config.json"] == (tmp_path / "plain" / "adapter_config.json").read_bytes()
