"""The hub, Colab and Weights & Biases as tutorials use them, where there are none: said, and never an end."""

import fnmatch
import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from datasets import Dataset
from huggingface_hub import HfApi, constants, interpreter_login, login, notebook_login
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from peft import get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

import halfbyte

TEXTS = Dataset.from_list([{"text": f"Red apples and {i} pears."} for i in range(4)])
ROWS = [{"input_ids": list(range(20)), "labels": list(range(20))}] * 4
FEW: dict[str, Any] = {
    "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1,
}  # fmt: skip

NO_WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb itself is installed")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "halfbyte"]


@pytest.fixture
def offline(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def sft(model: Any, lora: Any, folder: Path, output: Path, **more: Any) -> SFTTrainer:
    return SFTTrainer(
        model, SFTConfig(str(output), push_to_hub=True, **FEW, **more), train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(folder), peft_config=lora(),
    )  # fmt: skip


def test_logins_are_told_and_go_on(offline: None, said: Any) -> None:
    login("hf_abc")
    login(token="hf_abc", add_to_git_credential=True)
    interpreter_login()
    notebook_login(skip_if_logged_in=False)
    told = said()
    assert len(told) == 3
    assert all("the hub cannot be reached" in line and "nobody is logged in" in line for line in told)


def test_a_login_that_the_hub_answers_with_no_is_the_error_that_it_was(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*args: Any, **kwargs: Any) -> Any:
        request = httpx.Request("GET", "https://huggingface.co/api/whoami-v2")
        raise HfHubHTTPError("Invalid user token.", response=httpx.Response(401, request=request))

    monkeypatch.setattr("huggingface_hub.hf_api.whoami", no)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        login("hf_abc")


def test_undo_gives_back_a_login_that_fails(offline: None) -> None:
    halfbyte.undo()
    with pytest.raises(ConnectionError, match="offline"):
        login("hf_abc")


def test_a_training_that_would_push_ends_in_its_folder(
    offline: None, model: Any, lora: Any, tiny_model_folder: Path, tmp_path: Path, said: Any
) -> None:
    trainer = sft(model, lora, tiny_model_folder, tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub(dataset_name="apples")
    trainer.model.push_to_hub("me/apples", use_auth_token=True, create_pr=1, use_temp_dir=False)
    trainer.processing_class.push_to_hub("me/apples")
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "checkpoints").is_dir()
    told = [line for line in said() if "upload" in line]
    assert len(told) == 4 and "push_to_hub=True: the hub cannot be reached" in told[0] and str(tmp_path) in told[0]
    assert "trainer.push_to_hub(): nothing was uploaded" in told[1] and str(tmp_path) in told[1]
    assert all("push_to_hub('me/apples'): nothing was uploaded" in line for line in told[2:])


def test_the_plain_trainer_likewise(offline: None, model: Any, lora: Any, tmp_path: Path, said: Any) -> None:
    trainer = Trainer(
        get_peft_model(model, lora()), TrainingArguments(tmp_path, push_to_hub=True, **FEW), train_dataset=ROWS
    )
    trainer.train()
    trainer.push_to_hub()
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "adapter_model.safetensors").is_file()
    assert [line.partition("(")[0] for line in said() if "upload" in line] == [
        "halfbyte: push_to_hub=True: the hub cannot be reached ",
        "halfbyte: trainer.push_to_hub",
    ]


def test_what_can_be_uploaded_is_without_our_checkpoints(
    installed: None,
    model: Any,
    lora: Any,
    tiny_model_folder: Path,
    tmp_path: Path,
    said: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[str, list[str]]] = []

    def upload(self: HfApi, *, repo_id: str, folder_path: str, ignore_patterns: list[str], **_: Any) -> str:
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        kept = [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns)]
        sent.append((repo_id, kept))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    trainer = sft(model, lora, tiny_model_folder, tmp_path, hub_model_id="me/apples")
    monkeypatch.setattr(trainer, "create_model_card", lambda **_: None)  # it asks the hub for the base's licence
    trainer.train()
    assert trainer.push_to_hub() == "https://huggingface.co/me/apples"
    assert len(sent) == 2
    for repository, files in sent:
        assert repository == "me/apples" and "adapter_model.safetensors" in files and "tokenizer.json" in files
        assert not any("checkpoint" in file for file in files)
    assert not any("nothing was uploaded" in line for line in said())


def test_colab_s_modules(installed: None, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.colab import drive, files, userdata

    drive.mount("/content/drive", force_remount=True)
    files.download("model.zip")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    assert userdata.get("HF_TOKEN") == "hf_of_the_environment"
    monkeypatch.delenv("OPENAI_KEY", raising=False)
    with pytest.raises(userdata.SecretNotFoundError, match="the environment has no OPENAI_KEY: set it there"):
        userdata.get("OPENAI_KEY")
    with pytest.raises(AttributeError, match=r"has no google.colab.drive.mout \(did you mean 'mount'\?\)"):
        _ = drive.mout
    assert len(said()) == 3 and "nothing is mounted" in said()[0]
    assert not huggingface_hub.utils.is_google_colab()
    halfbyte.undo()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("google.colab")


@NO_WANDB
def test_wandb_reports_nothing_and_says_so(installed: None, said: Any) -> None:
    import wandb

    assert wandb.login(key="abc") is False
    with wandb.init(project="apples", job_type="training", anonymous="allow") as run:
        run.log({"loss": 1.0})
        run.config.update({"rate": 2.0})
        run.summary["best"] = 1.0
    wandb.config.rate = 2.0
    assert wandb.config.rate == 2.0
    wandb.log({"loss": 1})
    wandb.finish()
    assert [line.partition("(")[0] for line in said()] == [f"halfbyte: wandb.{x}" for x in ("login", "init", "log")]
    assert "wandb" not in get_available_reporting_integrations()
    with pytest.raises(AttributeError, match=r"halfbyte, which stands in for it, has no wandb\.Artifact"):
        _ = wandb.Artifact
    halfbyte.undo()
    assert "wandb" not in sys.modules


@NO_WANDB
def test_what_is_said_is_said_once(installed: None, said: Any, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    with caplog.at_level(logging.WARNING, "halfbyte"):
        for _ in range(3):
            wandb.log({})
    assert len(said()) == 1
