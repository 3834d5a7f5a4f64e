"""The experiments on quantization: what they measure with, that they go on where they were, and what is committed."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = ("table_2", "figure_3", "normality", "memory")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The experiments as they import each other, and no longer than these tests."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        names = ("lab", "formats", "char_rnn", "masked", "matching", "bases", *NAMES)
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXPERIMENTS))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
                del sys.modules[name]


def run(name: str, *words: str, script: Path = EXPERIMENTS) -> None:
    command = [sys.executable, str(script / f"{name}.py"), *words]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def nearest(weight: torch.Tensor, table: list[float], blocksize: int = 64) -> torch.Tensor:
    """The nearest value of a table to each value over its block's largest, times that."""
    blocks = weight.reshape(-1, blocksize)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(table)
    return (values[((blocks / largest)[..., None] - values).abs().argmin(dim=-1)] * largest).view_as(weight)


TABLES = {
    "INT4": [i / 7 for i in range(-8, 8)],
    "E2M1": [s * x / 6 for s in (1, -1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    "E3M0": [s * x / 16 for s in (1, -1) for x in (0, 0.25, 0.5, 1, 2, 4, 8, 16)],
    "FP4": [s * x / 12 for s in (1, -1) for x in (0, 0.0625, 2, 3, 4, 6, 8, 12)],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_format_rounds_to_the_nearest_of_its_values(modules: dict[str, ModuleType], name: str) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    kind = getattr(modules["formats"], name)
    torch.testing.assert_close(kind.rounded(weight)[0], nearest(weight, TABLES[name]), rtol=1e-6, atol=1e-7)


def test_nf4_rounds_as_a_plain_search_does_to_the_last_bit(modules: dict[str, ModuleType]) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    from halfbyte.quant import codebook

    values, bits = modules["formats"].NF4.rounded(weight)
    assert torch.equal(values, nearest(weight, codebook("nf4").tolist())) and bits == 4.5


def test_nf4_has_the_least_error_on_normal_values(modules: dict[str, ModuleType]) -> None:
    formats = modules["formats"]
    weights = {"normal": torch.randn(256, 1024, generator=torch.Generator().manual_seed(3))}
    found = {kind.name: kind.errors(weights)["squared_error"] for kind in formats.FORMATS}
    others = [found[kind.name] for kind in (formats.INT4, formats.E2M1, formats.E3M0, formats.FP4)]
    assert found["int8"] < found["NF4"] < 0.8 * min(others) and found["unquantized"] == 0
    assert found["NF4"] < found["NF4 + DQ"] < 1.01 * found["NF4"]


def test_e3m0_comes_before_e2m1_where_tails_are_heavy_and_blocks_large(modules: dict[str, ModuleType]) -> None:
    table_2 = modules["table_2"]
    for freedom, size, first in ((0, 64, "FP4 E2M1"), (0, 4096, "FP4 E2M1"), (3, 4096, "FP4 E3M0")):
        found = table_2.errors_of(freedom, size, 2**18)["squared_error"]
        assert min(("FP4 E2M1", "FP4 E3M0"), key=lambda name: found[name]) == first


def test_the_character_network_is_torchs_lstm_under_an_average(modules: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    model = modules["char_rnn"].CharRNN({chr(i): i + 1 for i in range(20)}, width=6, state=5).eval()
    lstms = [nn.LSTM(6, 5, batch_first=True), nn.LSTM(5, 5, batch_first=True)]
    for i, lstm in enumerate(lstms):
        reads, recurs = model.reads[i], model.recurs[i]
        values = reads.weight, recurs.weight, reads.bias, torch.zeros(20)
        for name, value in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), values, strict=True):
            getattr(lstm, name).data.copy_(value)
    ids = torch.randint(21, (3, 40))
    embedded = model.embedding(ids)
    first = lstms[0](embedded)[0]
    together = torch.cat([embedded, first, lstms[1](first)[0]], dim=-1)
    scores = together @ model.attention.weight.T
    average = (scores.exp() / scores.exp().sum(dim=1, keepdim=True) * together).sum(dim=1)
    torch.testing.assert_close(model(ids), model.output(average))


def test_a_decoders_loss_is_that_of_transformers(modules: dict[str, ModuleType], tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    text = "Two birds sing."
    nats, tokens = modules["bases"].decoder_losses(model, tokenizer, [text, "Nobody."])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        assert nats[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-5)
    assert tokens == [15, 7]


def test_masked_tokens_are_seen_by_nobody(modules: dict[str, ModuleType]) -> None:
    """Their loss does not depend on what the encoder could have read there."""
    masked = modules["masked"]

    class Encoder(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            hidden = F.one_hot(input_ids, 12).float()
            return type("Output", (), {"last_hidden_state": hidden})

    class Tokenizer:
        mask_token_id = 3

        def __call__(self, text: str, return_tensors: str) -> Any:
            ids = torch.tensor([[1, *(4 + ord(c) % 8 for c in text), 2]])
            return type("Encoding", (), {"input_ids": ids})

    torch.manual_seed(0)
    head = masked.MaskedHead(torch.randn(12, 12)).eval()
    nats, tokens = masked.masked_losses(Encoder(), head, Tokenizer(), ["abcdefghijklmno"])
    told = head(F.one_hot(torch.tensor(3), 12).float()[None]).log_softmax(dim=-1)[0]  # of the mask alone
    ids = [4 + ord(c) % 8 for c in "abcdefghijklmno"]
    places = [*range(0, 15, 7), *range(3, 15, 7)]
    assert tokens == [len(places)] and nats[0] == pytest.approx(-sum(told[ids[i]].item() for i in places), rel=1e-5)


def test_the_right_half_is_chosen_by_cosines(modules: dict[str, ModuleType]) -> None:
    matching = modules["matching"]

    class Encoder(nn.Module):
        def forward(self, words: torch.Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": words[None]})

    torch.manual_seed(1)
    vectors = {word: torch.randn(8) for word in "abcdef"}

    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"words": torch.stack([vectors[word] for word in text.split()])}

    nats, tokens = matching.matching_losses(Encoder(), tokenizer, ["a b c", "d e f"])
    first = [vectors["a"], vectors["d"]]
    second = [(vectors["b"] + vectors["c"]) / 2, (vectors["e"] + vectors["f"]) / 2]
    scores = torch.tensor([[20 * F.cosine_similarity(x, y, dim=0) for y in second] for x in first])
    assert tokens == [1, 1] and nats == pytest.approx([-scores[i].log_softmax(0)[i].item() for i in (0, 1)], rel=1e-4)


def test_the_test_of_normality_rejects_what_is_not_normal(modules: dict[str, ModuleType]) -> None:
    generator = torch.Generator().manual_seed(4)
    normal = modules["normality"].tested({"a": torch.randn(200, 256, generator=generator)})
    even = modules["normality"].tested({"a": torch.rand(200, 256, generator=generator)})
    assert normal["rejected"] < 0.12 and even["rejected"] > 0.95
    assert normal["row_kurtosis"] == pytest.approx(0, abs=0.15) and even["row_kurtosis"] == pytest.approx(-1.2, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_goes_on_where_it_was_and_does_nothing_twice(name: str, tmp_path: Path) -> None:
    run(name, "--small", str(tmp_path))
    whole = (tmp_path / "raw.jsonl").read_text()
    table = (tmp_path / "table.md").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 1 and list(tmp_path.glob("*.png"))
    (tmp_path / "raw.jsonl").write_text("".join(lines[:-1]))  # ended before the last trial
    run(name, "--small", str(tmp_path))
    again = (tmp_path / "raw.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    timed = {"seconds", "processor_seconds", "parts"}
    old, new = ({k: v for k, v in json.loads(text).items() if k not in timed} for text in (lines[-1], again[-1]))
    assert old == new and (name == "memory" or (tmp_path / "table.md").read_text() == table)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_committed_table_is_what_the_raw_results_give(name: str, tmp_path: Path) -> None:
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    held = tmp_path / "experiments" / "results" / name
    for file in [*held.glob("*.md"), *held.glob("*.png")]:
        file.unlink()
    run(name, "--tables", script=tmp_path / "experiments")
    committed = EXPERIMENTS / "results" / name
    files = sorted(file.name for file in committed.iterdir())
    assert files == sorted(file.name for file in held.iterdir())
    for file in committed.glob("*.md"):
        assert (held / file.name).read_text() == file.read_text()
