"""`mnist-diffusion evaluate`: measure images against real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, add_options, add_switch, from_options, parse
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import pipeline_folder
from mnist_diffusion.ranks import helpers, rank
from mnist_diffusion.requests import EvaluationRequest


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure images and write a report."""
    parser = Parser(
        prog=prog,
        description="Measure generated images against real ones: a table, report.json, report.md with pictures.",
        epilog="Several schedulers, steps or scales make a sweep: --num_inference_steps 5 10 20 --guidance_scale 1 2",
    )
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="pipeline folders or Hub ids; or images that any program made: one folder per class, parquet, or files "
        "named digit_<class>_<number>.png",
    )
    add_options(parser, EvaluationRequest, skip={"sources", "names"})
    add_switch(parser, "--write_card", "write the results into the pipeline folder's card")
    values = parse(parser, argv)
    request = from_options(EvaluationRequest, values)
    card = pipeline_folder(Path(request.sources[0])) / "README.md"
    if values.write_card and len(request.sources) > 1:
        raise UserError(f"--write_card writes one card, but {len(request.sources)} sources are named")
    if values.write_card and not (card.is_file() and card.with_name("model_index.json").is_file()):
        raise UserError(f"--write_card needs a pipeline folder with a card, but there is no {card}")
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation import evaluate, report
    from mnist_diffusion.pictures.tables import console
    from mnist_diffusion.sharing.card import write_results_to_card

    with helpers(request.processes, ["evaluate", *argv]):
        set_num_threads()
        measured = evaluate.evaluate(request)
    if rank() > 0:
        return 0
    report.print_table(measured, console())
    if values.write_card:
        write_results_to_card(card.parent, measured, report.card_text(measured))
    print(f"The report is in {request.out / 'report.md'}" + (f", the card is {card}" if values.write_card else ""))
    return 0
