"""A cross-encoder of one's own: the embedding model, tuned on training rows with hard negatives of the own search.

    pairs = mine_pairs(rows, search, refusal)       # (question, passage, 1 or 0)
    train_reranker(pairs, embedder, folder, seed)   # minutes on a CPU

Saved as safetensors in the folder `reranker` of the adapter.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora import console, machine
from qlora.refusal import is_refusal
from qlora.training.distractors import gather_answers
from qlora.training.rows import Row
from qlora.words import normalize, pad_words

Pair = tuple[str, str, float]
NEGATIVES, LOOKED_AT = 3, 10  # per question, of so many passages of a search
WINDOW = 256  # tokens of question and passage
BATCH, LEARNING_RATE, EPOCHS = 16, 1e-4, 2


def mine_pairs(rows: Sequence[Row], search: Callable[[str, int], list], refusal: str) -> list[Pair]:
    """(question, passage, label): the context of a row, and passages of a search that hold none of its answers.

    A row that refuses gives its context as a negative. Another row's answer to the same question counts as well.
    """
    answers, pairs = gather_answers(rows, refusal), []
    with console.progress() as bar:
        for row in bar.track([row for row in rows if row.context], description="hard negatives"):
            if is_refusal(row.response, refusal):
                pairs.append((row.instruction, row.context, 0.0))
                continue
            known = answers[normalize(row.instruction)]
            found = [document.page_content for document in search(row.instruction, LOOKED_AT)]
            wrong = [text for text in found if not any(answer in pad_words(text) for answer in known)]
            pairs.append((row.instruction, row.context, 1.0))
            pairs += [(row.instruction, text, 0.0) for text in wrong[:NEGATIVES]]
    return pairs


def train_reranker(pairs: Sequence[Pair], embedder: str, folder: Path, seed: int) -> None:
    """Tunes the embedding model to a cross-encoder, and puts it in place of `folder`.

    A line says how the mean loss compares with that of one score for all pairs: near 1 it learned nothing. Raises
    UserError, before it begins, without pairs of both labels.
    """
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    machine.threads()
    right = sum(label for *_, label in pairs)
    wrong = len(pairs) - right
    if not (right and wrong):
        what = f"{right:.0f} right and {wrong:.0f} wrong passages are no pairs to learn from"
        raise console.fail(what, "rows of the adapter", "ingest the documents that they are about, and others")
    model = CrossEncoder(embedder, num_labels=1, max_length=WINDOW, trust_remote_code=False)
    names = ("question", "passage", "label")
    rows = Dataset.from_dict(dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True)))
    partial = folder.with_name(f".{folder.name}.partial")
    machine.remove_folder(partial)
    given = CrossEncoderTrainingArguments(
        output_dir=str(partial / "run"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.1,
        seed=seed,
        bf16=machine.compute_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=50,
    )
    loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(wrong / right))
    result = CrossEncoderTrainer(model=model, args=given, train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(partial / "model"), safe_serialization=True)
    machine.remove_folder(folder)
    (partial / "model").rename(folder)
    machine.remove_folder(partial)
    share = result.training_loss / (math.log(2) * 2 * wrong / len(pairs))
    console.note(f"{len(pairs)} pairs of question and passage: {share:.2f} of the loss of one score for all")
