"""The benchmark of whole models: what it prints and writes, and a memory that is too small."""

import csv
import dataclasses

import jax
import pytest

from cotnet_jax.tools import benchmark_model

ROW = benchmark_model.Row(
    *("train", "cotnet50", 640, 224, "bfloat16", "1 x GPU", "0.11.2", 100.0, 6400.0, 24.0),
    *(1.0, 2.0, 3.0, 4.0, 5, {"ours": 60.0, "elementwise": 40.0}),
)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_model, "SECONDS", 0.01)


def run(*arguments):
    benchmark_model.main([*arguments, "--models=cotnet_tiny", "--size=32"])


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("pass_", "batches"), [("infer", "31"), pytest.param("train", "2", marks=pytest.mark.slow)]
)
def test_a_model_is_measured(pass_, batches, quick, capsys, tmp_path):
    file = tmp_path / "model.csv"
    run(pass_, f"--batch_sizes={','.join(batches)}", f"--csv={file}")
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("cotnet_tiny") for line in printed) == len(batches)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["pass"], row["batch"]) for row in rows] == [(pass_, batch) for batch in batches]
    assert all(float(row["ms"]) > 0 and float(row["images_per_s"]) > 0 for row in rows)


def test_half_of_the_batch_is_tried_where_memory_does_not_suffice(monkeypatch, capsys):
    def measure(pass_, setup, batch):
        if batch > 160:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        assert (pass_, setup) == ("train", batch)
        return dataclasses.replace(ROW, batch=batch)

    monkeypatch.setattr(benchmark_model, "measure", measure)
    assert benchmark_model.measure_what_fits("train", lambda batch: batch, 640).batch == 160
    assert "batch 640 does not fit into memory: trying 320" in capsys.readouterr().out

    def fail(pass_, setup, batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")

    monkeypatch.setattr(benchmark_model, "measure", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        benchmark_model.measure_what_fits("infer", lambda batch: batch, 512)


def test_a_row_has_a_column_for_each_kind_of_kernel(tmp_path):
    assert "ours 60.0" in benchmark_model.as_text(ROW)
    assert "kernels" not in benchmark_model.as_text(dataclasses.replace(ROW, kinds={}))
    for _ in range(2):
        benchmark_model.append(tmp_path / "rows.csv", ROW.values())
    header, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(rows) == 2 and "pass,model,batch" in header
    assert ROW.values()["ours_ms"] == 60 and ROW.values()["reduction_ms"] == 0
