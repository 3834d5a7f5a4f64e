"""Every command refuses a base that an adapter was not trained on, and takes the same one in another form."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Running, running, save_adapter, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte import cli
from halfbyte.deploy.adapters import combine, convert, diff, info, truncate
from halfbyte.deploy.merge import merge
from halfbyte.errors import InputError
from halfbyte.hf import HalfbyteConfig, quantize_checkpoint
from halfbyte.hf.models.base_files import Source, fingerprint
from halfbyte.hf.models.fingerprint import FILE, Fingerprint
from halfbyte.hf.models.hub import locate
from test_errors import check

Run = Callable[..., tuple[int, str, str]]
LOAD = "/v1/load_lora_adapter"


def trained_on(folder: Path, base: Path) -> Path:
    """The adapter in ``folder`` as a run over ``base`` leaves it."""
    found = fingerprint(Source(locate(base)), [HalfbyteConfig()])
    assert found
    found.called(str(base)).save(folder)
    return folder


def over(folder: Path, base: Path, name: str) -> Path:
    """A copy of an adapter that names another base."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    about = json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (copy / "adapter_config.json").write_text(json.dumps(about))
    return copy


@pytest.fixture(scope="module")
def stranger(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like ``base``, of another seed."""
    return save_model(tmp_path_factory.mktemp("strangers") / "stranger", AutoTokenizer.from_pretrained(base), 7)


@pytest.fixture(scope="module")
def own(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ``base``."""
    folder = tmp_path_factory.mktemp("fingerprints") / "own"
    return trained_on(save_adapter(base, folder, 1, task_type="CAUSAL_LM"), base)


@pytest.fixture(scope="module")
def four(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` in 4 bits, moved since."""
    folder = tmp_path_factory.mktemp("four")
    quantize_checkpoint(base, folder / "first")
    (folder / "four").mkdir()
    for file in (folder / "first").iterdir():
        shutil.copyfile(file, folder / "four" / file.name)
    return folder / "four"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    return run


def test_commands_refuse_another_base_in_one_sentence(
    run: Run, own: Path, base: Path, stranger: Path, tmp_path: Path
) -> None:
    wrong = over(own, stranger, "wrong")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 4)
    for command in (
        ("chat", wrong),
        ("chat", stranger, "--adapter", f"own={own}"),
        ("generate", wrong, "--prompt", "a"),
        ("serve", wrong, "--port", 0),
        ("serve", base, "--port", 0, "--adapter", f"own={own}", "--adapter", f"b={wrong_base(own, stranger)}"),
        ("merge", wrong, tmp_path / "merged"),
        ("merge", wrong, tmp_path / "merged", "--onto", "original"),
        ("merge", own, tmp_path / "merged", "--base", stranger),
        ("merge", own, tmp_path / "merged", "--base", stranger, "--onto", "original"),
        ("merge", own, tmp_path / "merged", "--base", stranger, "--to", "nf4", "--rounding", "random"),
        ("merge", own, tmp_path / "merged", "--base", stranger, "--to", "nf4", "--rounding", "original"),
        ("export", own, tmp_path / "merged", "--format", "gguf", "--base", stranger),
        ("audit", wrong, "--data", tmp_path / "rows.jsonl"),
    ):
        code, _, error = run(*command)
        assert code == 2 and "another base model" in error and "holds other values" in error, (command, error)
        assert " ".join(error.split()).count("; use it with that one, or remove its") == 1 and "Traceback" not in error
        assert not (tmp_path / "merged").exists()


def wrong_base(own: Path, stranger: Path) -> Path:
    """An adapter that names nothing wrong, but was trained on another base."""
    copy = own.with_name("of a stranger")
    if not copy.exists():
        shutil.copytree(own, copy)
        trained_on(copy, stranger)
    return copy


def test_a_server_loads_adapters_of_its_base_alone(own: Path, stranger: Path, base: Path, four: Path) -> None:
    wrong_base(own, stranger)
    for model in (base, four):
        with running(model, name="tiny", adapter_folder=[str(own.parent)]) as server:
            error = check(server.post(LOAD, {"lora_name": "odd", "lora_path": "of a stranger"}), 400)
            assert error["code"] == "adapter_not_loaded" and "/" not in error["message"]
            assert error["message"].startswith(
                "The adapter odd was trained on another base model (stranger) than tiny: of"
            )
            assert server.post(LOAD, {"lora_name": "own", "lora_path": "own"}).status_code == 200
            with server.http() as http:
                assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny", "own"]


def test_adapters_given_at_the_start_are_of_the_base(own: Path, base: Path, four: Path) -> None:
    for model in (base, four, over(own, four, "over four")):
        with running(model, adapter=[f"more={own}"]) as server:
            assert isinstance(server, Running)


def test_merging_takes_the_original_of_a_base_in_4_bits_whoever_quantized_it(
    own: Path, base: Path, stranger: Path, four: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "theirs"
    )
    merge(own, tmp_path / "wanted", onto="original")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "wanted").state_dict()
    for name, folder in (("ours", four), ("theirs", tmp_path / "theirs")):
        trained = trained_on(over(own, folder, f"over {name}"), folder)
        assert ("dense" in json.loads((trained / FILE).read_text())["digests"]) == (name == "ours")
        merge(trained, tmp_path / f"merged {name}", onto="original", base=base)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged {name}").state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in merged.items())
        assert not (tmp_path / f"merged {name}" / FILE).exists()
        with pytest.raises(InputError, match="another base model"):
            merge(trained, tmp_path / "no", onto="original", base=stranger)
        assert not (tmp_path / "no").exists()
        merge(trained, tmp_path / f"onto {name}")
        merge(trained, tmp_path / f"in nf4 onto {name}", to="nf4", rounding="random")
        for made in (f"onto {name}", f"in nf4 onto {name}"):  # the merged model is another one
            assert not (tmp_path / made / FILE).exists()


def test_adapters_made_of_adapters_keep_their_base(
    own: Path, base: Path, four: Path, stranger: Path, run: Run, tmp_path: Path
) -> None:
    text = (own / FILE).read_text()
    second = trained_on(over(own, four, "second"), four)
    truncate(own, tmp_path / "low", rank=2)
    combine({str(own): 0.5, str(second): 0.5}, tmp_path / "sum")  # one base in two forms
    dora = trained_on(save_adapter(base, tmp_path / "dora", 3, use_dora=True, task_type="CAUSAL_LM"), base)
    convert(dora, tmp_path / "plain", rank=4)
    for made in ("low", "sum", "plain"):
        assert (tmp_path / made / FILE).read_text() == text
    other = wrong_base(own, stranger)
    with pytest.raises(InputError, match=r"trained on another base model than .*own: of \d+ tensors .*; only adapters"):
        combine({str(own): 1.0, str(other): 1.0}, tmp_path / "no")
    with pytest.raises(InputError, match="another base model"):
        convert(trained_on(over(dora, base, "dora of another"), stranger), tmp_path / "no", rank=4)
    assert not (tmp_path / "no").exists()
    _, settings = diff(own, other)
    first, found = settings["base model"]
    assert "dense" in first and first != found and "holds other values" in found
    assert "base model" not in diff(own, second)[1]
    known = Fingerprint.of_adapter(own)
    assert info(own).base == known and known
    _, out, _ = run("adapter", "info", own)
    assert f"dense {known.digests['dense']}" in out
    assert json.loads(run("adapter", "info", own, "--json")[1])["base"]["dense"] == known.digests["dense"]
