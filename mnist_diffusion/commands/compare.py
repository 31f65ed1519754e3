"""`mnist-diffusion compare`: curves, sample sheets and figures of several runs, or of one run's snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mnist_diffusion.config import DataConfig, TrainConfig, UserError


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
    made.add_argument(
        "--split_seed", type=NonNegativeInt, default=0, help="the runs' train.seed, where the data has no test split"
    )
    made.add_argument("--out", type=Path, default=Path("comparison"), help="the folder to write to")
    return made


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write curves.png, sheets.png and comparison.md, and show the tables."""
    values = parser(prog).parse_args(list(argv))
    from rich.console import Console  # noqa: PLC0415  (heavy)
    from rich.table import Table  # noqa: PLC0415

    from mnist_diffusion.comparison import HEADINGS, distinct_names, read_run, rows  # noqa: PLC0415
    from mnist_diffusion.evaluation.report import markdown  # noqa: PLC0415
    from mnist_diffusion.figures import compared_curves  # noqa: PLC0415
    from mnist_diffusion.gallery import sheet_of_epochs  # noqa: PLC0415
    from mnist_diffusion.launch import set_num_threads  # noqa: PLC0415
    from mnist_diffusion.visualize import side_by_side  # noqa: PLC0415

    set_num_threads(TrainConfig())
    runs = [read_run(folder) for folder in values.runs]
    names = distinct_names(runs)
    table = [[name, *row[1:]] for name, row in zip(names, rows(runs), strict=True)]
    values.out.mkdir(parents=True, exist_ok=True)
    compared_curves({name: run.lines for name, run in zip(names, runs, strict=True)}).savefig(
        values.out / "curves.png", dpi=100
    )
    lines = ["# Comparison", "", markdown(HEADINGS, table), "", "![Learning curves](curves.png)"]
    if len(runs) == 1 and runs[0].sheets:
        sheet_of_epochs(runs[0].sheets).save(values.out / "sheets.png")
    elif last := {name: list(run.sheets.values())[-1] for name, run in zip(names, runs, strict=True) if run.sheets}:
        side_by_side(list(last.values()), list(last)).save(values.out / "sheets.png")
    if (values.out / "sheets.png").is_file():
        lines += ["", "![Sample sheets, from the same seeds](sheets.png)"]
    shown = Table(*HEADINGS)
    for row in table:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    if values.num_images is not None:
        of_one = runs[0].pipelines() if len(runs) == 1 else {}
        measured = of_one or {name: run.folder / "pipeline" for name, run in zip(names, runs, strict=True)}
        lines += ["", "## Measured", "", _measured(measured, values, console)]
    (values.out / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"The comparison is in {values.out / 'comparison.md'}")
    return 0


def _measured(pipelines: dict[str, Path], values: Any, console: Any) -> str:
    """Draw from the pipelines, measure, show; the table as Markdown."""
    from mnist_diffusion.evaluation.report import markdown_table, print_table  # noqa: PLC0415  (heavy)
    from mnist_diffusion.evaluation.runner import Request, run  # noqa: PLC0415

    if missing := [name for name, folder in pipelines.items() if not (folder / "model_index.json").is_file()]:
        raise UserError(f"--num_images needs pipelines, and these runs have none: {', '.join(missing)}")
    report = run(
        Request(
            sources=tuple(str(folder) for folder in pipelines.values()),
            names=tuple(pipelines),
            data=DataConfig(**values.data.as_dict()),
            num_images=values.num_images,
            seed=values.seed,
            split_seed=values.split_seed,
            out=values.out / "evaluation",
        )
    )
    print_table(report, console)
    return markdown_table(report)
