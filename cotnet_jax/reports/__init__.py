"""Evaluations as reports, and runs as curves: JSON, CSV, one HTML page, PNGs::

    config = reports.evaluation_config(workdir="runs/digits")
    metrics, folder = reports.evaluate(config, "runs/digits")       # folder / "report.html"
    reports.curves.write(["runs/digits", "runs/other"], "compared.png")

matplotlib is imported when something is drawn, not before.
"""

from etils import epy

# JAX takes seconds to import.
with epy.lazy_api_imports(globals()):
    from cotnet_jax.reports import curves
    from cotnet_jax.reports.evaluation import (
        checkpoints_of,
        evaluate,
        evaluate_each,
        format_table,
    )
    from cotnet_jax.reports.writing import PAGE
    from cotnet_jax.training.evaluation_config import evaluation_config

__all__ = [
    "PAGE",
    "checkpoints_of",
    "curves",
    "evaluate",
    "evaluate_each",
    "evaluation_config",
    "format_table",
]
