"""Many clients at once: every greedy answer is that of the same request alone, and memory is bounded."""

import asyncio

import pytest
from load import alone, growth, load
from serving import Running


# httpx2 (2.16) leaves a stream that its client has dropped to whichever thread collects it, and that thread complains
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("seconds", "clients"),
    [(3, 12), pytest.param(60, 32, marks=pytest.mark.slow), pytest.param(600, 32, marks=pytest.mark.slow)],
)
def test_answers_do_not_depend_on_what_else_is_answered(served: Running, seconds: float, clients: int) -> None:
    known = alone(served.url, 12)
    before = served.service.engine.figures()
    seen = asyncio.run(load(served.url, known, seconds, clients, seed=clients))
    assert not seen.wrong, seen.wrong[:3]
    assert seen.counts["greedy"] > clients and seen.counts["hangs up"] > 1
    served.wait_idle()
    after = served.service.engine.figures()
    assert after.ended.get("error", 0) == before.ended.get("error", 0)
    assert after.bytes_reserved == 0
    assert not served.service.under_way and not served.service.preparing
    assert not any(model.in_use for model in served.service.catalog)
    assert not [line for line in served.log if line["event"] == "failure"]
    if seconds >= 60:
        assert growth(seen.memory) < 64 << 20
