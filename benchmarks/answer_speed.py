#!/usr/bin/env python
"""Speed and memory of answers beside the seed recipe: LangChain's HuggingFacePipeline and RetrievalQA, same model.

    python benchmarks/answer_speed.py --adapter adapters/demo      # about ten minutes on two idle cores
    python benchmarks/answer_speed.py --adapter adapters/demo --questions 4 --rounds 1

Same 4-bit base with the same adapter, same questions, passages and rendered prompt, greedy. Every run is a fresh
process; every second round runs in reverse order. `short` lets the model stop by itself, `long` makes it write
at least 48 tokens. The seed recipe answers one by one, ours one by one, merged in memory, and in batches of eight.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qlora import console, settings
from qlora.cli.rag_flags import SAMPLE_QUESTIONS

PROJECT = Path(__file__).resolve().parent.parent

RECIPES = ("seed", "ours", "merged", "batch")
LONG, BATCH = 48, 8


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    if args.recipe:
        print(json.dumps(run_recipe(args)))
        return 0
    runs = {recipe: [] for recipe in RECIPES}
    for number in range(args.rounds):
        for recipe in RECIPES[:: -1 if number % 2 else 1]:
            runs[recipe].append(run_process(recipe, args))
            console.note(f"round {number + 1} of {args.rounds}, {recipe}: {describe(runs[recipe][-1])}")
    print(json.dumps(summarise(runs), indent=2))
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="answer_speed.py --adapter FOLDER [flags]", description=title, epilog=text)
    count = console.number(int, 1)
    parser.add_argument("--adapter", type=Path, required=True, help="folder that training wrote")
    parser.add_argument("--questions", type=count, default=8, help="of the sample's")
    parser.add_argument("--rounds", type=count, default=3, help="runs of each recipe")
    parser.add_argument("--recipe", type=console.choice(*RECIPES), help="run one, in this process")
    return parser


def run_process(recipe: str, args) -> dict:
    """What a fresh process measured of itself."""
    words = ["--adapter", str(args.adapter), "--questions", str(args.questions), "--recipe", recipe]
    made = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if made.returncode:
        sys.stderr.write(made.stderr[-4000:])
        raise SystemExit(made.returncode)
    return json.loads(made.stdout)


# ------------------------------------------------------------------------------- in the process


def run_recipe(args) -> dict:
    """Seconds, first-token seconds, tokens and answers of the short and the long run, and peak memory."""
    settings.quieten_libraries()
    model, tokenizer, prompt = load_model(args)
    asked = choose_questions(args.questions)
    ask = ask_seed if args.recipe == "seed" else ask_ours
    ask(model, tokenizer, prompt, asked[:1], args.recipe)  # warm-up of kernels and caches
    found = {}
    for length in ("short", "long"):
        model.generation_config.min_new_tokens = LONG if length == "long" else None
        started = time.perf_counter()
        answers, firsts = ask(model, tokenizer, prompt, asked, args.recipe)
        seconds = time.perf_counter() - started
        tokens = sum(len(tokenizer(answer).input_ids) for answer in answers)
        found[length] = {"seconds": seconds, "tokens": tokens, "answers": answers, "first_token_s": mean(firsts)}
    prefill = None if args.recipe == "seed" else measure_prefill(model, tokenizer, prompt, asked)
    return {**found, "prefill_s": prefill, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def load_model(args):
    """The model as each recipe wants it: the seed's is what transformers and PEFT load."""
    import argparse

    import rag_qlora
    from qlora.model import adapter, base_model

    trained = adapter.read_adapter(args.adapter)
    merge = args.recipe == "merged"
    flags = argparse.Namespace(
        base_model=trained.base_model,
        adapter=args.adapter,
        base_url=None,
        merge_for_speed=merge,
        no_cache=False,
        max_new_tokens=LONG + 16,
    )
    if args.recipe != "seed":
        return rag_qlora.load_model(flags)
    tokenizer, prompt, trained = rag_qlora.load_prompt(flags)
    base = base_model.load_base_model(base_model.resolve_base_model(trained.base_model))
    return adapter.load_adapter(base, trained), tokenizer, prompt


def measure_prefill(model, tokenizer, prompt, asked) -> float:
    """Seconds of one pass over a prompt, on average: no first token can be sooner."""
    import torch

    from qlora.prompt import encode_prompt, fill_prompt

    seconds = []
    for question, passages in asked:
        ids = torch.tensor([encode_prompt(tokenizer, fill_prompt(tokenizer, prompt, 2048, question, passages))])
        started = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, logits_to_keep=1)
        seconds.append(time.perf_counter() - started)
    return statistics.mean(seconds)


def choose_questions(count: int) -> list[tuple[str, list[str]]]:
    """(question, passages) of answerable sample questions, evenly spread; two passages belong to other questions."""
    from qlora.evaluation.questions import load_questions

    usable = [question for question in load_questions(SAMPLE_QUESTIONS) if question.context and question.answers]
    chosen = usable[:: len(usable) // count][:count]
    others = [question.context for question in usable]
    return [(q.question, [others[n], q.context, others[-n - 1]]) for n, q in enumerate(chosen)]


def ask_ours(model, tokenizer, prompt, asked, recipe: str) -> tuple[list[str], list[float]]:
    from qlora.answering.generator import Generator
    from qlora.prompt import as_langchain, fill_prompt

    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=LONG + 16)
    messages = [fill_prompt(tokenizer, prompt, 2048, question, passages) for question, passages in asked]
    if recipe == "batch":
        parts = [messages[at : at + BATCH] for at in range(0, len(messages), BATCH)]
        return [answer for part in parts for answer in generator.complete(part)], []
    return answer_all(generator, [as_langchain(each) for each in messages])


def ask_seed(model, tokenizer, prompt, asked, recipe: str) -> tuple[list[str], list[float]]:
    """RetrievalQA over a retriever that has the passages ready, with LangChain's pipeline as it comes."""
    from langchain_classic.chains import RetrievalQA
    from langchain_core.documents import Document
    from langchain_core.prompts import PromptTemplate
    from langchain_huggingface import HuggingFacePipeline
    from transformers import pipeline

    from qlora.answering.chain import PassageRetriever
    from qlora.prompt import number_passages

    text = tokenizer.apply_chat_template(
        prompt.messages("{question}", ["{context}"]), tokenize=False, add_generation_prompt=True
    )
    template = PromptTemplate.from_template(text.replace("[1] {context}", "{context}"))
    answering = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=LONG + 16,
        do_sample=False,
        return_full_text=False,
    )
    passages = {question: number_passages(texts) for question, texts in asked}
    retriever = PassageRetriever(find=lambda question: [Document(passages[question])])
    llm = HuggingFacePipeline(pipeline=answering)
    chain = RetrievalQA.from_chain_type(llm, retriever=retriever, chain_type_kwargs={"prompt": template})
    return [chain.invoke({"query": question})["result"].strip() for question, _ in asked], []


def answer_all(generator, asked: list) -> tuple[list[str], list[float]]:
    """The answers, and the seconds to the first piece of each."""
    from qlora.answering.chain import Stopwatch

    answers, firsts = [], []
    for messages in asked:
        watch = Stopwatch()
        answers.append(generator.invoke(messages, config={"callbacks": [watch]}).text.strip())
        firsts.append(watch.marks["first_token"] - watch.marks["generate"])
    return answers, firsts


# ------------------------------------------------------------------------------- numbers


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def describe(run: dict) -> str:
    return ", ".join(f"{length} {run[length]['seconds']:.1f} s" for length in ("short", "long"))


def summarise(runs: dict[str, list[dict]]) -> dict:
    """For each recipe and length: seconds an answer, tokens/s, how many times as fast as the seed, equal answers."""
    result = {}
    for recipe, measured in runs.items():
        result[recipe] = {"peak_gb": round(max(run["peak_gb"] for run in measured), 2)}
        if measured[0]["prefill_s"]:
            result[recipe]["prefill_s"] = round(statistics.median(run["prefill_s"] for run in measured), 3)
        for length in ("short", "long"):
            parts, seeds = [run[length] for run in measured], [run[length] for run in runs["seed"]]
            faster = [seed["seconds"] / part["seconds"] for part, seed in zip(parts, seeds, strict=True)]
            answers = list(zip(parts[0]["answers"], seeds[0]["answers"], strict=True))
            result[recipe][length] = {
                "seconds_an_answer": round(statistics.median(p["seconds"] for p in parts) / len(answers), 3),
                "first_token_s": parts[0]["first_token_s"]
                and round(statistics.median(part["first_token_s"] for part in parts), 3),
                "tokens_per_second": round(statistics.median(p["tokens"] / p["seconds"] for p in parts), 1),
                "times_as_fast": [round(ratio, 2) for ratio in (statistics.median(faster), min(faster), max(faster))],
                "equal_answers": f"{sum(ours == seed for ours, seed in answers)} of {len(answers)}",
            }
    return result


if __name__ == "__main__":
    sys.exit(console.run(main))
