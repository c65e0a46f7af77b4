"""The capacity of a machine: pieces that are fitted, and what they come to."""

import json

import numpy as np
import pytest

from bench import capacity
from bench.capacity import HELD_OUT, POINTS, Load, fit, seconds_of_a_row, table
from bench.decode import config_of, random_model
from bench.shapes import SHAPES
from bench.timing import DEVICE

PIECES = np.array([3e-4, 2e-4, 4e-7, 1e-6])


def test_pieces_are_recovered() -> None:
    seconds = [float(load.amounts @ PIECES) for load in POINTS]
    np.testing.assert_allclose(fit(POINTS, seconds), PIECES, rtol=1e-9)
    without = PIECES * [1, 1, 0, 1]  # a machine to which keys cost nothing
    found = fit(POINTS, [float(load.amounts @ without) for load in POINTS])
    np.testing.assert_allclose(found, without, atol=1e-12)


def test_a_row_is_the_sum_of_its_pieces() -> None:
    k, prompt, tokens = 2, 10, 4
    each = [7.0, 11.0, 13.0, 17.0]
    drawn = sum(each[1] + each[2] * prompt + each[3] * tokens / 2 for _ in range(k * tokens))
    assert Load(k, prompt, tokens).amounts @ each == prompt * each[0] + drawn


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Machines are whole, and enough; the error of the point that was held out is told."""

    def taken(model: object, load: Load, live: int, rows: int) -> float:
        slow = 1.25 if load == HELD_OUT else 1.0
        return slow * float(load.amounts @ PIECES)

    monkeypatch.setattr(capacity, "seconds_of_a_row", taken)
    capacity.main(["--shape", "pocket", "--at", "1,1000,1", "--rate", "1", "10"])
    text, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    seconds = 0.3 + 2e-4 + 4e-4 + 5e-7
    assert f"| 1 | 1,000 | 1 | {1 / seconds:.3g} | 3 | 1 | 4 |" in text.splitlines()
    assert "predicted 20% too fast" in text
    assert json.loads(line)["held_out_error"] == pytest.approx(-0.2)
    assert "| 1 | 10 | 2 |" in table(np.array([0.1, 0, 0, 0]), [Load(1, 10, 2)], [5])


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "0,1,1"])
def test_what_is_no_load(text: str) -> None:
    with pytest.raises(SystemExit):
        capacity.main(["--at", text])


def test_a_real_row_takes_time() -> None:
    shape = SHAPES["pocket"]
    model = random_model(config_of(shape, 64), shape.dtype, DEVICE)
    assert seconds_of_a_row(model, Load(2, 8, 4), live=4, rows=3) > 0
