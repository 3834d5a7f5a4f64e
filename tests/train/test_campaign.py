"""Thirty trials of the campaign (``tests/campaign.py``): runs ended at random moments go on to the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "campaign.py"


@pytest.mark.slow
def test_whatever_ends_a_run_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    # ten configurations, one of them of two processes: each is run once without an end, too
    words = [sys.executable, CAMPAIGN, "10030", "--first", "10000", "--configurations", "10"]
    words += ["--results", results, "--place", tmp_path / "place"]
    done = subprocess.run(words, capture_output=True, text=True)
    trials = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    failed = [trial for trial in trials if not trial.get("ok") and "skipped" not in trial]
    assert (done.returncode, failed) == (0, []), done.stderr[-2000:]
    assert len(trials) == 30 and len({trial["end"] for trial in trials}) > 5
