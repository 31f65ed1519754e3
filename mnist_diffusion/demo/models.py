"""The pipelines of the app, by the names it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline


class Models:
    """Loaded pipelines and their sources.

    A pipeline has the name of its run, if it belongs to one.

    Args:
        sources: pipeline folders or Hub ids.

    Raises:
        UserError: one could not be loaded.
    """

    def __init__(self, sources: Sequence[str] = ()):
        self._loaded: dict[str, tuple[str, MNISTDiffusionPipeline]] = {}
        for source in dict.fromkeys(sources):
            path = Path(source)
            base = path.parent.name if path.name == "pipeline" and path.parent.name else source.rstrip("/")
            same = sum(name == base or name.startswith(f"{base} (") for name in self._loaded)
            self._loaded[f"{base} ({same + 1})" if same else base] = source, load_pipeline(source, device=None)

    @property
    def names(self) -> list[str]:
        """The names of the pipelines."""
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
