"""Real runs, really killed: what the survival tests start, and a long chain of kills for the docs.

    python -m tests.support.survival kills 200
    python -m tests.support.survival elastic

Runs are forked from one process that has imported everything, so that a launch costs a second and a chain of
hundreds of kills minutes. It has run no torch operation before, whose threads would not survive a fork.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mnist_diffusion.training.checkpoint import load_checkpoint, newest_valid
from mnist_diffusion.training.run_folder import read_metrics
from tests.support.browser import free_port

FLAGS = [
    *("--data.source", "digits", "--data.batch_size", "8", "--model.block_out_channels", "[8, 8]"),
    *("--model.norm_num_groups", "4", "--sampling.num_inference_steps", "1", "--train.samples_per_class", "1"),
    *("--train.num_eval_images", "8", "--train.sample_every", "null", "--train.warmup_steps", "2"),
    *("--train.num_threads", "1", "--train.log_every_steps", "3", "--train.checkpoint_every", "1 step"),
    *("--train.pictures", "false"),
]
FILE_OPERATIONS = (
    *("mnist_diffusion.training.checkpoint.save_file", "mnist_diffusion.training.checkpoint.flush", "shutil.rmtree"),
    *("pathlib.Path.replace", "pathlib.Path.mkdir", "pathlib.Path.rename"),
)


@dataclasses.dataclass(frozen=True)
class Death:
    """When a process kills itself: at a file operation of one of its saves, counted from 0."""

    save: int
    operation: int
    after: bool


FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.support.preloaded"])
Work = Callable[[list[str]], int]
"""What a process does with its arguments in place of a run; its exit code."""


def start(
    arguments: Sequence[str], *, log: Path, ranks: int = 1, death: Death | None = None, work: Work | None = None
) -> list[Any]:
    """Start a run of so many processes; `death` strikes the main one."""
    port, processes = free_port(), []
    for rank in range(ranks):
        given = (list(arguments), _environment(rank, ranks, port), log, None if rank else death, work)
        processes.append(FORKING.Process(target=_child, args=given))
        processes[-1].start()
    return processes


def finish(arguments: Sequence[str], *, seconds: float = 120, **options: Any) -> list[int]:
    """Run to the end; the exit codes."""
    return join(start(arguments, **options), seconds=seconds)


def join(processes: list[Any], *, seconds: float = 120) -> list[int]:
    """Wait for processes; the exit codes, negative for the signal that killed one.

    Raises:
        TimeoutError: one still runs after so many seconds.
    """
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    if hanging := [process for process in processes if process.is_alive()]:
        for process in hanging:
            process.kill()
        raise TimeoutError(f"{len(hanging)} of {len(processes)} processes still ran after {seconds} s")
    return [process.exitcode for process in processes]


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher would set."""
    if ranks == 1:
        return {}
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    group = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return local | group


def _child(
    arguments: list[str], environment: dict[str, str], log: Path, death: Death | None, work: Work | None
) -> None:
    """One process of a run, which hears every signal even where this one was started to ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    if death is not None:
        _plan_death(death)
    import train_cfg

    sys.exit((work or train_cfg.main)(arguments))


def run_with(arguments: list[str], *, place: str, by: Callable[..., Any]) -> int:
    """A run in which `by` is called in place of a function or a method, which it is given first."""
    import train_cfg

    original = pkgutil.resolve_name(place)
    mock.patch(place, lambda *given, **named: by(original, *given, **named)).start()
    return train_cfg.main(arguments)


def _plan_death(death: Death) -> None:
    """Make this process kill itself before or after a file operation of a save."""
    saves, operations, saving = itertools.count(), itertools.count(), False
    save = "mnist_diffusion.training.trainer.save_checkpoint"
    save_checkpoint = pkgutil.resolve_name(save)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal operations, saving
        operations, saving = itertools.count(), next(saves) == death.save
        try:
            return save_checkpoint(*args, **kwargs)
        finally:
            saving = False

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = saving and next(operations) == death.operation
            if here and not death.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    mock.patch(save, counted).start()
    for name in FILE_OPERATIONS:
        mock.patch(name, watched(pkgutil.resolve_name(name))).start()


def final_state(folder: Path) -> dict[str, Any]:
    """What a run ends with: every file of its last checkpoint, its weights for using, and its log without times."""
    step, problems = newest_valid(folder / "checkpoints")
    assert not problems, problems
    checkpoint = folder / "checkpoints" / f"step-{step}"
    state: dict[str, Any] = {
        path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix == ".safetensors"
    }
    kept = json.loads((checkpoint / "state.json").read_text())
    state |= {name: kept[name] for name in ("ema_step", "planned_steps", "step")}
    state["pipeline"] = (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    lines = read_metrics(folder / "metrics.jsonl")
    state["log"] = [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]
    return state


def chain_of_kills(
    root: Path, deaths: Sequence[Death | None], flags: Sequence[str] = (), *, ranks: int = 1
) -> dict[str, Any]:
    """One run killed again and again, each time gone on from, then finished; the others must leave by themselves.

    Args:
        root: where to.
        deaths: how each launch dies; None at a random time.
        flags: of the run besides.
        ranks: processes of the run.

    Returns:
        Counts, and whether the end is that of a run never killed, to the bit.
    """
    random.seed(0)
    # Enough that no launch but the last comes to the end.
    steps = sum(25 if death is None else death.save + 1 for death in deaths) + 10
    arguments = [*FLAGS, "--train.max_steps", str(steps), *flags]
    whole, cut, log = root / "whole", root / "cut", root / "log.txt"
    codes = finish([*arguments, "--output_dir", str(whole)], log=log, ranks=ranks, seconds=900)
    assert codes == [0] * ranks, log.read_text()
    newest, landed = -1, 0
    again = [*arguments, "--output_dir", str(cut), "--train.resume", "true"]
    for death in deaths:
        processes = start(again, log=log, ranks=ranks, death=death)
        if death is None:
            _wait_for_a_moment(cut, newest)
            random.choice(processes).kill()
        landed += -signal.SIGKILL in join(processes)
        found, problems = newest_valid(cut / "checkpoints")
        assert not problems, problems
        assert (found if found is not None else -1) >= newest, f"the checkpoint of step {newest} is lost"
        newest = found if found is not None else -1
    assert finish(again, log=log, ranks=ranks, seconds=900) == [0] * ranks, log.read_text()[-3000:]
    first, second = final_state(whole), final_state(cut)
    different = [name for name in first if first[name] != second.get(name)]
    return {"kills": landed, "ended before": len(deaths) - landed, "steps": steps, "different": different}


def _wait_for_a_moment(folder: Path, newest: int) -> None:
    """A random time of a launch: while it starts, for one in four, else a little after its first checkpoint."""
    if random.random() < 0.25:
        time.sleep(random.uniform(0, 1))
        return
    deadline = time.monotonic() + 30
    while not any(int(path.name.removeprefix("step-")) > newest for path in folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, "no new checkpoint within 30 s"
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))


def every_operation() -> list[Death]:
    """Death before and after each file operation of a launch's second save, which are counted in one."""
    import torch

    from mnist_diffusion.training.checkpoint import save_checkpoint

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        root = Path(folder, "checkpoints")
        tensors = {name: {"a": torch.zeros(2)} for name in ("unet", "ema", "optimizer")}
        for step in range(2):
            save_checkpoint(root, step, tensors, {}, keep=2)
        originals = {name: pkgutil.resolve_name(name) for name in FILE_OPERATIONS}
        counting = [mock.patch(name, autospec=True, side_effect=each) for name, each in originals.items()]
        mocks = [patches.enter_context(each) for each in counting]
        save_checkpoint(root, 2, tensors, {}, keep=2)
        operations = sum(each.call_count for each in mocks)
    return [Death(1, operation, after) for operation in range(operations) for after in (False, True)]


def elastic_runs(root: Path, *, dtype: str) -> tuple[Path, Path]:
    """Twenty steps by one process, and by one until step 7, two until step 14, and one: the two run folders."""
    whole, elastic, log = root / "whole", root / "elastic", root / "log.txt"
    flags = [*FLAGS, "--model.dropout", "0.0", "--train.max_steps", "20"]
    work = partial(run_until, dtype=dtype)
    assert finish([*flags, "--output_dir", str(whole)], log=log, work=work) == [0], log.read_text()
    for ranks, until in ((1, 7), (2, 14), (1, 20)):
        part = [*flags, "--output_dir", str(elastic), "--train.resume", "true"]
        codes = finish(part, log=log, ranks=ranks, work=partial(work, until=until))
        assert codes == [0 if until == 20 else 128 + signal.SIGTERM] * ranks, log.read_text()[-3000:]
        found, _ = newest_valid(elastic / "checkpoints")
        assert found == until
    return whole, elastic


def run_until(arguments: list[str], *, dtype: str, until: int | None = None) -> int:
    """A run of some precision, told to stop after step `until`."""
    import torch

    import train_cfg
    from mnist_diffusion.method.objective import Batch, Objective
    from mnist_diffusion.training import run as module_of_runs

    module: Any = module_of_runs
    state_class, kind = module.TrainState, getattr(torch, dtype)

    class StoppingState(state_class):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, accelerator: Any, data: Any, unet: Any, objective: Objective):
            def loss(model: Any, batch: Batch) -> Any:
                typed = dataclasses.replace(batch, images=batch.images.to(kind), noise=batch.noise.to(kind))
                return objective.loss(model, typed)

            super().__init__(config, accelerator, data, unet.to(kind), dataclasses.replace(objective, loss=loss))

        def update(self, step: int, learning_rate: float) -> Any:
            measured = super().update(step, learning_rate)
            if step + 1 == until != self.config.train.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            return measured

    module.TrainState = StoppingState
    return train_cfg.main(arguments)


def kills(count: int = 200) -> None:
    """Print what became of a chain of kills.

    Args:
        count: how many; before and after each file operation of a save first, then at random times.
    """
    deaths: list[Death | None] = [*every_operation()]
    deaths += [None] * max(0, count - len(deaths))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = chain_of_kills(Path(folder), deaths[:count])
    seconds = time.monotonic() - started
    same = "equal to the bit to a run never killed" if not result["different"] else f"DIFFERENT: {result['different']}"
    print(
        f"{result['kills']} launches killed with SIGKILL ({result['ended before']} had ended before), "
        f"{result['steps']} steps, {seconds:.0f} s: weights, average, optimizer and log {same}; "
        "every newest checkpoint verified, none was lost"
    )


def elastic() -> None:
    """Print how far 20 steps of one, two and one processes end from 20 steps of one."""
    for dtype in ("float64", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            runs = elastic_runs(Path(folder), dtype=dtype)
            first, second = (load_checkpoint(run / "checkpoints", 20).tensors["unet"] for run in runs)
        largest = max(float((value - second[name]).abs().max()) for name, value in first.items())
        print(f"{dtype}: weights differ by at most {largest:.1e} after 20 steps")


if __name__ == "__main__":
    {"kills": kills, "elastic": elastic}[sys.argv[1]](*map(int, sys.argv[2:]))
