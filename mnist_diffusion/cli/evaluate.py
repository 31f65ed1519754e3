"""`mnist-diffusion evaluate`: measure images against real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import add_switch
from mnist_diffusion.config import DataConfig, SchedulerName
from mnist_diffusion.errors import UserError


def parser(prog: str) -> ArgumentParser:
    """The arguments of `mnist-diffusion evaluate`."""
    made = ArgumentParser(
        prog=prog,
        description="Measure generated images against real ones: a table, report.json, report.md with pictures.",
        epilog="Several schedulers, steps or scales make a sweep: --num_inference_steps 5 10 20 --guidance_scale 1 2",
    )
    add = made.add_argument
    add(
        "source",
        type=str,
        nargs="+",
        help="pipeline folders or Hub ids; or images that any program made: one folder a class, parquet, or files "
        "named digit_<class>_<number>.png",
    )
    made.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment"})
    add("--num_images", type=PositiveInt | None, help="images to draw, the same number of each class; 10,000")
    add("--scheduler", type=SchedulerName, nargs="+", default=[], help="samplers; the folder's own where left out")
    add("--num_inference_steps", type=PositiveInt, nargs="+", default=[], help="denoising steps")
    add("--guidance_scale", type=NonNegativeFloat, nargs="+", default=[], help="guidance scales")
    add("--seed", type=NonNegativeInt, default=0, help="of the images drawn, and of choices among the real ones")
    add(
        "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, where data.source has no test split"
    )
    add("--batch_size", type=PositiveInt, default=128, help="images drawn together; changes nothing but the speed")
    add("--device", type=str | None, help="such as cpu or cuda:0; a GPU where there is one")
    add("--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="precision of the network")
    add("--evaluator", type=Path | None, help="a folder that train_evaluator left, in place of the data set's own")
    add_switch(made, "--train_on_synthetic", "also train a classifier on the images and test it on real ones")
    add_switch(made, "--imagenet_fid", "also ImageNet-Inception FID, which says little of such images")
    add_switch(made, "--write_card", "write the results into the pipeline folder's card")
    add(
        "--out", type=Path, default=Path("evaluation"), help="the folder to write to; images found there are used again"
    )
    return made


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure images and write a report."""
    values = parser(prog).parse_args(list(argv))
    card = Path(values.source[0]) / "README.md"
    if values.write_card and len(values.source) > 1:
        raise UserError(f"--write_card writes one card, and {len(values.source)} sources are named")
    if values.write_card and not (card.is_file() and card.with_name("model_index.json").is_file()):
        raise UserError(f"--write_card needs a pipeline folder with a card, but there is no {card}")
    from rich.console import Console

    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation.evaluate import Request, run
    from mnist_diffusion.evaluation.report import card_text, print_table
    from mnist_diffusion.sharing.card import write_results_to_card

    set_num_threads()
    fields = {name: values[name] for name in Request.__dataclass_fields__ if name in values and name != "data"}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    report = run(Request(sources=tuple(values.source), data=DataConfig(**values.data.as_dict()), **{**fields, **lists}))
    console = Console()
    print_table(report, console if console.is_terminal else Console(width=120))
    if values.write_card:
        about = report["data"]
        write_results_to_card(
            card.parent,
            report["results"],
            text=card_text(report),
            dataset=about["source"],
            dataset_id=about["hub_id"] or about["fingerprint"][:16],
        )
    print(f"The report is in {values.out / 'report.md'}" + (f", the card is {card}" if values.write_card else ""))
    return 0
