"""tools/set_up.py: what is wrong is told in a sentence, what is there stays; and the lock holds what the lists name."""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from tools import set_up


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project in a path with a space."""
    root = tmp_path / "a project"
    root.mkdir()
    for name in ("requirements.txt", "requirements.lock", "requirements-models.txt"):
        shutil.copy(PROJECT / name, root)
    monkeypatch.setattr(set_up, "ROOT", str(root))
    monkeypatch.setattr(set_up, "VENV", str(root / ".venv"))
    monkeypatch.setattr(set_up, "READY", str(root / ".venv" / "ready"))
    monkeypatch.setattr(set_up, "PYTHON", str(root / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["set_up.py"])
    return root


@pytest.mark.parametrize(
    "version, told", [((3, 10, 1), "Python 3.10 is too old"), ((3, 15, 0), "Python 3.15 is too new")]
)
def test_another_python_is_refused(place, monkeypatch, capsys, version, told):
    monkeypatch.setattr(sys, "version_info", version)
    assert set_up.main() == 2
    err = capsys.readouterr().err
    assert told in err and "make setup PYTHON=" in err and err.count("\n") == 1


def test_a_python_without_venv_is_told(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert set_up.main() == 2 and "-venv" in capsys.readouterr().err


def test_too_little_disk_is_told_before_anything_is_made(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert set_up.main() == 2
    assert "1.0 GB are free, 4 GB needed (10 with CUDA)" in capsys.readouterr().err
    assert not (place / ".venv").exists()


def test_a_folder_that_cannot_be_written_is_told(place, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert set_up.main() == 2 and "cannot be written to" in capsys.readouterr().err


def test_a_stopped_set_up_goes_on_and_a_done_one_does_nothing(place, monkeypatch, capsys):
    """pip is left out: the commands are recorded, and the second is stopped."""
    ran, fails = [], True

    def call(command, cwd=None):
        if command[1:3] == ["-m", "venv"]:
            return subprocess.run([*command, "--without-pip"]).returncode
        ran.append(" ".join(map(str, command)))
        return int(fails and "torch==" in ran[-1])

    monkeypatch.setattr(set_up.subprocess, "call", call)
    monkeypatch.setattr(set_up, "describe_torch", lambda: "2.13.0, without CUDA")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert set_up.main() == 2 and "it continues from there" in capsys.readouterr().err
    assert not (place / ".venv" / "ready").exists() and "--require-hashes --no-deps" in ran[0]
    fails, ran[:] = False, []
    assert set_up.main() == 0 and len(ran) == 5
    assert re.search(r"Ready: Python 3\.\d+, torch 2\.13\.0, without CUDA", capsys.readouterr().err)
    ran.clear()
    assert set_up.main() == 0 and not ran
    (place / "requirements.lock").write_text("other==1\n")
    assert set_up.main() == 0 and ran


def test_a_package_whose_installation_was_killed_is_installed_again(place):
    packages = place / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole": ("METADATA", "RECORD", "INSTALLER"), "half": ("METADATA", "RECORD")}.items():
        (packages / f"{name}-1.dist-info").mkdir(parents=True)
        for file in files:
            (packages / f"{name}-1.dist-info" / file).touch()
    set_up.drop_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_a_broken_venv_is_made_anew(place, capsys):
    python = place / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/false\n")
    python.chmod(0o755)
    set_up.make_venv()
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0 and "anew" in capsys.readouterr().err


def test_the_lock_has_every_pin_with_hashes_and_no_build_of_torch():
    text = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text)
    locked = {match[0]: each for each in entries if (match := re.match(r"[\w.-]+==[\w.]+", each))}
    assert len(locked) > 150 and all("--hash=sha256:" in each for each in locked.values())
    assert not re.search(r"^(torch|triton|nvidia-|cuda-)", text, re.M)
    for name in ("requirements.txt", "requirements-dev.txt"):
        pins = re.findall(r"^[\w-]+==[\w.]+", (PROJECT / name).read_text(encoding="utf-8"), re.M)
        missing = set(pins) - set(locked) - {set_up.torch_pin()}
        assert not missing, f"{missing}: run make lock"
