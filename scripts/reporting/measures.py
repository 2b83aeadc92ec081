"""What networks are judged by: the error of images, the perplexity of text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What the networks of a task are judged by, on the validation data: the lower the better.

    Attributes:
        name, plural: for sentences and names of columns.
        unit: as it follows a head of a table.
        points: what a difference of two is counted in.
        column: of results.csv; with ``_bin`` behind it that of the hard-quantized network.
        judged: which epoch's network a run is judged by: the "final" one, or the "best" one on the validation data, where other
            data are left to test that one on.
        test_column: that of the best network on the test data, filled at the end; None where validation is on the test data.
    """

    name: str
    plural: str
    unit: str
    points: str
    column: str
    judged: str = "final"
    test_column: str | None = None

    def of_score(self, score: float) -> float:
        """The measure where a run's score, see ``Task.score``, is given: an accuracy in percent, or a perplexity."""
        return 100.0 - score if self.column == "val_error1" else score


ERROR = Measure("error", "errors", " %", "points", "val_error1")
PERPLEXITY = Measure("perplexity", "perplexities", "", "of perplexity", "val_ppl", "best", "test_ppl")
MEASURES = (ERROR, PERPLEXITY)
