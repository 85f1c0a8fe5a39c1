"""The benchmark of the input pipeline, without its measurements."""

import sys
import time

import pytest

from cotnet_jax.data import transforms
from cotnet_jax.tools import benchmark_input


@pytest.fixture
def rates(monkeypatch):
    """Every measured configuration; the rates are 100, 101, ..."""
    measured, clocks = [], []

    def note(config):
        measured.append((config.augment.randaugment_on, config.data.scaled_decoding))
        return 99.0 + len(measured)

    monkeypatch.setattr(
        benchmark_input,
        "_bare_rate",
        lambda source, config, processes, seconds, clock: clocks.append(clock) or note(config),
    )
    monkeypatch.setattr(benchmark_input, "_through_grain", lambda source, config: config)
    monkeypatch.setattr(benchmark_input, "_rate", lambda config, seconds: note(config))
    monkeypatch.setattr(benchmark_input, "_print_stages", lambda source, seconds: None)
    return measured, clocks


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark_input", "--image=40x30", *arguments])
    benchmark_input.main()


def test_all_modes_are_in_one_table(rates, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_input, "available_cores", lambda: 2)
    monkeypatch.setattr(benchmark_input, "_PSNR_CROPS", 20)
    run(monkeypatch, "--size=20", "--threads=3", "--workers=1", "--rounds=2")
    printed = capsys.readouterr().out
    assert "fake 40x30 JPEGs" in printed
    assert "small: short side of 20" in printed
    rows = [line.split() for line in printed.splitlines() if " bare " in line or " Grain " in line]
    table = [row for row in rows if row[-1][0].isdigit()]
    # Two bare ones (of one and three processes), threads, workers.
    assert [row[0] for row in table] == [
        mode for mode in ("host:", "device:", "scaled:", "small:") for _ in range(4)
    ]
    places = {"host": ("host", False), "device": ("device", False), "scaled": ("device", True)}
    modes = [places[mode] for mode in ("host", "device", "scaled", "device") for _ in range(4)]
    measured, clocks = rates
    assert measured == [*modes, *modes]
    assert set(clocks) == {time.perf_counter}
    # The medians of two rounds of 16 rows: 108 and more, on one or two cores.
    assert table[0][-4:] == ["1", "108", "108", "1.00"]
    assert table[2][-5:] == ["3", "0", "110", "55", "1.01"]
    assert "PSNR" in printed


def test_processor_time_is_of_one_bare_loop_a_mode(rates, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_input, "_PSNR_CROPS", 20)
    run(monkeypatch, "--processor_time", "--modes=host,device")
    measured, clocks = rates
    assert measured == [("host", False), ("device", False)]
    assert clocks == [time.process_time] * 2
    assert "of processor time" in capsys.readouterr().out


def test_smaller_copies_have_the_short_side():
    small = benchmark_input.FakeJpegs(2, 10, 90, 50, 40).shrink(20)
    assert len(small) == 10
    assert transforms.decode(small[9]["image"]).shape == (20, 25, 3)
    assert transforms.decode(small.shrink(30)[9]["image"]).shape == (20, 25, 3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--modes=host,fast", "unknown fast; choose from host, device, scaled, small"),
        ("--image=40", "must be WIDTHxHEIGHT, such as 500x375, not '40'"),
        ("--batch_size=0", "must be an integer of 1 or more, not '0'"),
        ("--rounds=0", "must be an integer of 1 or more, not '0'"),
        ("--size=0", "must be an integer of 1 or more, not '0'"),
        ("--seconds=0", "must be a number above 0, not 0"),
        ("--data_dir=DIR --modes=small", "a copy prepared with --size as --data_dir"),
    ],
)
def test_wrong_arguments(rates, monkeypatch, capsys, argument, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, *argument.split())
    assert message in capsys.readouterr().err
