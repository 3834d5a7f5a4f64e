"""The run folder: who may write to it, from what it goes on, and what is said when something is other than it was."""

import datetime
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte import checksums
from halfbyte.errors import InputError
from halfbyte.runs.circumstances import Circumstances, changes, fingerprint
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.folder import VERSION, RunFolder


def config(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d.jsonl", output=folder, **options)


CIRCUMSTANCES = Circumstances(
    versions={"halfbyte": "0.1.0", "torch": "2.13.0"},
    kernels="native (avx512)",
    threads=2,
    processes=1,
    machine="a chip",
    cores=2,
    memory_bytes=2**34,
    base_model="abcd",
)


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.begin(config(folder.path), CIRCUMSTANCES)
        for step in (9, 10, 100):
            save(folder, step)
    return folder


def save(folder: RunFolder, number: int, **about: Any) -> Path:
    """Make what stands for a checkpoint."""
    part = folder.checkpoints / f"step-{number:06d}"
    (part / "more").mkdir(parents=True)
    (part / "state.json").write_text(f"the numbers of step {number}")
    (part / "more/state.bin").write_bytes(b"")
    checksums.write(part, **{"step": number, "run": folder.run_id()} | about)
    return part


def test_it_goes_on_from_the_last_checkpoint_with_options_that_may_change(begun: RunFolder) -> None:
    resumed = config(begun.path, resume=True, save_steps=7, memory="3GiB", gradient_checkpointing=True)
    assert begun.check(resumed) and begun.checkpoint() == (begun.checkpoints / "step-000100", [])


@pytest.mark.parametrize("name", TrainConfig.fixed_options())
def test_every_other_option_has_to_stay(name: str, begun: RunFolder) -> None:
    now = config(begun.path, resume=True)
    other = now.model_copy(update={name: "something else"})
    if name == "output":  # a folder may be moved
        assert begun.check(config(begun.path, resume=True))
        return
    with pytest.raises(InputError, match=rf"cannot go on with other options .*\({name}: .* → 'something else'\)"):
        begun.check(other)


def test_a_run_s_own_file_of_options_cannot_make_another_run_of_it(begun: RunFolder) -> None:
    begun.config.write_text(begun.config.read_text().replace("rank: 64", "rank: 65"))
    with pytest.raises(InputError, match=r"\(rank: 64 → 65\)"):
        begun.check(TrainConfig.from_yaml(begun.config, {"resume": True}))


def test_a_run_that_was_ended_as_it_began_begins_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(folder.path), CIRCUMSTANCES)
    folder.config.unlink()
    assert not folder.check(config(folder.path, resume=True, rank=8))
    with pytest.raises(InputError, match="already holds a run"):
        folder.check(config(folder.path))


def test_all_options_that_differ_are_named(begun: RunFolder) -> None:
    with pytest.raises(InputError, match=r"\(rank: 64 → 8, batch_size: 4 → 2\); use its own config\.yaml"):
        begun.check(config(begun.path, resume=True, rank=8, batch_size=2))


def test_a_run_may_get_more_steps_and_not_fewer(begun: RunFolder) -> None:
    assert begun.check(config(begun.path, resume=True, epochs=4)) and begun.gets_more(config(begun.path, epochs=4))
    assert begun.check(config(begun.path, resume=True, max_steps=1))  # in the place of epochs; counted by the trainer
    with pytest.raises(InputError, match=r"can be given more epochs, not fewer \(3 → 2\)"):
        begun.check(config(begun.path, resume=True, epochs=2))
    begun.go_on(config(begun.path, resume=True, max_steps=20), {"step": 9, "from": 10, "to": 20})
    assert json.loads(begun.about.read_text())["courses"] == [{"step": 9, "from": 10, "to": 20}]
    assert TrainConfig.from_yaml(begun.config).max_steps == 20
    with pytest.raises(InputError, match=r"more max_steps, not fewer \(20 → 10\)"):
        begun.check(config(begun.path, resume=True, max_steps=10))
    with pytest.raises(InputError, match=r"goes by max_steps \(20\), not by epochs"):
        begun.check(config(begun.path, resume=True, max_steps=20, epochs=9))


def test_a_finished_run_goes_on_if_it_gets_more_and_its_checkpoint_was_kept(begun: RunFolder) -> None:
    begun.summary.write_text("{}")
    with pytest.raises(InputError, match="holds a finished run; give it more max_steps or epochs"):
        begun.check(config(begun.path, resume=True, keep=3))
    assert begun.check(config(begun.path, resume=True, epochs=5))
    assert begun.checkpoint()[0]
    shutil.rmtree(begun.checkpoints)
    with pytest.raises(InputError, match=r"whose checkpoints were removed at its end.*set keep"):
        begun.checkpoint()


@pytest.mark.parametrize("file", ["state.json", "checksums.json"])
def test_any_flipped_byte_of_a_checkpoint_is_told_and_the_one_before_is_taken(file: str, begun: RunFolder) -> None:
    last = begun.checkpoints / "step-000100"
    whole = (last / file).read_bytes()
    for place in range(len(whole)):
        (last / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found, damaged = begun.checkpoint()
        assert found == begun.checkpoints / "step-000010", place
        assert damaged == [f"step-000100: {file} is damaged"] or "newer halfbyte" in damaged[0], (place, damaged)


def test_checkpoints_that_are_half_there_or_another_s_are_told(begun: RunFolder) -> None:
    def told() -> str:
        return begun.checkpoint()[1][0]

    last = begun.checkpoints / "step-000100"
    with (last / "more/state.bin").open("ab") as stream:
        stream.write(b"x")
    assert told() == "step-000100: more/state.bin is damaged (1 bytes of 0)"
    (last / "more/state.bin").unlink()
    assert told() == "step-000100: more/state.bin is missing"
    (last / "checksums.json").unlink()
    assert told() == "step-000100: it has no checksums.json, so it is not whole, or not halfbyte's"
    shutil.rmtree(last)
    last.write_text("a file")
    assert told() == "step-000100: it is no folder"
    last.unlink()
    (begun.checkpoints / "step-notes").mkdir()
    save(begun, 200, run="another").touch()
    assert told() == "step-000200: it belongs to another run"
    shutil.rmtree(begun.checkpoints / "step-000200")
    save(begun, 200, step=7)
    assert told() == "step-000200: it is that of step 7"
    content = json.loads((begun.checkpoints / "step-000200/checksums.json").read_text())
    content["version"] = 2
    content.pop("digest")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (begun.checkpoints / "step-000200/checksums.json").write_text(json.dumps(content))
    assert told() == "step-000200: a newer halfbyte wrote it (form 2; this one knows 1)"


def test_where_no_checkpoint_is_good_all_are_named_and_nothing_is_removed(begun: RunFolder) -> None:
    for folder in begun.saved():
        (folder / "state.json").unlink()
    before = sorted(begun.path.rglob("*"))
    missing = "step-0000[0-9]+: state.json is missing; "
    with pytest.raises(InputError, match=rf"\(step-000100: state.json is missing; {missing}.*Nothing was removed"):
        begun.checkpoint()
    assert sorted(begun.path.rglob("*")) == before


def test_other_data_or_tokenizers_are_told_by_their_digests(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(folder.path), CIRCUMSTANCES, inputs={"data": "a" * 64, "tokenizer": "b" * 64})
    folder.compare_inputs({"data": "a" * 64, "tokenizer": "b" * 64})
    with pytest.raises(InputError, match=r"other training data \(a{12} → c{12}\) and other evaluation data \(none → d"):
        folder.compare_inputs({"data": "c" * 64, "tokenizer": "b" * 64, "eval_data": "d" * 64})


def test_a_moved_folder_goes_on(begun: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(begun.path.rename(tmp_path / "elsewhere"))
    assert moved.check(config(moved.path, resume=True))
    assert moved.checkpoint()[0] == moved.checkpoints / "step-000100"


def test_a_folder_of_the_old_layout_and_of_a_newer_one_are_told(begun: RunFolder) -> None:
    about = json.loads(begun.about.read_text())
    assert about["version"] == VERSION
    begun.about.write_text(json.dumps(about | {"version": VERSION + 1}))
    with pytest.raises(InputError, match=rf"newer halfbyte \(layout {VERSION + 1}\)"):
        begun.check(config(begun.path, resume=True))
    begun.about.unlink()
    with pytest.raises(
        InputError, match=r"no run\.json, .* cannot be resumed \(halfbyte 0\.1\.0 .*copy, set overwrite"
    ):
        begun.check(config(begun.path, resume=True))
    assert not begun.check(config(begun.path, overwrite=True))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": "one"}'])
def test_a_damaged_description_is_told(content: str, begun: RunFolder) -> None:
    begun.about.write_text(content)
    with pytest.raises(InputError, match=r"run\.json cannot be read .*; put it back from a copy, set overwrite"):
        begun.check(config(begun.path, resume=True))


def test_any_flipped_byte_of_the_description_is_told(begun: RunFolder) -> None:
    whole = begun.about.read_bytes()
    assert begun.check(config(begun.path, resume=True))
    for place in range(0, len(whole), 5):
        begun.about.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"run\.json (is damaged|cannot be read)|newer halfbyte"):
            begun.check(config(begun.path, resume=True))


def test_what_may_change_bits_is_noted_and_what_makes_another_run_refused(begun: RunFolder) -> None:
    assert begun.compare(CIRCUMSTANCES) == []
    assert begun.compare(CIRCUMSTANCES.model_copy(update={"cores": 8, "memory_bytes": 1})) == []
    versions = {"halfbyte": "0.1.0", "torch": "2.14.1"}
    other = {"versions": versions, "threads": 1, "kernels": "native (avx2)", "machine": "another"}
    assert begun.compare(CIRCUMSTANCES.model_copy(update=other)) == [
        "torch was 2.13.0 and is 2.14.1",
        "kernels were native (avx512) and are native (avx2)",
        "threads were 2 and are 1",
        "machine was a chip and is another",
    ]
    with pytest.raises(InputError, match="the same run: the base model's files are others"):
        begun.compare(CIRCUMSTANCES.model_copy(update={"processes": 2, "base_model": "other"}))
    [noted] = begun.compare(CIRCUMSTANCES.model_copy(update={"processes": 2}))
    assert noted.startswith("processes were 1 and are 2")


def test_every_circumstance_is_compared_or_left_out_on_purpose() -> None:
    values: dict[str, object] = {"versions": {"torch": "1"}, "written": {"model.safetensors": 2}}
    before = CIRCUMSTANCES.model_copy(update={"written": {"model.safetensors": 1}})
    for name in Circumstances.model_fields:
        found = changes(before, before.model_copy(update={name: values.get(name, 99)}))
        assert bool(found.noted or found.refused) == (name not in ("cores", "memory_bytes", "base_config")), name
    # the digest of the configuration is a part of the base model's, and decides where all weights are known
    other = before.model_copy(update={"base_model": "other", "base_config": "same"})
    same = before.model_copy(update={"base_config": "same"})
    assert not changes(same, other, base_is_known=True).refused and changes(same, other).refused
    assert changes(before, other, base_is_known=True).refused


def test_the_fingerprint_tells_other_weights_and_not_another_place(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("copy", "changed", "longer"):
        (tmp_path / name).mkdir()
        for file in tiny_model_folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tiny_model_folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "changed/model.safetensors").write_bytes(weights)
    (tmp_path / "longer/model.safetensors").write_bytes(weights + b"\0")
    ours = fingerprint(str(tiny_model_folder))
    assert fingerprint(str(tmp_path / "copy")) == ours
    assert len({ours, *(fingerprint(str(tmp_path / name)) for name in ("changed", "longer"))}) == 3


def hold(path: Path) -> subprocess.Popen[str]:
    """Let another process hold the folder ``path`` until it is ended."""
    script = (
        "import sys, time; from pathlib import Path; from halfbyte.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_pages_and_pictures_of_an_earlier_run_go_with_it(begun: RunFolder) -> None:
    for file in (begun.report, begun.curve):
        file.write_text("of the earlier run")
    begun.begin(config(begun.path, overwrite=True), CIRCUMSTANCES)
    assert not begun.report.exists() and not begun.curve.exists()
    time = datetime.datetime.fromisoformat(json.loads(begun.about.read_text())["begun"])
    assert abs(time - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=5)


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with hold(folder.path) as process:
        expected = rf"Another run \(process {process.pid}\) writes to .*run; wait for it"
        with pytest.raises(InputError, match=expected), folder.locked():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder.locked():
            pass
    assert list(folder.path.iterdir()) == []


def test_what_a_killed_run_left_half_written_is_removed(begun: RunFolder) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from halfbyte.files import whole_file, whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as part, whole_file(Path(sys.argv[2])):\n"
        "    (part / 'state.json').write_text('{'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, begun.checkpoints / "step-000101", begun.summary]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    (begun.path / ".mine").write_text("not a run's")
    before = {path.name for folder in (begun.path, begun.checkpoints) for path in folder.iterdir()}
    with begun.locked():
        pass
    after = {path.name for folder in (begun.path, begun.checkpoints) for path in folder.iterdir()}
    assert {name.split(".")[1] for name in before - after} == {"step-000101", "summary"}
    assert ".mine" in after and not [name for name in after if name.endswith(".part")]


def test_folders_are_made_and_removed_again_if_nothing_comes_into_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a/b/run")
    with pytest.raises(KeyError), folder.locked():
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with folder.locked():
        folder.config.write_text("")
    assert [file.name for file in folder.path.iterdir()] == ["config.yaml"]


def test_a_folder_that_cannot_be_written_is_told_with_owner_and_permission(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"/proc/a/run cannot be written \(.+\): /proc belongs to root with permissions dr-x"
    ):
        RunFolder(Path("/proc/a/run")).check(config(Path("/proc/a/run")))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is a file, so there can be no folder"):
        RunFolder(tmp_path / "file/run").check(config(tmp_path / "file/run"))
    RunFolder(tmp_path / "a/run").check(config(tmp_path / "a/run"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
