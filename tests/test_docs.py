"""The documents: each block runs as written with short settings, each link leads somewhere."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from huggingface_hub import hf_api
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_digits

import train_cfg
from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.cli import VERBS, main
from mnist_diffusion.config import RECIPES
from mnist_diffusion.data import sources
from mnist_diffusion.demo.studio.build import RUNTIME_FILES
from mnist_diffusion.evaluation import evaluator
from tests.conftest import REPOSITORY, make_image_folder
from tests.data.test_formats import idx_bytes
from tests.support.hub_server import HubServer

DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
DOCUMENTS += sorted((REPOSITORY / "docs").glob("*.md"))
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
BOTH = "runs/mnist runs/other"
SHORTENED = {
    "runs/mnist/snapshots/step-500": "runs/mnist/snapshots/step-2",
    "runs/ddpm_200/snapshots/step-277500": "runs/mnist/snapshots/step-2",
    "steps = 800": "steps = 3",
    "max_steps=1000": "max_steps=3, pictures=False, num_eval_images=16",
    "max_minutes=5": "max_minutes=None, max_steps=3, pictures=False, num_eval_images=16",
    "num_images=1000": "num_images=50",
    "seed in range(3)": "seed in range(1)",
    " ".join([*(f"runs/adm-{seed}" for seed in range(3)), *(f"runs/default/seed-{seed}" for seed in range(3))]): BOTH,
    " ".join([*(f"runs/mine-{seed}" for seed in range(3)), *(f"runs/flow/seed-{seed}" for seed in range(3))]): BOTH,
}
"""What takes long in the documents, and what it is here."""
SMALL = [
    *("--train.max_steps", "3", "--train.num_eval_images", "16", "--train.samples_per_class", "1"),
    *("--data.batch_size", "8", "--train.pictures", "false"),
]
NARROW = [
    *("--model.block_out_channels", "[8,8]", "--model.norm_num_groups", "4", "--model.attention_levels", "[]"),
    *("--sampling.num_inference_steps", "2"),
]
SHORT = {
    "train": [*SMALL, *NARROW],
    "distill": [*SMALL, "--train.mixed_precision", "no", "--distillation.num_teacher_steps", "2"],
    "sample": ["--num_images", "4", "--num_inference_steps", "1"],
    "evaluate": ["--num_images", "50", "--num_inference_steps", "1", "2"],
    "studio": ["--runtime", "runtime"],
}
"""Flags that are added to a command, where they win."""
NOT_RUN = {
    "python3 -m venv": "installs",
    "pip": "installs",
    "uv": "installs",
    "jupyter lab": "serves until it is interrupted",
    "mnist-diffusion app": "serves until it is interrupted, tried in tests/demo",
    "mnist-diffusion studio runs": "tried in tests/demo",
    "mnist-diffusion space runs/mnist user/digits --student": "tried in tests/demo",
    "mnist-diffusion space runs/emoji": "tried in tests/demo",
    "mnist-diffusion evaluate runs/mnist --processes": "several processes, tried in tests/evaluation",
    "mnist-diffusion sample runs/mnist --as_dataset": "several processes, tried in tests/plots",
    "accelerate launch --multi_gpu": "needs GPUs",
    "torchrun": "several processes, tried in tests/journeys",
    "python benchmarks/speedrun.py": "trains for minutes",
    "python examples/": "tried in tests/examples",
    **dict.fromkeys(("ruff", "lint-imports", "mypy", "codespell", "pytest"), "runs beside these tests"),
}
PROGRAMS = {"hf", *(command.split()[0] for command in NOT_RUN)}
ASK = f"""#!{sys.executable} -IS
import json, os, socket, sys
asked = socket.create_connection(("127.0.0.1", int(os.environ["DOCUMENT_PORT"])))
asked.sendall(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode() + b"\\n")
sys.exit(int(asked.makefile().readline()))
"""
"""Stands for each program in the shell of a document, and has this process do its work, which is faster."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs, images of several kinds, and nothing else."""
    root = tmp_path_factory.mktemp("documents")
    digits = load_digits()
    pixels = np.pad(
        (digits.images * (255 / 16)).astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2), ((0,), (2,), (2,))
    )
    mnist = root / "path" / "to" / "mnist"
    mnist.mkdir(parents=True)
    for name, part in (("train", slice(0, 1400)), ("t10k", slice(1400, None))):
        (mnist / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(pixels[part]))
        (mnist / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(digits.target[part].astype(np.uint8)))
    make_image_folder(root / "path" / "to" / "pictures")
    cifar = root / "path" / "to" / "cifar-10-batches-bin"
    cifar.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (20, 1 + 3 * 32 * 32), np.uint8)
    records[:, 0] = np.arange(20) % 10
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        records.tofile(cifar / f"{name}.bin")
    (cifar / "batches.meta.txt").write_text("airplane automobile bird cat deer dog frog horse ship truck\n")
    (root / "path" / "to" / "images").mkdir()
    (root / "runtime").mkdir()
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "activate").touch()
    for name in RUNTIME_FILES:  # which are copied, and not run
        (root / "runtime" / name).write_text("")
    for number in range(600):
        label = int(digits.target[number])
        if number < 100:
            Image.fromarray(pixels[number]).save(root / "path" / "to" / "images" / f"class_{label}_{number:03d}.png")
        letters = root / "path" / "to" / "letters" / [*"abcdefgh", "Flags", "Food & Drink"][label]
        letters.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(letters / f"{number}.png")
    (root / "emoji").symlink_to(root / "path" / "to" / "letters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, seed in (("mnist", "0"), ("other", "1")):
            AcceleratorState._reset_state(reset_partial_state=True)
            flags = ["--data.source", "path/to/mnist", "--train.seed", seed, "--train.snapshot_every", "2 steps"]
            flags += ["--output_dir", f"runs/{name}", "--train.checkpoint_every", "2 steps"]
            assert train_cfg.main([*flags, *SHORT["train"]]) == 0
    return root


@pytest.fixture
def in_workspace(workspace: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the workspace, with a Hub and evaluators of this document's own; what a document writes goes."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(evaluator, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "STEPS", 20)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_user0123456789")
    monkeypatch.setattr(sources, "FOLDER_READERS", sources.FOLDER_READERS)  # to which a document adds one
    before = {*Path().iterdir(), *Path("runs").iterdir()}
    yield
    for path in {*Path().iterdir(), *Path("runs").iterdir()} - before:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def blocks(document: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(document.read_text(encoding="utf-8")) if language in languages]


def in_general(text: str) -> set[str]:
    """The lines of what was printed, with `0` for every number."""
    return {re.sub(r"\d[\d,.]*", "0", line.strip()) for line in text.splitlines() if line.strip()}


def shortened(text: str) -> str:
    for long, short in SHORTENED.items():
        text = text.replace(long, short)
    return text


def run_command(words: list[str], number: int) -> int:
    """Do what a program of a document would, shortened; its exit code."""
    line = " ".join(words)
    if any(line.startswith(start) for start in NOT_RUN):
        return 0
    if words[0] == "hf":
        return subprocess.call([Path(sys.executable).with_name("hf"), *words[1:4], "--dry-run", *words[4:]])
    words = shlex.split(shortened(shlex.join(words)))
    words = words[2:] if words[0] == "accelerate" else words
    AcceleratorState._reset_state(reset_partial_state=True)
    program, arguments = words[0], words[1:]
    if program == "train_cfg.py" or arguments[0] == "train":
        arguments = [*arguments, *SHORT["train"]]
        arguments += [] if "--data.source" in arguments or "config.yaml" in line else ["--data.source", "digits"]
        arguments += [] if "--output_dir" in arguments else ["--output_dir", f"runs/document-{number}"]
    elif arguments[:2] != ["evaluate", "path/to/images"]:
        arguments = [*arguments, *SHORT.get(arguments[0], [])]
    programs: dict[str, Any] = {"train_cfg.py": train_cfg.main, "mnist-diffusion": main}
    return int(programs[program](arguments))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(each, id=each.name, marks=[] if each.name == "README.md" else pytest.mark.slow)
        for each in DOCUMENTS
        if blocks(each, "bash")
    ],
)
def test_commands_paste_into_a_shell(
    document: Path, in_workspace: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of a document's commands in one shell, as they stand there; they print what its `text` blocks say."""
    script = "\n".join(blocks(document, "bash"))
    if document.name == "README.md":  # which trains the run that it uses, and that the others begin with
        Path("runs").rename(tmp_path / "runs")
    for program in PROGRAMS:
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(ASK)
        path.chmod(0o755)
    codes: dict[str, int] = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        place = {"PATH": f"{path.parent}:{os.environ['PATH']}", "DOCUMENT_PORT": str(server.getsockname()[1])}
        with subprocess.Popen(["bash", "-e", "-c", script], env={**os.environ, **place}) as shell:
            try:
                while shell.poll() is None:
                    with contextlib.suppress(TimeoutError), server.accept()[0] as asking:
                        words = json.loads(asking.makefile().readline())
                        codes[shlex.join(words)] = run_command(words, len(codes))
                        asking.sendall(b"0\n")
            finally:
                shell.kill()
    if document.name == "README.md":
        shutil.rmtree("runs")
        (tmp_path / "runs").rename("runs")
    refused = [shlex.join(shlex.split(line, comments=True)) for line in script.splitlines() if "refused" in line]
    assert {line: code for line, code in codes.items() if code} == dict.fromkeys(refused, 2)
    assert shell.returncode == 0
    assert codes
    if document.name != "tutorial.md":  # whose blocks are printed by its Python
        assert in_general("\n".join(blocks(document, "text"))) <= in_general(capfd.readouterr().out)


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if blocks(each, "python")], ids=lambda path: path.name)
def test_python_runs_as_written(document: Path, in_workspace: None, hub: HubServer) -> None:
    assert main(["push", "runs/mnist", "user/name"]) == 0
    pipeline = MNISTDiffusionPipeline.from_pretrained("runs/mnist")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    names: dict[str, Any] = {"pipeline": pipeline, "DDIMScheduler": DDIMScheduler, "generator": generators[0]}
    names |= {"images": torch.rand(2, 1, 28, 28), "class_labels": [3, 7]}
    names |= dict(zip(("generator_a", "generator_b"), generators, strict=True))
    commit = hub.repositories["user/name"].refs["main"]
    for body in blocks(document, "python"):
        exec(shortened(body).replace("<commit>", commit), names)


def test_no_block_is_passed_over() -> None:
    found = {language for each in DOCUMENTS for language, _ in BLOCK.findall(each.read_text())}
    assert found == {"bash", "bibtex", "python", "text"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """In a kernel of its own, as Jupyter, Colab and `nbconvert --execute` do; it prints what the tutorial says."""
    notebook = nbformat.read(REPOSITORY / "docs" / "tutorial.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = shortened(cell.source)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "\n".join(output["data"]["text/plain"].strip("'") for output in outputs if "data" in output)
    assert in_general("\n".join(blocks(REPOSITORY / "docs" / "tutorial.md", "text"))) <= in_general(printed)
    assert len([*(tmp_path / "tutorial").glob("*.png")]) == 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = BLOCK.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        found = document.parent / path if path else document
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_every_command_recipe_and_folder_is_mentioned() -> None:
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    everything = "\n".join(texts.values())
    for verb in VERBS:
        assert f"mnist-diffusion {verb}" in everything, verb
    for recipe in RECIPES.glob("*.yaml"):
        assert f"`{recipe.stem}`" in texts[REPOSITORY / "docs" / "research_training.md"], recipe
    laid_out = texts[REPOSITORY / "CONTRIBUTING.md"]
    packages = [path.parent.name for path in (REPOSITORY / "mnist_diffusion").glob("*/__init__.py")]
    assert [name for name in packages if f"`mnist_diffusion/{name}/`" not in laid_out] == []
    assert not re.findall(r"(?<!-m )mnist_diffusion (?:train|sample|evaluate|distill)|mnist-diffusion-", everything)
