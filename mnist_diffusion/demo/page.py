"""The app: its tabs and controls, and the functions they call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from mnist_diffusion.demo import drawing
from mnist_diffusion.demo.drawing import (
    PIPELINE_DEFAULT,
    SAMPLER_CHOICES,
    Request,
    Steering,
    check_choice,
    check_int,
    check_range,
    settings_from,
)
from mnist_diffusion.demo.jobs import JobRunner, figure
from mnist_diffusion.demo.models import CLASSIFIER_FREE, Models
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text
from mnist_diffusion.pipelines.drawing import class_names

HERE = Path(__file__).parent
MAX_WAITING, MAX_SESSIONS = 64, 100
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RECIPES = {
    "default": "default: legible digits, in five minutes.",
    "tiny": "tiny: blobs that begin to look like digits, in one.",
}
MAX_MINUTES, MAX_STEERED = 30, 50
STEPS, SCALES = (1, 2, 4, 5, 10, 20, 50), (0.0, 1.0, 1.4, 1.9, 2.8, 5.0, 8.0)
SECONDS_BETWEEN_STEPS, SECONDS_BETWEEN_LOOKS = 0.6, 3.0
STATE_SECONDS = 900


@contextlib.contextmanager
def errors_as_toast() -> Iterator[None]:
    """Show errors as messages on the page."""
    try:
        yield
    except (UserError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _component(name: str, elem_id: str) -> gr.HTML:
    """One of our own: its elements and its script, in files of this folder."""
    template, script = (read_text(HERE / f"{name}.{suffix}") for suffix in ("html", "js"))
    return gr.HTML(html_template=template, js_on_load=script, apply_default_css=False, elem_id=elem_id)


@dataclass(frozen=True)
class Controls:
    """Controls that depend on the pipeline, and how each is set for one."""

    pipeline: gr.Dropdown
    first: Any
    set_for: list[tuple[Any, Callable[[Any], dict[str, Any]]]]

    def add(self, kind: Callable[..., Any], values: Callable[[Any], dict[str, Any]], **options: Any) -> Any:
        """A control of this kind that follows the pipeline: `values` gives the properties that it then has."""
        control = kind(**{**options, **values(self.first)})
        self.set_for.append((control, values))
        return control

    def classes(self, kind: type, *, place: int = 0, **options: Any) -> Any:
        """A control that chooses a class by its name, or several; `place` is that of the first choice."""

        def values(pipeline: Any) -> dict[str, Any]:
            names = list(class_names(pipeline))
            first = names[place % len(names)] if names else None
            return {"choices": names, "value": [first] if kind is gr.CheckboxGroup and names else first}

        return self.add(kind, values, **options)

    def guidance(self) -> gr.Slider:
        """A control of the guidance scale."""

        def values(pipeline: Any) -> dict[str, Any]:
            scales = pipeline.config.guidance_distilled
            only = (
                f"This student was distilled at the scales {', '.join(f'{each:g}' for each in scales)}."
                if scales
                else ""
            )
            value = min(pipeline.config.guidance_scale, drawing.MAX_GUIDANCE)
            return {"value": value, "info": only or GUIDANCE}

        look = {"minimum": 0, "maximum": drawing.MAX_GUIDANCE, "step": 0.1, "label": "Guidance scale"}
        return self.add(gr.Slider, values, **look)

    def bound(self, place: int, **options: Any) -> gr.Slider:
        """A control of the lower or upper bound of the guidance interval."""

        def values(pipeline: Any) -> dict[str, Any]:
            return {"value": pipeline.config.guidance_interval[place]}

        return self.add(gr.Slider, values, minimum=0, maximum=1, step=0.05, **options)

    def steps(self) -> gr.Slider:
        """A control of the number of steps."""

        def values(pipeline: Any) -> dict[str, Any]:
            return {"value": min(pipeline.config.num_inference_steps, drawing.MAX_STEPS)}

        look = {"minimum": 1, "maximum": drawing.MAX_STEPS, "step": 1, "label": "Steps", "info": STEPS_HELP}
        return self.add(gr.Slider, values, **look)


GUIDANCE = "How closely samples follow the class. 0: unconditional, 1: as trained; more: clearer digits, less variety."
STEPS_HELP = "Denoising steps. More take longer."
SEED = "The same seed gives the same images."


def build_page(models: Models, jobs: JobRunner | None, data: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        models: what it draws with.
        jobs: runs trainings; without it the app only samples.
        data: flags of `mnist-diffusion train` that name the images.
    """
    with gr.Blocks(title="mnist-diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# mnist-diffusion\nWatch a diffusion model sample, and change how it does.")
        first = models.names[0]
        chosen = gr.Dropdown(models.names, value=first, label="Pipeline", info="The model to sample from.")
        controls = Controls(chosen, models[first], [])
        with gr.Tabs():
            for build in (_generate, _steer, _compare, _explore):
                name = build.__name__.removeprefix("_")
                with gr.Tab(name.capitalize(), id=name):
                    build(models, controls)
            if jobs is not None:
                with gr.Tab("Train", id="train"):
                    refresh, shown = _train(models, jobs, data, controls.pipeline)
                # Somebody may have started a run and closed the page; the pipeline chosen there stays.
                page.load(lambda: refresh()[:2], None, shown[:2], **AT_ONCE)

        def follow(name: str) -> list[Any]:
            with errors_as_toast():
                return [gr.update(**values(models[name])) for _, values in controls.set_for]

        def opened(name: str) -> Any:
            with errors_as_toast():
                for folder in jobs.pipelines() if jobs is not None else []:
                    models.add(str(folder))
            return gr.update(choices=models.names, value=name)

        followers = [control for control, _ in controls.set_for]
        controls.pipeline.change(follow, controls.pipeline, followers, **AT_ONCE)
        page.load(opened, controls.pipeline, controls.pipeline, **AT_ONCE)
    page.queue(max_size=MAX_WAITING, api_open=False)
    page.state_session_capacity = MAX_SESSIONS
    page._queue.pending_messages_per_session.max_size = MAX_SESSIONS  # drawings that nobody has fetched yet
    return page


def _generate(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            classes = controls.classes(gr.CheckboxGroup, place=3, label="Classes", info="Classes to sample.")
            count = gr.Slider(1, 16, 8, step=1, label="Images of each")
            scale, steps = controls.guidance(), controls.steps()
            with gr.Row():
                sampler = gr.Dropdown(
                    list(SAMPLER_CHOICES), value=PIPELINE_DEFAULT, label="Sampler", info="Denoising algorithm."
                )
                look = {
                    "label": "Guidance rule",
                    "info": "Guide away from the unconditional prediction, or from a weaker model.",
                }
                rule = controls.add(gr.Dropdown, partial(_rules, models), **look)
            with gr.Row():
                low = controls.bound(0, label="Guidance from", info="0: the finished image.")
                high = controls.bound(1, label="Guidance to", info="1: pure noise.")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Sample", variant="primary")
        with gr.Column():
            player = _component("player", "generated")
            code = gr.Code(language="python", label="The same in Python", interactive=False, wrap_lines=True)

    def generate(
        name: str,
        classes: list[str],
        count: Any,
        scale: Any,
        steps: Any,
        sampler: str,
        low: Any,
        high: Any,
        rule: str,
        seed: Any,
    ) -> Iterator[tuple[Any, str]]:
        with errors_as_toast():
            rules = models.rules(models[name])
            chosen = rules[check_choice("guidance rule", rule, list(rules))]
            settings = settings_from(scheduler=sampler, steps=steps, scale=scale, interval=(low, high), rule=chosen)
            request = Request(class_labels=tuple(classes or ()), num_images=count, settings=settings, seed=seed)
            pipeline = models[name]
            python = request.code(pipeline, models.source, name)
            for frames in drawing.stream_frames(pipeline, request, models.__getitem__):
                yield frames.value(), python

    asked = [controls.pipeline, classes, count, scale, steps, sampler, low, high, rule, seed]
    draw.click(generate, asked, [player, code], api_name="generate", **ONE_AT_A_TIME)


def _rules(models: Models, pipeline: Any) -> dict[str, Any]:
    return {"choices": list(models.rules(pipeline)), "value": CLASSIFIER_FREE}


def _steer(models: Models, controls: Controls) -> None:
    gr.Markdown(
        "Let a digit form slowly, and choose another class or guidance meanwhile. An early change makes another "
        "digit, a late one changes little."
    )
    with gr.Row():
        with gr.Column():
            label = controls.classes(gr.Radio, place=3, label="Class", info="May be changed while the digit forms.")
            scale, steps = controls.guidance(), gr.Slider(2, MAX_STEERED, 20, step=1, label="Steps")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            with gr.Row():
                play, step = gr.Button("Play", variant="primary"), gr.Button("One step")
                pause, again = gr.Button("Pause"), gr.Button("From the start")
        player = _component("player", "steered")
    state = gr.State(None, time_to_live=STATE_SECONDS)
    clock = gr.Timer(SECONDS_BETWEEN_STEPS, active=False)

    def advance(
        state: tuple[Steering, tuple[Any, ...]] | None, name: str, label: str, scale: Any, steps: Any, seed: Any
    ) -> tuple[Any, Any, Any]:
        with errors_as_toast():
            if state is None or state[0].over or state[1] != (name, steps, seed):
                check_int("steps", steps, 2, MAX_STEERED)
                drawing.label_of(models[name], label)
                settings = settings_from(scheduler=PIPELINE_DEFAULT, steps=steps, scale=scale)
                request = Request(class_labels=(label,), num_images=1, settings=settings, seed=seed)
                state = Steering(models[name], request), (name, steps, seed)
            steering = state[0]
            steering.advance(label, scale)
            return state, steering.player.value(), gr.Timer(active=False) if steering.over else gr.skip()

    asked, shown = [state, controls.pipeline, label, scale, steps, seed], [state, player, clock]
    for trigger, name in ((step.click, "steer"), (clock.tick, None)):
        hidden = {} if name else {"api_visibility": "private"}
        step_done = trigger(advance, asked, shown, api_name=name, **{**ONE_AT_A_TIME, **hidden})
        step_done.failure(lambda: gr.Timer(active=False), None, clock, **AT_ONCE)
    play.click(lambda: gr.Timer(active=True), None, clock, **AT_ONCE)
    pause.click(lambda: gr.Timer(active=False), None, clock, **AT_ONCE)
    for begun_anew in (again.click, controls.pipeline.change):
        begun_anew(lambda: (None, None, gr.Timer(active=False)), None, shown, **AT_ONCE)


def _compare(models: Models, controls: Controls) -> None:
    gr.Markdown("One image of each class from the same seeds, in each combination of what is chosen.")
    with gr.Row():
        with gr.Column():
            others = controls.add(
                gr.CheckboxGroup, lambda pipeline: {"choices": models.names}, label="Also with", info="Other pipelines."
            )
            samplers = gr.CheckboxGroup(list(SAMPLER_CHOICES), value=[PIPELINE_DEFAULT, "ddim"], label="Samplers")
            steps = gr.CheckboxGroup(list(STEPS), value=[5, 10], label="Steps")
            scales = controls.add(gr.CheckboxGroup, _nearest_scale, choices=list(SCALES), label="Guidance scales")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Compare", variant="primary")
        rows = gr.HTML(elem_id="compared")

    def compare(
        name: str, others: list[str], samplers: list[str], steps: list[Any], scales: list[Any], seed: Any
    ) -> Iterator[str]:
        with errors_as_toast():
            chosen = {each: models[each] for each in dict.fromkeys([name, *(others or ())])}
            ways = {"samplers": samplers or [], "steps": steps or [], "scales": scales or []}
            for found in drawing.compared(chosen, **ways, seed=seed):
                yield _figures(found)

    asked = [controls.pipeline, others, samplers, steps, scales, seed]
    draw.click(compare, asked, rows, api_name="compare", **ONE_AT_A_TIME)


def _nearest_scale(pipeline: Any) -> dict[str, Any]:
    return {"value": [min(SCALES, key=lambda each: abs(each - pipeline.config.guidance_scale))]}


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
                "### Redraw your picture as another class\nDDIM inversion finds the noise that generates your "
                "picture. Sampled from this noise as another class, it keeps its style."
            )
            sketchpad = _component("sketchpad", "sketchpad")
            is_a = controls.classes(gr.Dropdown, place=3, label="It is a")
            as_a = controls.classes(gr.Dropdown, place=8, label="Draw it as a")
            scale = controls.guidance()
            invert = gr.Button("Draw again", variant="primary")
        inverted = gr.HTML(elem_id="inverted")

    def interpolate(name: str, one: str, seed_one: Any, two: str, seed_two: Any, frames: Any, scale: Any) -> str:
        with errors_as_toast():
            found = drawing.interpolated(
                models[name], classes=(one, two), seeds=(seed_one, seed_two), frames=frames, scale=scale
            )
            return _figures(found)

    def redraw(name: str, picture: Any, is_a: str, as_a: str, scale: Any) -> str:
        with errors_as_toast():
            pipeline = models[name]
            image = drawing.decode_sketch(picture, pipeline.image_shape)
            rows = drawing.reconstruct(pipeline, image, source_class=is_a, target_class=as_a, scale=scale)
            return _figures(rows)

    asked = [controls.pipeline, one, seed_one, two, seed_two, frames, between_scale]
    walk.click(interpolate, asked, between, api_name="interpolate", **ONE_AT_A_TIME)
    asked = [controls.pipeline, sketchpad, is_a, as_a, scale]
    invert.click(redraw, asked, inverted, api_name="invert", **ONE_AT_A_TIME)


def _train(models: Models, jobs: JobRunner, data: Sequence[str], pipeline: gr.Dropdown) -> tuple[Any, list[Any]]:
    """The Train tab; the function that refreshes it, and the components it sets."""
    gr.Markdown("Training continues if you close the page. Its pipeline can then be chosen at the top.")
    with gr.Row():
        with gr.Column():
            recipe = gr.Radio(list(RECIPES), value="default", label="Recipe", info=" ".join(RECIPES.values()))
            minutes = gr.Slider(1, MAX_MINUTES, 5, step=1, label="Minutes", info="Training time.")
            seed = gr.Number(0, precision=0, label="Seed", info="Another seed trains another model.")
            start, stop = gr.Button("Train", variant="primary"), gr.Button("Stop and keep")
        with gr.Column():
            status, clock = gr.HTML(elem_id="train-job"), gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)
    outputs = [status, clock, pipeline]

    def refresh() -> list[Any]:
        running, chosen = jobs.running, gr.skip()
        if not running:
            with errors_as_toast():
                names = [models.add(str(folder)) for folder in jobs.pipelines()]
            chosen = gr.update(choices=models.names, value=names[-1]) if names else gr.skip()
        return [jobs.status_html(), gr.Timer(active=running), chosen]

    def begin(recipe: str, minutes: Any, seed: Any) -> list[Any]:
        with errors_as_toast():
            check_choice("recipe", recipe, list(RECIPES))
            limit = check_range("minutes", minutes, 1, MAX_MINUTES)
            length = ["--train.max_steps", "null", "--train.max_minutes", str(limit)]
            number = str(check_int("seed", seed, 0, drawing.MAX_SEED))
            options = ["--train.seed", number, "--train.sample_every", "100 steps"]
            jobs.start(f"app-{recipe}", ["--config", recipe, *length, *options, *data])
        return refresh()

    clock.tick(refresh, None, outputs, **AT_ONCE)
    start.click(begin, [recipe, minutes, seed], outputs, api_name="train", concurrency_limit=1)
    stop.click(jobs.stop, None, None, **AT_ONCE)
    return refresh, outputs
