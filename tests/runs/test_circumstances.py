"""What is known of a base model's files: another one is refused, one that was written again is told."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.runs.circumstances import Circumstances, changes, fingerprint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder of 2 MiB, of which samples see a part."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2**18), "b": torch.ones(2**18)}, tmp_path / "model.safetensors")
    return tmp_path


def here(base: Path) -> Circumstances:
    return Circumstances.here(str(base), 1)


def change(base: Path, at: int, name: str = "a") -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].index_fill(0, torch.tensor([at]), 7)
    save_file(tensors, file)


def test_the_same_files_are_the_same_base(base: Path) -> None:
    before = here(base)
    assert changes(before, here(base)).noted == changes(before, here(base)).refused == []


@pytest.mark.parametrize(("name", "at"), [("a", 0), ("b", 100), ("b", 2**18 - 1)])
def test_a_weight_within_the_samples_makes_another_base(name: str, at: int, base: Path) -> None:
    before = here(base)
    change(base, at, name)
    assert changes(before, here(base)).refused == ["the base model's files are others"]


def test_a_weight_between_the_samples_is_not_seen_but_that_the_file_was_written_again_is_told(base: Path) -> None:
    before = here(base)
    change(base, 2**17)
    found = changes(before, here(base))
    assert fingerprint(str(base)) == before.base_model and found.refused == []
    [sentence] = found.noted
    assert sentence.startswith("model.safetensors of the base model was written since, of which only samples are")
    assert changes(before.model_copy(update={"written": {}}), here(base)).noted == []  # a run of before times were kept


def test_tensors_in_another_order_make_another_base_wherever_the_header_says_so(tmp_path: Path) -> None:
    """A header longer than a sample, whose last names change places."""
    prints = []
    names = [f"layer.{i}.{'weight' * 12}" for i in range(900)]
    for order in (names, [*names[:500], names[501], names[500], *names[502:]]):
        entries = ",".join(f'"{n}":{{"dtype":"U8","shape":[1000],"data_offsets":[{1000*i},{1000*(i+1)}]}}'
                           for i, n in enumerate(order))  # fmt: skip
        header = f"{{{entries}}}".encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(900_000))
        assert len(load_file(file)) == 900 and len(header) > 2**16
        prints.append(fingerprint(str(tmp_path)))
    assert prints[0] != prints[1]


def test_a_gguf_file_is_a_base_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(2**20))
    before = here(file)
    os.utime(file, ns=(0, 0))
    assert changes(before, here(file)).noted and not changes(before, here(file)).refused
    file.write_bytes(bytes(2**20 + 1))
    assert changes(before, here(file)).refused
