"""Checkpoints of an unfinished run, so that it can be killed at any moment and continue exactly.

.NAME.partial/manifest.json    the arguments and rows of the run: a resumed run must match them
.NAME.partial/metrics.jsonl    the curve so far
.NAME.partial/checkpoint-N/    Trainer's own files, best.safetensors and progress.json; whole or absent
"""

import json
import re
import shutil
from pathlib import Path

from qlora.console import Problems, fail, note
from qlora.machine import remove_folder
from qlora.model import adapter

MANIFEST = "manifest.json"
STAGING = "staging"  # where a checkpoint is written before it is renamed


def last_checkpoint(partial: Path) -> Path | None:
    """The newest checkpoint of an unfinished run, or None."""
    return max(partial.glob("checkpoint-*"), key=step_of, default=None)


def describe_state(output: Path) -> dict[str, object]:
    """Whether the run that writes there is finished, and the step of its newest checkpoint, or None."""
    checkpoint = last_checkpoint(adapter.partial_folder(output))
    return {"finished": adapter.is_finished(output), "checkpoint": checkpoint and step_of(checkpoint)}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check_unfinished(partial: Path, resume: bool, overwrite: bool) -> None:
    """Raises UserError when a run with checkpoints would be deleted without --overwrite."""
    checkpoint = last_checkpoint(partial)
    if checkpoint and not (resume or overwrite):
        what = f"an unfinished run exists, at step {step_of(checkpoint)}"
        raise fail(what, str(partial), "add --resume to continue it, or --overwrite to start again")


def start_run(partial: Path, resume: bool, manifest: dict) -> None:
    """Makes the folder of the run ready, and writes or compares its manifest: see both functions."""
    start_folder(partial, resume)
    match_manifest(partial, manifest)


def start_folder(partial: Path, resume: bool) -> None:
    """The folder of an unfinished run: with `resume` the existing one, otherwise a new, empty one."""
    if not (resume and last_checkpoint(partial)):
        remove_folder(partial)
    shutil.rmtree(partial / STAGING, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)


def match_manifest(partial: Path, manifest: dict) -> None:
    """Writes the manifest of a new run, or checks that a resumed one has the same.

    Raises UserError with everything that differs in arguments, rows and base model. Other library versions are only
    reported: the run continues, maybe not to the same bits. Threads are not compared: `threads` returns them.
    """
    path = partial / MANIFEST
    if not last_checkpoint(partial):
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    compare_manifests(before, manifest, path).raise_if_any()


def compare_manifests(before: dict, now: dict, where: Path) -> Problems:
    """A problem for everything in which a resumed run differs from the one that it continues."""
    problems, old = Problems(), flatten(before)
    for name, value in flatten(now).items():
        if name == "threads" or old.get(name, value) == value:
            continue
        if name.startswith("versions."):
            note(f"{name.removeprefix('versions.')} was {old[name]}, is {value}: the last digits may differ")
        else:
            fix = "resume with the old value, or start again with --overwrite and without --resume"
            flag = re.sub(r"^arguments\.(\w+)$", lambda match: "--" + match[1].replace("_", "-"), name)
            problems.add(f"{flag} was {old[name]}, is {value}", str(where), fix)
    return problems


def threads(partial: Path) -> int:
    """The largest number of threads of the run: the number that it began with.

    Sums and matrix products are divided among them, and in fp32 their last digits depend on the number.
    """
    return json.loads((partial / MANIFEST).read_text(encoding="utf-8"))["threads"]


def flatten(manifest: dict) -> dict[str, object]:
    """{"versions": {"torch": 2}} -> {"versions.torch": 2}"""
    return {
        f"{group}.{name}" if isinstance(values, dict) else group: value
        for group, values in manifest.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def put_in_place(partial: Path, step: int, keep: int) -> None:
    """Renames the staged checkpoint, so that it is whole or absent, and removes all but the newest `keep`."""
    (partial / STAGING / f"checkpoint-{step}").rename(partial / f"checkpoint-{step}")
    for old in sorted(partial.glob("checkpoint-*"), key=step_of)[:-keep]:
        old.rename(partial / STAGING / old.name)  # one that is half removed must not look whole
    shutil.rmtree(partial / STAGING)


def cut_metrics(metrics: Path, step: int) -> None:
    """Removes measurements after the checkpoint: they are made again."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    cut = metrics.with_suffix(".cut")
    cut.write_text("".join(whole), encoding="utf-8")
    cut.replace(metrics)
