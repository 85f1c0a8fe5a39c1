"""Say once that a run waits for its images, and what helps."""

import time

import ml_collections
from absl import logging

from cotnet_jax.data.parallelism import choose_parallelism, is_noise

# Share of the time, in successive lines of progress of so many seconds together, from which on the
# input is the limit. Lines of a few steps tell little: at the beginning workers still start.
_SHARE = 0.1
_LINES, _SECONDS = 2, 30


class InputLimit:
    """Watch the share of time that a run waits for data.

    Args:
      config: the whole configuration.
      rows: images of a batch in this process.
    """

    def __init__(self, config: ml_collections.ConfigDict, rows: int):
        self._config = config
        self._rows = rows
        self._shares: list[float] = []
        self._since = time.monotonic()
        self._said = False

    def after_line(self, data_wait_share: float) -> None:
        """Note the share between two lines of progress, 0 to 1; log a warning if it is time to."""
        now = time.monotonic()
        if data_wait_share < _SHARE:
            self._shares, self._since = [], now
            return
        self._shares.append(data_wait_share)
        if self._said or len(self._shares) < _LINES or now - self._since < _SECONDS:
            return
        self._said = True
        share = sum(self._shares) / len(self._shares)
        logging.warning(
            "Images are the limit of this run: %.0f %% of its time is spent waiting for them. "
            "What helps:\n  %s",
            100 * share,
            "\n  ".join(advice(self._config, self._rows)),
        )


def advice(config: ml_collections.ConfigDict, rows: int) -> list[str]:
    """Return what makes the input of a run faster, the best first, one line each.

    Args:
      config: the whole configuration.
      rows: images of a batch in this process.
    """
    data, augment = config.data, config.augment
    chosen = ml_collections.ConfigDict({**data, "num_workers": -1, "num_threads": 0})
    now, best = choose_parallelism(data, rows), choose_parallelism(chosen, rows)
    lines = []
    if now.workers < best.workers:
        lines.append(
            f"--config.data.num_workers=-1 --config.data.num_threads=0 ({best}, now {now})"
        )
    if is_noise(data):
        return [*lines, "more cores"]
    on_host = augment.randaugment and augment.randaugment_on == "host"
    # The host erases, and after RandAugment.
    if on_host and not augment.erasing_probability:
        lines.append("--config.augment.randaugment_on=device, in a new run")
    if not data.scaled_decoding:
        lines.append("--config.data.scaled_decoding=True, in a new run, for large photos")
    lines.append("images stored smaller, by cotnet-prepare ... --size=N, in a new run")
    lines.append("more cores")
    return lines
