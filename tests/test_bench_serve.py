"""bench.serve: its figures, on a server of its own."""

import json

import pytest

from bench import serve


@pytest.mark.soak
def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is answered at each rate, and no hostile request is a fault of the server."""
    args = serve.Args(rows=6, k=2, max_new_tokens=200, repeats=1, shares=(1.0, 4.0), hostile=150)
    serve.main(args)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["batch_rows_per_s"] > 0 and figures["together_rows_per_s"] > 0
    for each, share in zip(figures["one_by_one"], (1.0, 4.0), strict=True):
        latency = each["latency_ms"]
        assert each["share"] == share and each["refused"] == 0
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert sum(figures["hostile_answers"].values()) == 150
    assert figures["run"]["versions"]["commit"]


def test_hostile_requests_are_those_of_the_seed() -> None:
    """And of many kinds."""
    drawn = serve.hostile_requests(200, 1)
    assert drawn == serve.hostile_requests(200, 1) != serve.hostile_requests(200, 2)
    assert len({path for path, _, _ in drawn}) == 6 and len({body for _, body, _ in drawn}) > 30
