"""Hold a run folder: one run at a time, which marks it as its own."""

from __future__ import annotations

import contextlib
import errno
import re
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import file_within, may_pass, read_text, remove_left_behind, replace_text
from mnist_diffusion.run_folder.checkpoint import newest_intact

LOCK = ".lock"
RUN_ID = "run_id"
RESULTS = ("pipeline", "pipeline_best", "snapshots", "summary.json")
"""What a run leaves that training again would overwrite."""
PLACES = ("samples", "pictures", "snapshots", "averages")
"""Folders in a run folder into which the run writes."""


def is_empty(path: Path) -> bool:
    """Whether a run folder holds nothing, or only the lock of a run that did not start."""
    return not path.is_dir() or {file.name for file in path.iterdir()} <= {LOCK}


class RunFolderError(UserError):
    """The run folder cannot be used."""


class RunFolder:
    """A run folder that a run holds until it is released or the process ends, however it ends.

    Args:
        path: the folder; made if it does not exist.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(path / LOCK)
        self.run_id: str | None = None
        self.new = self.marked = self.made = False

    def hold(self, *, resume: bool) -> None:
        """Make the folder, let no other run hold it, and mark it as this run's.

        Args:
            resume: resume the run in it; without that it must hold nothing.

        Raises:
            RunFolderError: another run holds it, it cannot be written to, or it is not empty.
        """
        path = self.path
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                self.made = True
            self.lock.acquire(timeout=0)
            if not resume and not is_empty(path):
                raise RunFolderError(f"another run has begun in {path}; name another output_dir")
            self.new, self.marked = is_empty(path), (path / RUN_ID).is_file()
            for place in (path, *(path / name for name in PLACES)) if self.marked else ():
                remove_left_behind(place)
            self.run_id = self._run_id()
        except Timeout:
            raise RunFolderError(f"another run is writing to {path}; wait for it, or name another output_dir") from None
        except OSError as error:
            reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '')})"
            raise RunFolderError(f"output_dir={str(path)!r} cannot be written to: {reason}") from error

    def link_as_latest(self) -> None:
        """Let `latest`, beside the folder, lead to it, unless something else is called so."""
        latest = self.path.parent / "latest"
        new = latest.with_name(f".latest-{self.run_id}")
        with contextlib.suppress(OSError):  # some file systems have no links
            if latest.is_symlink() or not latest.exists():
                new.symlink_to(self.path.name, target_is_directory=True)
                new.replace(latest)

    def _run_id(self) -> str:
        """The mark of the run that began this folder; if it was lost, that of its newest checkpoint."""
        file, known = self.path / RUN_ID, ""
        try:
            known = read_text(file_within(self.path, RUN_ID), 100).strip()
        except FileError as error:
            if may_pass(error):
                raise
        if not re.fullmatch(r"\w+", known):
            known = str(newest_intact(self.path / "checkpoints")[1] or uuid.uuid4().hex)
            replace_text(file, known)
        return known

    def require_nothing_to_lose(self) -> None:
        """Make sure that a run may start at step 0 here: the folder was empty, or a run began in it and left no result.

        Raises:
            RunFolderError: it may not.
        """
        lost = [name for name in RESULTS if (self.path / name).exists()]
        lost += [f"checkpoints/{path.name}" for path in (self.path / "checkpoints").glob("*.broken*")]
        if not self.new and (lost or not self.marked):
            if not self.marked:
                (self.path / RUN_ID).unlink()
            held = f"holds {', '.join(lost)}" if lost else "is not the folder of a run"
            raise RunFolderError(f"{self.path} has no checkpoint to resume from, and {held}; name another output_dir")

    def release(self) -> None:
        """Let another run hold the folder; one that the run made, and left nothing in, is removed."""
        left = (RUN_ID, "config.yaml", "metrics.jsonl")
        try:
            with contextlib.suppress(OSError):
                there = {file.name for file in self.path.iterdir() if file.name != left[-1] or file.stat().st_size}
                if self.made and self.lock.is_locked and there <= {LOCK, *left[:-1]}:
                    for name in (*left, LOCK):
                        (self.path / name).unlink(missing_ok=True)
                    self.path.rmdir()
        finally:
            self.lock.release()
