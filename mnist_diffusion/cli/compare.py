"""`mnist-diffusion compare`: curves, sample sheets and figures of several runs, or of one run's snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mnist_diffusion.config import DataConfig
from mnist_diffusion.errors import UserError


def parser(prog: str) -> ArgumentParser:
    """The arguments of `mnist-diffusion compare`."""
    made = ArgumentParser(
        prog=prog,
        description="Set runs beside each other, or the snapshots of one run: curves, sample sheets, a table.",
        epilog="With --num_images their pipelines are drawn from, from the same seeds, and measured.",
    )
    made.add_argument("runs", type=Path, nargs="+", help="run folders; of a single one, its snapshots")
    made.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment", "balance"})
    made.add_argument("--num_images", type=PositiveInt | None, help="images to draw and measure of each pipeline")
    made.add_argument("--seed", type=NonNegativeInt, default=0, help="of the images")
    made.add_argument("--split_seed", type=NonNegativeInt | None, help="the runs' train.seed; their own if left out")
    made.add_argument("--out", type=Path, default=Path("comparison"), help="the folder to write to")
    return made


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write curves.png, sheets.png and comparison.md, and show the tables."""
    values = parser(prog).parse_args(list(argv))
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation.evaluate import run
    from mnist_diffusion.evaluation.report import card_text, markdown, print_table
    from mnist_diffusion.files import replace_text
    from mnist_diffusion.pictures.compare import HEADINGS, distinct_names, rows, sheet_of_epochs
    from mnist_diffusion.pictures.grids import save_picture, side_by_side
    from mnist_diffusion.pictures.plots import compared_curves, to_picture
    from mnist_diffusion.run_folder.read import read_run

    set_num_threads()
    runs = [read_run(folder) for folder in values.runs]
    names = distinct_names(runs)
    request = _request(runs, names, values) if values.num_images is not None else None
    table = [[name, *row[1:]] for name, row in zip(names, rows(runs), strict=True)]
    values.out.mkdir(parents=True, exist_ok=True)
    curves = compared_curves({name: each.lines for name, each in zip(names, runs, strict=True)})
    save_picture(to_picture(curves), values.out / "curves.png")
    lines = ["# Comparison", "", markdown(HEADINGS, table), "", "![Learning curves](curves.png)"]
    last = {name: each.sheets[-1].picture for name, each in zip(names, runs, strict=True) if each.sheets}
    if last:
        sheets = sheet_of_epochs(runs[0].sheets) if len(runs) == 1 else side_by_side(list(last.values()), list(last))
        save_picture(sheets, values.out / "sheets.png")
        lines += ["", "![Sample sheets, from the same seeds](sheets.png)"]
    shown = Table(*HEADINGS)
    for row in table:
        shown.add_row(*(escape(cell) for cell in row))
    console = Console()
    console.print(shown)
    page = values.out / "comparison.md"
    replace_text(page, "\n".join(lines) + "\n")
    if request is not None:
        report = run(request)
        print_table(report, console)
        lines += ["", "## Measured", "", card_text(report)]
        replace_text(page, "\n".join(lines) + "\n")
    print(f"The comparison is in {page}")
    return 0


def _request(runs: Sequence[Any], names: Sequence[str], values: Any) -> Any:
    """What is to be measured: the pipelines of the runs, or of a single run all it has left.

    Raises:
        UserError: a run has no pipeline, or the runs saw different images and none are named.
    """
    from mnist_diffusion.evaluation.evaluate import Request

    found = [run.pipelines() for run in runs]
    if missing := [name for name, pipelines in zip(names, found, strict=True) if "pipeline" not in pipelines]:
        raise UserError(f"--num_images needs pipelines, and these runs have none: {', '.join(missing)}")
    pipelines = found[0] if len(runs) == 1 else {n: each["pipeline"] for n, each in zip(names, found, strict=True)}
    data, split_seed = DataConfig(**values.data.as_dict()), values.split_seed or 0
    if data == DataConfig():
        seen = [run.data() for run in runs]
        # The same images whatever the seeds, where none had to choose the held-out ones.
        told = [(each[0], run.summary.get("data_fingerprint", each[1])) for run, each in zip(runs, seen, strict=True)]
        if any(each != told[0] for each in told):
            raise UserError("the runs saw different images; name those to measure against with --data.source")
        data, split_seed = seen[0][0], seen[0][1] if values.split_seed is None else values.split_seed
    return Request(
        sources=tuple(str(folder) for folder in pipelines.values()),
        names=tuple(pipelines),
        data=data,
        num_images=values.num_images,
        seed=values.seed,
        split_seed=split_seed,
        out=values.out / "evaluation",
    )
