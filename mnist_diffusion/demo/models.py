"""The pipelines of the app, by the names it shows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline


class Models:
    """Loaded pipelines and their sources.

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
        """Load a pipeline unless it is loaded, and return its name, which is that of its run if it has one.

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
        """The names in the order they were added."""
        return list(self._loaded)

    def source(self, name: str) -> str:
        """The folder or Hub id of a pipeline."""
        return self._find(name)[0]

    def __getitem__(self, name: object) -> MNISTDiffusionPipeline:
        return self._find(name)[1]

    def _find(self, name: object) -> tuple[str, MNISTDiffusionPipeline]:
        """The source and the pipeline of a name.

        Raises:
            UserError: there is none.
        """
        if not isinstance(name, str) or name not in self._loaded:
            raise UserError(f"pipeline must be one of {self.names}, got {str(name)[:100]!r}")
        return self._loaded[name]
