"""``evaluate`` on the command line: a run's base and adapter beside each other, what is kept, what is refused."""

import io
import json
import math
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte import cli
from halfbyte.cli import console
from halfbyte.evaluate.references import best_scores
from halfbyte.generate.stream import stream_reply
from halfbyte.runs.folder import RunFolder
from halfbyte.train import TrainConfig, fine_tune

WORDS = ("one", "two", "tea", "sun", "ice", "elm", "oak", "rye")
ROWS = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in WORDS]


def write(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """A run that was trained on the first five words of ``WORDS``."""
    folder = tmp_path_factory.mktemp("evaluated")
    write(folder / "rows.jsonl", ROWS[:5] * 8)
    config = TrainConfig(
        model=str(tiny_model_folder), data=[folder / "rows.jsonl"], output=folder / "run", max_steps=40, rank=8,
        learning_rate=1e-2, eval_samples=0, lora_dropout=0.0,
    )  # fmt: skip
    return fine_tune(config).output


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "asked.jsonl", [*ROWS[:-1], {"prompt": "say rye", "references": ["rye", "rye rye"]}])


def of(report, task, metric):
    return next(one for one in report["measured"] if (one["task"], one["metric"]) == (task, metric))


def test_answers_of_base_and_adapter_are_compared_with_references(run, trained, tiny_model_folder, rows, tmp_path):
    code, out, err = run(
        "evaluate", trained, "--references", rows, "--max-new-tokens", 12, "--json", tmp_path / "r.json"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["sides"] == ["base", "adapter"]
    kept = max(RunFolder(trained).evaluations.iterdir())
    assert json.loads((kept / "results.json").read_text()) == report and f"Kept in {kept}" in out.replace("\n", "")
    scores = {}
    for side, path in (("base", tiny_model_folder), ("adapter", trained)):
        model, tokenizer = halfbyte.load(path), halfbyte.load_tokenizer(trained)
        turns = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
        answers = ["".join(stream_reply(model, tokenizer, turn, max_new_tokens=12)) for turn in turns]
        lines = [json.loads(text) for text in (kept / f"asked.jsonl-{side}.jsonl").read_text().splitlines()]
        assert [line["generated"] for line in lines] == answers
        wanted = [[row["completion"]] for row in ROWS[:-1]] + [["rye", "rye rye"]]
        scores[side] = [best_scores(answer, texts) for answer, texts in zip(answers, wanted, strict=True)]
    for metric in ("rouge_l", "f1", "exact_match"):
        values = {side: np.array([score[metric] for score in found]) for side, found in scores.items()}
        found = of(report, "asked.jsonl", metric)
        assert found["count"] == 8 and found["higher_is_better"]
        for side, own in values.items():
            assert found["figures"][side]["value"] == pytest.approx(own.mean())
            assert found["figures"][side]["stderr"] == pytest.approx(own.std(ddof=1) / math.sqrt(8))
        apart = values["adapter"] - values["base"]
        assert found["difference"]["value"] == pytest.approx(apart.mean())
        assert found["difference"]["stderr"] == pytest.approx(apart.std(ddof=1) / math.sqrt(8))
    assert of(report, "asked.jsonl", "rouge_l")["difference"]["value"] > 0.1
    assert re.search(r"asked.jsonl +│ ROUGE-L ↑ +│ +8 │", out) and "difference" in out


def test_a_plain_model_has_one_column_and_keeps_nothing_unless_it_is_told(run, tiny_model_folder, rows, tmp_path):
    before = sorted(tiny_model_folder.iterdir())
    given = ["evaluate", tiny_model_folder, "--references", rows, "--max-new-tokens", 4, "--limit", 3]
    code, out, err = run(*given)
    assert code == 0, err
    assert "difference" not in out and "Kept" not in out and sorted(tiny_model_folder.iterdir()) == before
    code, out, _ = run(*given, "--output", tmp_path / "kept")
    assert code == 0 and sorted(file.name for file in (tmp_path / "kept").iterdir()) == [
        "asked.jsonl-model.jsonl", "results.json",
    ]  # fmt: skip
    assert of(json.loads((tmp_path / "kept" / "results.json").read_text()), "asked.jsonl", "f1")["count"] == 3


def test_perplexity_is_that_of_a_dense_model(run, trained, tiny_model_folder, tmp_path):
    texts = ["The cat sat on the mat.", "say one\none one", "北京是中国的首都。" * 12]
    file = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    given = ["evaluate", trained, "--data", file, "--max-length", 64, "--json", tmp_path / "r.json"]
    code, _, err = run(*given)
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    tokenizer = halfbyte.load_tokenizer(trained)
    for side, path in (("base", tiny_model_folder), ("adapter", trained)):
        model = halfbyte.load(path)
        nats = tokens = 0
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for place in range(1, len(ids)):
                # in windows of 64 predictions, of which the last one reaches back
                done = (place - 1) // 64 * 64
                end = min(done + 64, len(ids) - 1)
                start = max(0, end - 64) if done else 0
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start:place]])).logits[0, -1]
                nats -= logits.float().log_softmax(-1)[ids[place]].item()
                tokens += 1
        assert of(report, "texts.jsonl", "perplexity")["figures"][side]["value"] == pytest.approx(
            math.exp(nats / tokens), rel=0.02
        )
        bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
        assert of(report, "texts.jsonl", "bits_per_byte")["figures"][side]["value"] == pytest.approx(bits, rel=0.02)


def test_what_was_trained_on_is_found_and_left_out(run, trained, rows, tmp_path):
    given = ["evaluate", trained, "--references", rows, "--max-new-tokens", 6, "--contamination"]
    code, out, err = run(*given, "--json", tmp_path / "r.json")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    [overlap] = report["overlaps"]
    assert (overlap["task"], overlap["rows"], overlap["overlapping"]) == ("asked.jsonl", 8, 5)
    assert overlap["examples"][0]["words"] == "say one" and "rows.jsonl" in overlap["examples"][0]["trained"]
    assert {one["count"] for one in overlap["clean"]} == {3}
    kept = max(RunFolder(trained).evaluations.iterdir())
    lines = [json.loads(text) for text in (kept / "asked.jsonl-adapter.jsonl").read_text().splitlines()]
    clean = next(one for one in overlap["clean"] if one["metric"] == "f1")
    assert clean["figures"]["adapter"]["value"] == pytest.approx(np.mean([line["f1"] for line in lines[5:]]))
    assert "5 (62.5%)" in out and "On the rows that do not overlap" in out
    other = write(tmp_path / "other.jsonl", [{"any": ["thing", "Please say rye!"]}])
    code, out, err = run(*given, "--train-data", other)
    assert code == 0 and "1 (12.5%)" in out, err


def test_mmlu_is_asked_of_both(run, trained, tmp_path):
    rows = [
        {"input": f"Question {i}: A. p\nB. q\nAnswer:", "output": "ABCD"[i % 4], "subject": ["law", "art"][i % 2]}
        for i in range(10)
    ]
    file = write(tmp_path / "five_shot_mmlu_test.json", rows)
    code, out, err = run("evaluate", trained, "--mmlu", tmp_path, "--json", tmp_path / "r.json", "--batch-size", 3)
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    whole, law, art = (of(report, name, "accuracy") for name in ("mmlu", "mmlu: law", "mmlu: art"))
    for side in ("base", "adapter"):
        mean = (law["figures"][side]["value"] + art["figures"][side]["value"]) / 2
        assert whole["figures"][side]["value"] == pytest.approx(mean)
    assert whole["count"] == 10 and law["is_inner"] and "mmlu: law" not in out
    code, out, _ = run("evaluate", trained, "--mmlu", file, "--no-base", "--max-length", 12)
    assert code == 0 and "base" not in out and "10 questions of MMLU were longer than 12 tokens" in out


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (halfbyte[eval])")
def test_tasks_of_rows_stand_beside_the_others(run, trained, rows, tmp_path):
    questions = [{"question": f"say {w}", "choices": [f"{w} {w}", "no", f"{w}"], "answer": 0} for w in WORDS]
    task = write(tmp_path / "mine.jsonl", questions)
    given = ["evaluate", trained, "--tasks", task, "--references", rows, "--max-new-tokens", 2, "--log-samples"]
    code, _, err = run(*given, "--contamination", "--json", tmp_path / "r.json")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert {one["task"] for one in report["measured"]} == {"asked.jsonl", "mine"}
    found = of(report, "mine", "acc")
    assert found["count"] == 8 and found["difference"]["stderr"] is not None
    assert {overlap["task"]: overlap["overlapping"] for overlap in report["overlaps"]} == {"asked.jsonl": 5, "mine": 0}
    assert "lm_eval" in report["versions"]
    kept = max(RunFolder(trained).evaluations.iterdir())
    lines = [json.loads(text) for text in (kept / "mine-adapter.jsonl").read_text().splitlines()]
    assert [line["doc"]["question"] for line in lines] == [row["question"] for row in questions]
    assert np.mean([line["acc"] for line in lines]) == found["figures"]["adapter"]["value"]
    assert "loglikelihood" not in err and "100%" not in err


def test_what_is_wrong_is_one_sentence_and_leaves_nothing(run, trained, task_folder, rows, tmp_path, monkeypatch):
    emoji = write(tmp_path / "emoji.jsonl", [*ROWS, {"prompt": "smile", "completion": "👍"}])
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "say it"}])
    long = write(tmp_path / "long.jsonl", [{"prompt": "x" * 400, "completion": "y"}])
    empty = write(tmp_path / "empty.jsonl", [])
    before = sorted(trained.rglob("*"))
    cases = [
        ([], "was told to measure nothing"),
        (["--references", tmp_path / "askd.jsonl"], "askd.jsonl"),
        (["--references", emoji], "has the reference '👍', in which ROUGE-L"),
        (["--references", bare], "says no answer that should come"),
        (["--references", long], "attends to 256"),
        (["--references", empty], "holds no rows"),
        (["--data", pairs], "perplexity (--data) is of texts"),
        (["--data", rows, "--max-length", 1000], "is no text but"),
        (["--references", rows, "--max-length", 1000], "--max-length 1,000 is more than"),
        (["--mmlu", tmp_path / "no.json"], "There is no file"),
        (["--mmlu", rows], "is no question of MMLU"),
        (["--references", rows, "--shots", rows], "--shots belongs to --tasks"),
        (["--references", rows, "--system", "x", "--mmlu-shots", rows], "--mmlu-shots belongs to --mmlu"),
        (["--references", rows, "--train-data", rows], "--contamination"),
        (["--tasks", "arc_esay"], "did you mean 'arc_easy'?" if find_spec("lm_eval") else "pip install"),
    ]
    for words, told in cases:
        code, out, err = run("evaluate", trained, *words)
        assert (code, out) == (2, ""), (words, err)
        assert told in " ".join(err.split()), (told, err)
        assert err.startswith("Error: ") and sorted(trained.rglob("*")) == before, words
    code, out, err = run("evaluate", tmp_path / "nowhere", "--references", rows)
    assert code == 2 and "There is no folder" in err
    code, out, err = run("evaluate", task_folder("bert"), "--references", rows)
    assert code == 2 and "does not generate text" in err
    code, out, err = run("evaluate", task_folder("t5"), "--data", rows)
    assert code == 2
    code, out, err = run("evaluate", trained, "--references", rows, "--output", pairs)
    assert code == 2 and "is a file" in err


def test_rows_that_cannot_be_measured_may_be_left_out(run, trained, tmp_path):
    file = write(
        tmp_path / "rows.jsonl", [*ROWS, *ROWS, {"prompt": "say it"}, {"prompt": "x" * 400, "completion": "y"}]
    )
    given = ["evaluate", trained, "--references", file, "--max-new-tokens", 2, "--no-base", "--skip-bad-rows"]
    code, out, err = run(*given)
    assert code == 0 and "1 row left out" in out and " 16 │" in out, (out, err)


def test_lm_eval_that_is_not_installed_is_told_with_how_to_install_it(run, trained, monkeypatch):
    monkeypatch.setattr("halfbyte.evaluate.tasks.find_spec", lambda _: None)
    code, _, err = run("evaluate", trained, "--tasks", "arc_easy")
    assert code == 2 and "pip install 'halfbyte[eval]'" in err


def test_how_far_it_is_is_told_where_no_bar_can_be_drawn(run, trained, rows, monkeypatch):
    monkeypatch.setattr(console, "EVERY", 0.0)
    code, _, err = run("evaluate", trained, "--references", rows, "--max-new-tokens", 2)
    assert code == 0
    assert re.search(r"asked.jsonl, base: 8 of 8", err) and re.search(r"asked.jsonl, adapter: \d of 8, [\d.e+]+/s", err)


def test_an_encoder_with_a_decoder_answers_and_nothing_else(run, task_folder, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"source": "say plum", "target": "plum"}] * 2)
    code, out, err = run("evaluate", task_folder("t5"), "--references", file, "--max-new-tokens", 3)
    assert code == 0 and "ROUGE-L" in out, err


def test_another_run_in_the_folder_takes_the_figures_of_the_one_before_along(tiny_model_folder, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    given = {"model": str(tiny_model_folder), "data": [data], "output": tmp_path / "run", "max_steps": 1, "rank": 2}
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    (tmp_path / "run" / "evaluate" / "mine").write_text("")
    fine_tune(TrainConfig(**given))
    assert (tmp_path / "run" / "evaluate" / "mine").exists()  # no run was there
    fine_tune(TrainConfig(**given, overwrite=True))
    assert not (tmp_path / "run" / "evaluate").exists()
