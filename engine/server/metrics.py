"""What the server counts, in the form that Prometheus reads."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from engine.generate import Usage
from engine.verdict import RowFailure, Verdict

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # the histogram's bounds


class Metrics:
    """Counters of one server. usage: of its judge; pending: how many rows are not done."""

    def __init__(self, usage: Usage, pending: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "quorum_requests", "Requests that were answered", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "quorum_request_seconds", "Seconds from a request's arrival to the end of its answer",
            ["route"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._rows = Counter("quorum_rows", "Rows that got a verdict", registry=registry)
        self._failures = Counter(
            "quorum_failures", "Rows that could not be judged", registry=registry
        )
        self._partial = Counter(
            "quorum_partial_rows", "Verdicts of rows that ended early", registry=registry
        )
        self._samples = Counter("quorum_samples", "Judgements that were drawn", registry=registry)
        self._votes = Counter("quorum_votes", "Judgements that voted", registry=registry)
        self._invalid = Counter(
            "quorum_invalid_samples", "Judgements without valid scores", ["reason"],
            registry=registry,
        )  # fmt: skip
        Gauge("quorum_pending_rows", "Rows that are not done", registry=registry).set_function(
            pending
        )
        registry.register(_Tokens(usage))

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def count_outcome(self, outcome: Verdict | RowFailure) -> None:
        """A row is done."""
        if isinstance(outcome, RowFailure):
            self._failures.inc()
            return
        self._rows.inc()
        self._partial.inc(outcome.partial)
        self._votes.inc(outcome.votes)
        self._samples.inc(len(outcome.samples))
        for sample in outcome.samples:
            if sample.invalid is not None:
                self._invalid.labels(sample.invalid).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Tokens(Collector):
    """Tokens and seconds of the models, as the judge counts them itself."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def collect(self) -> Iterator[CounterMetricFamily]:
        tokens = CounterMetricFamily(
            "quorum_tokens", "Tokens that ran through a model", labels=["kind"]
        )
        seconds = CounterMetricFamily("quorum_model_seconds", "Seconds in a model", labels=["kind"])
        for kind in ("prefill", "decode", "idle", "meta"):
            tokens.add_metric([kind], getattr(self._usage, f"{kind}_tokens"))
        for kind in ("prefill", "decode", "meta"):
            seconds.add_metric([kind], getattr(self._usage, f"{kind}_seconds"))
        yield tokens
        yield seconds
