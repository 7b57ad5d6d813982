"""Answers that grow together are what each is alone, whoever comes and goes meanwhile."""

import threading

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from transformers import AutoModelForCausalLM

from qlora.answering.chain import Finding, build_chain
from qlora.answering.continuous_batch import Asked, ContinuousBatch
from qlora.answering.generator import Generator
from qlora.model import base_model

BEGINNING = list(range(10, 40))
PROMPTS = [[*BEGINNING, 3, 4, 5], [*BEGINNING, 9], list(range(50, 120)), [*BEGINNING, *range(60, 80)]]
LENGTHS = [6, 2, 4, 5]  # tokens of each answer


class Forcing(Generator):
    """A random model whose answers are forced; it keeps the logits that it had for each token."""

    seen: dict = {}

    def bias_first(self, start: int):
        def process(ids, logits):
            (prompt,) = ids[:, :start].tolist()
            at = ids.shape[1] - start
            self.seen.setdefault(tuple(prompt), []).append(logits[0].float())
            forced = torch.full_like(logits, -torch.inf)
            forced[:, 20 + at] = 0
            return forced

        return process


@pytest.fixture
def generator(tiny_base) -> Forcing:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20  # a random model hardly looks at positions
    return Forcing(model=model, tokenizer=base_model.load_tokenizer(str(tiny_base)), max_new_tokens=6, seen={})


@pytest.mark.parametrize("beginning", [BEGINNING, []])
def test_answers_grow_together_as_they_do_alone(generator, beginning):
    """Two begin, a longer one comes when they have a token, another one when the second has left."""
    alone = {}
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        lone = generator.model_copy(update={"seen": alone, "max_new_tokens": length})
        lone.extend_ids(lone.tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt"))
    said = [[] for _ in PROMPTS]

    def ask(n: int):
        def take(token: int) -> bool:
            said[n].append(token)
            return len(said[n]) == LENGTHS[n]

        return Asked(PROMPTS[n], take, generator)

    batch = ContinuousBatch(generator, beginning)
    batch.admit([ask(0), ask(1)])
    assert len(batch) == 2
    batch.step()
    assert len(batch) == 1 and said[1] == [20, 21]
    batch.admit([])
    batch.admit([ask(2)])
    batch.step()
    batch.admit([ask(3)])
    assert len(batch) == 3
    while batch:
        batch.step()
    assert said == [list(range(20, 20 + length)) for length in LENGTHS]
    assert batch.cache is None and len(generator.seen) == len(PROMPTS)
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        together, whole = generator.seen[tuple(prompt)], alone[tuple(prompt)][:length]
        assert len(together) == length
        for one, other in zip(together, whole, strict=True):
            assert torch.allclose(one, other, atol=0.02)  # rounding is 1e-6, a position too far 0.3


def test_a_batch_keeps_no_more_than_its_rows_need(generator):
    batch = ContinuousBatch(generator)
    left = {0: 2, 1: 9}

    def counting(n: int):
        def take(token: int) -> bool:
            left[n] -= 1
            return left[n] == 0

        return take

    batch.admit([Asked(list(range(10, 90)), counting(0), generator), Asked([5, 6, 7], counting(1), generator)])
    assert batch.mask.shape == (2, 80)
    batch.step()  # the long one leaves, and its padding with it
    assert batch.mask.shape == (1, 4) and batch.cache.layers[0].keys.shape[2] == 4


def test_the_chain_answers_in_the_thread_that_asks():
    """On the CPU another thread of torch makes both slower."""
    threads = []

    def find(question, k):
        threads.append(threading.current_thread())
        return [Document("The mate closes the gate.", metadata={"score": 0.9, "source": "a.md"})]

    model = RunnableLambda(lambda messages: (threads.append(threading.current_thread()), AIMessage("The mate [1]."))[1])
    chain = build_chain(Finding(find, 1), lambda *given: [{"role": "user", "content": "?"}], model, "I don't know.")
    state = chain.invoke({"question": "Who?", "searched": "Who?", "history": ()})
    assert state["answer"].text == "The mate [1]." and state["documents"]
    assert threads == [threading.current_thread()] * 2
