"""`mnist-diffusion evaluate`: score images against real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import pipeline_folder


def main(argv: Sequence[str], *, prog: str) -> int:
    """Score images and write a report."""
    options: EvaluationOptions = Parser(EvaluationOptions, "sources", prog=prog).read(argv)
    if not options.sources:
        from mnist_diffusion.pipelines.drawing import default_sources

        options = dataclasses.replace(options, sources=default_sources()[:1])
    card = pipeline_folder(Path(options.sources[0])) / "README.md"
    if options.write_card and len(options.sources) > 1:
        raise UserError(f"--write_card writes one card, but {len(options.sources)} sources are named")
    if options.write_card and not (card.is_file() and card.with_name("model_index.json").is_file()):
        raise UserError(f"--write_card needs a pipeline folder with a card, but there is no {card}")
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation import evaluate, report
    from mnist_diffusion.parallel import in_processes, is_main
    from mnist_diffusion.pipelines.card import write_results_to_card
    from mnist_diffusion.plots.tables import console

    def work() -> int:
        set_num_threads()
        scores = evaluate.evaluate(options)
        if is_main():
            report.print_table(scores, console())
            if options.write_card:
                write_results_to_card(card.parent, scores, report.card_text(scores))
            written = f", the card is {card}" if options.write_card else ""
            print(f"The report is in {options.out / 'report.md'}{written}")
        return 0

    return in_processes(options.processes, ["evaluate", *argv], work)
