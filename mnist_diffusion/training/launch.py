"""Start the processes of a run: devices, threads, precision, and its folder."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState, utils
from accelerate.state import AcceleratorState

from mnist_diffusion.config import ImagesConfig, RunConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.environment import launcher, set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import is_printable, read_json
from mnist_diffusion.training.checkpoint import newest_intact
from mnist_diffusion.training.run_folder import is_empty

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class RunContext:
    """Where a run takes place: its processes with their device and precision, and its folder.

    Args:
        accelerator: device, precision, processes and trackers.
        folder: the run folder, which need not exist yet.
        recipe: name of the recipe, for titles.
        resumes: whether there is a checkpoint to resume from.
    """

    accelerator: Accelerator
    folder: Path
    recipe: str
    resumes: bool

    def with_precision_of(self, config: RunConfig) -> RunContext:
        """This context with an accelerator of another precision; the earlier one must not be used any more."""
        return replace(self, accelerator=build_accelerator(config, self.folder))

    def require_same(self, what: str, fingerprint: str) -> None:
        """Check that every process has read the same.

        Raises:
            UserError: they have not, as when one machine of several has no data and fell back.
        """
        if len(different := {each[:16] for each in utils.gather_object([fingerprint])}) > 1:
            raise UserError(
                f"the processes read different {what} (fingerprints {sorted(different)}); make the same files "
                "available to all of them"
            )

    def load_images(self, config: ImagesConfig, *, seed: int) -> ImageData:
        """Load labelled images, the same on every process; `seed` chooses the held-out ones if the source has none."""
        with self.accelerator.main_process_first():  # which may download them; the others find them in the cache
            images = load_images(config, seed=seed)
        self.require_same("images", images.fingerprint)
        return images


PROBED = ("mixed_precision", "channels_last", "num_threads")
"""Options of `train` that a run chooses for its machine where they are null."""


def start_run(config: Config, recipe: str) -> tuple[RunContext, Config]:
    """Start processes, choose device and precision, and name the run folder, which is not created yet.

    Returns:
        Where the run takes place; and its configuration. On resume, options left null take the values that the run
        chose for its machine.

    Raises:
        UserError: it cannot work: the processes, the folder, the precision, the batch size or the trackers.
    """
    start_processes(config)
    folder = choose_output_dir(config, recipe)
    probed: dict[str, Any] = {}
    resumes = config.train.resume and any((folder / "checkpoints").glob("step-*"))
    if resumes:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # what is wrong is said when it is loaded
            newest = newest_intact(folder / "checkpoints")
            then = {} if newest is None else read_json(newest / "state.json")["config"]["train"]
            values = {name: then[name] for name in PROBED if name in then and getattr(config.train, name) is None}
            replace(config.train, **values)  # which checks them
            probed = values
    resumes, probed = utils.broadcast_object_list([resumes, probed])
    if launcher().mixed_precision != "no":
        probed.pop("mixed_precision", None)
    config = replace(config, train=replace(config.train, **probed))
    set_num_threads(config.train.num_threads)
    return RunContext(build_accelerator(config, folder), folder, recipe, resumes), config


def start_processes(config: RunConfig) -> PartialState:
    """Join the process group, if there is one, and divide the cores among its processes.

    Raises:
        UserError: several processes that are not connected.
    """
    launched = launcher()
    announced = max(launched.num_processes, launched.local_processes)
    set_num_threads(config.train.num_threads)  # before accelerate reads OMP_NUM_THREADS, and again after it
    state = PartialState(cpu=utils.parse_flag_from_env("ACCELERATE_USE_CPU"))
    if announced > 1 and state.num_processes == 1:
        raise UserError(
            f"the launcher started {announced} processes, but they found no common device and would be {announced} "
            "independent runs writing over each other. For processes on CPUs set ACCELERATE_USE_CPU=true; on a machine "
            "without that many GPUs launch one process"
        )
    set_num_threads(config.train.num_threads)
    return state


def choose_output_dir(config: RunConfig, recipe: str) -> Path:
    """Choose the run folder, the same for every process; it is not created yet.

    Raises:
        UserError: the folder holds something and the run is not a resumed one, or it is a file.
    """
    name = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    [folder] = utils.broadcast_object_list([config.output_dir or name])
    path = Path(folder)
    if not all(map(is_printable, path.absolute().parts)):
        raise UserError(f"output_dir={folder!a} is not UTF-8, has control characters, or a name in it is too long")
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir={folder!r} is a file")
    if not config.train.resume and not is_empty(path):
        advice = "add --train.resume true to resume the run in it, or name another"
        raise UserError(f"output_dir={folder!r} is not empty; {advice}")
    return path


def build_accelerator(config: RunConfig, output_dir: Path) -> Accelerator:
    """Build the `Accelerator`, with the precision and the trackers of the configuration; earlier ones must not be used.

    Raises:
        UserError: launcher and configuration disagree on the precision, the batch does not divide among
            processes and micro-batches, or a tracker is not installed.
    """
    state = PartialState()
    requested, launched = config.train.mixed_precision, launcher().mixed_precision
    if requested is not None and launched not in ("no", requested):
        both = f"train.mixed_precision={requested!r}, but the launcher asks for {launched!r}"
        raise UserError(f"{both}; use `accelerate launch --mixed_precision {requested}`")
    precision = requested or launched
    if precision == "fp16" and state.device.type == "cpu":
        by = "train.mixed_precision='fp16'" if requested else "the launcher's mixed precision, fp16,"
        raise UserError(f"{by} needs a GPU; on a CPU use `accelerate launch --mixed_precision no`, or bf16")
    size, count, micro = config.data.batch_size, state.num_processes, config.train.gradient_accumulation_steps
    if size % (count * micro):
        parts = f"{count} processes x train.gradient_accumulation_steps={micro}"
        raise UserError(f"data.batch_size={size} must be divisible by {parts}")
    project = utils.ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs"))
    trackers = list(config.train.trackers)
    AcceleratorState._reset_state()  # of an earlier run in this process, or with another precision
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_config=project)
    if missing := set(trackers) - {str(tracker) for tracker in accelerator.log_with}:
        names = ",".join(sorted(missing))
        raise UserError(f"train.trackers: {names} is not installed; pip install 'mnist-diffusion[{names}]'")
    if "wandb" in trackers:
        [ready] = utils.broadcast_object_list([_wandb_is_ready() if state.is_main_process else True])
        if not ready:
            raise UserError("train.trackers: wandb has no key; run `wandb login`, or set WANDB_MODE=offline")
    return accelerator


def _wandb_is_ready() -> bool:
    """Whether wandb has a key, or needs none."""
    import wandb

    try:
        if wandb.setup().settings.mode not in ("online", "shared") or wandb.login(prompt=False, verify=False):
            return True
    except Exception as error:  # for example, an unknown WANDB_MODE
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"train.trackers: wandb could not be started: {reason}") from error
    wandb.teardown()  # it caches the mode; a notebook may set another, and try again
    return False
