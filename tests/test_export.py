"""Merging a tiny Llama's adapter into a plain model or a GGUF file; pushing a folder to a hub that speaks HTTP here."""

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import QUICK, sample_rows, train
from safetensors.torch import load_file

from qlora import machine
from qlora.answering.generator import Generator
from qlora.console import UserError
from qlora.model import base_model
from qlora.model.adapter import load_adapter, read_adapter, serving_hint
from qlora.model.lean_layers import dequantize
from qlora.prompt import show_prompt
from qlora.training import export, gguf_file
from qlora.training.distractors import add_distractors
from qlora.training.examples import tokenize_rows
from qlora.training.rows import Row

TOKEN = "hf_secretsecret"


@pytest.fixture(scope="module")
def decided(tiny_base, tmp_path_factory):
    """An adapter that is sure of each of its tokens: the shared tiny one answers with EOS alone."""
    folder = tmp_path_factory.mktemp("decided")
    rows = [{**row, "response": "the ferry leaves at noon"} for row in sample_rows()[::24]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--base-model", tiny_base, "--dataset", folder / "rows.jsonl", "--output", folder / "adapter"]
    assert train(*words, "--distractors", 0, "--learning-rate", 0.02, "--max-steps", 60) == 0
    return read_adapter(folder / "adapter")


@pytest.fixture(scope="module")
def held_out(decided):
    """Twelve other real rows, as examples."""
    tokenizer = base_model.load_tokenizer(str(decided.folder))
    rows = [Row(**row) for row in sample_rows()[12:300:24]]
    shaped = add_distractors(rows, 1, 1.0, decided.prompt, seed=0)
    return tokenize_rows(tokenizer, decided.prompt, shaped, 768)[0]


@pytest.fixture(scope="module")
def merged(decided, held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "mine"
    assert export.merge_adapter(decided, folder, held_out) == 8
    return folder


def greedy(model, tokenizer, examples) -> list[list[int]]:
    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=24)
    return [generator.generate_ids([e.prompt_ids])[0] for e in examples]


# ------------------------------------------------------------------------------- merge


def test_plain_transformers_answers_as_the_adapter_on_4bit_does(decided, held_out, merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    tuned = load_adapter(base_model.load_base_model(decided.base_model), decided)
    answers = greedy(plain, tokenizer, held_out)
    assert len(answers) == 12 and all(len(answer) > 5 for answer in answers)
    assert answers == greedy(tuned, tokenizer, held_out)
    assert tokenizer.chat_template == decided.prompt.chat_template
    assert base_model.resolve_base_model(str(merged)) == str(merged)


def test_merged_folder_has_exactly_these_files_and_nothing_of_the_quantisation(decided, merged):
    assert {path.name for path in merged.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "prompt.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert [path.name for path in merged.parent.iterdir()] == ["mine"]
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(machine.compute_dtype()).removeprefix("torch.")
    assert (merged / "prompt.json").read_bytes() == (decided.folder / "prompt.json").read_bytes()


def test_merged_weights_are_dequantised_base_plus_delta(decided, merged):
    from bitsandbytes.nn import Linear4bit
    from torch.nn import Linear

    saved, lora = load_file(merged / "model.safetensors"), load_file(decided.folder / "adapter_model.safetensors")
    layers = {
        name: module
        for name, module in base_model.load_base_model(decided.base_model).named_modules()
        if isinstance(module, Linear) and name != "lm_head"
    }
    assert len(layers) == 14
    kept = {name for name, layer in layers.items() if not isinstance(layer, Linear4bit)}
    assert kept == {f"model.layers.{n}.{name}" for n in (0, 1) for name in ("mlp.down_proj", "self_attn.v_proj")}
    for name, layer in layers.items():
        before = dequantize(layer.weight, machine.compute_dtype())
        a, b = (lora[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
        after = (before.float() + 2 * b @ a).to(before.dtype)  # alpha is twice the rank
        torch.testing.assert_close(saved[f"{name}.weight"], after, rtol=1e-2, atol=1e-4)
        assert (saved[f"{name}.weight"] - before).abs().max() > 0.01


@pytest.mark.parametrize("share", [0.0, -1.0])
def test_a_wrong_merge_is_refused_and_writes_nothing(decided, held_out, tmp_path, monkeypatch, share):
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: share * right(self, name))
    with pytest.raises(UserError, match=r"answers 8 of 8 prompts differently - .* - answer with base model"):
        export.merge_adapter(decided, tmp_path / "mine", held_out)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_gpu(decided, monkeypatch):
    """A 4-bit model that believes to be on a GPU, with accelerate's hooks, and the bytes that 16 bit need."""
    model = base_model.load_base_model(decided.base_model, training=True)
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model, 2 * model.num_parameters() / export.FULL


def give_memory(monkeypatch, on_gpu: float, in_main: float) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: on_gpu)
    monkeypatch.setattr(machine, "available_memory", lambda: in_main)


def test_a_merge_too_large_for_the_gpu_is_made_on_the_cpu(on_gpu, monkeypatch, capsys):
    model, needed = on_gpu
    give_memory(monkeypatch, 0.9 * needed, 1.1 * needed)
    plain = export.dequantize_model(model, may_move=True)
    assert "Merging on the CPU" in capsys.readouterr().err
    assert not any(hasattr(module, "_hf_hook") for module in plain.modules())  # they move inputs back to the GPU
    assert torch.isfinite(plain(input_ids=torch.tensor([[5, 6]])).logits).all()


def test_a_merge_stays_on_a_gpu_with_room(on_gpu, monkeypatch, capsys):
    model, needed = on_gpu
    give_memory(monkeypatch, 1.1 * needed, 0)
    plain = export.dequantize_model(model, may_move=True)
    assert hasattr(plain, "_hf_hook") and capsys.readouterr().err == ""


@pytest.mark.parametrize(("may_move", "where"), [(True, "cpu"), (False, "cuda")])
def test_a_merge_without_memory_is_told(on_gpu, monkeypatch, may_move, where):
    model, needed = on_gpu
    give_memory(monkeypatch, 0.9 * needed, 0.9 * needed)
    monkeypatch.setattr(type(model), "to", lambda self, device: setattr(type(self), "device", device) or self)
    with pytest.raises(UserError, match=f"too little memory to merge: .* needed - merging on {where} - free some"):
        export.dequantize_model(model, may_move)


def test_a_tie_is_no_difference_and_a_near_miss_is_one():
    class Fixed:
        device = "cpu"

        def __init__(self, gap):
            self.logits = torch.linspace(-10, 10, 100).repeat(1, 3, 1)
            self.logits[0, 1, 7] = 10 - gap  # the second token of the answer, of std 5.8

        def __call__(self, input_ids, logits_to_keep):
            assert input_ids.tolist() == [[5, 99, 7]] and logits_to_keep == 3
            return self

    assert export.keeps_answer(Fixed(0.5), [5], [99, 7])
    assert not export.keeps_answer(Fixed(1.5), [5], [99, 7])


def test_folder_with_something_in_it_and_no_rows_are_refused_before_any_work(decided, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_base_model", lambda *a, **k: pytest.fail("loaded a model"))
    (tmp_path / "thesis.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="not empty"):
            export.merge_adapter(decided, taken, held_out)
    with pytest.raises(UserError, match="no held-out row"):
        export.merge_adapter(decided, tmp_path / "mine", [])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_write_that_dies_leaves_nothing_and_spares_an_unfinished_training(decided, tmp_path, monkeypatch):
    class Dying:
        def get_memory_footprint(self):
            return 1

        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("disk full")

    (tmp_path / ".mine.partial").mkdir()
    with pytest.raises(OSError, match="disk full"):
        export.write_model(tmp_path / "mine", Dying(), None, decided)
    assert [path.name for path in tmp_path.iterdir()] == [".mine.partial"]


# ------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def exported(decided, held_out, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "mine.gguf"
    assert export.export_gguf(decided, file, held_out) == 8
    return file


def test_a_gguf_file_answers_as_the_adapter_on_4bit_does(decided, held_out, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": exported.parent, "gguf_file": exported.name}
    plain, written = AutoModelForCausalLM.from_pretrained(**place), AutoTokenizer.from_pretrained(**place)
    tokenizer = base_model.load_tokenizer(str(decided.folder))
    tuned = load_adapter(base_model.load_base_model(decided.base_model), decided)
    answers = greedy(plain, tokenizer, held_out)
    assert answers == greedy(tuned, tokenizer, held_out) and all(len(answer) > 5 for answer in answers)
    for row in sample_rows()[:30]:
        ids = written(row["context"], add_special_tokens=False).input_ids
        assert ids == tokenizer(row["context"], add_special_tokens=False).input_ids
    assert written.chat_template == decided.prompt.chat_template
    assert (written.bos_token, written.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert {path.name for path in exported.parent.iterdir()} == {"mine.gguf", "mine.Modelfile"}


def test_the_modelfile_asks_as_we_do(decided, exported):
    tokenizer = export.load_tokenizer_of(decided)
    text = exported.with_suffix(".Modelfile").read_text(encoding="utf-8")
    [template], [rules] = (re.findall(rf'^{name} """(.*?)"""$', text, re.M | re.S) for name in ("TEMPLATE", "SYSTEM"))
    system, user = decided.prompt.messages("Who {{ signs }}?", ["The bosun.", "The mate."])
    assert rules == system["content"] and template.endswith("{{ .Response }}")
    asked = template.removesuffix("{{ .Response }}").replace("{{ .System }}", rules)
    assert asked.replace("{{ .Prompt }}", user["content"]) == show_prompt(tokenizer, [system, user])
    lines = text.splitlines()
    assert {"FROM ./mine.gguf", 'PARAMETER stop "</s>"', "PARAMETER temperature 0"} <= set(lines)
    assert lines[0] == "# ollama create mine -f mine.Modelfile"


def test_a_wrong_gguf_file_is_refused_and_nothing_is_left(decided, held_out, tmp_path, monkeypatch):
    tensors = gguf_file.list_tensors

    def list_wrong(model):
        return ((name, weight.flip(0) if "ffn_down" in name else weight) for name, weight in tensors(model))

    monkeypatch.setattr(gguf_file, "list_tensors", list_wrong)
    with pytest.raises(UserError, match=r"the GGUF file answers \d of 8 prompts differently - .*convert_hf_to_gguf.py"):
        export.export_gguf(decided, tmp_path / "mine.gguf", held_out)
    assert list(tmp_path.iterdir()) == []


def test_a_run_exports_what_it_trained_and_a_bad_name_is_told_first(tiny_base, rows_file, tmp_path, capsys):
    words = "--base-model", tiny_base, "--dataset", rows_file, "--output", tmp_path / "a", *QUICK, "--export-gguf"
    assert train(*words, tmp_path / "mine.gguf") == 0
    told = f"GGUF, and a Modelfile beside it: {tmp_path / 'mine.gguf'} (answers to 8 held-out rows are the adapter's)"
    assert told in capsys.readouterr().err
    for name, said in (("mine.gguf", "is there already"), ("mine.bin", "does not end in .gguf"), ("x/a.gguf", "exist")):
        assert train(*words, tmp_path / name, "--overwrite") == 2
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------- push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as create_repo and upload_folder use; the server keeps what was sent.

    Paths and answers as huggingface_hub 1.33 sends and reads them (hf_api.py, _commit_api.py, lfs.py).
    """

    def log_message(self, *words):
        pass

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.tokens.add(self.headers["Authorization"])
        status, message = hub.refuses.get(self.path, (200, ""))
        if status != 200:
            return self.reply({"error": message, "errors": [{"message": message}]}, status)
        at = f"http://127.0.0.1:{hub.server_port}"
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.reply({"url": f"{at}/ann/mine"})
        if self.path == "/api/models/ann/mine/preupload/main":
            files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.reply({"files": [{**file, "uploadMode": hub.mode(file["path"])} for file in files]})
        if self.path == "/ann/mine.git/info/lfs/objects/batch":
            upload = [
                {**file, "actions": {"upload": {"href": f"{at}/storage/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.reply({"objects": upload})
        if self.path == "/api/models/ann/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.storage[value["oid"]]
            return self.reply({"commitUrl": f"{at}/ann/mine/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.reply({}, 200 if self.path == "/api/validate-yaml" else 404)

    def do_PUT(self):
        self.server.storage[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({}, self.server.refuses.get("/storage", (200, ""))[0])

    def do_GET(self):  # create_repo looks, when it is refused, whether the repository is there
        self.reply({"error": "Repository not found"}, 404)

    def reply(self, value: dict, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on the loopback device, for the real client; nobody is logged in."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
    server.created, server.files, server.storage, server.tokens, server.refuses = None, {}, {}, set(), {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    # hf_xet speaks to a storage service of its own; the hub still takes the LFS protocol from clients without it.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def visible_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("xet", [False, True])
def test_push_sends_every_file_but_dot_files_and_shows_no_token(
    hub, tiny_adapter, tmp_path, monkeypatch, capfd, caplog, xet
):
    from huggingface_hub import constants

    if xet:  # the client's other way to commit; nothing is stored in xet, since the hub asks for regular files
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.mode = lambda path: "regular"
    folder = shutil.copytree(tiny_adapter, tmp_path / "mine")
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert export.push_adapter(folder, "mine", hub.address) == f"{hub.address}/ann/mine"
    assert hub.created["visibility"] == "private" and hub.created["name"] == "mine"
    assert hub.files == visible_files(tiny_adapter) and "adapter_model.safetensors" in hub.files
    assert len(hub.storage) == (0 if xet else 1)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text


def test_push_sends_a_merged_folder(hub, merged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export.push_adapter(merged, "ann/mine", hub.address)
    assert hub.files == visible_files(merged) and hub.created["organization"] == "ann"


def test_push_without_a_token_or_a_model_asks_nobody(hub, tiny_adapter, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no Hugging Face token - HF_TOKEN - set one with write access"):
        export.push_adapter(tiny_adapter, "ann/mine", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="no adapter or model to push"):
        export.push_adapter(tmp_path, "ann/mine", hub.address)
    assert hub.tokens == set()


@pytest.mark.parametrize(
    ("path", "status", "fix"),
    [
        ("/api/repos/create", 401, "valid token with write access"),
        ("/api/repos/create", 403, "your own USER/NAME"),
        ("/api/validate-yaml", 400, "fix what the hub names"),
        ("/api/models/ann/mine/preupload/main", 404, "check the user or organisation"),
        ("/api/models/ann/mine/commit/main", 403, "your own USER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_told_without_the_token(hub, tiny_adapter, monkeypatch, path, status, fix):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses[path] = (status, f"no, {TOKEN} may not")
    with pytest.raises(UserError, match=f"the push failed .* - ann/mine - .*{fix}") as caught:
        export.push_adapter(tiny_adapter, "ann/mine", hub.address)
    assert "no, HF_TOKEN may not" in str(caught.value) and TOKEN not in str(caught.value)
    assert hub.files == {}


def test_bad_names_a_failed_upload_and_a_dead_network_are_told(hub, tiny_adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"the push failed .* - a/b/c - fix"):
        export.push_adapter(tiny_adapter, "a/b/c", hub.address)
    hub.refuses["/storage"] = (403, "")
    with pytest.raises(UserError, match=r"uploading 'adapter_model.safetensors' .* - ann/mine - check the network"):
        export.push_adapter(tiny_adapter, "ann/mine", hub.address)
    with pytest.raises(UserError, match=r"the push failed .* - ann/mine - check the network"):
        export.push_adapter(tiny_adapter, "ann/mine", "http://127.0.0.1:9")


# ------------------------------------------------------------------------------- served


def test_the_card_says_how_vllm_serves_the_adapter(tiny_adapter, tiny_base):
    line = "--enable-lora --max-lora-rank 16 --lora-modules mine=THIS_FOLDER --chat-template"
    assert f"vllm serve {tiny_base} {line}" in (tiny_adapter / "README.md").read_text()
    assert "--max-lora-rank 64 " in serving_hint("base", {"rank": 33})
    for refused in ({"rank": 16, "dora": True}, {"rank": 513}):
        assert "--merge" in serving_hint("base", refused) and "vllm serve" not in serving_hint("base", refused)
