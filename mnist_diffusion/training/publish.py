"""Push a run's pipelines to the Hub while it trains and when it ends."""

from __future__ import annotations

import queue
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars

from mnist_diffusion.config import HubConfig
from mnist_diffusion.sharing.errors import HubError
from mnist_diffusion.sharing.hub import open_repository, push
from mnist_diffusion.training.processes import Processes


class Publisher:
    """Pushes a run's snapshots while it trains and its pipeline when it has ended, if `hub.push` asks for it.

    Args:
        config: where to and what.
        folder: the run folder.
        processes: the main one pushes; if it cannot, all raise.

    Raises:
        HubError: nobody is logged in, or the Hub refuses. Training has not begun then.
    """

    def __init__(self, config: HubConfig, folder: Path, processes: Processes):
        self.config, self.folder, self.repo_id = config, folder, config.repo_id or folder.name
        self.main = config.push and processes.main
        if config.push:
            processes.on_main(self._open)
        self.waiting: queue.Queue[Path | None] = queue.Queue()
        # A daemon, because who stops a run does not want to wait for a push.
        self.worker = threading.Thread(target=self._push_snapshots, name="push", daemon=True)
        if self.main and config.every_snapshot:
            disable_progress_bars()
            self.worker.start()

    def _open(self) -> None:
        self.repo_id = open_repository(self.repo_id, private=self.config.private, revision=self.config.revision)

    def snapshot(self, folder: Path) -> None:
        """Push a snapshot in the background, in place of those that are still waiting."""
        if self.worker.is_alive():
            self.waiting.put(folder)

    def _push_snapshots(self) -> None:
        ended = False
        while not ended:
            arrived = [self.waiting.get()]
            while not self.waiting.empty():
                arrived.append(self.waiting.get())
            ended = None in arrived
            for folder in list(filter(None, arrived))[-1:]:
                try:
                    self._push(folder, message=f"Upload {folder.name}")
                except Exception as error:  # whatever it is, the run goes on
                    print(f"warning: {folder} was not pushed: {error}", file=sys.stderr)

    def _push(self, folder: Path, **more: Any) -> str:
        return push(folder, self.repo_id, private=self.config.private, revision=self.config.revision, **more)

    def finish(self) -> None:
        """Push the finished run, after a snapshot that is being pushed.

        Raises:
            HubError: it could not be pushed; the message says how to do it later.
        """
        if self.worker.is_alive():
            self.waiting.put(None)
            self.worker.join()
        if not self.main:
            return
        try:
            address = self._push(self.folder, with_checkpoints=self.config.with_checkpoints)
        except Exception as error:
            later = shlex.join(["mnist-diffusion", "push", str(self.folder), self.repo_id, *self._flags()])
            raise HubError(f"{error}\nThe run is whole in {self.folder}; push it later with: {later}") from None
        print(f"Pushed: {address}")

    def _flags(self) -> list[str]:
        private = ["--private"] if self.config.private else []
        revision = [] if self.config.revision is None else ["--revision", self.config.revision]
        return [*private, *revision, *(["--with_checkpoints"] if self.config.with_checkpoints else [])]
