"""Measure what one would use instead of this package, on the same machine in one run.

    python -m cotnet_jax.tools.benchmark_peers infer --batch_sizes=8 --rounds=5
    python -m cotnet_jax.tools.benchmark_peers train --batch_sizes=256 --csv=peers.csv

Peers are CoTNet in PyTorch with the aggregation by ``unfold``, on GPUs also under ``torch.compile``
and in bfloat16, and timm's ResNet-50 where timm is installed. They need torch, which the package
does not. Each measurement is a process of its own, so that none keeps memory or threads from the
next, and all take turns in every round: what else the machine does strikes them alike. A line is
printed when a round is over; the last table has the least milliseconds of a call.

A training step of PyTorch is forward, backward and SGD with momentum, without mixing and EMA; ours
is the recipe's, with both. Both have noise for images, on the device.
"""

import concurrent.futures
import csv
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotnet_jax.command_line import Parser, positive, positives
from cotnet_jax.tools.benchmark_ops import by_comma

OURS = "cotnet_jax"
PEERS = (OURS, "torch-unfold", "torch-unfold-compile", "timm-resnet50", "timm-resnet50-compile")
SECONDS = 1.0


def measure(peer: str, pass_: str, model: str, batch_size: int, size: int) -> float:
    """Return the milliseconds of a call: the least of three series of at least a second."""
    # Each library is imported in the process that measures it alone.
    make = _ours if peer == OURS else _torch
    call = make(peer, pass_, model, batch_size, size)
    call(2)
    start = time.perf_counter()
    call(2)
    count = max(2, int(SECONDS / (time.perf_counter() - start) * 2))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call(count)
        seconds.append((time.perf_counter() - start) / count)
    return min(seconds) * 1e3


def _ours(peer: str, pass_: str, model: str, batch_size: int, size: int) -> Callable[[int], None]:
    from cotnet_jax.tools import benchmark_model

    del peer
    batch = batch_size if pass_ == "train" else None
    setup = benchmark_model.set_up(model, size, None, batch)
    if pass_ == "train":
        traced, make = benchmark_model.trace_training(setup)
    else:
        traced, make = benchmark_model.trace_inference(setup, batch_size)
    program = benchmark_model.lower(traced).compile()
    return benchmark_model.make_call(pass_, program, make())


def _torch(peer: str, pass_: str, model: str, batch_size: int, size: int) -> Callable[[int], None]:
    import torch

    from cotnet_jax.tools.torch_cotnet import TorchCoTNet

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if peer.startswith("timm"):
        import timm

        network = timm.create_model("resnet50")
    else:
        network = TorchCoTNet(model)
    # On GPUs what is faster, on CPUs the original's own, which is as fast there.
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    network = network.to(device, memory_format=layout)
    images = torch.randn(batch_size, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    network.train(pass_ == "train")
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
    forward: Any = torch.compile(network) if peer.endswith("compile") else network

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            if pass_ == "infer":
                with torch.inference_mode():
                    forward(images)
                return
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def call(count: int) -> None:
        for _ in range(count):
            once()
        if on_gpu:
            torch.cuda.synchronize()

    return call


def measure_apart(*arguments: Any) -> float:
    """Return what ``measure`` does, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def available() -> list[str]:
    """Return the peers that run here: on CPUs those without ``torch.compile``."""
    import jax

    found = [OURS]
    if importlib.util.find_spec("torch"):
        found += ["torch-unfold"]
        if importlib.util.find_spec("timm"):
            found += ["timm-resnet50"]
    if jax.default_backend() == "gpu":
        found += [f"{peer}-compile" for peer in found[1:]]
    return found


def main(arguments: list[str]) -> None:
    command = "python -m cotnet_jax.tools.benchmark_peers"
    parser = Parser(
        "Measure what one would use instead of this package, in one run.",
        [
            f"{command} infer --batch_sizes=8 --rounds=5",
            f"{command} train --batch_sizes=256,640 --csv=peers.csv",
            f"{command} infer --peers=cotnet_jax,torch-unfold",
        ],
        notes="The module's docstring says what the peers are and what a step has.",
    )
    parser.add_argument(
        "pass_",
        metavar="train|infer",
        nargs="?",
        choices=["train", "infer"],
        required=True,
        help="A training step, or the network in evaluation.",
    )
    parser.add_argument(
        "--peers", type=by_comma(PEERS), metavar="NAME,...", help="Default: all that run here."
    )
    parser.add_argument(
        "--model",
        choices=["cotnet50", "cotnet101"],
        default="cotnet50",
        metavar="NAME",
        help="cotnet50 or cotnet101; default %(default)s.",
    )
    parser.add_argument(
        "--batch_sizes", type=positives, default=[8], metavar="N,...", help="Images; default 8."
    )
    parser.add_argument(
        "--size", type=positive, default=224, metavar="N", help="Pixels; default %(default)s."
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="Turns; default %(default)s."
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="Write all rounds to this file.")
    options = parser.parse_args(arguments)
    rows = []
    for batch_size in options.batch_sizes:
        least: dict[str, float] = {}
        for round_ in range(1, options.rounds + 1):
            for peer in options.peers or available():
                case = (peer, options.pass_, options.model, batch_size, options.size)
                ms = measure_apart(*case)
                least[peer] = min(ms, least.get(peer, ms))
                rows.append((*case, round_, f"{ms:.2f}"))
                print(f"round {round_}: {peer} {ms:.1f} ms", flush=True)
        print(f"{'batch ' + str(batch_size):24} {'ms':>9} {'images/s':>9} {'of ours':>8}")
        for peer, ms in sorted(least.items(), key=lambda item: item[1]):
            ratio = f"{ms / least[OURS]:8.2f}" if OURS in least else ""
            print(f"{peer:24} {ms:9.1f} {batch_size / ms * 1e3:9.1f} {ratio}", flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("peer", "pass", "model", "batch", "size", "round", "ms"))
            writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
