"""The comparison with peers: what it prints and writes, and that its PyTorch network is CoTNet."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.models.cotnet import create_model
from cotnet_jax.tools import benchmark_peers
from cotnet_jax.weights.name_map import to_torch_state_dict


def test_peers_take_turns_and_the_least_of_each_counts(monkeypatch, capsys, tmp_path):
    times = iter([20.0, 30.0, 10.0, 40.0])
    monkeypatch.setattr(benchmark_peers, "measure_apart", lambda *case: next(times))
    file = tmp_path / "peers.csv"
    arguments = ["infer", "--peers=cotnet_jax,torch-unfold", "--rounds=2", f"--csv={file}"]
    benchmark_peers.main(arguments)
    printed = capsys.readouterr().out
    assert printed.index("round 1: torch-unfold") < printed.index("round 2: cotnet_jax")
    assert "torch-unfold                  30.0     266.7     3.00" in printed
    rows = list(csv.DictReader(file.open()))
    assert [float(row["ms"]) for row in rows] == [20, 30, 10, 40]
    assert {row["batch"] for row in rows} == {"8"}


def test_an_unknown_peer_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark_peers.main(["infer", "--peers=keras"])
    assert "keras" in capsys.readouterr().err


def test_peers_are_those_that_are_installed(monkeypatch):
    installed = {"torch"}
    monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda n: n in installed)
    assert benchmark_peers.available() == ["cotnet_jax", "torch-unfold"]
    installed.clear()
    assert benchmark_peers.available() == ["cotnet_jax"]


def test_our_own_program_runs(monkeypatch):
    monkeypatch.setattr(benchmark_peers, "SECONDS", 0.01)
    assert benchmark_peers.measure("cotnet_jax", "infer", "cotnet_tiny", 1, 32) > 0


def test_the_network_in_pytorch_is_the_same():
    torch = pytest.importorskip("torch")
    from cotnet_jax.tools.torch_cotnet import TorchCoTNet

    random = np.random.default_rng(0)
    images = random.standard_normal((2, 64, 32, 3))
    with jax.enable_x64(True):
        model = create_model("cotnet50", num_classes=10, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        # So that no scale is 0 and no statistic plain.
        variables = jax.tree.map(lambda a: a + 0.1 * random.standard_normal(a.shape), variables)
        arrays = to_torch_state_dict("cotnet50", variables, num_classes=10)
        wanted = np.asarray(model.apply(variables, jnp.asarray(images)))
    network = TorchCoTNet("cotnet50", num_classes=10).double().eval()
    misfits = network.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()}, False)
    assert not misfits.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in misfits.missing_keys)
    with torch.inference_mode():
        got = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert np.linalg.norm(got - wanted) <= 1e-9 * np.linalg.norm(wanted)
