"""A run whose base does not fit into its memory is, to the last bit, that of one that has enough."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import hf, mapped
from halfbyte.errors import InputError
from halfbyte.hf.layers import activations
from halfbyte.hf.models import paging
from halfbyte.runs.events import Event, Note, StepMetrics
from halfbyte.train import TrainConfig, build, fine_tune

pytestmark = pytest.mark.skipif(not mapped.available(), reason="what is mapped is told on Linux alone")


@pytest.fixture(scope="module")
def options(mapped_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"{'really ' * (i % 4)}{i}?", "completion": f"{i * i} it is"} for i in range(17)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(mapped_folder), "data": [file], "batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 3,
        "eval_samples": 0, "eval_share": 0.2, "sample_prompts": [], "lora_dropout": 0.1, "rank": 4, "max_length": 64,
    }  # fmt: skip


def run(options: dict[str, Any], output: Path, **more: Any) -> tuple[list[float], list[str], dict[str, torch.Tensor]]:
    events: list[Event] = []
    fine_tune(TrainConfig(**options | {"output": output} | more), events.append)
    losses = [event.loss for event in events if isinstance(event, StepMetrics)]
    notes = [event.text for event in events if isinstance(event, Note)]
    return losses, notes, load_file(output / "adapter_model.safetensors")


class Little:
    """Plans that find just enough memory for two layers of the base, with all else recomputed.

    What is free in this process moves by more than this model is large, so it is what a run would find that is set.
    """

    def __init__(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        base = hf.load(model, device="cpu")
        self.least, self.whole = paging.least_bytes(base), paging.mapped_bytes(base)
        assert self.whole > 1.5 * self.least
        self.pages = False  # until then the same plan without pages, since how a step is packed depends on it
        self.found: list[activations.Policy] = []
        self._plan = activations.plan
        monkeypatch.setattr(activations, "plan", self)

    def __call__(self, *args: Any, **kwargs: Any) -> activations.Policy:
        kept = {"free": 2**40, "recompute": True, "base": activations.Base(self.least, self.least)}
        free = self._plan(*args, **kwargs | kept).bytes + 2 * 2**20
        self.found.append(self._plan(*args, **kwargs | {"free": free}))
        return self.found[-1] if self.pages else replace(self.found[-1], paged=None)


@pytest.mark.parametrize("packing", [False, True])
def test_losses_and_adapter_are_those_of_a_base_in_memory(
    options: dict[str, Any], packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = Little(options["model"], monkeypatch)
    losses, notes, adapter = run(options, tmp_path / "enough", packing=packing)
    assert not any("base" in note and "read" in note for note in notes)
    little.pages = True
    paged, told, same = run(options, tmp_path / "little", packing=packing)
    policy = little.found[-1]
    assert policy.paged is not None and little.least <= policy.paged < little.whole
    assert paged == losses and adapter.keys() == same.keys()
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)
    assert any("the base is read from its file as it is used" in note for note in told)
    assert any("of the base were read while it was used" in note for note in told)


LITTLE = """
import sys
from dataclasses import replace
from halfbyte.cli import main
from halfbyte.hf.layers import activations

plan, pages = activations.plan, sys.argv.pop() == "pages"

def little(*args, **kwargs):
    least = kwargs["base"].least
    kept = {"free": 2**40, "recompute": True, "base": activations.Base(least, least)}
    free = plan(*args, **kwargs | kept).bytes + 2**20
    policy = plan(*args, **kwargs | {"free": free})
    assert policy.paged is not None and policy.paged < kwargs["base"].all
    return policy if pages else replace(policy, paged=None)

activations.plan = little
main()
"""


@pytest.mark.slow
def test_two_processes_page_what_they_share_and_leave_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "little.py").write_text(LITTLE)
    adapters, losses = [], []
    for place in ("enough", "pages"):
        output = tmp_path / place
        flags = {"model": options["model"], "data": options["data"][0], "output": output, "rank": 4, "max-steps": 3}
        flags |= {"batch-size": 2, "gradient-accumulation-steps": 2, "lora-dropout": 0, "max-length": 64}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "little.py")]
        done = subprocess.run(
            [sys.executable, *torchrun, "train", *words, "--no-packing", "--sample-prompts", "[]", place],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([event["loss"] for event in told if event["kind"] == "step"])
        read = any("of the base were read while it was used" in event.get("text", "") for event in told)
        assert read == (place == "pages")
        adapters.append(load_file(output / "adapter_model.safetensors"))
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_a_run_that_diverges_says_where_as_one_with_its_base_in_memory_does(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = Little(options["model"], monkeypatch)
    sentences = []
    for little.pages in (False, True):
        with pytest.raises(InputError, match=r"diverged: .* of step \d+ is not finite, first in") as told:
            run(options, tmp_path / f"{little.pages}", learning_rate=1e20)
        sentences.append(str(told.value))
    assert sentences[0] == sentences[1]


def test_less_memory_than_two_layers_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "free_for", lambda *_: activations.WORKSPACE + 2**20)
    with pytest.raises(InputError, match=r"A step needs .* of memory even with every activation recomputed or on"):
        run(options, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_16_bit_base_beyond_memory_is_quantized_into_the_cache_and_mapped(
    options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = options | {"model": str(tiny_model_folder)}
    losses, _, adapter = run(there, tmp_path / "enough")
    monkeypatch.setattr(build, "free_for", lambda *_: 1000 if not opened else 2**34)
    opened: list[str] = []
    load = hf.load

    def noted(path: str, **kwargs: Any) -> Any:
        opened.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(hf, "load", noted)
    again, _, same = run(there, tmp_path / "little")
    [path] = opened
    assert path != str(tiny_model_folder) and (Path(path) / "converted.json").is_file()
    assert again == losses and all(torch.equal(adapter[name], same[name]) for name in adapter)
    config = json.loads((tmp_path / "little" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_folder)
