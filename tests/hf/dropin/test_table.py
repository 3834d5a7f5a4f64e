"""The table is true of the installed libraries, and what it replaces is put back, name by name."""

import importlib
import re
import subprocess
import sys
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import InputError
from halfbyte.hf import install
from halfbyte.hf.replacement import MISSING, Replacement

ROWS = install.table()


def value_of(row: Replacement) -> Any:
    holder, key, is_item = row._place()
    return holder.get(key, MISSING) if is_item else vars(holder).get(key, getattr(holder, key, MISSING))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.where)
def test_each_row_names_what_is_there_or_was_once_there(row: Replacement) -> None:
    if row.where.startswith("sys.modules"):
        return
    holder, key, is_item = row._place()
    there = key in holder if is_item else hasattr(holder, key)
    gone = ("Only", "chat_format", "trl:ORPO", "for_int8_training", "Trainer.tokenizer", "._pad_token")
    assert there != any(name in row.where for name in gone)
    assert row.why and not row.why.endswith(".")
    assert importlib.import_module(row.library)


def test_no_name_is_replaced_twice_and_every_version_is_one_that_the_table_was_read_for() -> None:
    names = [row.where for row in ROWS]
    assert len(names) == len(set(names))
    install.check_versions(ROWS)


def test_undo_restores_every_name_and_a_second_install_is_as_the_first() -> None:
    before = [value_of(row) for row in ROWS]
    halfbyte.install()
    during = [value_of(row) for row in ROWS]
    halfbyte.install()
    halfbyte.undo()
    after = [value_of(row) for row in ROWS]
    halfbyte.undo()
    changed = [row.where for row, old, new in zip(ROWS, before, during, strict=True) if old is new]
    assert not changed
    assert all(new is old for old, new in zip(before, after, strict=True))


def test_a_failure_while_installing_leaves_nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(old: Any) -> Any:
        raise RuntimeError("no")

    bad = Replacement("transformers.trainer:Trainer.train", fail, "a test", "transformers", ">=5")
    monkeypatch.setattr(install, "table", lambda: [*ROWS, bad])
    before = [value_of(row) for row in ROWS]
    with pytest.raises(RuntimeError, match="no"):
        halfbyte.install()
    assert all(old is value_of(row) for row, old in zip(ROWS, before, strict=True))


def test_a_name_that_cannot_be_put_back_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(new: Any) -> None:
        raise RuntimeError("no")

    where = "transformers.trainer:Trainer.get_num_trainable_parameters"
    bad = Replacement(where, lambda old: lambda self: 0, "a test", "transformers", ">=5", after=fail)
    middle = len(ROWS) // 2
    monkeypatch.setattr(install, "table", lambda: [*ROWS[:middle], bad, *ROWS[middle:]])
    before = [value_of(row) for row in ROWS]
    halfbyte.install()
    with pytest.raises(RuntimeError, match="no"):
        halfbyte.undo()
    assert all(old is value_of(row) for row, old in zip(ROWS, before, strict=True))


def test_another_version_of_a_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Replacement("transformers.trainer:Trainer.train", lambda old: old, "a test", "transformers", "<5")
    monkeypatch.setattr(install, "table", lambda: [old])
    with pytest.raises(InputError, match=re.escape("pip install 'transformers<5'")):
        halfbyte.install()


def test_a_mere_import_replaces_nothing() -> None:
    program = (
        "import transformers, peft, trl\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "names = lambda: [transformers.Trainer.__init__, peft.PeftModel.__init__, trl.SFTTrainer.__init__,\n"
        "    transformers.TrainingArguments.__init__, table['bitsandbytes_4bit'], table['bitsandbytes_8bit'],\n"
        "    peft.prepare_model_for_kbit_training.__code__, vars(transformers.PreTrainedModel)['from_pretrained']]\n"
        "before = names()\n"
        "import halfbyte, halfbyte.hf, halfbyte.hf.install, halfbyte.train\n"
        "assert all(old is new for old, new in zip(before, names(), strict=True))\n"
        "assert not hasattr(trl, 'ORPOTrainer')\n"
        "halfbyte.install()\n"
        "assert not any(old is new for old, new in zip(before, names(), strict=True))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_notebook_loads_and_unloads_the_extension() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    halfbyte.load_ipython_extension(None)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is not before
    halfbyte.unload_ipython_extension(None)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is before
