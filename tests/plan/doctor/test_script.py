"""Scripts as tutorials print them: what each line asks for that is not here. Nothing of them is run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.errors import InputError
from halfbyte.plan.doctor.finding import Finding
from halfbyte.plan.doctor.reading import read_script
from halfbyte.plan.doctor.script import examine

LISTINGS = Path(__file__).parents[2] / "hf" / "dropin" / "listings"
Doctor = Callable[..., list[Finding]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    monkeypatch.setattr("halfbyte.hf.models.hub.is_offline_mode", lambda: True)

    def look(source: str, *, with_replaced: bool = False) -> list[Finding]:
        file = tmp_path / "script.py"
        file.write_text(source)
        findings = examine(file, [("", source)])
        return [one for one in findings if one.level != "ok" or (with_replaced and one.what == "replaced")]

    return look


ARGUMENTS = "from transformers import TrainingArguments\nTrainingArguments"
LINES = [
    ("import unsloth", "imports", "fault", "unsloth is not installed"),
    ("try:\n    import flash_attn\nexcept ImportError:\n    pass", "imports", "note", "flash_attn is not installed"),
    ("from transformers import AdamW", "imports", "fault", "transformers has no AdamW"),
    ("from trl import DataCollatorForNothing", "imports", "fault", "trl has no DataCollatorForNothing"),
    ("import torch.nothing_here, transformers.nothing", "imports", "fault", "transformers.nothing cannot be imported"),
    ("import transformers as t\nt.TrainingArguments('o', evaluation_strategy='no')", "arguments", "note", "eval_strat"),
    ("import transformers\ntransformers.TrainingArguments('o', no_such=1)", "arguments", "fault", "no such argument"),
    ("from trl import SFTConfig\nSFTConfig('o', fsdp='full_shard')", "arguments", "fault", "fsdp"),
    (f"{ARGUMENTS}('o', deepspeed='d')", "arguments", "warning", "deepspeed"),
    (f"{ARGUMENTS}('o', overwrite_output_dir=True)", "arguments", "note", "gone"),
    (f"{ARGUMENTS}('o', group_by_length=True)", "arguments", "note", "train_sampling"),
    ("from trl import SFTTrainer\nSFTTrainer(model, tokenizer=t)", "arguments", "note", "processing_class"),
    ("from trl import SFTTrainer\nSFTTrainer(model, max_seq_length=9)", "arguments", "note", "SFTConfig"),
    ("from trl import DPOTrainer\nDPOTrainer(model, nothing=9)", "arguments", "fault", "no such argument"),
    ("from peft import LoraConfig\nLoraConfig(rank=3)", "arguments", "fault", "no such argument"),
    ("M.from_pretrained('x', load_in_4bit=True)", "arguments", "note", "BitsAndBytesConfig"),
    ("M.from_pretrained(p, attn_implementation='flash_attention_2')", "attention", "note", "flash attention"),
    ("a = 'nobody/nothing'\nM.from_pretrained(a)", "models", "warning", "HF_HUB_OFFLINE"),
    ("M.from_pretrained('./nowhere/at/all')", "models", "warning", "no such folder"),
    ("load_dataset('json', data_files={'train': 'nowhere.jsonl'})", "data", "fault", "nowhere.jsonl"),
    ("load_dataset('nobody/data')", "data", "note", "nobody/data"),
    ("tokenizer.pad_token = tokenizer.eos_token", "pad token", "note", "pad_token"),
    ("model.merge_and_unload()", "merging", "note", "halfbyte merge"),
    ("B = 1\nBitsAndBytesConfig(load_in_4bit=True)", "4 bits", "note", "float32"),
    ("BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)", "4 bits", "note", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "what", "level", "said"), LINES, ids=[line[0][-40:] for line in LINES])
def test_what_a_line_asks_for_that_is_not_here_is_told(source: str, what: str, level: str, said: str, doctor: Doctor):
    findings = [one for one in doctor(source) if (one.what, one.level) == (what, level)]
    assert any(said in f"{one.value} {one.why} {one.fix}" for one in findings), findings
    assert all(one.why for one in findings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("source", "level"),
    [
        ("import torch\nx.to('cuda')", "note"),
        ("x.cuda()", "note"),
        ("import torch\ntorch.device('cuda:0')", "note"),
        ("M.from_pretrained(p, device_map={'': 0})", "note"),
        ("import torch\ntorch.cuda.get_device_name(0)", "note"),
        ("from torch import cuda\ncuda.get_device_name(0)", "note"),
        ("import torch\ntorch.cuda.graph_pool_handle()", "warning"),
        ("import torch.distributed as d\nd.init_process_group('nccl')", "fault"),
    ],
)
def test_what_is_asked_of_a_gpu_that_is_not_there_is_told(source: str, level: str, doctor: Doctor):
    assert [one.level for one in doctor(source) if one.what == "GPU"] == [level]


def test_a_script_that_asks_for_nothing_is_well(doctor: Doctor, tmp_path: Path):
    (tmp_path / "helpers.py").write_text("")
    source = "import json, helpers\nfrom . import other\nfrom transformers import AutoTokenizer\nprint(json.dumps({}))"
    assert doctor(source) == []


def test_what_the_script_saves_itself_is_not_missed(doctor: Doctor):
    assert doctor("m.save_pretrained('out')\nM.from_pretrained('out')\nM.from_pretrained('out/checkpoint-3')") == []


def test_a_model_and_data_that_are_here_are_well(doctor: Doctor, tiny_model_folder: Path, tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    source = f"M.from_pretrained('{tiny_model_folder}')\nload_dataset('json', data_files='{data}')"
    assert doctor(source) == []


def test_files_beside_the_script_that_shadow_a_library_are_told(doctor: Doctor, tmp_path: Path):
    (tmp_path / "tokenizers.py").write_text("")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    found = [one for one in doctor("x = 1") if one.what == "shadowed"]
    assert [one.level for one in found] == ["fault", "fault"]
    assert {one.fix.split()[1] for one in found} == {str(tmp_path / "tokenizers.py"), str(tmp_path / "datasets")}


def test_what_install_would_replace_is_told_by_its_table(doctor: Doctor):
    source = (
        "from transformers import BitsAndBytesConfig, TrainingArguments\nfrom trl import SFTTrainer\n"
        "TrainingArguments('o', optim='paged_adamw_8bit')\nSFTTrainer(model)"
    )
    told = [one.value for one in doctor(source, with_replaced=True) if one.what == "replaced"]
    for where in ("TrainingArguments.__init__", "SFTTrainer.__init__", "[bitsandbytes_4bit]", "[paged_adamw_8bit]"):
        assert any(where in value for value in told), where
    assert not any("DPOTrainer" in value or "lion" in value for value in told)
    assert "nothing of this script" in doctor("x = 1", with_replaced=True)[0].value


@pytest.mark.parametrize("listing", sorted(LISTINGS.glob("*.txt")), ids=lambda file: file.stem)
def test_listings_that_halfbyte_run_runs_have_no_fault(listing: Path, monkeypatch: pytest.MonkeyPatch):
    """tests/hf/dropin runs each of them as it stands."""
    monkeypatch.setattr("halfbyte.hf.models.hub.is_offline_mode", lambda: True)
    findings = examine(listing, [("", listing.read_text())])
    files = ("data", "models")  # which those tests lay beside them
    assert [one for one in findings if one.level == "fault" and one.what not in files] == []


def test_a_notebook_s_cells_are_read_with_their_magics_left_out():
    cells = [
        ("cell 1", "!pip install -q transformers==4.31\n%load_ext x\nimport torch as th"),
        ("cell 3", "%%bash\nnot python at all"),
        ("cell 4", "if True:\n    !ls\nx = th.zeros(1).to('cuda')"),
    ]
    script = read_script(cells, "n.ipynb")
    assert script.shell[0].startswith("!pip install") and len(script.shell) == 4
    [call] = [call for call in script.calls if call.last == "to"]
    assert (call.place, call.arguments) == ("cell 4, line 3", ("cuda",))


def test_what_is_not_python_is_bad_input():
    with pytest.raises(InputError, match=r"a\.py is not Python that could be run \(line 2: "):
        read_script([("", "x = 1\nprint 'x'\n")], "a.py")
    with pytest.raises(InputError, match=r"\(cell 2, line 1: "):
        read_script([("cell 1", "x"), ("cell 2", "def")], "a.ipynb")
    with pytest.raises(InputError):
        read_script([("", "x\0")], "a.py")
