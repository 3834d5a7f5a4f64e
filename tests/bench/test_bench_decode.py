"""The decoding benchmark at tiny sizes: that the sides do the same work, what is counted, and what is reported."""

import io
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from matplotlib.image import imread
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from halfbyte.bench import agreement, decode, decode_sides, gguf_file, llama_cpp, shapes
from halfbyte.bench.decode_report import DecodeReport, DecodeRow, SideTimes
from halfbyte.bench.decode_sides import Halfbyte, Transformers, made_up
from halfbyte.bench.decode_works import Sizes, Work, floor, step_bytes, work_flop
from halfbyte.bench.report import Circumstances
from halfbyte.cli import app
from halfbyte.errors import InputError
from halfbyte.generate.decoders import decoder_for
from halfbyte.hf import load
from halfbyte.kernels import can_decode, product_dtype
from halfbyte.kernels.decode import PHASES

native = pytest.mark.skipif(not can_decode(), reason="no native products")
# hidden, inner, layers, heads, key/value heads, head size, vocabulary
TINY = (128, 192, 2, 4, 2, 32, 300)
VALUES = 2 * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 192 * 128)

CIRCUMSTANCES = Circumstances(
    machine="m", cores=1, memory_gib=1, load=0, tier="t", arithmetic="a", threads=1, versions={}, date="2026-01-01",
    commit=None, changed=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """Leave the libraries' logging as it was: a side silences it."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny-model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        shapes.write_model("tiny", folder)
    return folder


@native
def test_what_a_side_holds_is_what_the_formats_take(model: Path) -> None:
    ours, _ = Halfbyte(adapters=2).open(str(model))
    blocks = VALUES // 64
    groups = sum(math.ceil(n // 64 / 256) for n in [128 * 128, 64 * 128, 64 * 128, 128 * 128, *[192 * 128] * 3])
    assert ours.layer_values == VALUES
    assert ours.layer_bytes == VALUES // 2 + blocks + 2 * groups * 4  # codes, 8-bit constants, fp32 ones of each 256
    assert ours.head_bytes == 2 * 300 * 128
    assert ours.token_bytes == 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, values of two bytes
    assert ours.attention == 2 * 4 * 32
    widths = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
    assert ours.adapter_bytes == 2 * sum(2 * decode_sides.RANK * (n + k) for n, k in widths)
    in_eight, _ = Halfbyte("int8", "int8").open(str(model))
    assert in_eight.head_bytes < 0.6 * ours.head_bytes
    assert in_eight.token_bytes == 2 * 2 * 2 * (32 + 4)
    theirs, _ = Transformers(four_bit=False).open(str(model))
    width = product_dtype(torch.bfloat16, "cpu").itemsize  # 2, or 4 where torch has no products in bf16
    held = {"head_bytes": ours.head_bytes * width // 2, "token_bytes": ours.token_bytes * width // 2}
    assert theirs == ours._replace(layer_bytes=width * VALUES, adapter_bytes=0, **held)


def test_the_floor_is_bytes_over_bandwidth_or_flop_over_the_peak() -> None:
    sizes = Sizes(1000, 500, 20, 4, 2000, 300, 8)
    one, many = Work("decode", 1, 10, 3), Work("decode", 50, 10, 3, 2)
    # the tokens that are timed come after one that is not: they stand at 11, 12 and 13 and attend to 12, 13 and 14
    assert step_bytes(one, sizes) == 1500 + 4 * 13
    assert step_bytes(many, sizes) == 1500 + 2 * 20 + 50 * 4 * 13
    assert work_flop(one, sizes) == 3 * 2 * 2300 + 4 * 8 * (12 + 13 + 14)
    assert floor(one, sizes, 100.0, 1e9) == 3 * 1552 / 100
    assert floor(many, sizes, 1e9, 1000.0) == work_flop(many, sizes) / 1000
    again, turn = Work("again", 1, 10, 3), Work("turn", 1, 10, 3)
    assert again.counted == 13 and turn.counted == 3
    assert work_flop(again, sizes) == 2 * 13 * 2000 + 2 * 300 + 4 * 8 * sum(range(1, 14))
    assert work_flop(turn, sizes) == 2 * 3 * 2000 + 2 * 300 + 4 * 8 * (11 + 12 + 13)


@native
def test_the_sides_decode_behind_the_same_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = Halfbyte().open(str(model))
    _, theirs = Transformers(four_bit=False).open(str(model))
    for name, module in ours._decoder.model.named_modules():  # the very same weights: what the 4-bit ones stand for
        if hasattr(module, "frozen_weight"):
            weight = theirs._model.get_submodule(name).weight
            weight.data = module.frozen_weight.dequantize(torch.bfloat16).to(weight.dtype)
    own: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    step, dense = ours._decoder.step, theirs._model
    monkeypatch.setattr(ours._decoder, "step", lambda *given: own.append(step(*given)) or own[-1])

    class Watched:
        config = dense.config

        def __call__(self, *given: Any, **options: Any) -> Any:
            output = dense(*given, **options)
            other.append(output.logits[:, -1].float())
            return output

    theirs._model = Watched()
    work = Work("decode", 3, 40, 2)
    for _ in range(2):  # the second time from what is held
        assert ours.run(work).seconds > 0 and theirs.run(work).seconds > 0
    assert len(own) == 2 * (1 + 2) and len(other) == len(own) + 1
    for place in (0, 3):  # each run's first step, behind 40 tokens and the same 41st
        assert float((own[place] - other[place + 1]).abs().max() / own[place].std()) < 0.05
    assert torch.equal(own[0], own[3]) and torch.allclose(other[1], other[4])


def test_a_gguf_file_opens_to_the_model_that_was_written(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    gguf_file.write(str(model), {file: ("BF16", "BF16")})
    reader = gguf.GGUFReader(file)
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(held) == len(state) - 1  # the head is the embedding
    q = held["blk.1.attn_q.weight"].view(torch.bfloat16)
    rows = state["model.layers.1.self_attn.q_proj.weight"]
    # of a head of 32, transformers turns value i with i + 16; in the file they are neighbours
    assert torch.equal(q[32], rows[32]) and torch.equal(q[33], rows[48]) and torch.equal(q[34], rows[33])
    down = held["blk.0.ffn_down.weight"].view(torch.bfloat16)
    assert torch.equal(down, state["model.layers.0.mlp.down_proj.weight"])


def test_a_model_that_is_not_written_for_llama_cpp_is_refused(tmp_path: Path) -> None:
    transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"only models of Llama's architecture"):
        gguf_file.check(str(tmp_path))


def test_without_node_llama_cpp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"there is no node or npm here: install Node"):
        llama_cpp.module()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("npm") and shutil.which("node")), reason="no node")
def test_llama_cpp_goes_on_as_transformers_does(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    gguf_file.write(str(model), {file: ("BF16", "BF16")})
    side = llama_cpp.LlamaCpp(file, Sizes(1, 1, 0, 1, 1, 1, 1), threads=1)
    try:
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = made_up(20, 3, 250)
        expected = dense.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 20:].tolist()
        assert side.greedy(ids, 6) == expected
        for work in (
            Work("decode", 3, 8, 2),
            Work("prompt", 1, 0, 16),
            Work("turn", 1, 12, 4),
            Work("again", 1, 12, 4),
        ):
            assert side.ask(work).seconds > 0
            assert side.ask(work).seconds > 0
    finally:
        side.end()


@native
@pytest.mark.parametrize("peers", ["none", pytest.param("bf16,bitsandbytes,llama.cpp", marks=pytest.mark.slow)])
def test_a_whole_run_is_reported(model: Path, tmp_path: Path, peers: str) -> None:
    runner = CliRunner()
    options = [
        "--rows",
        "1,3",
        "--peers",
        peers,
        "--adapters",
        "2",
        "--prompt",
        "20",
        "--history",
        "70",
        "--tokens",
        "3",
    ]
    files = [
        "--json",
        str(tmp_path / "d.json"),
        "--picture",
        str(tmp_path / "d.png"),
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    result = runner.invoke(app, ["bench", "decode", str(model), *options, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "d.json").read_text())
    names = [row["name"] for row in found["rows"]]
    dense = "bf16" if product_dtype(torch.bfloat16, "cpu") == torch.bfloat16 else "fp32"
    others = [name.replace("bf16", dense) for name in decode.PEERS[:2] if name in peers] + (
        list(llama_cpp.FORMS) if "llama" in peers else []
    )
    assert names == [
        "decode, 1 row", "decode, 3 rows", "prompt of 20", "first token, 32 tokens after 70, read again",
        "first token, 32 tokens after 70, held", "decode, 2 rows, one adapter", "decode, 2 rows, 2 adapters",
    ]  # fmt: skip
    for row in found["rows"]:
        adapted = row["adapters"] > 0
        assert list(row["sides"]) == (["halfbyte", *(others if not adapted else [])])
        for side in row["sides"].values():
            assert len(side["seconds"]) == 2 and min(side["seconds"]) > 0 and side["floor_seconds"] > 0
        if row["kind"] == "decode":
            assert list(row["phases"]) == list(PHASES)
    assert set(found["gains"]) == {names[1], *names[4:]}
    base, turn = found["rows"][3]["sides"]["halfbyte"], found["rows"][4]["sides"]["halfbyte"]
    lower, median, upper = found["gains"][names[4]]["halfbyte"]
    assert lower <= median <= upper
    assert min(base["seconds"]) / max(turn["seconds"]) <= median <= max(base["seconds"]) / min(turn["seconds"])
    assert imread(tmp_path / "d.png").ndim == 3
    assert "waiting" in result.stdout and "halfbyte" in result.stdout


@native
def test_the_phases_of_a_step_are_told_while_they_are_asked_for(model: Path) -> None:
    _, side = Halfbyte().open(str(model))
    work = Work("decode", 2, 8, 3)
    before = time.process_time()
    taken = side.phases(work).seconds
    passed = time.process_time() - before
    assert list(taken) == list(PHASES) and all(seconds > 0 for seconds, _ in taken.values())
    assert sum(work + wait for work, wait in taken.values()) <= passed
    side.run(work)
    assert side._decoder.paged.decoder.phase_times() == taken


@native
def test_agreement_is_of_the_tokens_that_the_model_as_loaded_puts_first(model: Path) -> None:
    loaded = load(model, device="cpu").eval()
    decoder = decoder_for(loaded)
    prompts = [made_up(length, length, 300) for length in (5, 70)]
    answers = agreement.greedy(decoder, prompts, 6)  # type: ignore[arg-type]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()
    assert agreement.agreement(decoder, prompts, answers) == 1.0  # type: ignore[arg-type]
    wrong = [[(answers[0][0] + 7 * place) % 300 for place in range(1, 7)], answers[1]]
    with torch.no_grad():
        after = loaded(input_ids=torch.tensor([prompts[0] + wrong[0]])).logits[0, len(prompts[0]) - 1 : -1].argmax(-1)
    same = sum(a == b for a, b in zip(after.tolist(), wrong[0], strict=True))
    assert agreement.agreement(decoder, prompts, wrong) == (same + 6) / 12 < 1  # type: ignore[arg-type]


@native
def test_perplexity_is_that_of_the_model_s_own_forward(model: Path) -> None:
    loaded = load(model, device="cpu").eval()
    texts = [made_up(length, length, 300) for length in (9, 40, 17)]
    total = 0.0
    for text in texts:
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([text])).logits[0, :-1].float()
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).sum())
    expected = math.exp(total / sum(len(text) - 1 for text in texts))
    decoder = decoder_for(loaded)
    assert agreement.perplexity(decoder, texts) == pytest.approx(expected, rel=2e-3)  # type: ignore[arg-type]


@native
def test_every_head_and_cache_is_told(model: Path) -> None:
    report = agreement.bench_agreement(str(model), answer=3, threads=1)
    assert [(kind.head, kind.cache) for kind in report.kinds] == [
        (h, c) for h in agreement.HEADS for c in agreement.CACHES
    ]
    assert report.kinds[0].agreement == 1.0
    assert all(kind.perplexity > 1 for kind in report.kinds)
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    assert "perplexity" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "bitsandbyte"], "There is no peer 'bitsandbyte'"),
        (["--rows", "1,x"], "--rows is '1,x'"),
        (["--rows", "0"], "--rows is '0'"),
        (["--rows", "65", "--peers", "none"], "up to 64 rows"),
    ],
)
def test_bad_input_gets_a_sentence(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "135m", *options])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_a_ratio_is_taken_within_its_round() -> None:
    def row(kind: str, texts: int, adapters: int, seconds: list[float], tokens: int) -> DecodeRow:
        sides = {"halfbyte": SideTimes(seconds=seconds, floor_seconds=0.5), "peer": SideTimes(seconds=[4.0, 9.0])}
        name = f"{kind} {texts} {adapters}"
        return DecodeRow(
            name=name, kind=kind, texts=texts, adapters=adapters, tokens=tokens, read_bandwidth=[1.0], peak_flops=[1.0],
            sides=sides,
        )  # fmt: skip

    rows = [
        row("decode", 1, 0, [1.0, 2.0], 10), row("decode", 8, 0, [2.0, 4.0], 80), row("decode", 8, 1, [2.0, 5.0], 80),
        row("decode", 8, 8, [4.0, 10.0], 80), row("again", 1, 0, [8.0, 8.0], 100), row("turn", 1, 0, [1.0, 2.0], 32),
    ]  # fmt: skip
    report = DecodeReport(circumstances=CIRCUMSTANCES, model="m", head="h", cache="c", rows=rows)
    assert rows[0].ratios["peer"].median == pytest.approx((4 / 1 + 9 / 2) / 2)
    assert rows[0].of_floor["halfbyte"] == 0.5
    gains = {name: sides["halfbyte"].median for name, sides in report.gains.items()}
    assert gains == {
        "decode 8 0": 4.0, "decode 8 1": pytest.approx((4 + 80 / 5 * 2 / 10) / 2), "decode 8 8": 0.5, "turn 1 0": 6.0,
    }  # fmt: skip
