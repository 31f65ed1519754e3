"""The app: its tabs and controls, and the functions they call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import LRUCache

from mnist_diffusion.demo import drawing
from mnist_diffusion.demo.drawing import PIPELINE_DEFAULT, SAMPLER_CHOICES, check_int
from mnist_diffusion.demo.models import Models
from mnist_diffusion.files import read_text
from mnist_diffusion.pipelines.drawing import class_names

HERE = Path(__file__).parent
MAX_WAITING, MAX_SESSIONS, MAX_UNFETCHED = 64, 100, 200
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
MAX_STEERED = 50
STEPS, SCALES = (1, 2, 4, 5, 10, 20, 50), (0.0, 1.0, 1.25, 1.4, 2.0, 2.8, 5.0)
SECONDS_BETWEEN_STEPS = 0.6
STATE_SECONDS = 900


class FewMessages(asyncio.Queue[Any]):
    """Messages to a session; the oldest are dropped while too many are unfetched."""

    def put_nowait(self, item: Any) -> None:
        """Put a message, in place of the oldest if there are too many."""
        if self.qsize() >= MAX_UNFETCHED:
            self.get_nowait()
        super().put_nowait(item)


class Unfetched(LRUCache[str, Any]):
    """Gradio's messages that visitors have not fetched yet, by session: of few sessions, and few of each."""

    def __setitem__(self, session: str, messages: Any) -> None:
        super().__setitem__(session, FewMessages())


@contextlib.contextmanager
def errors_as_toast() -> Iterator[None]:
    """Show errors as messages on the page."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _component(name: str, elem_id: str) -> gr.HTML:
    """Build a custom component from `<name>.html` and `<name>.js` in this folder."""
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
            scales = ", ".join(f"{each:g}" for each in pipeline.config.guidance_distilled or ())
            info = f"This student was distilled at the scales {scales}." if scales else GUIDANCE
            return {"value": min(pipeline.config.guidance_scale, drawing.MAX_GUIDANCE), "info": info}

        look = {"minimum": 0, "maximum": drawing.MAX_GUIDANCE, "step": 0.1, "label": "Guidance scale"}
        return self.add(gr.Slider, values, **look)

    def steps(self) -> gr.Slider:
        """A control of the number of steps."""
        most = drawing.MAX_STEPS
        look = {"minimum": 1, "maximum": most, "step": 1, "label": "Steps", "info": STEPS_HELP}
        return self.add(gr.Slider, lambda pipeline: {"value": min(pipeline.config.num_inference_steps, most)}, **look)


GUIDANCE = "How closely samples follow the class. 0: unconditional, 1: as trained; more: clearer images, less variety."
STEPS_HELP = "Denoising steps. More take longer."
SEED = "The same seed gives the same images."


def build_page(models: Models) -> gr.Blocks:
    """The page, which samples from these models."""
    with gr.Blocks(title="mnist-diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# mnist-diffusion\nWatch a diffusion model sample, and change how it does.")
        first = models.names[0]
        picker = gr.Dropdown(models.names, value=first, label="Pipeline", info="The model to sample from.")
        controls = Controls(picker, models[first], [])
        with gr.Tabs():
            for build in (_generate, _steer, _compare, _explore):
                name = build.__name__.removeprefix("_")
                with gr.Tab(name.capitalize(), id=name):
                    build(models, controls)

        def follow(name: str) -> list[Any]:
            with errors_as_toast():
                return [gr.update(**values(models[name])) for _, values in controls.set_for]

        followers = [control for control, _ in controls.set_for]
        controls.pipeline.change(follow, controls.pipeline, followers, **AT_ONCE)
    page.queue(max_size=MAX_WAITING, api_open=False)
    page.state_session_capacity = MAX_SESSIONS
    page._queue.pending_messages_per_session = Unfetched(MAX_SESSIONS)
    return page


def _generate(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            classes = controls.classes(gr.CheckboxGroup, place=3, label="Classes", info="Classes to sample.")
            count = gr.Slider(1, 16, 8, step=1, label="Images of each")
            scale, steps = controls.guidance(), controls.steps()
            sampler = gr.Dropdown(
                list(SAMPLER_CHOICES), value=PIPELINE_DEFAULT, label="Sampler", info="Denoising algorithm."
            )
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Sample", variant="primary")
        with gr.Column():
            player = _component("player", "generated")
            code = gr.Code(language="python", label="The same in Python", interactive=False, wrap_lines=True)

    def generate(name, classes, count, scale, steps, sampler, seed):  # of whatever types
        with errors_as_toast():
            how = {"sampler": sampler, "steps": steps, "scale": scale}
            request = drawing.request_of(classes=classes or (), count=count, seed=seed, **how)
            python = request.code(models[name], models.source(name))
            for value in drawing.stream_frames(models[name], request):
                yield value, python

    inputs = [controls.pipeline, classes, count, scale, steps, sampler, seed]
    draw.click(generate, inputs, [player, code], api_name="generate", **ONE_AT_A_TIME)


def _steer(models: Models, controls: Controls) -> None:
    gr.Markdown(
        "Let an image form slowly, and choose another class or guidance meanwhile. An early change makes another "
        "image, a late one changes little."
    )
    with gr.Row():
        with gr.Column():
            label = controls.classes(gr.Radio, place=3, label="Class", info="May be changed while the image forms.")
            scale, steps = controls.guidance(), gr.Slider(2, MAX_STEERED, 20, step=1, label="Steps")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            with gr.Row():
                play, step = gr.Button("Play", variant="primary"), gr.Button("One step")
                pause, again = gr.Button("Pause"), gr.Button("From the start")
        player = _component("player", "steered")
    state = gr.State(None, time_to_live=STATE_SECONDS)
    clock = gr.Timer(SECONDS_BETWEEN_STEPS, active=False)

    def advance(state, name, label, scale, steps, seed):
        with errors_as_toast():
            if state is None or state[0].over or state[1] != (name, steps, seed):
                check_int("steps", steps, 2, MAX_STEERED)
                how = {"sampler": PIPELINE_DEFAULT, "steps": steps, "scale": scale}
                request = drawing.request_of(classes=[label], count=1, seed=seed, **how)
                state = drawing.Drawing(models[name], request), (name, steps, seed)
            value = drawing.steered(state[0], label, scale)
            return state, value, gr.Timer(active=False) if state[0].over else gr.skip()

    inputs, outputs = [state, controls.pipeline, label, scale, steps, seed], [state, player, clock]
    step_done = gr.on([step.click, clock.tick], advance, inputs, outputs, api_name="steer", **ONE_AT_A_TIME)
    step_done.failure(lambda: gr.Timer(active=False), None, clock, **AT_ONCE)
    play.click(lambda: gr.Timer(active=True), None, clock, **AT_ONCE)
    pause.click(lambda: gr.Timer(active=False), None, clock, **AT_ONCE)
    begun_anew = [controls.pipeline.change, again.click]
    gr.on(begun_anew, lambda: (None, None, gr.Timer(active=False)), None, outputs, **AT_ONCE)


def _compare(models: Models, controls: Controls) -> None:
    gr.Markdown("One image of each class from the same seeds, in each combination of the chosen settings.")
    with gr.Row():
        with gr.Column():
            others = gr.CheckboxGroup(
                models.names, label="Also with", info="Other pipelines.", visible=len(models.names) > 1
            )
            samplers = gr.CheckboxGroup(list(SAMPLER_CHOICES), value=[PIPELINE_DEFAULT, "ddim"], label="Samplers")
            steps = gr.CheckboxGroup(list(STEPS), value=[5, 10], label="Steps")
            scales = controls.add(gr.CheckboxGroup, _nearest_scale, choices=list(SCALES), label="Guidance scales")
            seed = gr.Number(0, precision=0, label="Seed", info=SEED)
            draw = gr.Button("Compare", variant="primary")
        rows = gr.HTML(elem_id="compared")

    def compare(name, others, samplers, steps, scales, seed):
        with errors_as_toast():
            pipelines = {each: models[each] for each in dict.fromkeys([name, *(others or ())])}
            ways = {"samplers": samplers or [], "steps": steps or [], "scales": scales or []}
            yield from drawing.compared(pipelines, **ways, seed=seed)

    inputs = [controls.pipeline, others, samplers, steps, scales, seed]
    draw.click(compare, inputs, rows, api_name="compare", **ONE_AT_A_TIME)


def _nearest_scale(pipeline: Any) -> dict[str, Any]:
    return {"value": [min(SCALES, key=lambda each: abs(each - pipeline.config.guidance_scale))]}


def _explore(models: Models, controls: Controls) -> None:
    with gr.Row():
        with gr.Column():
            gr.Markdown("### Between two images\nNoise and class are mixed on the way from one to the other.")
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
            is_a = controls.classes(gr.Dropdown, place=3, label="Its class")
            as_a = controls.classes(gr.Dropdown, place=8, label="Redraw it as")
            scale = controls.guidance()
            invert = gr.Button("Draw again", variant="primary")
        inverted = gr.HTML(elem_id="inverted")

    def interpolate(name, one, seed_one, two, seed_two, frames, scale):
        with errors_as_toast():
            ends = {"classes": (one, two), "seeds": (seed_one, seed_two)}
            return drawing.interpolated(models[name], **ends, frames=frames, scale=scale)

    def redraw(name, picture, is_a, as_a, scale):
        with errors_as_toast():
            image = drawing.decode_sketch(picture, models[name].image_shape)
            return drawing.reconstruct(models[name], image, source_class=is_a, target_class=as_a, scale=scale)

    inputs = [controls.pipeline, one, seed_one, two, seed_two, frames, between_scale]
    walk.click(interpolate, inputs, between, api_name="interpolate", **ONE_AT_A_TIME)
    inputs = [controls.pipeline, sketchpad, is_a, as_a, scale]
    invert.click(redraw, inputs, inverted, api_name="invert", **ONE_AT_A_TIME)
