"""The adapter folder: what training leaves and answering reads. Plain PEFT can load it as well.

adapter_model.safetensors  adapter_config.json        PEFT's own
tokenizer.json  tokenizer_config.json  chat_template.jinja
prompt.json  run.json  data_report.json  metrics.jsonl  loss.png  README.md
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora.console import Problems, fail, shorten_text
from qlora.machine import remove_folder
from qlora.model.fingerprint import fingerprint_model
from qlora.presets import EMBEDDED
from qlora.prompt import SCHEMA, Prompt

RUN_SCHEMA = 1
OURS = {  # what a folder may hold that --overwrite replaces
    *("adapter_model.safetensors", "adapter_config.json", "prompt.json", "run.json", "metrics.jsonl"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "README.md", "loss.png", "evaluation.png", "data_report.json"),
    *("ranking.json", "reranker"),
}
REQUIRED_FILES = ("adapter_model.safetensors", "adapter_config.json", "prompt.json", "run.json")
REQUIRED_FILES += ("tokenizer.json", "tokenizer_config.json")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes (vllm/config/lora.py, 0.33)


@dataclass(frozen=True)
class Adapter:
    """A folder that was read and verified."""

    folder: Path
    prompt: Prompt
    run: dict
    base_model: str  # the name that `resolve_base_model` takes: of the base model on this machine

    @property
    def passages(self) -> int:
        """Passages per question in training, at most; answering gives as many."""
        return self.run["arguments"]["distractors"] + 1

    @property
    def refusal_bias(self) -> float:
        """The value that is added to the logit of a refusal's first token, fitted on the held-out rows."""
        return self.run["result"].get("refusal_bias", 0.0)


def bytes_needed(rank: int) -> int:
    """Disk for an adapter of a 13B model, the largest of the presets, and its tokenizer."""
    return 16_000_000 * rank + 50_000_000  # 3.9 M weights per rank, in fp32


def partial_folder(folder: Path) -> Path:
    """Where a run writes until it is complete; `folder` itself only ever holds a whole adapter."""
    return folder.with_name(f".{folder.name}.partial")


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError when the folder already holds something and may not be replaced."""
    if folder.is_file():
        raise fail("the output is a file", str(folder), "give a folder with --output")
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if inside - OURS:
        others = ", ".join(sorted(inside - OURS)[:3])
        raise fail(f"the output folder holds other files ({others})", str(folder), "give a new folder with --output")
    if inside and not overwrite:
        raise fail(
            "the output folder already holds an adapter", str(folder), "add --overwrite or choose another --output"
        )


def write_adapter(folder: Path, model, tokenizer, prompt: Prompt, run: dict) -> None:
    """Puts a whole adapter in place of `folder`, and removes the partial folder (metrics.jsonl lies there)."""
    partial = partial_folder(folder) / "adapter"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in ("metrics.jsonl", "data_report.json"):
        shutil.copyfile(partial.parent / name, partial / name)
    # save_embedding_layers="auto" would ask the hub whether the vocabulary grew; ours never does.
    model.save_pretrained(partial, save_embedding_layers=False)
    sort_layers(partial / "adapter_config.json")
    tokenizer.save_pretrained(partial)
    write_json(partial / "prompt.json", {**asdict(prompt), "digest": prompt.digest})
    write_json(partial / "run.json", {"schema": RUN_SCHEMA, **run})
    plot_losses(partial / "metrics.jsonl", partial / "loss.png")
    (partial / "README.md").write_text(model_card(run), encoding="utf-8")
    remove_folder(finished_folder(folder))
    partial.parent.rename(finished_folder(folder))
    put_in_place(folder)


def sort_layers(path: Path) -> None:
    """Sorts the names of layers in PEFT's configuration, which writes a set: equal runs should give equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()})


def finished_folder(folder: Path) -> Path:
    """What a partial folder is called from the moment on that its adapter is whole."""
    return folder.with_name(f".{folder.name}.finished")


def put_in_place(folder: Path) -> bool:
    """Moves a finished adapter to its place; returns whether there was one, as after a kill in this very moment.

    The adapter that it replaces stays until then.
    """
    finished, old = finished_folder(folder), folder.with_name(f".{folder.name}.replaced")
    is_there = (finished / "adapter").is_dir()
    if is_there:
        if folder.exists():
            remove_folder(old)
            folder.rename(old)
        (finished / "adapter").rename(folder)
    remove_folder(finished)
    if folder.exists():
        remove_folder(old)
    return is_there


def is_finished(folder: Path) -> bool:
    """Whether a whole adapter is there and no unfinished run beside it."""
    return all((folder / name).is_file() for name in REQUIRED_FILES) and not partial_folder(folder).exists()


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_adapter(folder: Path, base_model: str | None = None) -> Adapter:
    """The verified adapter. Raises UserError with everything that is wrong with the folder:

    missing, files missing, not our JSON, another prompt schema, made for a base other than `base_model` (when one is
    named), or for one that is not on this machine.
    """
    where = str(folder)
    if not folder.is_dir():
        fix = "train one: python instruct_train_qlora.py, or answer with the base model: --adapter none"
        raise fail("adapter folder not found", where, suggest_adapters(folder.parent) or fix)
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise fail(f"incomplete adapter: {', '.join(missing)} missing", where, "train again, or copy the whole folder")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        texts = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        digest = texts.pop("digest")
        schema = texts.get("schema")
        prompt = Prompt(**texts) if schema == SCHEMA else None
        base = find_base(folder, run["base_model"], base_model)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged adapter ({error})", where, "train again, or copy the whole folder") from error
    problems = Problems()
    if prompt is None:
        problems.add(f"prompt schema {schema}, this version reads {SCHEMA}", where, "train again with this version")
    elif prompt.digest != digest:
        problems.add("prompt.json was changed after training", where, "restore the file, or train again")
    if base is None:
        made_for = run["base_model"]["name"]
        if base_model:
            fix = f"leave --base-model out, or train an adapter for {base_model}"
            problems.add(f"the adapter was made for {made_for}, not for {base_model}", where, fix)
        else:
            what = f"the base model of the adapter, {made_for}, is not here or was changed"
            problems.add(what, where, "name its folder with --base-model")
    problems.raise_if_any()
    return Adapter(folder, prompt, run, base)


def describe_base(name: str, folder: Path) -> dict:
    """The base model as run.json of an adapter `folder` keeps it: how it was named, where it was, and its fingerprint.

    `near` is its place seen from the adapter: both may be copied to another machine together.
    """
    path = Path(name).expanduser()
    places = {}
    if name != EMBEDDED and path.is_dir():
        places = {"folder": str(path.resolve()), "near": os.path.relpath(path.resolve(), folder.resolve())}
    return {"name": name, **places, "fingerprint": fingerprint_model(name)}


def find_base(folder: Path, made_for: dict, named: str | None) -> str | None:
    """The name of the adapter's base model on this machine: the one `named`, else where it was or beside the adapter.

    None where no such model has its fingerprint. Adapters of earlier versions have none: then the names must be equal.
    """
    places = [made_for["folder"], str(folder / made_for["near"])] if "near" in made_for else [made_for["name"]]
    for name in [named] if named else places:
        if "near" in made_for and not Path(name).expanduser().is_dir():
            continue
        found = fingerprint_model(name) if made_for.get("fingerprint") else None
        if found == made_for["fingerprint"] if found else name == made_for["name"]:
            return name
    return None


def suggest_adapters(parent: Path) -> str:
    """A hint that names the finished adapters, the newest as a flag; empty without one."""
    found = [each for each in parent.glob("*") if is_finished(each)] if parent.is_dir() else []
    found.sort(key=lambda each: (each / "run.json").stat().st_mtime, reverse=True)
    others = f"; or {', '.join(map(str, found[1:4]))}" if found[1:] else ""
    return f"use the newest one: --adapter {found[0]}{others}" if found else ""


def digest_weights(folder: Path) -> str:
    """sha256 of the adapter's weights."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def load_adapter(base, adapter: Adapter):
    """The base model with the adapter's weights on it, for answering."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        message = f"the weights do not fit {adapter.base_model} ({shorten_text(str(error), 160)})"
        raise fail(message, str(adapter.folder), "train again, or copy the whole folder") from error


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws training loss (every step) and held-out loss as a PNG."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2 if style == "-" else 2)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture)


def model_card(run: dict) -> str:
    """README.md of the adapter folder, with the front matter the hub reads."""
    base, data, result = run["base_model"]["name"], run["dataset"], run["result"]
    kept = ", ".join(run["quantisation"].get("llm_int8_skip_modules") or ["lm_head"])
    line = "" if "folder" in run["base_model"] else f"base_model: {base}\n"  # the hub knows no local folders
    refusal = run["arguments"].get("refusal", Prompt.refusal)
    return f"""---
{line}library_name: peft
pipeline_tag: text-generation
tags: [qlora, lora, retrieval-augmented-generation]
---

# QLoRA adapter for {base}

Answers questions from numbered passages, cites them as `[n]`, and says "{refusal}" when they do
not hold the answer. The exact prompt is in `prompt.json` and `chat_template.jinja`.

| | |
|---|---|
| rows | {data["training_rows"]} for training, {data["held_out_rows"]} of other documents held out |
| held-out loss | {result["eval_loss_before"]:.3f} before, {result["eval_loss_after"]:.3f} after |
| steps | {result["steps"]} in {result["train_seconds"]:.0f} s, {result["useful_tokens_per_second"]:.0f} tokens/s |
| quantisation | {run["quantisation"]["bnb_4bit_quant_type"]}, double quantisation; not {kept} |

![loss](loss.png)

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

{serving_hint(base, run["arguments"])}

Everything about the run is in `run.json`.
"""


def serving_hint(base: str, arguments: dict) -> str:
    """How vLLM serves the adapter: it takes ranks up to one of VLLM_RANKS, 16 unless told, and no DoRA."""
    ranks = [rank for rank in VLLM_RANKS if rank >= arguments.get("rank", 16)]
    if arguments.get("dora") or not ranks:
        return "vLLM takes no such adapter: serve the folder that `instruct_train_qlora.py --resume --merge` writes."
    words = ["vllm serve", base, "--enable-lora", f"--max-lora-rank {max(16, ranks[0])}"]
    words += ["--lora-modules mine=THIS_FOLDER", "--chat-template THIS_FOLDER/chat_template.jinja"]
    return f"```console\n$ {' '.join(words)}\n```"
