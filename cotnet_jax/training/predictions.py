"""What a network says of every single image, collected over one pass and all processes."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.data.undecodable import Batch
from cotnet_jax.distributed.gather import gather_texts

# Entries of a batch: the file name stays on the host, the record's number goes to the devices.
FILE_NAME = "file_name"
RECORD = "record"
_TOP = 5


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The likeliest classes of all N images of a split, in the split's order.

    Attributes:
      file_names: [N], "" where the dataset has none.
      labels: int32 [N].
      classes: int32 [N, K], the likeliest first; K is 5, or the number of classes if that is less.
      probabilities: float32 [N, K], theirs.
    """

    file_names: tuple[str, ...]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [N], whether the likeliest class is the label."""
        return self.classes[:, 0] == self.labels

    def most_confident_errors(self, count: int) -> np.ndarray:
        """Return the records of at most ``count`` wrong images, the surest of a class first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.probabilities[wrong, 0], kind="stable")][:count]


def top_predictions(logits: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the likeliest classes of each image of a batch, on the devices.

    Args:
      logits: [B, classes]. Of equal ones the lower class comes first, as in ``evaluation_counts``.
      batch: "label", "mask" and RECORD, [B].

    Returns:
      {"record", "label", "mask": [B], "classes": int32 [B, K], "probabilities": float32 [B, K]}.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top, classes = jax.lax.top_k(logits, min(_TOP, logits.shape[-1]))
    return {
        "record": batch[RECORD],
        "label": batch["label"],
        "mask": batch["mask"],
        "classes": classes,
        "probabilities": jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)),
    }


class PredictionCollector:
    """Collect the predictions of one pass over a split.

    Args:
      batch_size: images per step, over all processes.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._rows: list[dict[str, dict[str, jax.Array]]] = []
        self._names: list[str] = []

    def number(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this process's batches with their records' numbers, and keep their file names."""
        for step, batch in enumerate(batches):
            self._names += batch[FILE_NAME].tolist()
            arrays = {name: array for name, array in batch.items() if name != FILE_NAME}
            yield {**arrays, RECORD: self._records(step, jax.process_index())}

    def add(self, rows: dict[str, dict[str, jax.Array]]) -> None:
        """Keep {kind: ``top_predictions``} of a global batch, which each process has whole."""
        # They are read when the pass is over, and are on the host by then.
        jax.tree.map(lambda array: array.copy_to_host_async(), rows)
        self._rows.append(rows)

    def collect(self) -> dict[str, Predictions]:
        """Return {kind: its predictions}; every process of a run calls this after the pass."""
        names: dict[int, str] = {}
        for process, texts in enumerate(gather_texts(self._names)):
            steps = range(len(self._rows))
            records = np.concatenate([self._records(step, process) for step in steps])
            names |= dict(zip(records.tolist(), texts, strict=True))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *self._rows)
        return {kind: _in_order(rows, names) for kind, rows in whole.items()}

    def _records(self, step: int, process: int) -> np.ndarray:
        """int32, the records that a process reads for a step, as ``pipeline.eval_batches`` says."""
        rows = self._batch_size // jax.process_count()
        first = step * self._batch_size + process * rows
        return np.arange(first, first + rows, dtype=np.int32)


def _in_order(rows: dict[str, np.ndarray], names: dict[int, str]) -> Predictions:
    kept = rows["mask"] > 0
    order = np.argsort(rows["record"][kept])
    rows = {name: array[kept][order] for name, array in rows.items()}
    return Predictions(
        file_names=tuple(names[record] for record in rows["record"].tolist()),
        labels=rows["label"],
        classes=rows["classes"],
        probabilities=rows["probabilities"],
    )
