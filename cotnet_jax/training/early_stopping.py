"""End a run whose evaluations have ceased to become better."""

from collections.abc import Mapping

import ml_collections


class EarlyStopping:
    """Follow one metric over the evaluations of a run; off where its name is "".

    It depends on what was measured after each step alone, so that a run that was interrupted ends
    after the same step as one that was not.

    Args:
      settings: config.early_stopping. Of a metric whose name ends in "loss" less is better.
    """

    def __init__(self, settings: ml_collections.ConfigDict):
        self.metric = settings.metric
        self._patience = settings.patience
        self._sign = -1 if self.metric.endswith("loss") else 1
        self._values: dict[int, float] = {}

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take note of an evaluation after ``step`` steps."""
        value = metrics.get(self.metric)
        if self.metric and value is not None:
            self._values[step] = value

    def reason(self) -> str:
        """Return why the run ends, as a clause; "" while it goes on."""
        best, since = -1, 0
        for step in sorted(self._values):
            if best < 0 or self._sign * self._values[step] > self._sign * self._values[best]:
                best, since = step, 0
            else:
                since += 1
        if since < self._patience:
            return ""
        return (
            f"{self.metric} has not become better in {since} evaluations, since it was "
            f"{self._values[best]:.4g} after step {best}"
        )
