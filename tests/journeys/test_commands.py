"""The real commands in processes of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image

import train_cfg
from mnist_diffusion import cli
from mnist_diffusion.cli import main
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from tests.conftest import REPOSITORY, make_image_folder, make_pipeline
from tests.support.hub_server import HubServer
from tests.support.survival import FLAGS, Nursery
from tests.training.test_survival import recording_batches

BIN = Path(sys.executable).parent
ACCELERATE, TORCHRUN, CONSOLE = str(BIN / "accelerate"), str(BIN / "torchrun"), str(BIN / "mnist-diffusion")
SCRIPT = str(REPOSITORY / "train_cfg.py")
SHORT = [
    *("--config", "tiny", "--data.source", "digits", "--train.max_steps", "3", "--train.num_eval_images", "16"),
    *("--train.samples_per_class", "1"),
]


def command(
    *arguments: str, cwd: Path, environment: dict[str, str] | None = None, code: int = 0, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_"))}
    result = subprocess.run(
        arguments,
        cwd=cwd,
        env={**kept, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def require_a_run(printed: str, folder: Path) -> None:
    latest, run = sorted((folder / "runs").iterdir())
    assert latest.name == "latest"
    assert latest.readlink() == Path(run.name)
    assert run.name.startswith("tiny-")
    assert (run / "pipeline" / "model_index.json").is_file()
    assert f'DiffusionPipeline.from_pretrained("{Path("runs") / run.name / "pipeline"}"' in printed


def test_launch_and_the_lines_that_it_prints(tmp_path: Path) -> None:
    configured = ["--config_file", str(REPOSITORY / "accelerate_config.yaml")]
    printed = command(ACCELERATE, "launch", *configured, SCRIPT, *SHORT, cwd=tmp_path).stdout
    require_a_run(printed, tmp_path)
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec("\n".join(lines), {})
    assert (tmp_path / "sample.png").is_file()


@pytest.mark.slow
def test_all_cores_are_used_though_a_launcher_sets_one_thread(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from mnist_diffusion.environment import set_num_threads\n"
        "set_num_threads()\n"
        "print(torch.get_num_threads())"
    )
    script = tmp_path / "threads.py"
    script.write_text(code)
    plain = command(sys.executable, str(script), cwd=tmp_path, environment={"OMP_NUM_THREADS": ""}).stdout
    launched = command(ACCELERATE, "launch", str(script), cwd=tmp_path).stdout
    one_of_two = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    shared = command(sys.executable, str(script), cwd=tmp_path, environment=one_of_two).stdout
    assert int(launched) == int(plain)
    assert int(shared) == max(1, int(plain) // 2)
    assert int(command(sys.executable, str(script), cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"}).stdout) == 1


def test_dry_run_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_cfg.main([*SHORT, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for part in ("17,657 parameters", "1617 to train on", "expected     3 steps", "beta_schedule: squaredcos_cap_v2"):
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_errors_are_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on the standard error, exit code 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_cfg.main([*SHORT, "--data.source", "/no/such"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.source='/no/such' was not found")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for verb in ("sample", "evaluate"):  # before anything is loaded or drawn
        assert main([verb, "no/where", "--out", "file"]) == 2
        assert "file cannot be written to" in capsys.readouterr().err


@pytest.mark.slow
def test_hub_out_of_reach(tmp_path: Path) -> None:
    """With no source named: a loud notice, digits, and the notice again in summary and card."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    unnamed = [flag for flag in SHORT if flag not in ("--data.source", "digits")]
    result = command(sys.executable, SCRIPT, *unnamed, "--output_dir", "run", cwd=tmp_path, environment=nowhere)
    assert result.stdout.count("FALLING BACK") == 2
    assert "FALLING BACK" in json.loads((tmp_path / "run" / "summary.json").read_text())["notice"]
    assert "FALLING BACK" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


DRAW = """
import hashlib
import importlib.abc
import sys

import torch

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mnist_diffusion":
            raise ModuleNotFoundError(name)

saved_by, *folders = sys.argv[1:]
if saved_by == "plain":
    sys.meta_path.insert(0, Missing())
    from diffusers import DiffusionPipeline as Pipeline
    trust = {"trust_remote_code": True}
else:
    from mnist_diffusion import MNISTDiffusionPipeline as Pipeline
    trust = {}
for folder in folders:
    pipeline = Pipeline.from_pretrained(folder, **trust)
    pipeline.save_pretrained(f"{folder}-{saved_by}")
    named = {"class_labels": [3, "h"], "guidance_scale": 5} if pipeline.num_classes else {"num_images_per_label": 2}
    start = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    images = pipeline(**named, num_inference_steps=4, **start).images
    print("conditional" in folder, hashlib.sha256(images.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_three_ways_to_load_agree_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed class, plain diffusers where the project cannot be imported, and a folder saved again by each."""
    folders = [tmp_path / name for name in ("conditional", "free")]
    for folder, conditional in zip(folders, (True, False), strict=True):
        make_pipeline(conditional=conditional).save_pretrained(folder)
    (tmp_path / "draw.py").write_text(DRAW)
    printed: list[str] = []
    for saved_by in ("own", "plain", "own"):
        arguments = ["draw.py", saved_by, *map(str, folders)]
        if saved_by == "own":
            monkeypatch.setattr(sys, "argv", arguments)
            exec(DRAW, {})
            printed += capsys.readouterr().out.splitlines()
        else:
            elsewhere = {"HF_HOME": str(tmp_path / "cache")}
            printed += command(sys.executable, *arguments, cwd=tmp_path, environment=elsewhere).stdout.splitlines()
        folders = [folder.with_name(f"{folder.name}-{saved_by}") for folder in folders]
    assert len(printed) == 6
    assert len(set(printed)) == 2


def test_from_a_teacher_to_a_student_and_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--config", "tiny", "--train.max_steps", "2", "--out", "student"]
    for arguments in (["train", *SHORT, "--output_dir", "teacher"], ["distill", "teacher/pipeline", *short]):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert told.count("source       scikit-learn digits") == 2  # as the teacher's run names it
    assert "pipeline(class_labels=[3]).images" in told
    assert cli.main(["sample", "student/pipeline", "--num_images", "10"]) == 0
    assert (tmp_path / "samples" / "grid.png").is_file()


@pytest.mark.slow
def test_from_five_folders_of_pictures_to_pictures_of_five_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; then the pipeline draws each class in its colour, and knows the folders' names."""
    colours = {
        "Äpfel": (200, 30, 30),
        "blue jays": (30, 30, 200),
        "grass": (30, 200, 30),
        "snow": (250, 250, 250),
        "tar": (5, 5, 5),
    }
    random = np.random.default_rng(0)
    for name, colour in colours.items():
        (tmp_path / "my pictures" / name).mkdir(parents=True)
        for index in range(30):
            pixels = np.clip(np.array(colour) + random.integers(-30, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my pictures" / name / f"no {index}.png")
    small = ["--model.block_out_channels", "[16,16]", "--model.norm_num_groups", "4", "--train.max_steps", "150"]
    learn = ["--train.learning_rate", "0.01", "--train.ema_decay", "0.9", "--train.sample_every", "1000 steps"]
    flags = ["--data.source", "my pictures", *small, *learn, "--train.warmup_steps", "10", "--output_dir", "run"]
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_cfg.main(flags) == 0
    printed = capsys.readouterr().out
    assert "5 (blue jays: 27, grass: 27, snow: 27, tar: 27, Äpfel: 27)" in printed
    pipeline = MNISTDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert list(pipeline.config.id2label.values()) == ["blue jays", "grass", "snow", "tar", "Äpfel"]
    means = np.array(list(colours.values()))
    for name in colours:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        for image in pipeline([name] * 4, generator=generators).images:
            mean = np.asarray(image).mean(axis=(0, 1))
            assert list(colours)[int(np.abs(means - mean).sum(axis=1).argmin())] == name
    assert (tmp_path / "run" / "pictures" / "denoising.png").is_file()


def test_a_folder_of_pictures_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image_folder(tmp_path / "my pictures é")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--config", "tiny", "--data.source", "my pictures é", "--train.max_steps", "2", "--output_dir", "run"]
    assert train_cfg.main(flags) == 0
    assert "blue: 5, green: 5, red: 5" in capsys.readouterr().out


@pytest.mark.slow
def test_two_torchrun_nodes_on_loopback(tmp_path: Path) -> None:
    """Each sees its half of what one process sees, and both end with the same weights, to the bit."""
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nfrom tests.training.test_survival import recording_batches\n")
    worker.write_text(worker.read_text() + "sys.exit(recording_batches(sys.argv[1:]))\n")
    environment = {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = [*FLAGS, "--train.max_steps", "4", "--output_dir"]
    group = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [TORCHRUN, *group, "--node_rank", str(node), str(worker), *flags, str(tmp_path / "two")],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    log = tmp_path / "log.txt"
    assert Nursery().finish([*flags, str(tmp_path / "one")], log=log, work=recording_batches) == [0], log.read_text()
    one = torch.load(tmp_path / "one" / "seen-0.pt", weights_only=True)
    two = [torch.load(tmp_path / "two" / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("images", "noise", "timesteps", "labels", "dropped"):
        for step, value in enumerate(one[name]):
            assert torch.equal(value, torch.cat([half[name][step] for half in two])), name
    for first, second, whole in zip(two[0]["weights"], two[1]["weights"], one["weights"], strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_cards_lines_in_a_fresh_process_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """The three lines of a pushed card, pinned to the commit, where the project cannot be imported."""
    run = [sys.executable, SCRIPT, *SHORT, "--output_dir", "run", "--hub.push", "true", "--hub.repo_id", "owner/digits"]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    command(*run, cwd=tmp_path, environment=environment)
    [_, pushed] = hub.repositories["owner/digits"].history
    card = hub.repositories["owner/digits"].files(pushed)["README.md"].decode()
    [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = [line for line in lines.splitlines() if line]
    assert len(code) == 3
    pinned = lines.replace("trust_remote_code=True", f'trust_remote_code=True, revision="{pushed}"')
    assert pinned != lines
    hub.repositories["owner/digits"].commit("main", {"model_index.json": b"what somebody pushed later"})
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = "import sys\nsys.modules['mnist_diffusion'] = None\n"
    environment["HF_TOKEN"] = ""
    command(sys.executable, "-c", missing + pinned + "image.save('digit.png')\n", cwd=empty, environment=environment)
    with Image.open(empty / "digit.png") as image:
        assert image.size == (28, 28)
    metadata = ModelCard(card).data.to_dict()
    assert metadata["library_name"] == "diffusers"
    assert "license" not in metadata
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    for heading in ("Use", "Training", "Evaluation", "Environmental cost", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card
