"""The life of a measurement, on one that counts: what is written, resumed, kept apart by precision, and refused."""

import json
import math
from dataclasses import dataclass

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.eval.measurement import Measurement, run_measurement
from infini_train.inference.loading import open_trained


@dataclass(frozen=True, kw_only=True)
class Square:
    number: int
    square: int


class Squares(Measurement[Square]):
    """Squares of the first numbers; stops itself before `last`."""

    file, record = "squares.jsonl", Square

    def __init__(self, trained, count, last=None):
        super().__init__(trained, "squares", "-small", {"base": 10})
        self.about = {"count": count}
        self.count, self.last, self.measured = count, last, []

    def plan(self, records):
        return [f"{len(records)} were there already"] if records else [], None

    def measure(self, records, on_progress):
        for number in range(len(records), self.count):
            if number == self.last:
                raise KeyboardInterrupt
            self.measured.append(number)
            on_progress(1)
            yield [Square(number=number, square=number**2)]

    def describe(self, batch, records):
        yield f"{batch[-1].number}, {len(records)} in all"

    def summarise(self, records):
        return {"sum": sum(record.square for record in records)}

    def format(self, results):
        return f"sum {results['sum']}"

    def write(self, records, results, folder, board):
        (folder / "sum.txt").write_text(str(results["sum"]))
        board.add_scalar(f"eval/{self.board_name}/sum", results["sum"], self.trained.step)


def test_results_are_strict_json(run):
    """Python writes NaN and Infinity, which other readers of JSON refuse."""

    class Odd(Squares):
        def summarise(self, records):
            return {"sum": math.nan, "more": [math.inf, 1.5]}

        def write(self, records, results, folder, board):
            pass

    results = run_measurement(Odd(open_trained(run), 1))
    assert math.isnan(results["sum"])
    written = json.loads((run / "eval" / "squares-1-small" / "results.json").read_text(), parse_constant=pytest.fail)
    assert (written["sum"], written["more"]) == ("NaN", ["Infinity", 1.5])


def test_a_stopped_measurement_goes_on(run):
    trained, said = open_trained(run), []
    with pytest.raises(KeyboardInterrupt):
        run_measurement(Squares(trained, 5, last=2), report=said.append)
    folder = run / "eval" / "squares-1-small"
    assert said == ["0, 1 in all", "1, 2 in all"] and [path.name for path in folder.iterdir()] == ["squares.jsonl"]
    measurement = Squares(trained, 5)
    results = run_measurement(measurement, report=said.append)
    assert measurement.measured == [2, 3, 4] and said[2:4] == ["2 were there already", "2, 3 in all"]
    assert results == json.loads((folder / "results.json").read_text())
    assert results["sum"] == 30 and results["count"] == 5 and results["base"] == 10 and results["precision"] == "fp32"
    assert (folder / "sum.txt").read_text() == "30"
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert [event.value for event in board.Scalars("eval/squares-small/sum")] == [30]


def test_another_folder_and_another_precision(run, tmp_path):
    trained = open_trained(run)
    assert run_measurement(Squares(trained, 3), out=tmp_path / "out", report=len)["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "tensorboard" / "eval").is_dir() and not (run / "eval").exists()
    rounded = Squares(trained._replace(precision="bf16"), 3)
    with pytest.raises(ConfigError, match=r"holds another test \(precision: fp32, not bf16\)"):
        run_measurement(rounded, out=tmp_path / "out", report=len)
    run_measurement(rounded, out=tmp_path / "out", overwrite=True, report=len)
    assert rounded.measured == [0, 1, 2]
