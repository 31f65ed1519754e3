"""`mnist-diffusion space`: write, and push, a Space on the Hub that draws with a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, add_switch, parse
from mnist_diffusion.errors import UserError


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the folder, push it if asked, and say what to do with it."""
    parser = Parser(
        prog=prog,
        description="Write a Space on the Hub that draws with a pipeline (extra `onnx` for static, `app` for gradio).",
        epilog="The token is that of `hf auth login` or of HF_TOKEN; it is never an argument.",
    )
    parser.add_argument("pipeline", type=str, help="a pipeline folder, or a Hub id such as user/name")
    parser.add_argument("repo_id", type=str, help="the Space, user/name")
    parser.add_argument(
        "--kind",
        choices=("static", "gradio"),
        default="static",
        help="static: the studio, which runs in browsers; gradio: the page, which the Hub runs",
    )
    parser.add_argument("--student", type=str, default=None, help="also one distilled from it, which is shown first")
    parser.add_argument("--out", type=Path, default=Path("space"), help="the folder to write to, new or empty")
    parser.add_argument("--runtime", type=Path, default=None, help="static: the `dist` folder of onnxruntime-web")
    add_switch(parser, "--push", "push it to the Hub")
    add_switch(parser, "--private", "nobody else may see the Space")
    values = parse(parser, argv)
    out: Path = values.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must be a folder that is new or empty, got {str(out)!r}; remove it, or name another")
    if values.private and not values.push:
        raise UserError("--private has no effect without --push")
    if values.runtime is not None and values.kind == "gradio":
        raise UserError(f"--runtime={str(values.runtime)!r} has no effect with --kind gradio")
    from mnist_diffusion.diffusion.pipeline import load_pipeline

    try:
        from mnist_diffusion.app.space import push_space, write_gradio_space, write_static_space

        names = {"static": ("In few passes", "Step by step"), "gradio": ("student", "pipeline")}[values.kind]
        sources = zip(names, (values.student, values.pipeline), strict=True)
        pipelines = {name: load_pipeline(source, device="cpu") for name, source in sources if source is not None}
        title = values.repo_id.rpartition("/")[2]
        if values.kind == "static":
            write_static_space(pipelines, out, title=title, runtime=values.runtime)
        else:
            write_gradio_space(pipelines, out, title=title)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}; pip install 'mnist-diffusion[app,onnx]'") from error
    look = f"python -m http.server --bind 127.0.0.1 --directory {out}" if values.kind == "static" else "python app.py"
    print(f"The Space is in {out}; look at it with `{look}`" + ("" if values.kind == "static" else f" in {out}"))
    if values.push:
        print(f"Pushed: {push_space(out, values.repo_id, kind=values.kind, private=values.private)}")
    return 0
