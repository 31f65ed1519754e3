"""Load on the page: many clients at once for some minutes, a tenth of them hostile.

    mnist-diffusion app PIPELINE --only_draw --port 7861                                     # in one terminal
    python benchmarks/app_load.py http://127.0.0.1:7861 --clients 32 --minutes 5 --pid PID   # in another

Prints how many drawings were answered, how long they took, and how the memory of the server, process `--pid`, changed.
The hostile clients ask for classes, steps, sizes and types that are out of bounds, for files by path and address, for
routes that are not there, and in ever new sessions whose answers they never fetch.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client
from jsonargparse import auto_cli

HOSTILE_SHARE = 0.1
STEPS, IMAGES = 10, 4
FILES = tuple({"path": where, "meta": {"_type": "gradio.FileData"}} for where in ("/dev/zero", "https://example.com/a"))
WORDS: tuple[Any, ...] = (None, "x", -1, 1e308, [], {}, ["z"], [[0]], True, "../../etc/passwd", "a" * 10_000, *FILES)
PATHS = (
    "gradio_api/file=/etc/passwd",
    "gradio_api/upload",
    "assets/../../blocks.py",
    "gradio_api/proxy=http://127.0.0.1",
)


def main(address: str, *, clients: int = 32, minutes: float = 5, pid: int | None = None, seed: int = 0) -> None:
    """Run the clients, and print what they found.

    Args:
        address: of the page.
        clients: how many, each of which asks again as soon as it is answered.
        minutes: for how long.
        pid: the server's process on this machine, whose memory is measured.
        seed: of the hostile requests.
    """
    until, seconds, found = time.monotonic() + 60 * minutes, [], Counter[str]()
    hostile = round(clients * HOSTILE_SHARE)
    config = Client(address, verbose=False).config
    pipeline = next(each["props"]["value"] for each in config["components"] if each["props"].get("label") == "Pipeline")
    generate = next(each["id"] for each in config["dependencies"] if each["api_name"] == "generate")
    usual = (pipeline, ["3"], IMAGES, 1.9, STEPS, "pipeline default")

    def honest(number: int) -> None:
        client, asked = Client(address, verbose=False), 0
        while time.monotonic() < until:
            started = time.perf_counter()
            try:
                client.predict(*usual, 1000 * number + asked, api_name="/generate")
                seconds.append(time.perf_counter() - started)
                found["answered"] += 1
            except Exception as error:  # a full queue is an answer too
                found["refused: queue full" if "full" in str(error) else f"failed: {error!s:.80}"] += 1
                time.sleep(0.5)
            asked += 1

    def attack(number: int) -> None:
        client, draws = Client(address, verbose=False), random.Random(seed + number)
        while time.monotonic() < until:
            arguments, kind = [*usual, 0], draws.randrange(3)
            arguments[draws.randrange(len(arguments))] = draws.choice(WORDS)
            try:
                if kind == 0:
                    with urllib.request.urlopen(f"{address.rstrip('/')}/{draws.choice(PATHS)}") as answer:
                        found[f"hostile: served ({answer.status})"] += 1
                elif kind == 1:
                    asked = {"data": arguments, "fn_index": generate, "session_hash": f"{draws.random()}"}
                    body, kinds = json.dumps(asked).encode(), {"Content-Type": "application/json"}
                    request = urllib.request.Request(f"{address.rstrip('/')}/gradio_api/queue/join", body, kinds)
                    urllib.request.urlopen(request, timeout=10).close()
                    found["hostile: asked, and never fetched"] += 1
                else:
                    client.predict(*arguments, api_name="/generate")
                    found["hostile: drawn, as it was harmless"] += 1
            except urllib.error.HTTPError as error:
                found[f"hostile: refused by the server ({error.code})"] += 1
            except urllib.error.URLError as error:
                found[f"failed: {error}"] += 1
            except Exception:
                found["hostile: refused by the page"] += 1
            time.sleep(0.1)

    threads = [threading.Thread(target=attack if each < hostile else honest, args=(each,)) for each in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(60 * minutes * 0.2)  # by then everything has been used once
    before = _megabytes(pid)
    for thread in threads:
        thread.join()
    after = _megabytes(pid)
    _report(found, seconds)
    if pid is not None:
        print(f"memory {before:.0f} MB after a fifth of the time, {after:.0f} MB at the end: {after / before - 1:+.1%}")
    started = time.perf_counter()
    Client(address, verbose=False).predict(*usual, 0, api_name="/generate")
    print(f"afterwards one drawing takes {time.perf_counter() - started:.2f} s")


def _report(found: Counter[str], seconds: list[float]) -> None:
    for what, count in sorted(found.items()):
        print(f"{count:6} {what}")
    if not seconds:
        raise SystemExit("no drawing was answered")
    middle, late = np.percentile(seconds, [50, 95])
    print(f"seconds per drawing of {IMAGES} images in {STEPS} steps: p50 {middle:.2f}, p95 {late:.2f}")


def _megabytes(pid: int | None) -> float:
    """Resident memory of a process, from /proc."""
    if pid is None:
        return float("nan")
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
