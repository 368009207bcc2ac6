"""Question: what do callers of the library pay for sharing one CounterClient?

Command: .venv/bin/python benchmarks/shared_client.py [--rounds N] [--seconds S] [--beside DIR]
It takes half a minute and prints a Markdown table.

One process of the server has a CPU to itself, and so has one process of callers. In each round
every kind of callers has its turn, every second round in the opposite order: 200 greenlets on one
client, 200 on 20 clients, 20 threads on one client, and one thread alone, which shares nothing and
must not pay for those that do. DIR holds another client.py and protocol.py, such as those of an
earlier commit (`git archive COMMIT client.py protocol.py`), which are measured in the same rounds.

Invalid if: other work runs (the spread is in brackets), or the machine has one CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
CALLERS: Final = {
    "200 greenlets, 1 client": ("greenlets", 200, 1),
    "200 greenlets, 20 clients": ("greenlets", 200, 20),
    "20 threads, 1 client": ("threads", 20, 1),
    "1 thread, 1 client": ("threads", 1, 1),
}
WARMUP_S: Final = 0.2


def call(kind: str, callers: int, clients: int, address: str, seconds: float) -> float:
    """Has so many callers add ones; additions a second."""
    import threading

    from client import CounterClient

    counters = [CounterClient(address) for _ in range(clients)]
    counts = [0] * callers
    start_s = time.perf_counter() + WARMUP_S
    end_s = start_s + seconds

    def add(number: int) -> None:
        counter = counters[number % clients]
        while (now := time.perf_counter()) < end_s:
            counter.add(1)
            counts[number] += now >= start_s

    threads = [threading.Thread(target=add, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for counter in counters:
        counter.close()
    return sum(counts) / (time.perf_counter() - start_s)


def work(kind: str, callers: str, clients: str, address: str, seconds: str, library: str) -> None:
    """A process of callers, each a thread or, where the application is patched, a greenlet."""
    if kind == "greenlets":
        from gevent import monkey

        monkey.patch_all()
    sys.path.insert(0, library)
    print(call(kind, int(callers), int(clients), address, float(seconds)))


def compare(libraries: dict[str, Path], rounds: int, seconds: float) -> list[str]:
    """Measures in alternating rounds; the lines of a table."""
    import peers
    from results import markdown_table, rate_text

    cpus = peers.choose_cpus()
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    jobs = [(name, library) for name in CALLERS for library in libraries]
    with tempfile.TemporaryDirectory() as directory:
        server = peers.this_server("--processes", "1")
        with peers.started(server, cpus.server, Path(directory) / "log") as running:
            for number in range(rounds):
                for name, library in jobs if number % 2 else reversed(jobs):
                    words = [*map(str, CALLERS[name]), f"127.0.0.1:{running.port}", str(seconds)]
                    done = subprocess.run(
                        [sys.executable, __file__, "--work", *words, str(libraries[library])],
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                        preexec_fn=lambda: peers.prepare_child(cpus.generator),
                    )
                    rates[name, library].append(float(done.stdout))
    rows = [[name, *(rate_text(rates[name, each]) for each in libraries)] for name in CALLERS]
    return markdown_table(["additions a second", *libraries], rows)


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        arguments: Any = sys.argv[2:]
        work(*arguments)
        return 0
    parser = argparse.ArgumentParser(description="Callers that share one CounterClient.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--beside", type=Path, help="another client.py and protocol.py")
    options = parser.parse_args()
    libraries = {"this library": HERE.parent}
    if options.beside:
        libraries["the one beside it"] = options.beside
    print("\n".join(compare(libraries, options.rounds, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
