"""`mnist-diffusion space`: write, and push, a Space on the Hub that samples from a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.errors import UserError
from mnist_diffusion.option_types import STRICT, FilePath, Place, Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Write a Space that samples from a pipeline (extra `onnx` for static, `app` for gradio).

    The token is that of `hf auth login` or of HF_TOKEN; it is never an argument.
    """

    pipeline: Place
    """Pipeline folder, run folder, or Hub id such as user/name."""
    repo_id: Text
    """Repository of the Space, user/name."""
    kind: Literal["static", "gradio"] = "static"
    """The studio, which runs in browsers (static), or the app, which runs on the Hub (gradio)."""
    student: Place | None = None
    """Distilled student pipeline; listed first."""
    out: FilePath = Path("space")
    """Output folder, which must be empty or missing."""
    runtime: FilePath | None = None
    """For static: the `dist` folder of onnxruntime-web; downloaded with npm if omitted."""
    push: bool = False
    """Push the Space to the Hub."""
    private: bool = False
    """Create a private Space."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the folder, push it if asked, and print what to do with it."""
    options: Options = Parser(Options, "pipeline", "repo_id", prog=prog).read(argv)
    out, static = options.out, options.kind == "static"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={str(out)!r} must be an empty or a new folder")
    if options.private and not options.push:
        raise UserError("private=true has no effect without push")
    if options.runtime is not None and not static:
        raise UserError(f"runtime={str(options.runtime)!r} has no effect with kind=gradio")
    from mnist_diffusion.hub_client import require_login
    from mnist_diffusion.pipelines.drawing import load_pipeline

    if options.push:
        require_login(options.repo_id)
    try:
        from mnist_diffusion.demo.space import push_space, write_gradio_space, write_static_space

        names = ("One step or a few", "Step by step") if static else ("student", "pipeline")
        sources = zip(names, (options.student, options.pipeline), strict=True)
        pipelines = {name: load_pipeline(source, device="cpu") for name, source in sources if source is not None}
        title = options.repo_id.rpartition("/")[2]
        if static:
            write_static_space(pipelines, out, title=title, runtime=options.runtime)
        else:
            write_gradio_space(pipelines, out, title=title)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}; pip install 'mnist-diffusion[app,onnx]'") from error
    try_it = f"python -m http.server --bind 127.0.0.1 --directory {out}" if static else f"cd {out} && python app.py"
    print(f"The Space is in {out}; try it with `{try_it}`")
    if options.push:
        print(f"Pushed: {push_space(out, options.repo_id, kind=options.kind, private=options.private)}")
    return 0
