"""The page: tabs, controls, and which function each of them calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from mnist_diffusion.app import drawing
from mnist_diffusion.app.drawing import OWN, SAMPLER_NAMES, Settings, Steering, whole, within
from mnist_diffusion.app.models import CLASSIFIER_FREE, Models
from mnist_diffusion.app.work import Work, figure
from mnist_diffusion.checks import require
from mnist_diffusion.config import SamplingConfig
from mnist_diffusion.diffusion.pipeline import class_names
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text

HERE = Path(__file__).parent
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RECIPES = {
    "default": "default: digits that read as asked, in five minutes.",
    "tiny": "tiny: blobs that begin to look like digits, in one.",
}
USUAL = SamplingConfig()
"""What the controls show while there is no pipeline."""
MAX_MINUTES, MAX_EVALUATED, MAX_STEERED = 30, 5000, 50
STEPS, SCALES = (1, 2, 4, 5, 10, 20, 50), (0.0, 1.0, 1.4, 1.9, 2.8, 5.0, 8.0)
SECONDS_BETWEEN_STEPS, SECONDS_BETWEEN_LOOKS = 0.6, 3.0
STATE_SECONDS = 900


@contextlib.contextmanager
def told_kindly() -> Iterator[None]:
    """Show what is wrong as a message on the page."""
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
            names = list(class_names(pipeline)) if pipeline is not None else []
            first = names[place % len(names)] if names else None
            return {"choices": names, "value": [first] if kind is gr.CheckboxGroup and names else first}

        return self.add(kind, values, **options)

    def guidance(self) -> gr.Slider:
        """A control of the guidance scale."""

        def values(pipeline: Any) -> dict[str, Any]:
            if pipeline is None:
                return {"info": GUIDANCE}
            scales = pipeline.config.guidance_distilled
            only = f"This student has learned the scales {', '.join(f'{each:g}' for each in scales)}." if scales else ""
            value = min(pipeline.config.guidance_scale, drawing.MAX_GUIDANCE)
            return {"value": value, "info": only or GUIDANCE}

        look = {"minimum": 0, "maximum": drawing.MAX_GUIDANCE, "step": 0.1, "label": "Guidance scale"}
        return self.add(gr.Slider, values, **look)

    def bound(self, place: int, **options: Any) -> gr.Slider:
        """A control of the lower or upper bound of the guidance interval."""

        def values(pipeline: Any) -> dict[str, Any]:
            return {"value": place if pipeline is None else pipeline.config.guidance_interval[place]}

        return self.add(gr.Slider, values, minimum=0, maximum=1, step=0.05, **options)

    def steps(self) -> gr.Slider:
        """A control of the number of steps."""

        def values(pipeline: Any) -> dict[str, Any]:
            steps = (USUAL if pipeline is None else pipeline.config).num_inference_steps
            return {"value": min(steps, drawing.MAX_STEPS)}

        look = {"minimum": 1, "maximum": drawing.MAX_STEPS, "step": 1, "label": "Steps", "info": STEPS_HELP}
        return self.add(gr.Slider, values, **look)


GUIDANCE = "How strongly the class is asked for. 0: not at all, 1: as trained; more: clearer digits, but more alike."
STEPS_HELP = "In how many steps noise becomes an image. More take longer."
SEED = "The same number draws the same images."


def build_page(models: Models, work: Work | None, data: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        models: what it draws with.
        work: trains and evaluates; without it the page only draws.
        data: arguments that name the images to train on and to measure against.
    """
    with gr.Blocks(title="mnist-diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# mnist-diffusion\nWatch a diffusion model draw, and play with how it does.")
        first = models.names[:1]
        chosen = gr.Dropdown(
            models.names, value=first[0] if first else None, label="Pipeline", info="The model that draws."
        )
        controls = Controls(chosen, models[first[0]] if first else None, [])
        with gr.Tabs(selected="generate" if first or work is None else "train"):
            for build in (_generate, _steer, _compare, _explore):
                name = build.__name__.removeprefix("_")
                with gr.Tab(name.capitalize(), id=name):
                    build(models, controls)
            if work is not None:
                tasks: list[tuple[Callable[[], list[Any]], list[Any]]] = []
                for build_task in (_train, _evaluate):
                    name = build_task.__name__.removeprefix("_")
                    with gr.Tab(name.capitalize(), id=name):
                        tasks.append(build_task(models, work, data, controls.pipeline))
                for look, shown in tasks:  # somebody may have started it, and closed the page
                    page.load(partial(_without_others, look), None, shown[:2], **AT_ONCE)

        def follow(name: str | None) -> list[Any]:
            pipeline = models[name] if name in models.names else None
            return [gr.update(**values(pipeline)) for _, values in controls.set_for]

        def opened(name: str | None) -> Any:
            with told_kindly():
                trained = [models.add(str(folder)) for folder in (work.trained() if work is not None else [])]
            return gr.update(choices=models.names, value=name or next(reversed(trained), None))

        followers = [control for control, _ in controls.set_for]
        controls.pipeline.change(follow, controls.pipeline, followers, **AT_ONCE)
        page.load(opened, controls.pipeline, controls.pipeline, **AT_ONCE)
    page.queue(max_size=64, api_open=False)
    page.state_session_capacity = 200
    return page


def _without_others(look: Callable[[], list[Any]]) -> list[Any]:
    """What shows a task, and its clock; who opens the page goes on with the pipeline that is chosen there."""
    return look()[:2]


def _generate(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            classes = controls.classes(gr.CheckboxGroup, place=3, label="Classes", info="What to draw.")
            count = gr.Slider(1, 16, 8, step=1, label="Images of each")
            scale, steps = controls.guidance(), controls.steps()
            with gr.Row():
                sampler = gr.Dropdown(list(SAMPLER_NAMES), value=OWN, label="Sampler", info="How noise becomes images.")
                look = {"label": "Guidance rule", "info": "Away from no class, or from a weaker model's images."}
                rule = controls.add(gr.Dropdown, partial(_rules, models), **look)
            with gr.Row():
                low = controls.bound(0, label="Guidance from", info="0: the finished image.")
                high = controls.bound(1, label="Guidance to", info="1: pure noise.")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Draw", variant="primary")
        with gr.Column():
            film = _component("film", "generated")
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
        with told_kindly():
            rules = models.rules(models[name])
            require(rule in rules, "guidance rule", str(rule)[:100], f"one of {', '.join(rules)}")
            settings = Settings(
                class_labels=tuple(classes or ()),
                num_images=count,
                guidance_scale=scale,
                guidance_interval=(low, high),
                guidance=rules[rule],
                scheduler=sampler,
                num_inference_steps=steps,
                seed=seed,
            )
            pipeline = models[name]
            python = settings.code(pipeline, models.source, name)
            for film in drawing.films(pipeline, settings, models.__getitem__):
                yield film.value(), python

    asked = [controls.pipeline, classes, count, scale, steps, sampler, low, high, rule, seed]
    draw.click(generate, asked, [film, code], api_name="generate", **ONE_AT_A_TIME)


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
        film = _component("film", "steered")
    state = gr.State(None, time_to_live=STATE_SECONDS)
    clock = gr.Timer(SECONDS_BETWEEN_STEPS, active=False)

    def advance(
        state: tuple[Steering, tuple[Any, ...]] | None, name: str, label: str, scale: Any, steps: Any, seed: Any
    ) -> tuple[Any, Any, Any]:
        with told_kindly():
            if state is None or state[0].over or state[1] != (name, steps, seed):
                whole("steps", steps, 2, MAX_STEERED)
                begin: dict[str, Any] = {"class_labels": (label,), "num_images": 1, "guidance_scale": scale}
                settings = Settings(**begin, num_inference_steps=steps, seed=seed)
                drawing.label_of(models[name], label)
                state = Steering(models[name], settings), (name, steps, seed)
            steering = state[0]
            steering.advance(label, scale)
            return state, steering.film.value(), gr.Timer(active=False) if steering.over else gr.skip()

    asked, shown = [state, controls.pipeline, label, scale, steps, seed], [state, film, clock]
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
            samplers = gr.CheckboxGroup(list(SAMPLER_NAMES), value=[OWN, "ddim"], label="Samplers")
            steps = gr.CheckboxGroup(list(STEPS), value=[5, 10], label="Steps")
            scales = controls.add(gr.CheckboxGroup, _nearest_scale, choices=list(SCALES), label="Guidance scales")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Compare", variant="primary")
        rows = gr.HTML(elem_id="compared")

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


def _nearest_scale(pipeline: Any) -> dict[str, Any]:
    usual = (USUAL if pipeline is None else pipeline.config).guidance_scale
    return {"value": [min(SCALES, key=lambda each: abs(each - usual))]}


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


def _task(work: Work, verb: str, ended: Callable[[], list[Any]], others: list[Any]) -> tuple[Any, list[Any]]:
    """Place what shows a task; a function that looks at it, and what it sets, `others` as `ended` says in the end."""
    shown, clock = gr.HTML(elem_id=f"{verb}-task"), gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)

    def look() -> list[Any]:
        running = work.running
        rest = [gr.skip()] * len(others) if running else ended()
        return [work.shown(verb), gr.Timer(active=running), *rest]

    clock.tick(look, None, outputs := [shown, clock, *others], **AT_ONCE)
    return look, outputs


def _train(models: Models, work: Work, data: Sequence[str], pipeline: gr.Dropdown) -> tuple[Any, list[Any]]:
    gr.Markdown("Training goes on if you close the page, and what it leaves can then be chosen at the top.")
    with gr.Row():
        with gr.Column():
            recipe = gr.Radio(list(RECIPES), value="default", label="Recipe", info=" ".join(RECIPES.values()))
            minutes = gr.Slider(1, MAX_MINUTES, 5, step=1, label="Minutes", info="It ends when these are over.")
            seed = gr.Number(0, precision=0, label="Seed", info="Another number trains another model.")
            start, stop = gr.Button("Train", variant="primary"), gr.Button("Stop and keep")
        with gr.Column():

            def ended() -> list[Any]:
                with told_kindly():
                    names = [models.add(str(folder)) for folder in work.trained()]
                return [gr.update(choices=models.names, value=names[-1])] if names else [gr.skip()]

            look, outputs = _task(work, "train", ended, [pipeline])

    def begin(recipe: str, minutes: Any, seed: Any) -> list[Any]:
        with told_kindly():
            require(recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
            limit = within("minutes", minutes, 1, MAX_MINUTES)
            length = ["--train.max_steps", "null", "--train.max_minutes", str(limit)]
            often = ["--train.seed", str(whole("seed", seed, 0, drawing.MAX_SEED)), "--train.sample_every", "100 steps"]
            work.start("train", f"app-{recipe}", ["--config", recipe, *length, *often, *data])
        return look()

    start.click(begin, [recipe, minutes, seed], outputs, api_name="train", concurrency_limit=1)
    stop.click(lambda: work.stop("train"), None, None, **AT_ONCE)
    return look, outputs


def _evaluate(models: Models, work: Work, data: Sequence[str], pipeline: gr.Dropdown) -> tuple[Any, list[Any]]:
    gr.Markdown("Class accuracy, Fréchet distance, precision and recall, beside what real images score.")
    with gr.Row():
        with gr.Column():
            count = gr.Slider(
                100, MAX_EVALUATED, 500, step=100, label="Images", info="More are surer, and take longer."
            )
            start, stop = gr.Button("Evaluate", variant="primary"), gr.Button("Stop")
        with gr.Column():
            look, outputs = _task(work, "evaluate", list, [])

    def begin(name: str, count: Any) -> list[Any]:
        with told_kindly():
            number = whole("images", count, 100, MAX_EVALUATED)
            work.start("evaluate", "app-evaluation", [models.source(name), "--num_images", str(number), *data])
        return look()

    start.click(begin, [pipeline, count], outputs, api_name="evaluate", concurrency_limit=1)
    stop.click(lambda: work.stop("evaluate"), None, None, **AT_ONCE)
    return look, outputs
