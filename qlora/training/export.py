"""Exports: a merged model that runs anywhere, as a folder or as GGUF, and a folder pushed to the Hugging Face hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from qlora import machine, settings
from qlora.console import UserError, fail, note
from qlora.machine import check_disk, check_writable, claiming
from qlora.model.adapter import Adapter, load_adapter
from qlora.model.base_model import load_base_model, load_tokenizer, resolve_base_model
from qlora.prompt import encode_prompt, fill_prompt
from qlora.training import gguf_file
from qlora.training.examples import Example

CHECKED_ROWS, CHECKED_TOKENS = 8, 32
# Logits nearer than this share of their standard deviation are a tie. Correct merges of SmolLM2-135M differed by
# at most 0.07 (two steps of bf16) in 48 answers; without the LoRA delta, or quantised again, each answer by 0.5 to 4.
# Equality would be too strict: bitsandbytes' two CPU kernels, on the same weights, differ in one answer of 16.
TIE = 0.15
FULL = 0.9  # share of the free memory that the weights may take: a layer exists twice while it is changed


def merge_adapter(adapter: Adapter, folder: Path, rows: Sequence[Example]) -> int:
    """Writes base + adapter as a plain transformers model; returns the number of answers that were checked first.

    The weights are dequantised NF4 + LoRA delta, as in training. Quantised again (PEFT's merge on the 4-bit
    model; the folder as --base-model) they lose the delta, which is smaller than a step of NF4.
    Up to 8 held-out `rows` are answered greedily by adapter on 4-bit, and the merged model must answer the same.
    Raises UserError, with nothing written, when it does not, when `folder` holds something, and without disk.
    """
    folder = folder.resolve()
    check_target(folder)
    tokenizer, prompts = load_tokenizer_of(adapter), choose_prompts(rows)
    write_model(folder, merge_in_memory(adapter, tokenizer, prompts, may_move=True), tokenizer, adapter)
    return len(prompts)


def load_tokenizer_of(adapter: Adapter):
    tokenizer = load_tokenizer(str(adapter.folder))
    tokenizer.chat_template = adapter.prompt.chat_template
    return tokenizer


def choose_prompts(rows: Sequence[Example]) -> list[list[int]]:
    """The prompts of up to 8 of the rows, from all over them. Raises UserError without any."""
    if not rows:
        raise fail("no held-out row to check the merged model with", "dataset", "give more rows")
    return [row.prompt_ids for row in rows[:: max(1, len(rows) // CHECKED_ROWS)][:CHECKED_ROWS]]


def export_gguf(adapter: Adapter, path: Path, rows: Sequence[Example]) -> int:
    """Writes base + adapter as a GGUF file with an Ollama Modelfile; returns the number of answers that were checked.

    The merged model must answer as the adapter does, and the file, loaded by transformers, as the merged model. Raises
    UserError, with nothing written, when one does not, and for what cannot be exported.
    """
    from accelerate.utils.memory import clear_device_cache

    from qlora.answering.generator import Generator

    path = path.resolve()
    check_gguf_target(path)
    tokenizer, prompts = load_tokenizer_of(adapter), choose_prompts(rows)
    merged = merge_in_memory(adapter, tokenizer, prompts, may_move=True)
    gguf_file.check_exportable(merged.config, tokenizer)
    check_disk(path.parent, merged.get_memory_footprint())
    generator = Generator(model=merged, tokenizer=tokenizer, max_new_tokens=CHECKED_TOKENS)
    answers, ends = [generator.generate_ids([prompt])[0] for prompt in prompts], generator.end_tokens()
    partial = path.with_name(f".{path.stem}.writing.gguf")
    try:
        gguf_file.write_gguf(partial, merged, tokenizer)
        config, device = merged.config, merged.device
        del merged, generator
        clear_device_cache(garbage_collection=True)
        loaded = gguf_file.load_gguf(partial, config, device)
        differing = sum(not keeps_answer(loaded, *pair) for pair in zip(prompts, answers, strict=True))
        if differing:
            what = f"the GGUF file answers {differing} of {len(prompts)} prompts differently"
            raise fail(what, str(adapter.folder), gguf_file.OTHERWISE)
        gguf_file.write_modelfile(path.with_suffix(".Modelfile"), path, tokenizer, adapter.prompt, ends)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(prompts)


def check_gguf_target(path: Path) -> None:
    """Raises UserError unless the file has GGUF's suffix, is not there, and can be made."""
    if path.suffix != ".gguf":
        raise fail("the name of the file to export does not end in .gguf", str(path), "write mine.gguf")
    for taken in (path, path.with_suffix(".Modelfile")):
        if taken.exists():
            raise fail("the file to export is there already", str(taken), "give a new name")
    machine.check_file(path)


def merge_for_speed(trained: Adapter, tokenizer, questions: Path):
    """`merge_in_memory`, checked on the first of the questions with their contexts."""
    from qlora.evaluation.questions import load_questions

    asked = [question for question in load_questions(questions) if question.context][:CHECKED_ROWS]
    messages = [fill_prompt(tokenizer, trained.prompt, 1024, q.question, [q.context]) for q in asked]
    return merge_in_memory(trained, tokenizer, [encode_prompt(tokenizer, each) for each in messages])


def merge_in_memory(adapter: Adapter, tokenizer, prompts: Sequence[list[int]], may_move: bool = False):
    """Base + adapter as one model in 16 bit, which answers the prompts as the adapter on 4-bit does.

    With `may_move` it is on the CPU when the GPU has no room for it. Raises UserError when it answers differently, or
    when memory is missing.
    """
    from accelerate.utils.memory import clear_device_cache

    from qlora.answering.generator import Generator

    clear_device_cache(garbage_collection=True)  # an unused trainer is a cycle of references
    # As for training: the CPU kernel for answering repacks the weights, and dequantising those gives noise.
    base = load_base_model(resolve_base_model(adapter.base_model), training=True, keep=False)
    tuned = load_adapter(base, adapter)
    generator = Generator(model=tuned, tokenizer=tokenizer, max_new_tokens=CHECKED_TOKENS)
    answers = [generator.generate_ids([prompt])[0] for prompt in prompts]
    # In the dtype of the 4-bit model: in fp32, at twice the size, no more answers are equal (14 of
    # 16, bf16 15), since the reference itself rounds to bf16.
    merged = load_adapter(dequantize_model(tuned.unload(), may_move), adapter).merge_and_unload().eval()
    differing = sum(not keeps_answer(merged, *pair) for pair in zip(prompts, answers, strict=True))
    if differing:
        what = f"the merged model answers {differing} of {len(prompts)} prompts differently"
        raise fail(what, str(adapter.folder), "answer with base model and adapter instead")
    return merged


def dequantize_model(model, may_move: bool):
    """The 4-bit model in 16 bit where it is, or on the CPU when its GPU has no room and it `may_move`.

    Raises UserError where there is no room.
    """
    from accelerate.hooks import remove_hook_from_submodules

    needed, on_cpu = 2 * model.num_parameters() / FULL, model.device.type == "cpu"
    free = machine.available_memory() if on_cpu else machine.free_memory()
    if may_move and not on_cpu and needed > free:
        note(f"Merging on the CPU: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB of the GPU are free")
        remove_hook_from_submodules(model)  # accelerate's, which would move every input back to the GPU
        model, free = model.to("cpu"), machine.available_memory()
    if needed > free:
        what = f"too little memory to merge: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
        fix = "free some (after training, add --resume: the adapter is saved), or answer with base model and adapter"
        raise fail(what, f"merging on {model.device}", fix)
    return model.dequantize()


def check_target(folder: Path) -> None:
    """Raises UserError unless `folder` is empty, or does not exist and can be created."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise fail("the folder for the merged model is not empty", str(folder), "give a new folder")
    check_writable(folder)


def check_hub(repository: str) -> None:
    """Raises UserError for a name that is not a repository's, and without a token."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise fail(f"not the name of a repository: {repository}", "--push-to-hub", "write USER/NAME") from error
    hub_token()


def hub_token() -> str:
    """HF_TOKEN, or that of `hf auth login`. Raises UserError without one."""
    from huggingface_hub import get_token

    token = settings.get("HF_TOKEN") or get_token()
    if not token:
        raise fail("no Hugging Face token", "HF_TOKEN", "set one with write access (huggingface.co/settings/tokens)")
    return token


def keeps_answer(model, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token of `answer` is the greedy choice of `model` after those before it, up to a `TIE`."""
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return bool((logits.amax(1) - chosen <= TIE * logits.std(1)).all())


def write_model(folder: Path, model, tokenizer, adapter: Adapter) -> None:
    """Puts the whole model in place of the absent or empty `folder`; a failure leaves nothing behind."""
    check_disk(check_writable(folder), model.get_memory_footprint())
    # Not adapter.partial_folder: the checkpoints of an unfinished training could be there.
    partial = folder.with_name(f".{folder.name}.merging")
    with claiming(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            shutil.copyfile(adapter.folder / "prompt.json", partial / "prompt.json")
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def push_adapter(folder: Path, repository: str, endpoint: str | None = None) -> str:
    """Uploads an adapter or merged folder, without dot files, to a model repository; returns its address.

    A new repository is private, an existing one keeps its visibility. Raises UserError when the folder holds no
    model, without a token, and with the hub's message when it refuses or cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise fail("no adapter or model to push", str(folder), "give a folder that training or merging wrote")
    token = hub_token()
    api = HfApi(endpoint=endpoint, token=token)
    try:
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, ignore_patterns=[".*", "*/.*"])
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: uploads of large files
        raise explain_refusal(error, repository, token) from error
    return str(created)


def explain_refusal(error: Exception, repository: str, token: str) -> UserError:
    """The message of the hub or the network, without the token, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split()).replace(token, "HF_TOKEN")[:300]
    fixes = {
        401: "set HF_TOKEN to a valid token with write access",
        403: "give the token write access to that user or organisation, or push to your own USER/NAME",
        404: "check the user or organisation, and that the token has write access",
    }
    other = "fix what the hub names" if isinstance(error, ValueError) else "check the network and push again"
    return fail(f"the push failed ({said})", repository, fixes.get(status, other))
