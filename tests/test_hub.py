"""Push and pull over real HTTP: the real client against a Hub on the loopback device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from mnist_diffusion import cli
from mnist_diffusion.errors import UserError
from mnist_diffusion.hub import pull, push
from mnist_diffusion.hub_client import HubError
from mnist_diffusion.pipelines.card import SECTION_START, write_results_to_card
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.pipeline import CODE_FILE, MNISTDiffusionPipeline
from mnist_diffusion.training.checkpoint import load_checkpoint
from tests.conftest import make_pipeline, tiny_config, use_hub
from tests.support.hub_server import HubServer, Request

NAME = "owner/digits"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PUSHED = {
    ".gitattributes",
    "README.md",
    "config.yaml",
    "model_index.json",
    CODE_FILE,
    "samples.png",
    "scheduler/scheduler_config.json",
    "summary.json",
    "unet/config.json",
    WEIGHTS,
}
TOKEN, GUEST = "hf_owner0123456789", "hf_guest0123456789"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestPush:
    def test_a_run(self, hub: HubServer, made_run: Path) -> None:
        before = content(made_run)
        address = push(made_run, NAME)
        files = hub.repositories[NAME].files()
        assert set(files) == PUSHED
        assert address == f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].refs['main']}"
        assert files[WEIGHTS] in hub.objects.values()
        assert content(made_run) == before
        card = files["README.md"].decode()
        assert f'from_pretrained("{NAME}", trust_remote_code=True)' in card
        assert "this-folder-or-repository" not in card
        assert yaml.safe_load(files["config.yaml"])["hub"]["push"] is False

    def test_again_after_a_change(self, hub: HubServer, made_run: Path) -> None:
        """What is stale goes, what others put there stays; an unchanged push makes no commit."""
        push(made_run, NAME)
        repository = hub.repositories[NAME]
        stale = {"unet/diffusion_pytorch_model.bin": b"old", "scheduler/old.json": b"{}", "docs/mine.png": b"mine"}
        repository.commit("main", {**repository.files(), **stale})
        make_pipeline(seed=9).save_pretrained(made_run / "pipeline")
        push(made_run, NAME)
        assert set(repository.files()) == PUSHED | {"docs/mine.png"}
        commits = list(repository.commits)
        push(made_run, NAME)
        assert list(repository.commits) == commits
        loaded = MNISTDiffusionPipeline.from_pretrained(NAME)
        for name, value in make_pipeline(seed=9).unet.state_dict().items():
            assert torch.equal(loaded.unet.state_dict()[name], value)

    def test_to_a_branch_and_as_a_pull_request(
        self, hub: HubServer, made_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        push(made_run, NAME)
        main = hub.repositories[NAME].refs["main"]
        make_pipeline(seed=2).save_pretrained(made_run / "pipeline")
        push(made_run, NAME, revision="try")
        assert hub.repositories[NAME].refs["try"] != main
        monkeypatch.setenv("HF_TOKEN", GUEST)
        assert push(made_run, NAME, create_pr=True) == f"{hub.url}/{NAME}/discussions/1"
        assert set(hub.repositories[NAME].refs) == {"main", "try", "refs/pr/1"}
        assert hub.repositories[NAME].refs["main"] == main

    def test_training_state_only_where_it_is_asked_for(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        push(made_run, NAME)
        with pytest.raises(UserError, match="has no checkpoint to resume from"):
            pull(NAME, tmp_path / "none", with_checkpoints=True)
        assert not (tmp_path / "none").exists()
        push(made_run, NAME, with_checkpoints=True)
        files = {*PUSHED, "metrics.jsonl"}
        files |= {f"checkpoints/step-2/{name}" for name in ("manifest.json", "model.safetensors", "state.json")}
        assert set(hub.repositories[NAME].files()) == files
        out = pull(NAME, tmp_path / "pulled", with_checkpoints=True)
        assert load_checkpoint(out / "checkpoints", 2).state == {"n": 2, "step": 2}
        below = {"checkpoints", "config.yaml", "metrics.jsonl", "pipeline", "summary.json"}
        assert {path.name for path in out.iterdir()} == below
        (made_run / "checkpoints" / "step-2" / "state.json").write_text("{}")
        push(made_run, NAME, with_checkpoints=True)  # the newest is broken: the one before it
        assert set(hub.repositories[NAME].files()) == {name.replace("step-2", "step-1") for name in files}
        for path in (made_run / "checkpoints").rglob("manifest.json"):
            path.unlink()
        with pytest.raises(UserError, match="no valid checkpoint to push"):
            push(made_run, NAME, with_checkpoints=True)

    def test_measured_results_come_along(self, hub: HubServer, made_run: Path) -> None:
        measured = {"accuracy": 0.98765, "fid": 3.21, "fid_floor": 0.4}
        settings = {"scheduler": "ddim", "num_images": 100, "num_inference_steps": 20, "guidance_scale": None}
        data = {"source": "digits", "hub_id": "digits", "fingerprint": "0"}
        report: dict[str, Any] = {"results": [{**measured, **settings}], "data": data}
        write_results_to_card(made_run / "pipeline", report, "Measured: **98.77%**.")
        push(made_run, NAME)
        files = hub.repositories[NAME].files()
        card: Any = ModelCard(files["README.md"].decode())
        assert card.data.model_name == "digits"
        assert {each.metric_type: each.metric_value for each in card.data.eval_results} == measured
        assert "Measured: **98.77%**." in card.text
        card.validate()
        place = "/home/ann/pictures"
        report["data"] = {"source": f"{place} (folder)", "source_id": place, "hub_id": None, "fingerprint": "0"}
        write_results_to_card(made_run / "pipeline", report, f"of images of {place} that are not on the Hub")
        hostile = made_run / "pipeline_best" / "README.md"
        hostile.parent.mkdir()
        hostile.write_text("---\n---\n" + SECTION_START * 300_000)  # which took time in its square
        write_results_to_card(hostile.parent, report, "Measured.")
        MNISTDiffusionPipeline.from_pretrained(made_run).push_to_hub("owner/copy")
        files = hub.repositories["owner/copy"].files()
        assert b"of images of pictures that" in files["README.md"]
        assert b"/home/ann" not in files["README.md"]

    def test_variants_stand_beside_each_other(self, hub: HubServer) -> None:
        make_pipeline().push_to_hub(NAME)
        make_pipeline().to(torch.float16).push_to_hub(NAME, variant="fp16")
        for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
            loaded = MNISTDiffusionPipeline.from_pretrained(NAME, variant=variant, dtype=dtype)
            assert loaded.unet.dtype == dtype

    def test_over_another_models_push(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        """Figures, pictures and configuration of the one do not stay with the other, but other people's files do."""
        push(made_run, NAME)
        old, others = (f".eval_results/{name}.yaml" for name in ("evaluation", "other"))  # the first of version 0.2.0
        for name in (old, others):
            HfApi().upload_file(path_or_fileobj=b"[]", path_in_repo=name, repo_id=NAME)
        make_pipeline(seed=3).save_pretrained(tmp_path / "alone")
        push(tmp_path / "alone", NAME)
        kept = PUSHED - {"config.yaml", "samples.png", "summary.json"} | {others}
        assert set(hub.repositories[NAME].files()) == kept
        assert b"pushed without a card" in hub.repositories[NAME].files()["README.md"]

    @pytest.mark.parametrize("relative", [False, True])
    def test_places_of_this_machine_stay_here_and_a_licence_is_chosen(
        self, hub: HubServer, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        home = Path() if relative else tmp_path
        place = home / "home of ann" / "pictures for später, whose path YAML folds, as it is long" / "pictures"
        place.mkdir(parents=True)
        config = made_run / "config.yaml"
        config.write_text(tiny_config().to_yaml().replace("source: digits", f"source: {place}"))
        card, summary = made_run / "pipeline" / "README.md", made_run / "summary.json"
        card.write_text(card.read_text() + f"\ntrained on {place} (image folder)\n")
        summary.write_text(json.dumps({"data_source": f"{place} (image folder)"}))
        push(made_run, NAME, license="cc0-1.0")
        files = hub.repositories[NAME].files()
        assert not [name for name, content in files.items() if b"home of ann" in content]
        assert b"source: pictures\n" in files["config.yaml"]
        assert ModelCard(files["README.md"].decode()).data.to_dict()["license"] == "cc0-1.0"
        assert str(place) in config.read_text()

    def test_what_lies_around_is_not_pushed(self, hub: HubServer, tmp_path: Path) -> None:
        """A configuration of something else above the folder, a link to a secret, code that somebody put there."""
        (tmp_path / "config.yaml").write_text("password: secret")
        folder = tmp_path / "pipeline"
        make_pipeline().save_pretrained(folder)
        (folder / CODE_FILE).write_text("print('evil')")
        push(folder, NAME)
        files = hub.repositories[NAME].files()
        assert "config.yaml" not in files
        assert b"class MNISTDiffusionPipeline" in files[CODE_FILE]
        for name in ("README.md", "samples.png", "config.yaml"):
            (folder / name).symlink_to(tmp_path / "config.yaml")
            with pytest.raises(UserError, match="is a link that leads out of its folder"):
                push(folder, NAME)
            (folder / name).unlink()

    def test_somebody_else_at_the_same_time(self, hub: HubServer, made_run: Path) -> None:
        """Another commit between looking and committing: an error, and not a mixture of two models."""
        push(made_run, NAME)
        repository = hub.repositories[NAME]
        others: list[str] = []

        def fault(request: Request) -> None:
            if "/commit/" in request.path and not others:
                others.append(repository.commit("main", {**repository.files(), "unet/config.json": b"another"}))

        hub.fault = fault
        make_pipeline(seed=8).save_pretrained(made_run / "pipeline")
        with pytest.raises(HubError, match="somebody else changed it at the same time; try again"):
            push(made_run, NAME)
        assert len(others) == 1
        push(made_run, NAME)
        loaded = MNISTDiffusionPipeline.from_pretrained(NAME)
        assert torch.equal(loaded.unet.conv_in.weight, make_pipeline(seed=8).unet.conv_in.weight)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            *(("README.md", b"---\na: %b\n---\n# x\n" % a, "the metadata at the top of") for a in (b"[b", b"[" * 5000)),
            (WEIGHTS, b"broken", r"safetensors is not a safetensors file"),
            ("model_index.json", None, "neither a pipeline folder nor a run folder"),
        ],
    )
    def test_what_cannot_be_pushed(self, hub: HubServer, made_run: Path, name: str, content: Any, message: str) -> None:
        file = made_run / "pipeline" / name
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            push(made_run, NAME)
        assert not hub.requests

    @pytest.mark.parametrize("place", ["config.yaml", "README.md", WEIGHTS, "the commit message"])
    def test_a_token_in_what_would_be_pushed(self, hub: HubServer, made_run: Path, place: str) -> None:
        card, weights = made_run / "pipeline" / "README.md", made_run / "pipeline" / WEIGHTS
        if place == "config.yaml":
            (made_run / place).write_text(f"data:\n  source: /home/{TOKEN}\n")
        elif place == "README.md":
            card.write_text(card.read_text() + TOKEN)
        elif place == WEIGHTS:  # in their header
            save_file(load_file(weights), weights, metadata={"format": "pt", "note": TOKEN})
        with pytest.raises(UserError, match=f"{place} holds the Hub token") as caught:
            push(made_run, NAME, message=f"with {TOKEN}" if place == "the commit message" else "Upload")
        assert TOKEN not in str(caught.value)
        assert set(hub.repositories[NAME].files()) == {".gitattributes"}

    def test_private_is_private(self, hub: HubServer, made_run: Path) -> None:
        push(made_run, NAME)
        with pytest.raises(HubError, match="as private: it is public; change that at"):
            push(made_run, NAME, private=True)


class TestFromAPipeline:
    def test_a_loaded_one_takes_its_card_along(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        push(made_run, NAME)
        first = hub.repositories[NAME].files()
        for source in (NAME, made_run / "pipeline"):
            MNISTDiffusionPipeline.from_pretrained(source).push_to_hub("owner/copy")
            copy = hub.repositories.pop("owner/copy").files()
            assert set(copy) == PUSHED - {"config.yaml", "summary.json"}
            assert copy["samples.png"] == first["samples.png"]
            assert copy["README.md"].decode().count('"owner/copy"') == 1
            assert b"owner/digits" not in copy["README.md"]
            assert b"_name_or_path" not in copy["model_index.json"]
            hub.add("owner/again", copy)
            loaded = MNISTDiffusionPipeline.from_pretrained("owner/again")
            loaded.save_pretrained(tmp_path / "saved")
            assert MNISTDiffusionPipeline.from_pretrained(tmp_path / "saved")(3, num_inference_steps=1).images
            assert copy[WEIGHTS] == first[WEIGHTS]
            assert b"## Training" in copy["README.md"]

    def test_one_from_nowhere_gets_a_short_card(self, hub: HubServer, tmp_path: Path) -> None:
        make_pipeline().save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=NAME, private=True)
        assert (
            'DiffusionPipeline.from_pretrained("owner/digits"' in hub.repositories[NAME].files()["README.md"].decode()
        )
        assert hub.repositories[NAME].private
        assert MNISTDiffusionPipeline.from_pretrained(NAME)("c", num_inference_steps=1).images


class TestPull:
    def test_round_trip(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        push(made_run, NAME)
        neighbours = [tmp_path / name for name in (".pulled.partial", ".pulled.old", ".x.partial")]
        for neighbour in neighbours:
            neighbour.mkdir()
        files = hub.repositories[NAME].files()
        hub.repositories[NAME].commit("main", {**files, "evil.py": b"", "unet/evil.bin": b"", "x/../../out": b""})
        out = pull(NAME, tmp_path / "pulled")
        assert all(neighbour.is_dir() for neighbour in neighbours)
        expected = content(made_run / "pipeline") | {"config.yaml": (made_run / "config.yaml").read_bytes()}
        pulled = content(out)
        for name in PUSHED - {".gitattributes", "README.md", "summary.json"}:
            assert pulled[name] == expected[name], name
        assert set(pulled) == PUSHED - {".gitattributes"}
        drawn = [
            MNISTDiffusionPipeline.from_pretrained(each)(
                3, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
            ).images
            for each in (NAME, out, made_run / "pipeline")
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])
        with pytest.raises(UserError, match="or is not empty; name a new one"):
            pull(NAME, out)

    def test_pinned_revisions(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        push(made_run, NAME)
        first = hub.repositories[NAME].refs["main"]
        make_pipeline(seed=4).save_pretrained(made_run / "pipeline")
        push(made_run, NAME)
        old, new = (hub.repositories[NAME].files(ref)[WEIGHTS] for ref in (first, "main"))
        assert old != new
        assert content(pull(NAME, tmp_path / "a", revision=first))[WEIGHTS] == old
        assert content(pull(NAME, tmp_path / "b"))[WEIGHTS] == new
        pinned = MNISTDiffusionPipeline.from_pretrained(NAME, revision=first)
        by_name = load_pipeline(f"{NAME}@{first}", device="cpu", dtype="float32")
        for each in (pinned, by_name):
            assert torch.equal(each.unet.conv_in.weight, make_pipeline().unet.conv_in.weight)
        with pytest.raises(HubError, match="no such revision"):
            pull(NAME, tmp_path / "c", revision="nothing")

    def test_from_the_cache_without_a_hub(self, hub: HubServer, made_run: Path, tmp_path: Path) -> None:
        """As the client lays out what it fetched through Xet: links from a repository's blobs to those of all."""
        push(made_run, NAME)
        MNISTDiffusionPipeline.from_pretrained(NAME)
        cache = tmp_path / "cache"
        (cache / "blobs" / "ab").mkdir(parents=True)
        for blob in [*cache.glob("models--*/blobs/*")]:
            blob.symlink_to(Path("../../blobs/ab") / blob.rename(cache / "blobs" / "ab" / blob.name).name)
        use_hub("http://127.0.0.1:9", cache)
        for only in (False, True):
            loaded = MNISTDiffusionPipeline.from_pretrained(NAME, local_files_only=only)
            assert loaded(3, num_inference_steps=1).images

    def test_a_private_one_with_a_token(
        self, hub: HubServer, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        push(made_run, NAME, private=True)
        assert pull(NAME, tmp_path / "mine")
        monkeypatch.setenv("HF_TOKEN", GUEST)
        with pytest.raises(HubError, match=r"repository not found, or private \(use another token\)"):
            pull(NAME, tmp_path / "theirs")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="repository not found, or private; log in with `hf auth login`"):
            pull(NAME, tmp_path / "nobodys")
        with pytest.raises(HubError, match="log in with `hf auth login`"):
            load_pipeline(NAME, device="cpu", dtype="float32")
        assert not (tmp_path / "theirs").exists()


def test_the_commands(hub: HubServer, made_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(made_run), NAME, "--private", "--with_checkpoints", "--message", "First"]) == 0
    assert capsys.readouterr().out.startswith(f"Pushed: {hub.url}/{NAME}/commit/")
    assert cli.main(["pull", f"{NAME}@main", "--out", str(tmp_path / "out"), "--with_checkpoints"]) == 0
    out = tmp_path / "out"
    assert f"--config {out / 'config.yaml'} --train.resume --output_dir {out}" in capsys.readouterr().out
    assert cli.main(["pull", "owner/nothing", "--out", str(tmp_path / "none")]) == 2
    assert "error: cannot pull owner/nothing: repository not found" in capsys.readouterr().err
