"""The page: tabs, controls, and which function each of them calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mnist_diffusion.app import drawing
from mnist_diffusion.app.drawing import OWN, SAMPLER_NAMES, Settings, Steering, whole, within
from mnist_diffusion.app.models import NONE_YET, Models
from mnist_diffusion.app.work import Work, figure
from mnist_diffusion.checks import require
from mnist_diffusion.diffusion.pipeline import class_names
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text

HERE = Path(__file__).parent
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "minimal"}
RECIPES = {"default": "Five minutes to digits that read as asked.", "tiny": "18 thousand parameters, in a minute."}
MAX_MINUTES, MAX_EVALUATED = 30, 5000
STEPS, SCALES = (1, 2, 4, 5, 10, 20, 50), (0.0, 1.0, 1.4, 1.9, 2.8, 5.0, 8.0)
SECONDS_BETWEEN_STEPS, SECONDS_BETWEEN_LOOKS = 0.6, 3.0
STATE_SECONDS = 900


@contextlib.contextmanager
def told_kindly() -> Iterator[None]:
    """Show what is wrong with a visitor's settings as a message on the page."""
    try:
        yield
    except (UserError, ValueError, TypeError) as error:
        raise gr.Error(str(error), print_exception=False, title="This cannot be drawn") from error


def _component(name: str, elem_id: str) -> gr.HTML:
    """One of our own: its elements and its script, in files of this folder."""
    template, script = (read_text(HERE / f"{name}.{suffix}") for suffix in ("html", "js"))
    return gr.HTML(html_template=template, js_on_load=script, apply_default_css=False, elem_id=elem_id)


@dataclass(frozen=True)
class Controls:
    """Controls that depend on the pipeline, and how each is set for one."""

    pipeline: gr.Dropdown
    set_for: list[tuple[Any, Callable[[Any], dict[str, Any]]]]

    def add(self, control: Any, values: Callable[[Any], dict[str, Any]]) -> Any:
        """Let a control follow the pipeline: `values` gives the properties that it then has."""
        self.set_for.append((control, values))
        return control

    def classes(self, kind: type, *, place: int = 0, **options: Any) -> Any:
        """A control that chooses a class by its name, or several; `place` is that of the first choice."""

        def values(pipeline: Any) -> dict[str, Any]:
            names = list(class_names(pipeline)) if pipeline is not None else []
            first = names[place % len(names)] if names else None
            return {"choices": names, "value": [first] if kind is gr.CheckboxGroup and names else first}

        return self.add(kind(choices=[], **options), values)

    def guidance(self, **options: Any) -> gr.Slider:
        """A control of the guidance scale."""

        def values(pipeline: Any) -> dict[str, Any]:
            if pipeline is None:
                return {}
            scales = pipeline.config.guidance_distilled
            only = f"This student has learned the scales {', '.join(f'{each:g}' for each in scales)}." if scales else ""
            return {"value": pipeline.config.guidance_scale, "info": only or GUIDANCE}

        return self.add(gr.Slider(0, 15, 1.9, step=0.1, label="Guidance scale", info=GUIDANCE, **options), values)

    def steps(self, **options: Any) -> gr.Slider:
        """A control of the number of steps."""
        control = gr.Slider(
            1, drawing.MAX_STEPS, 10, step=1, label="Steps", info="More steps, more looks at the picture.", **options
        )
        return self.add(control, lambda pipeline: {"value": pipeline.config.num_inference_steps} if pipeline else {})


GUIDANCE = "How hard the class is insisted on: 0 does not name it, 1 does, more makes digits clearer and more alike."
SEED = "The same number draws the same images."


def build_page(models: Models, work: Work | None, data: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        models: what it draws with.
        work: trains and evaluates; without it the page only draws.
        data: arguments that name the images to train on and to measure against.
    """
    with gr.Blocks(title="mnist-diffusion", analytics_enabled=False) as page:
        gr.Markdown("# mnist-diffusion\nWatch a diffusion model draw, and play with how it does.")
        first = models.names[:1]
        controls = Controls(
            gr.Dropdown(models.names, value=first[0] if first else None, label="Pipeline", info="Who draws."), []
        )
        with gr.Tabs(selected="generate" if first or work is None else "train"):
            for build in (_generate, _steer, _compare, _explore):
                name = build.__name__.removeprefix("_")
                with gr.Tab(name.capitalize(), id=name):
                    build(models, controls)
            if work is not None:
                with gr.Tab("Train", id="train"):
                    _train(models, work, data, controls.pipeline)
                with gr.Tab("Evaluate", id="evaluate"):
                    _evaluate(models, work, data, controls.pipeline)

        def follow(name: str | None) -> list[Any]:
            pipeline = models[name] if name in models.names else None
            return [gr.update(**values(pipeline)) for _, values in controls.set_for]

        def opened(name: str | None) -> list[Any]:
            known = name if name in models.names else next(iter(models.names), None)
            return [gr.update(choices=models.names, value=known), *follow(known)]

        followers = [control for control, _ in controls.set_for]
        controls.pipeline.change(follow, controls.pipeline, followers, queue=False, show_progress="hidden")
        page.load(opened, controls.pipeline, [controls.pipeline, *followers], queue=False, show_progress="hidden")
    page.queue(max_size=64, default_concurrency_limit=4, api_open=False)
    page.state_session_capacity = 200
    return page


def _generate(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            classes = controls.classes(gr.CheckboxGroup, place=3, label="Classes", info="What to draw.")
            count = gr.Slider(1, 16, 8, step=1, label="Images of each")
            scale, steps = controls.guidance(), controls.steps()
            sampler = gr.Dropdown(list(SAMPLER_NAMES), value=OWN, label="Sampler", info="How noise becomes images.")
            with gr.Accordion("More", open=False):
                low = gr.Slider(0, 1, 0, step=0.05, label="Guidance from", info="Time, 0 is the finished picture.")
                high = gr.Slider(0, 1, 1, step=0.05, label="Guidance to", info="Time, 1 is pure noise.")
                for place, bound in enumerate((low, high)):
                    controls.add(bound, lambda pipeline, place=place: _bound(pipeline, place))
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Draw", variant="primary")
        with gr.Column():
            film = _component("film", "generated")
            code = gr.Code(language="python", label="The same in Python", interactive=False, wrap_lines=True)

    def generate(
        name: str, classes: list[str], count: Any, scale: Any, steps: Any, sampler: str, low: Any, high: Any, seed: Any
    ) -> Iterator[tuple[Any, str]]:
        with told_kindly():
            settings = Settings(
                class_labels=tuple(classes or ()),
                num_images=count,
                guidance_scale=scale,
                guidance_interval=(low, high),
                scheduler=sampler,
                num_inference_steps=steps,
                seed=seed,
            )
            pipeline = models[name]
            python = settings.code(pipeline, models.source(name))
            for film in drawing.films(pipeline, settings):
                yield film.value(), python

    asked = [controls.pipeline, classes, count, scale, steps, sampler, low, high, seed]
    draw.click(generate, asked, [film, code], api_name="generate", **ONE_AT_A_TIME)


def _bound(pipeline: Any, place: int) -> dict[str, Any]:
    return {"value": pipeline.config.guidance_interval[place]} if pipeline is not None else {}


def _steer(models: Models, controls: Controls) -> None:
    gr.Markdown(
        "Let it draw slowly, and change class or guidance on the way: early it becomes the other digit, late it stays."
    )
    with gr.Row():
        with gr.Column():
            label = controls.classes(gr.Radio, place=3, label="Class", info="May be changed while it draws.")
            scale, steps = controls.guidance(), gr.Slider(2, 50, 20, step=1, label="Steps")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            with gr.Row():
                play, step = gr.Button("Play", variant="primary"), gr.Button("One step")
                pause, again = gr.Button("Pause"), gr.Button("From the start")
        film = _component("film", "steered")
    state = gr.State(None, time_to_live=STATE_SECONDS)
    clock = gr.Timer(SECONDS_BETWEEN_STEPS, active=False)

    def advance(
        steering: Steering | None, name: str, label: str, scale: Any, steps: Any, seed: Any
    ) -> tuple[Any, Any, Any]:
        with told_kindly():
            if steering is None or steering.over:
                whole("steps", steps, 2, 50)
                settings = Settings(
                    class_labels=(label,), num_images=1, guidance_scale=scale, num_inference_steps=steps, seed=seed
                )
                require(models[name].num_classes is not None, "pipeline", name, "class-conditional")
                steering = Steering(models[name], settings)
            steering.advance(label, scale)
            return steering, steering.film.value(), gr.update() if not steering.over else gr.update(active=False)

    asked = [state, controls.pipeline, label, scale, steps, seed]
    shown = [state, film, clock]
    for trigger, name in ((step.click, "steer"), (clock.tick, False)):
        trigger(advance, asked, shown, api_name=name, **{**ONE_AT_A_TIME, "show_progress": "hidden"})
    simple: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    play.click(lambda: gr.Timer(active=True), None, clock, **simple)
    pause.click(lambda: gr.Timer(active=False), None, clock, **simple)
    again.click(lambda: (None, None, gr.Timer(active=False)), None, shown, **simple)
    controls.pipeline.change(lambda: (None, None, gr.Timer(active=False)), None, shown, **simple)


def _compare(models: Models, controls: Controls) -> None:
    gr.Markdown("One image of each class from the same seeds, in each combination of what is chosen.")
    with gr.Row():
        with gr.Column():
            others = gr.CheckboxGroup(models.names, label="Beside which pipelines", info="A student, say.")
            samplers = gr.CheckboxGroup(list(SAMPLER_NAMES), value=[OWN, "ddim"], label="Samplers")
            steps = gr.CheckboxGroup(list(STEPS), value=[5, 10], label="Steps")
            scales = gr.CheckboxGroup(list(SCALES), value=[1.9], label="Guidance scales")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Compare", variant="primary")
        rows = gr.HTML(elem_id="compared")
    controls.add(others, lambda pipeline: {"choices": models.names})
    controls.add(
        scales, lambda pipeline: {"value": [min(SCALES, key=lambda each: abs(each - pipeline.config.guidance_scale))]}
        if pipeline else {}
    )  # fmt: skip

    def compare(
        name: str, others: list[str], samplers: list[str], steps: list[Any], scales: list[Any], seed: Any
    ) -> Iterator[str]:
        with told_kindly():
            chosen = {each: models[each] for each in dict.fromkeys([name, *(others or ())])}
            ways = {"samplers": samplers or [], "steps": steps or [], "scales": scales or []}
            for found in drawing.compared(chosen, **ways, seed=seed):
                yield _figures(found)

    asked = [controls.pipeline, others, samplers, steps, scales, seed]
    draw.click(compare, asked, rows, api_name="compare", **ONE_AT_A_TIME)


def _figures(rows: Sequence[drawing.Row]) -> str:
    return "".join(figure(row.title, row.picture, row.about) for row in rows)


def _explore(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            gr.Markdown("### Between two digits\nNoise and class are mixed on the way from one to the other.")
            one = controls.classes(gr.Dropdown, place=3, label="From class")
            seed_one = gr.Number(0, precision=0, label="From seed")
            two = controls.classes(gr.Dropdown, place=8, label="To class")
            seed_two = gr.Number(1, precision=0, label="To seed")
            frames = gr.Slider(2, drawing.MAX_FRAMES, 9, step=1, label="Images on the way")
            between_scale = controls.guidance()
            walk = gr.Button("Walk", variant="primary")
        between = gr.HTML(elem_id="between")
    with gr.Row():
        with gr.Column():
            gr.Markdown(
                "### A picture of your own, under another label\nThe noise from which the model draws your picture is "
                "found (DDIM inversion). Drawn from this noise as another class, it keeps its style."
            )
            easel = _component("easel", "easel")
            is_a = controls.classes(gr.Dropdown, place=3, label="It is a")
            as_a = controls.classes(gr.Dropdown, place=8, label="Draw it as a")
            scale = controls.guidance()
            invert = gr.Button("Draw again", variant="primary")
        inverted = gr.HTML(elem_id="inverted")

    def interpolate(name: str, one: str, seed_one: Any, two: str, seed_two: Any, frames: Any, scale: Any) -> str:
        with told_kindly():
            found = drawing.interpolated(
                models[name], classes=(one, two), seeds=(seed_one, seed_two), frames=frames, scale=scale
            )
            return _figures(found)

    def redraw(name: str, picture: Any, is_a: str, as_a: str, scale: Any) -> str:
        with told_kindly():
            pipeline = models[name]
            image = drawing.drawn_by_hand(picture, pipeline.image_shape)
            return _figures(drawing.drawn_again(pipeline, image, is_a=is_a, as_a=as_a, scale=scale))

    asked = [controls.pipeline, one, seed_one, two, seed_two, frames, between_scale]
    walk.click(interpolate, asked, between, api_name="interpolate", **ONE_AT_A_TIME)
    asked = [controls.pipeline, easel, is_a, as_a, scale]
    invert.click(redraw, asked, inverted, api_name="invert", **ONE_AT_A_TIME)


def _task(work: Work, verb: str, ended: Callable[[], list[Any]], others: Sequence[Any]) -> tuple[Any, gr.Timer, Any]:
    """A place that shows a task while it runs, and the clock that looks after it; `ended` sets `others` then."""
    shown, clock = gr.HTML(elem_id=f"{verb}-task"), gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)

    def look() -> list[Any]:
        running = work.running
        return [work.shown(verb), gr.Timer(active=running), *([gr.update()] * len(others) if running else ended())]

    simple: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    clock.tick(look, None, [shown, clock, *others], **simple)
    return shown, clock, look


def _train(models: Models, work: Work, data: Sequence[str], pipeline: gr.Dropdown) -> None:
    gr.Markdown(f"{'' if models.names else f'**{NONE_YET.capitalize()}.** '}Training goes on if you close the page.")
    with gr.Row():
        with gr.Column():
            recipe = gr.Radio(list(RECIPES), value="tiny", label="Recipe", info=" ".join(
                f"{name}: {text}" for name, text in RECIPES.items()))  # fmt: skip
            minutes = gr.Slider(1, MAX_MINUTES, 1, step=1, label="Minutes", info="It ends when these are over.")
            seed = gr.Number(0, precision=0, label="Seed", info="Of weights, noise and order.")
            start, stop = gr.Button("Train", variant="primary"), gr.Button("Stop and keep")
        with gr.Column():
            loaded: dict[str, str] = {}

            def ended() -> list[Any]:
                folder = work.trained()
                if folder is None:
                    return [gr.update()]
                if str(folder) not in loaded:
                    loaded[str(folder)] = models.add(str(folder))
                return [gr.update(choices=models.names, value=loaded[str(folder)])]

            shown, clock, look = _task(work, "train", ended, [pipeline])

    def begin(recipe: str, minutes: Any, seed: Any) -> list[Any]:
        with told_kindly():
            require(recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
            limit = within("minutes", minutes, 0.05, MAX_MINUTES)
            length = ["--train.max_steps", "null", "--train.max_minutes", str(limit)]
            often = ["--train.seed", str(whole("seed", seed, 0, drawing.MAX_SEED)), "--train.sample_every", "100 steps"]
            work.start("train", f"app-{recipe}", ["--config", recipe, *length, *often, *data], out="--output_dir")
        return look()

    outputs = [shown, clock, pipeline]
    start.click(begin, [recipe, minutes, seed], outputs, api_name="train", concurrency_limit=1)
    stop.click(work.stop, None, None, queue=False, api_visibility="private")
    recipe.change(lambda chosen: 5 if chosen == "default" else 1, recipe, minutes, queue=False, show_progress="hidden")


def _evaluate(models: Models, work: Work, data: Sequence[str], pipeline: gr.Dropdown) -> None:
    gr.Markdown("Class accuracy, Fréchet distance, precision and recall, beside what real images score.")
    with gr.Row():
        with gr.Column():
            count = gr.Slider(100, MAX_EVALUATED, 500, step=100, label="Images", info="More are surer, but slow.")
            start, stop = gr.Button("Evaluate", variant="primary"), gr.Button("Stop")
        with gr.Column():
            shown, clock, look = _task(work, "evaluate", list, [])

    def begin(name: str, count: Any) -> list[Any]:
        with told_kindly():
            number = whole("images", count, 100, MAX_EVALUATED)
            models[name]
            arguments = [models.source(name), "--num_images", str(number), *data]
            work.start("evaluate", "app-evaluation", arguments, out="--out")
        return look()

    start.click(begin, [pipeline, count], [shown, clock], api_name="evaluate", concurrency_limit=1)
    stop.click(work.stop, None, None, queue=False, api_visibility="private")
