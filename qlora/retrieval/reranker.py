"""Cross-encoders: models that read question and passage together, and say how well the one answers the other.

score = open_reranker("cross-encoder/ms-marco-MiniLM-L6-v2")    # or a folder, or http://127.0.0.1:8080/rerank
score("Who signs form B7?", ["The director signs it.", "Form B7 is green."])        # [3.1, -5.2]: logits
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from qlora import machine
from qlora.console import fail, note
from qlora.model.base_model import explaining

Score = Callable[[str, list[str]], list[float]]
SECONDS = 30  # that a server may take


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def check_reranker(name: str) -> None:
    """Raises UserError unless it is the address of a server, or a model that scores a pair of texts."""
    if is_url(name):
        parts = urlsplit(name)
        if not parts.hostname or parts.username or parts.password:
            raise fail("not the address of a reranker", "--rerank", "write http://HOST:PORT/rerank, without a password")
        return
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise fail("reranker not found", f"--rerank {name}", "name a folder, a model of the hub, or http://HOST/rerank")
    from transformers import AutoConfig

    with explaining(name, "--rerank"):
        config = AutoConfig.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    kinds = config.architectures or []
    if config.num_labels != 1 or not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        what = f"{', '.join(kinds) or 'a model without a head'} with {config.num_labels} labels is not a cross-encoder"
        raise fail(what, f"--rerank {name}", "name a model that scores a pair of texts with one number")


def open_reranker(name: str) -> Score:
    """score(question, texts) -> a logit for each; texts longer than the model's window are shortened, and counted."""
    return partial(ask_server, name) if is_url(name) else Scorer(load_cross_encoder(name))


def load_cross_encoder(name: str):
    """A sentence-transformers CrossEncoder, in bf16 where the CPU multiplies it; safetensors only."""
    from sentence_transformers import CrossEncoder

    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    options = {"dtype": machine.compute_dtype(), "use_safetensors": True}
    with explaining(name, "--rerank"):
        model = CrossEncoder(source, trust_remote_code=False, model_kwargs=options)
    return model.eval()


class Scorer:
    """A cross-encoder on this machine."""

    def __init__(self, model):
        self.model, self.shortened = model, 0
        self.lock = threading.Lock()  # a tokenizer serves one thread at a time, and with a model server there are more
        positions = getattr(model.config, "max_position_embeddings", None) or model.max_length
        # RoBERTa counts positions from its padding token's number on.
        offset = 2 if "roberta" in model.config.model_type else 0
        self.window = min(model.max_length or positions, positions - offset)

    def __call__(self, question: str, texts: list[str]) -> list[float]:
        with self.lock:
            return self.score(question, texts)

    def score(self, question: str, texts: list[str]) -> list[float]:
        import torch

        tokenizer = self.model.tokenizer
        lengths = [len(ids) for ids in tokenizer([question] * len(texts), texts, truncation=False).input_ids]
        self.note_shortened(sum(length > self.window for length in lengths))
        self.model.max_length = self.window
        machine.threads().adjust()
        pairs = [(question, text) for text in texts]
        with torch.inference_mode():
            return self.model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False).tolist()

    def note_shortened(self, count: int) -> None:
        if count and not self.shortened:
            note(f"Passages longer than the reranker's window of {self.window} tokens are shortened for it")
        self.shortened += count


def ask_server(url: str, question: str, texts: Sequence[str]) -> list[float]:
    """The scores of a server: Text Embeddings Inference's /rerank, or that of vLLM, Jina and Cohere.

    One request serves both kinds: each takes the fields that it knows. Raises UserError when it fails.
    """
    import httpx

    asked = {"query": question, "texts": list(texts), "documents": list(texts), "raw_scores": True, "truncate": True}
    try:
        answer = httpx.post(url, json=asked, timeout=SECONDS)
        answer.raise_for_status()
        found = answer.json()
        rows = found["results"] if isinstance(found, dict) else found
        scores = {row["index"]: float(row.get("score", row.get("relevance_score"))) for row in rows}
        return [scores[n] for n in range(len(texts))]
    except httpx.HTTPError as error:
        raise fail(
            f"the reranker failed ({type(error).__name__}: {error})", url, "start it, or check --rerank"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no scores of a reranker ({type(error).__name__}: {error})"
        raise fail(what, url, "name the address of /rerank, of Text Embeddings Inference or vLLM") from None
