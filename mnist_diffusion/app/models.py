"""The pipelines that the page draws with, by the names it shows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_diffusion.checks import AUTOGUIDANCE, GUIDERS, PLAIN_GUIDANCE
from mnist_diffusion.diffusion.pipeline import load_pipeline
from mnist_diffusion.errors import UserError
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

CLASSIFIER_FREE = "classifier-free"
NONE_YET = "there is no pipeline yet: train one first"


class Models:
    """Loaded pipelines, and where each is from.

    Args:
        sources: pipeline folders or Hub ids.

    Raises:
        UserError: one could not be loaded.
    """

    def __init__(self, sources: Sequence[str] = ()):
        self._loaded: dict[str, tuple[str, MNISTDiffusionPipeline]] = {}
        self._lock = threading.Lock()
        for source in sources:
            self.add(source)

    def add(self, source: str) -> str:
        """Load a pipeline, if it is not loaded; the name that it has, which is that of its run, if it has one.

        Raises:
            UserError: it could not be loaded.
        """
        path = Path(source)
        base = path.parent.name if path.name == "pipeline" and path.parent.name else source.rstrip("/")
        with self._lock:
            known = next((name for name, (where, _) in self._loaded.items() if where == source), None)
            if known is None:
                same = sum(name == base or name.startswith(f"{base} (") for name in self._loaded)
                known = base if not same else f"{base} ({same + 1})"
                self._loaded[known] = source, load_pipeline(source, device=None)
        return known

    @property
    def names(self) -> list[str]:
        """In the order they were added."""
        return list(self._loaded)

    def rules(self, pipeline: Any) -> dict[str, str]:
        """The guidance rules that a visitor may choose for a pipeline, by what they are called."""
        guiders = {name.removesuffix("Guidance"): name for name in GUIDERS}
        others = [name for name, (_, model) in self._loaded.items() if model is not pipeline]
        weaker = {f"autoguidance by {name}": f"{AUTOGUIDANCE}{name}" for name in others}
        return {CLASSIFIER_FREE: PLAIN_GUIDANCE, **guiders, **weaker}

    def source(self, name: str) -> str:
        """Where a pipeline is from."""
        return self._find(name)[0]

    def __getitem__(self, name: object) -> MNISTDiffusionPipeline:
        return self._find(name)[1]

    def _find(self, name: object) -> tuple[str, MNISTDiffusionPipeline]:
        """What has this name.

        Raises:
            UserError: nothing has.
        """
        if not self._loaded:
            raise UserError(NONE_YET)
        if not isinstance(name, str) or name not in self._loaded:
            raise UserError(f"pipeline must be one of {self.names}, got {str(name)[:100]!r}")
        return self._loaded[name]
