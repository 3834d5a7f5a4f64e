"""What stands in the page becomes options of a run: those of the command line, and nothing outside of the folders."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy.ui import asked, found, uploads
from halfbyte.deploy.ui.found import FoundModel
from halfbyte.deploy.ui.places import Outside, Places
from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig

GIVEN: dict[str, Any] = {
    "model": "org/model",
    "files": None,
    "paste": "",
    "path": "rows.jsonl",
    "prompt": "",
    "completion": "",
    "rejected": "",
    "label": "",
    "skip": False,
    "method": "sft",
    "task": "lm",
    "preset": "quick",
    "epochs": 1,
    "max_length": 256,
    "rank": 16,
    "learning_rate": 5e-4,
    "batch_size": 16,
    "eval_share": 0.1,
    "memory": "",
    "yaml": "",
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "root" / "linked.gguf").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "root" / "with a link").mkdir()
    (tmp_path / "root" / "with a link" / "model.safetensors").symlink_to(tmp_path / "secret.jsonl")
    monkeypatch.setattr(found, "models", lambda _: [FoundModel("small", str(tmp_path / "cache" / "small"), "llama", 1)])
    return Places([tmp_path / "root"])


def options(places: Places, **changed: Any) -> dict[str, Any]:
    return asked.options_of(places, "en", GIVEN | changed)


def test_the_options_make_a_run_and_the_command_says_the_same(places: Places, tmp_path: Path) -> None:
    made = options(
        places, prompt="Frage", completion="Antwort", skip=True, memory="8GiB", yaml="lora_dropout: 0.05\nseed: 3"
    )
    config = TrainConfig.from_yaml(None, made | {"output": tmp_path / "run"})
    assert config.columns == {"prompt": "Frage", "completion": "Antwort"} and config.skip_bad_rows == "all"
    assert (config.lora_dropout, config.seed, config.memory, config.rank) == (0.05, 3, 8 * 2**30, 16)
    words = shlex.split(asked.command_of(made, tmp_path / "run"))
    assert words[:2] == ["halfbyte", "train"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    again = TrainConfig.from_yaml(None, {name[2:].replace("-", "_"): value for name, value in given.items()})
    assert again == config


@pytest.mark.parametrize(
    ("method", "columns"),
    [
        ("sft", {"prompt": "p", "completion": "a"}),
        ("dpo", {"prompt": "p", "chosen": "a", "rejected": "r"}),
        ("kto", {"prompt": "p", "completion": "a", "label": "l"}),
        ("text", {"text": "p"}),
    ],
)
def test_columns_have_the_names_of_the_goal(places: Places, method: str, columns: dict[str, str]) -> None:
    chosen = {"prompt": "p", "completion": "a", "rejected": "r", "label": "l"}
    kept = {name: chosen[name] for name in chosen if chosen[name] in columns.values()}
    assert options(places, method=method, **kept)["columns"] == columns


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "../secret.jsonl"},
        {"path": "/etc/passwd"},
        {"path": "~/x.jsonl"},
        {"path": "runs/../../secret.jsonl@0.5"},
        {"path": "/*"},
        {"model": "../secret.jsonl"},
        {"model": "/etc"},
        {"yaml": "eval_data: /etc/passwd"},
        {"yaml": "replay: ../secret.jsonl*0.1"},
        {"yaml": "chat_template: ../secret.jsonl"},
        {"yaml": "adapter: /root"},
        {"yaml": "replay: ' /etc/passwd*0.5'"},
        {"yaml": "replay: ../secret.jsonl*0.5"},
        {"yaml": "forgetting_data: ' ../secret.jsonl'"},
        {"yaml": "sample_prompts: ~/secret.txt"},
        {"files": ["/etc/passwd"]},
        {"files": ["../secret.jsonl"]},
        {"model": ".halfbyte-ui/uploads/0123"},
        {"yaml": "eval_data: [a.jsonl, ../secret.jsonl]"},
        {"yaml": "eval_data: {path: ../secret.jsonl}"},
        {"model": "..", "path": "rows.jsonl"},
        {"model": "linked.gguf"},
        {"model": "with a link"},
    ],
)
def test_nothing_outside_of_the_folders_is_read(places: Places, changed: dict[str, Any]) -> None:
    with pytest.raises(Outside):
        options(places, **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": ""}, "Choose a model"),
        ({"path": ""}, "Give some data"),
        ({"yaml": "a: &a [*a]"}, "line 1"),
        ({"yaml": "a: [1"}, "line"),
        ({"yaml": "- 1"}, "line 1"),
        ({"yaml": "[" * 10_000}, "line"),
        ({"yaml": "seed: 2020-99-99"}, "line"),
        ({"path": "~nobody-of-this-name/rows.jsonl"}, "There is no"),
        ({"model": "~nobody-of-this-name/model x"}, "There is no"),
        ({"yaml": "trust_remote_code: true"}, "cannot be set here"),
        ({"yaml": "output: x"}, "cannot be set here"),
        ({"path": "nothing here.jsonl"}, "There is no"),
    ],
)
def test_what_lacks_or_is_wrong_is_said(places: Places, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        options(places, **changed)


def test_what_lies_where_the_server_was_started_is_no_hub_id(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for changed in ({"model": "org/model"}, {"model": "small", "path": "org/model"}):
        with pytest.raises(InputError, match="There is no"):
            options(places, **changed)


def test_files_among_the_options_are_those_of_the_folders_wherever_the_server_was_started(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = places.roots[0]
    (root / "more").mkdir()
    (root / "more" / "rows.jsonl").write_text('{"text": "c"}\n')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.jsonl").write_text('{"text": "secret"}\n')
    made = options(places, yaml="replay: ' more/rows.jsonl*0.5'\nforgetting_data: more/rows.jsonl\nnew_tokens: a,b")
    file = root / "more" / "rows.jsonl"
    assert (made["replay"], made["forgetting_data"], made["new_tokens"]) == (f"{file}*0.5", str(file), "a,b")
    (root / "more" / "rows.jsonl").unlink()
    for word in ("replay: more/rows.jsonl*0.5", "forgetting_data: more/rows.jsonl"):
        with pytest.raises(InputError):
            options(places, yaml=word)
    assert options(places, yaml="adapter: more")["adapter"] == str(root / "more")


def test_a_long_prompt_is_no_path(places: Places) -> None:
    prompt = "Say something long. " * 50
    assert options(places, yaml=f"sample_prompts: '{prompt}'")["sample_prompts"] == prompt


def test_links_within_the_folders_lead_nowhere_else(places: Places, tmp_path: Path) -> None:
    root = places.roots[0]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "rows.jsonl").write_text('{"text": "secret"}\n')
    (root / "linked").mkdir()
    (root / "linked" / "link").symlink_to(tmp_path / "outside")
    (root / "linked" / "own.jsonl").symlink_to(root / "rows.jsonl")
    for path in ("linked/link", "linked/ln*/*.jsonl", "linked/link/rows.jsonl", "*/link/*.jsonl"):
        with pytest.raises(InputError):
            options(places, path=path)
    assert options(places, path="linked/own.jsonl")["data"] == [str(root / "rows.jsonl")]
    (root / "linked" / "rows.jsonl").symlink_to(tmp_path / "outside" / "rows.jsonl")
    for path in ("linked", "linked/*.jsonl", "**/*.jsonl"):
        with pytest.raises(Outside):
            options(places, path=path)


def test_models_are_those_that_were_found_hub_ids_and_folders_within(places: Places, tmp_path: Path) -> None:
    assert options(places, model="small")["model"] == str(tmp_path / "cache" / "small")
    assert options(places, model="org/model")["model"] == "org/model"
    (places.roots[0] / "mine").mkdir()
    assert options(places, model="mine")["model"] == str(places.roots[0] / "mine")


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ('{"a": 1}\n{"a": 2}', "jsonl"),
        ('[{"a": 1}]', "jsonl"),
        ('{\n "a": 1\n}', "json"),
        ("a,b\n1,2", "csv"),
        ("a\tb\n1\t2", "tsv"),
        ("a;b\n1;2\n\n3;4", "csv"),
        ("a,b\n1,2\n3,4,5", "csv"),
        ("Once, upon a time", "txt"),
        ("Once, upon a time,\nthere was a byte.\nIt had, as bytes have, eight bits, or two halves.", "txt"),
        ("[" * 100_000, "json"),
        ("多行\n文本", "txt"),
    ],
)
def test_what_is_pasted_is_kept_once_as_what_it_looks_like(places: Places, text: str, ending: str) -> None:
    file = uploads.pasted(places, text)
    assert file.suffix == f".{ending}" and file.read_text().strip() == text and file.is_relative_to(places.roots[0])
    assert uploads.pasted(places, text) == file


def test_a_file_that_is_sent_is_moved_to_a_name_that_leads_nowhere(places: Places, tmp_path: Path) -> None:
    sent = places.arriving / "gradio" / "abc" / '<img src=x>"data".jsonl'
    sent.parent.mkdir(parents=True)
    sent.write_text("{}\n")
    [kept] = options(places, path="", files=[str(sent)])["data"]
    assert Path(kept).is_relative_to(places.uploads) and Path(kept).name == "img src=xdata.jsonl"
    assert Path(kept).read_text() == "{}\n"
    assert options(places, path="", files=[kept])["data"] == [kept]


def test_what_was_sent_is_kept_as_long_as_a_run_or_a_job_names_it(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [uploads.pasted(places, f"text {number}") for number in range(3)]
    folder = places.uploads / "0123456789abcdef"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    for user, file in ((places.runs / "run", files[0]), (places.jobs / "job", files[1])):
        user.mkdir(parents=True)
        (user / "config.yaml").write_text(f"data: [{file}]\n")
    (places.runs / "run" / "run.json").write_text("{}")
    uploads.tidy(places)
    assert folder.exists() and files[2].exists()  # they are new
    monkeypatch.setattr(uploads, "UNUSED", -1)
    uploads.tidy(places)
    assert sorted(places.uploads.iterdir()) == sorted(files[:2])


def test_recipes_say_their_numbers() -> None:
    quick, paper = asked.numbers_of("quick"), asked.numbers_of("paper")
    assert (quick["rank"], paper["rank"]) == (16, 64) and quick["learning_rate"] == 5e-4
    assert quick.keys() == paper.keys() == set(asked.NUMBERS)
