"""``/metrics`` in Prometheus' form, by its own library: requests, and the engine's figures at the moment of asking."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from halfbyte.deploy.serve.log import Record
from halfbyte.generate.figures import BOUNDS, Figures
from halfbyte.memory import resident_memory

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OTHER = "other"
"""The path and the model of requests that name none that there is: labels are few."""


class Metrics:
    """Counts.

    Args:
        paths: known ones.
        figures: of the engine, if there is one.
    """

    def __init__(self, paths: frozenset[str], figures: Callable[[], Figures] | None) -> None:
        self._paths = paths
        self._registry = CollectorRegistry()
        labels = ["path", "model", "status"]
        self._requests = Counter("halfbyte_requests", "Requests that have ended.", labels, registry=self._registry)
        self._seconds = Histogram(
            "halfbyte_request_seconds", "From a request's head to its end.", ["path"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "halfbyte_first_token_seconds", "From a request's head to its first token.", ["model"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        if figures is not None:
            self._registry.register(_OfEngine(figures))

    def count(self, record: Record) -> None:
        """Count a request that has ended."""
        path = record.path if record.path in self._paths else OTHER
        self._requests.labels(path, record.model or "", str(record.status)).inc()
        self._seconds.labels(path).observe(time.perf_counter() - record.began)
        if record.first_token is not None:
            self._first.labels(record.model or "").observe(record.first_token - record.began)

    def page(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """The engine's figures as metrics."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def describe(self) -> list[Metric]:
        """Return nothing: names are known when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        now = self._figures()
        ended = CounterMetricFamily("halfbyte_answers", "Answers by the reason of their end.", labels=["finish"])
        for finish in ("stop", "length", "cancelled", "error"):
            ended.add_metric([finish], now.ended.get(finish, 0))
        yield ended
        for name, text, value in (
            ("halfbyte_refused", "Answers that found the queue full.", now.refused),
            ("halfbyte_prompt_tokens", "Tokens of prompts that were read.", now.tokens_read),
            ("halfbyte_cached_tokens", "Tokens of prompts that had been read before.", now.tokens_cached),
            ("halfbyte_written_tokens", "Tokens of answers.", now.tokens_written),
            ("halfbyte_read_seconds", "Time that reading prompts took.", now.read_seconds),
        ):
            yield CounterMetricFamily(name, text, value=value)
        for name, text, value in (
            ("halfbyte_waiting", "Answers that wait for memory or a row.", now.waiting),
            ("halfbyte_rows", "Answers under way.", now.rows),
            ("halfbyte_cache_bytes", "Keys and values that are held.", now.bytes_held),
            ("halfbyte_cache_reserved_bytes", "Keys and values that answers under way may take.", now.bytes_reserved),
            ("halfbyte_resident_bytes", "Memory of the process.", resident_memory()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        total, buckets = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), now.step_counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        steps = HistogramMetricFamily("halfbyte_step_seconds", "One token for every answer under way.")
        steps.add_metric([], buckets, now.step_seconds)
        yield steps
