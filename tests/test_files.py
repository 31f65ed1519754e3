"""Files: everything is read and written through one module, within limits, whole or not at all."""

import ast
import errno
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mnist_diffusion import files
from mnist_diffusion.cli.options import reporting_errors
from mnist_diffusion.errors import ConfigError, FileError, UserError
from mnist_diffusion.training.run_folder import RunFolder
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "mnist_diffusion"
DOOR = {"files.py", "pipelines/pipeline_mnist_diffusion.py"}
"""The door itself, and the file that ships, which imports nothing of the package."""
LIBRARIES = {"open", "np.load", "np.save", "np.savez", "torch.load", "torch.save", "numpy.load"}
OPENING = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "savefig", "fromfile", "tofile", "fdopen"}


def opened(call: ast.Call) -> str | None:
    """What a call opens, as it is written, if it opens files by a name; a bare name but `open` is one of the door's."""
    function, given = ast.unparse(call.func), [ast.unparse(each) for each in call.args[:1]]
    in_memory = given in (["buffer"], ["file"], ["os.devnull"]) or any(each.startswith("io.BytesIO(") for each in given)
    if in_memory or function == "archive.open" or any(keyword.arg == "fileobj" for keyword in call.keywords):
        return None
    opens = function in LIBRARIES or ("." in function and function.rpartition(".")[2] in OPENING)
    return ast.unparse(call) if opens else None


def test_nothing_else_in_the_package_opens_a_file_by_its_name() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if (name := path.relative_to(PACKAGE).as_posix()) in DOOR:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        found += [f"{name}:{call.lineno}: {text}" for call in calls if (text := opened(call))]
    assert found == []


class TestReading:
    @pytest.mark.parametrize(
        ("name", "make"),
        [
            *(("missing", str), ("x" * 300, str), ("folder", Path.mkdir), ("pipe", os.mkfifo)),
            ("device", lambda path: path.symlink_to("/dev/zero")),
            ("circle", lambda path: path.symlink_to(path)),
            ("large", lambda path: os.truncate(shutil.copy(__file__, path), 2**40)),
        ],
    )
    def test_only_regular_files_of_a_size_are_read_and_at_once(self, tmp_path: Path, name: str, make: Any) -> None:
        make(path := tmp_path / name)
        with pytest.raises(FileError, match=name) as error:
            files.read_bytes(path, 1000)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_key_that_occurs_twice_in_yaml_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("train:\n  seed: 1\ndata: {}\ntrain:\n  max_steps: 3\n")
        with pytest.raises(ConfigError, match="the key 'train' occurs twice"):
            files.read_yaml(tmp_path / "x.yaml")


class TestWriting:
    def test_a_planted_link_is_replaced_and_what_it_leads_to_stays(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        for name in ("README.md", "config.yaml", ".README.md.partial", ".config.yaml.partial"):
            (tmp_path / name).symlink_to(tmp_path / "secret")
        for name in ("README.md", "config.yaml"):
            files.replace_text(tmp_path / name, "new")
            assert (tmp_path / name).read_text() == "new"
            assert not (tmp_path / name).is_symlink()
        (tmp_path / "log").symlink_to(tmp_path / "secret")
        with pytest.raises(FileError, match="log is not a regular file"):
            files.append_text(tmp_path / "log", "new")
        assert (tmp_path / "secret").read_text() == "secret"

    def test_a_failed_write_leaves_the_old_file_names_the_path_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_text("old")

        def fail(file: BinaryIO) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match=r"No space left on device: '.*x'"):
            files.replace_file(path, fail)
        assert path.read_text() == "old"
        assert [each.name for each in tmp_path.iterdir()] == ["x"]

    def test_a_folder_is_whole_or_the_old_one(self, tmp_path: Path) -> None:
        folder = tmp_path / "x"
        files.replace_folder(folder, lambda new: files.replace_text(new / "a", "1"))

        def fail(new: Path) -> None:
            (new / "a").write_text("2")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files.replace_folder(folder, fail)
        assert (folder / "a").read_text() == "1"
        assert [each.name for each in tmp_path.iterdir()] == ["x"]

    def test_what_a_killed_process_left_is_removed_and_the_users_own_files_stay(self, tmp_path: Path) -> None:
        for name in (".0123abcd.partial", ".pipeline.0123abcd.old", ".gone.0123abcd.old", ".x.old", ".notes.partial"):
            (tmp_path / name).mkdir()
        (tmp_path / "pipeline").mkdir()
        (tmp_path / ".76543210.partial").write_text("half a file")
        files.remove_left_behind(tmp_path)
        assert {each.name for each in tmp_path.iterdir()} == {"pipeline", "gone", ".x.old", ".notes.partial"}

    def test_a_folder_that_is_no_runs_is_left_as_it_is(self, tmp_path: Path) -> None:
        """As the folder that run folders are in: what is being written there is another run's."""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".0123abcd.partial").mkdir()
        (tmp_path / ".0123abcd.partial").mkdir()
        before = sorted(tmp_path.rglob("*"))
        held = RunFolder(tmp_path)
        held.acquire(resume=True)
        with pytest.raises(UserError, match="is not the folder of a run"):
            held.ensure_safe_to_overwrite()
        held.release()
        assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before

    def test_who_does_not_get_a_run_folder_leaves_it_to_who_has_it(self, tmp_path: Path) -> None:
        first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
        second.created = True  # as if it had seen no folder, a moment before the first made it
        first.acquire(resume=False)
        with pytest.raises(UserError, match="another run is writing to"):
            second.acquire(resume=False)
        second.release()
        assert (tmp_path / "run" / "run_id").is_file()
        first.release()
        assert not (tmp_path / "run").exists()


class TestCommands:
    def test_an_interrupt_is_no_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        def work() -> int:
            raise KeyboardInterrupt

        assert reporting_errors(work) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_a_closed_pipe_is_no_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reading, writing = os.pipe()
        os.close(reading)

        def work() -> int:
            print("x" * 100_000, flush=True)
            return 0

        with os.fdopen(writing, "w") as closed:
            monkeypatch.setattr("sys.stdout", closed)
            assert reporting_errors(work) == 141
