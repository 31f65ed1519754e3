"""`mnist-diffusion compare`: compare runs, or one run's snapshots, by curves, sample sheets and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import Parser, parse
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.errors import UserError
from mnist_diffusion.requests import EvaluationRequest


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write curves.png, sheets.png and comparison.md, and show the tables."""
    parser = Parser(
        prog=prog,
        description="Compare runs, or the snapshots of one run: curves, sample sheets, a table.",
        epilog="With --num_images their pipelines draw images from the same seeds, which are measured.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; of a single one, its snapshots")
    parser.add_class_arguments(ImagesConfig, "data")
    parser.add_argument("--num_images", type=PositiveInt | None, help="images to draw and measure of each pipeline")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the images")
    parser.add_argument("--split_seed", type=NonNegativeInt | None, help="the runs' train.seed; their own if omitted")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="the folder to write to")
    values = parse(parser, argv)
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation import evaluate, report
    from mnist_diffusion.files import replace_picture, replace_text
    from mnist_diffusion.pictures import compare, plots, tables
    from mnist_diffusion.run_folder.read import read_run

    set_num_threads()
    runs = compare.by_name([read_run(folder) for folder in values.runs])
    request = _request(runs, values) if values.num_images is not None else None
    table = compare.rows(runs)
    values.out.mkdir(parents=True, exist_ok=True)
    groups = [{name: run.lines for name, run in group.items()} for group in compare.by_objective(runs)]
    replace_picture(plots.to_picture(plots.compared_curves(groups)), values.out / "curves.png")
    lines = ["# Comparison", "", tables.markdown(compare.HEADINGS, table), "", "![Learning curves](curves.png)"]
    apart = "Losses of different objectives do not compare, and are drawn apart."
    lines += ["", apart] if len(groups) > 1 else []
    if differences := compare.settings_that_differ(runs):
        lines += ["", "## Settings that differ", "", tables.markdown(["setting", *runs], differences)]
    if (sheets := compare.compared_sheets(runs)) is not None:
        replace_picture(sheets, values.out / "sheets.png")
        lines += ["", "![Sample sheets, from the same seeds](sheets.png)"]
    console, page = tables.console(), values.out / "comparison.md"
    console.print(tables.screen_table(compare.HEADINGS, table))
    if differences:
        console.print(tables.screen_table(["setting", *runs], differences))
    if len(groups) > 1:
        console.print(apart)
    replace_text(page, "\n".join(lines) + "\n")
    if request is not None:
        measured = evaluate.evaluate(request)
        report.print_table(measured, console)
        replace_text(page, "\n".join([*lines, "", "## Measured", "", report.card_text(measured)]) + "\n")
    print(f"The comparison is in {page}")
    return 0


def _request(runs: Mapping[str, Any], values: Any) -> EvaluationRequest:
    """What is to be measured: the pipelines of the runs, or all pipelines of a single run.

    Raises:
        UserError: a run has no pipeline, or the runs were trained on different images and none are named.
    """
    from mnist_diffusion.run_folder.read import images_of_run

    found = {name: run.pipelines() for name, run in runs.items()}
    if missing := [name for name, pipelines in found.items() if "pipeline" not in pipelines]:
        raise UserError(f"--num_images needs pipelines, and these runs have none: {', '.join(missing)}")
    last = {name: pipelines["pipeline"] for name, pipelines in found.items()}
    pipelines = last if len(runs) > 1 else found.popitem()[1]
    data, split_seed = values.data, 0
    if data == ImagesConfig():
        # The same images whatever the seeds, if the source itself has held-out ones.
        saw = [(run, *images_of_run(run.folder / "config.yaml")) for run in runs.values()]
        if len({(images, run.summary.get("data_fingerprint", seed)) for run, images, seed in saw}) > 1:
            raise UserError("the runs saw different images; name those to measure against with --data.source")
        _, data, split_seed = saw[0]
    return EvaluationRequest(
        sources=tuple(str(folder) for folder in pipelines.values()),
        names=tuple(pipelines),
        data=data,
        num_images=values.num_images,
        seed=values.seed,
        split_seed=split_seed if values.split_seed is None else values.split_seed,
        out=values.out / "evaluation",
    )
