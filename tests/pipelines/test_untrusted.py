"""Untrusted files: none of their code runs, each is refused by a clear error, and none takes memory or time."""

import gzip
import json
import os
import pickle
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.evaluation.evaluator import SHIPPED, load_evaluator
from mnist_diffusion.pipelines.pipeline import CODE_FILE, MNISTDiffusionPipeline
from mnist_diffusion.training.checkpoint import newest_valid, save_checkpoint
from tests.conftest import make_pipeline, parse_train
from tests.data.test_formats import classes, load, write

INDEX, UNET, WEIGHTS = "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, CODE = "scheduler/scheduler_config.json", CODE_FILE
MOST_KIBIBYTES = 2**18


class Canary:
    """Sings, that is writes its file, when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "it ran"))


def code(canary: Path) -> str:
    """Python that sings when it is imported, and goes on to be what is asked of it."""
    return (
        f"open({str(canary)!r}, 'w').write('it ran')\n"
        "from diffusers import DiffusionPipeline, UNet2DModel, DDPMScheduler\n"
        "class MNISTDiffusionPipeline(DiffusionPipeline):\n    pass\n"
        "class Evil(UNet2DModel):\n    pass\n"
        "class EvilScheduler(DDPMScheduler):\n    pass\n"
    )


def pickled(name: str, *, instead_of: str | None = None) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        if instead_of is not None:
            (folder / instead_of).unlink()
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))

    return change


def edited(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """A JSON file with other values; a file `evil.py` that sings lies everywhere."""

    def change(folder: Path, canary: Path) -> None:
        before = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**before, **values}))
        for place in (folder.parent, folder, *filter(Path.is_dir, folder.iterdir())):
            (place / "evil.py").write_text(code(canary))

    return change


def written(name: str, content: bytes | str) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def linked(name: str, target: str) -> Callable[[Path, Path], None]:
    """A file, or a folder, that is a link to somewhere else; `../outside` is the one that was there."""

    def change(folder: Path, canary: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(target)

    return change


def lying(**entry: Any) -> Callable[[Path, Path], None]:
    """Weights whose header says something else of the first tensor than what is in the file."""

    def change(folder: Path, canary: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        values = json.loads(content[8 : 8 + length])
        values["conv_in.weight"].update(entry)
        text = json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def reweighed(name: str, value: torch.Tensor | None) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        others = {each: tensor for each, tensor in load_file(folder / WEIGHTS).items() if each != name}
        save_file(others if value is None else {**others, name: value}, folder / WEIGHTS)

    return change


def pipe(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def sharded(folder: Path, canary: Path) -> None:
    """An index of shards, which names a file outside."""
    weights = folder / WEIGHTS
    shutil.move(weights, folder.parent / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../weights.safetensors"}}
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


FOLDERS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    # Pickles in every place, by name or disguised.
    "bin for weights": (pickled(f"{WEIGHTS[:-11]}bin", instead_of=WEIGHTS), r"model\.bin, which is a pickle"),
    "pickled weights": (pickled(WEIGHTS), "is not a safetensors file"),
    "pickled index": (pickled(INDEX), "is not JSON"),
    # Code by name.
    "traversal to code": (edited(INDEX, _class_name=["../evil", "MNISTDiffusionPipeline"]), "_class_name must be"),
    "custom_pipeline": (edited(INDEX, custom_pipeline="evil"), "custom_pipeline is not a known name"),
    "network of another file": (edited(INDEX, unet=["evil", "Evil"]), "unet must be"),
    "name for the terminal": (edited(INDEX, id2label={"0": "a\x1b[31m"}), "should match pattern"),
    "scheduler of another file": (edited(INDEX, scheduler=["evil", "EvilScheduler"]), "scheduler must be one of"),
    "no such scheduler": (edited(INDEX, scheduler=["diffusers", "OsScheduler"]), "_class_name must be .OsScheduler."),
    "another component": (edited(INDEX, evil=["evil", "Evil"]), "evil is not a known name"),
    # Values.
    "labels of no class": (edited(INDEX, id2label={"999999": "y"}), "which the network does not have"),
    "endless steps": (edited(INDEX, num_inference_steps=10**12), "num_inference_steps must be"),
    "scales that are none": (edited(INDEX, guidance_distilled=[1, "2"]), "guidance_distilled must be"),
    "infinite guidance": (edited(INDEX, guidance_scale=1e999), "guidance_scale must be a finite"),
    "patches of other pixels": (edited(INDEX, patch_size=2), "patch_size=2 does not fit a network of 1 channels"),
    "wide network": (edited(UNET, block_out_channels=[10**9, 10**9]), "block_out_channels must be from"),
    "wide enough to fill memory": (edited(UNET, block_out_channels=[99968, 99968]), "has a tensor|has shape"),
    "no groups": (edited(UNET, norm_num_groups=0), "describes no network: ZeroDivisionError"),
    "nested configuration": (edited(UNET, act_fn={"a": ["silu"]}), "act_fn must be a plain value or a list"),
    "image of 40 GB": (edited(UNET, sample_size=100_000), "sample_size must be from 1 to 4,096"),
    "endless noise schedule": (edited(SCHEDULER, num_train_timesteps=10**12), "num_train_timesteps must be from"),
    "schedule of code": (edited(SCHEDULER, beta_schedule="__import__('os')"), "describes no DPMSolverMultistep"),
    # Links and things that are no files.
    "folder elsewhere": (linked("unet", "../outside"), "is a link that leads out of its folder"),
    "secrets": (linked(UNET, "/etc/passwd"), "is a link that leads out of its folder"),
    "endless device": (linked(WEIGHTS, "/dev/zero"), "is a link that leads out of its folder"),
    "circle": (linked(INDEX, INDEX), "there is no"),
    "pipe": (pipe, "is not a regular file"),
    "shards elsewhere": (sharded, "must name the shards of the weights"),
    # Weights that lie.
    "header of exabytes": (written(WEIGHTS, struct.pack("<Q", 2**63)), "claims a header of 9,223,372,036,854,775,808"),
    "tensor of terabytes": (lying(shape=[2**40], data_offsets=[0, 2**42]), "is not a safetensors file"),
    "another shape": (reweighed("conv_in.bias", torch.zeros(1000)), "has shape"),
    "another type": (reweighed("conv_in.bias", torch.zeros(8, dtype=torch.int64)), "has type I64"),
    "a tensor less": (reweighed("conv_in.bias", None), "lacks tensor 'conv_in.bias'"),
    # JSON that is too much.
    "huge JSON": (written(INDEX, '{"a": "' + "x" * 2**21 + '"}'), "is larger than the limit of 1,048,576 bytes"),
    "nested JSON": (written(INDEX, "[" * 500_000), "is not JSON"),
    "no object": (written(SCHEDULER, "[]"), "holds no JSON object but a list"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = FOLDERS[case]
    folder, canary = tmp_path / "folder", tmp_path / "canary"
    shutil.copytree(saved, folder)
    (folder / CODE).write_text(code(canary))
    change(folder, canary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileError, match=message) as caught:
        MNISTDiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert len(str(caught.value)) < 1000
    assert not canary.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIBIBYTES


def test_files_in_place_of_folders(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(FileError, match="is a pickle, which can run code when loaded"):
        MNISTDiffusionPipeline.from_pretrained(tmp_path / "model.ckpt")
    with pytest.raises(FileError, match=r"there is no folder model\.pt"):
        MNISTDiffusionPipeline.from_pretrained("model.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled("pytorch_model.bin", instead_of="model.safetensors"), r"pytorch_model\.bin, which is a pickle"),
        (edited("config.json", widths=[10**9] * 5), "widths must be at most"),
        (edited("config.json", id2label={"0": "a", "2": "b"}), "describes no evaluator"),
        (written("model.safetensors", struct.pack("<Q", 2**63)), "claims a header"),
    ],
)
def test_an_evaluators_folder(
    change: Callable[[Path, Path], None], message: str, tmp_path: Path, digits: ImageData
) -> None:
    folder, canary = tmp_path / "evaluator", tmp_path / "canary"
    shutil.copytree(SHIPPED, folder)
    change(folder, canary)
    with pytest.raises(UserError, match=message):
        load_evaluator(folder, digits)
    assert not canary.exists()


def test_a_checkpoint_with_a_pickle(tmp_path: Path) -> None:
    """A state that is pickled, or a manifest that nests or leads elsewhere, is set aside unread."""
    canary, nested = tmp_path / "canary", written("manifest.json", '{"a":' * 100_000)
    changes = (*map(pickled, ("state.json", "model.safetensors", "random.pkl")), nested)
    for step, change in enumerate(changes, 1):
        change(save_checkpoint(tmp_path / "c", step, {"model": {"w": torch.zeros(1)}}, {}, keep=9), canary)
    assert newest_valid(tmp_path / "c")[0] is None
    assert not canary.exists()


def test_labelled_images(tmp_path: Path) -> None:
    """Pickles and code among the data are not opened; a source that is one is refused by name."""
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Canary(canary))
    bad = {"data.py": code(canary), "a/extra.pkl": pickled, "b/extra.pt": pickled}
    data = write(tmp_path / "data", {**classes(("a", "b")), **bad, "dataset_infos.pickle": pickled})
    assert load(data).num_classes == 2
    for name in bad:
        with pytest.raises(UserError, match=Path(name).name):
            load(data / name)
    idx = {f"train-{kind}-ubyte.gz": gzip.compress(pickled) for kind in ("images-idx3", "labels-idx1")}
    with pytest.raises(UserError, match="idx"):
        load(write(tmp_path / "idx", idx))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch CANARY']", "python/object|could not determine a constructor"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors and aliases"),
        ("x: " + "[" * 1000, "nested|YAML"),
        ("x: " + "y" * 200_000, "larger than"),
        ("- 1", "must be a mapping of sections"),
        ("data:\n  augment:\n    shift: null", r"data\.augment\.shift must be a valid number"),
    ],
)
def test_configurations(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text.replace("CANARY", str(tmp_path / "canary")))
    with pytest.raises(SystemExit):
        parse_train(["--config", str(tmp_path / "config.yaml")])
    error = capsys.readouterr().err
    assert re.search(message, error.partition("error:")[2]), error
    assert not (tmp_path / "canary").exists()
