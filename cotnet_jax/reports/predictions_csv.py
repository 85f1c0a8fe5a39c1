"""The predictions of every image as CSV, one row each, in the order of the split."""

import csv
import io

from cotnet_jax.reports.summary import Report


def to_csv(report: Report) -> str:
    """Return the table of a report's predictions.

    Columns: record (its number in the split), file_name, label and label_name, correct (1 or 0),
    then top1, top1_name and top1_probability to top5 and its own. Classes are indices of logits.
    """
    found, names = report.predictions, report.names
    tops = range(1, found.classes.shape[1] + 1)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["record", "file_name", "label", "label_name", "correct"]
        + [f"top{n}{end}" for n in tops for end in ("", "_name", "_probability")]
    )
    rows = zip(
        found.file_names,
        found.labels.tolist(),
        found.right.astype(int).tolist(),
        found.classes.tolist(),
        found.probabilities.tolist(),
        strict=True,
    )
    for record, (file_name, label, right, classes, probabilities) in enumerate(rows):
        row = [record, file_name, label, names[label], right]
        for each, probability in zip(classes, probabilities, strict=True):
            row += [each, names[each], f"{probability:.6f}"]
        writer.writerow(row)
    return file.getvalue()
