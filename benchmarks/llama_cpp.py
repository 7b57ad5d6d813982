#!/usr/bin/env python
"""Does llama.cpp itself read an exported GGUF file as we do: the same tokens, prompts and greedy answers?

    python instruct_train_qlora.py --resume --output adapters/mine --export-gguf mine.gguf
    llama-server -m mine.gguf --port 8081      # llama.cpp, or the package xllamacpp; no dependency of ours
    python benchmarks/llama_cpp.py --adapter adapters/mine --server http://127.0.0.1:8081

Ours is the adapter on the 4-bit base model. Where answers part, the first token that differs is named with how near
the two were, in standard deviations of its logits (a tie in `qlora/training/export.py` is 0.15).
"""

import json
import sys
import urllib.request
from pathlib import Path

from benchmarks.answer_speed import choose_questions
from qlora import console, settings

AWKWARD = [
    "  two  spaces\n\n\nlines\t tab 12345 3.14",
    'Größe: naïve "quotes" 漢字 🙂',
    "It'S I'LL don't x=1;y+=2",
    " \n ",
]


def main(argv: list[str]) -> int:
    parser = console.Parser(usage="benchmarks/llama_cpp.py [flags]", description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the adapter that was exported")
    parser.add_argument("--server", default="http://127.0.0.1:8081", metavar="URL", help="llama-server with its file")
    parser.add_argument("--questions", type=console.number(int, 1, 1000), default=8, help="of the sample questions")
    args, problems = console.parse_arguments(parser, argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    print(json.dumps(compare(args.adapter, args.server, args.questions), indent=2, ensure_ascii=False))
    return 0


def compare(folder: str, server: str, count: int) -> dict:
    """How many texts, prompts and answers are equal, and where answers part."""
    from qlora.answering.generator import Generator
    from qlora.model import adapter, base_model
    from qlora.prompt import encode_prompt, fill_prompt, show_prompt
    from qlora.training.export import CHECKED_TOKENS, load_tokenizer_of

    trained = adapter.read_adapter(Path(folder))
    tokenizer = load_tokenizer_of(trained)
    model = adapter.load_adapter(base_model.load_base_model(base_model.resolve_base_model(trained.base_model)), trained)
    generator = Generator(model=model, tokenizer=tokenizer, max_new_tokens=CHECKED_TOKENS)
    asked = [fill_prompt(tokenizer, trained.prompt, 1024, *question) for question in choose_questions(count)]
    texts = [*AWKWARD, *(messages[-1]["content"] for messages in asked)]
    tokens = sum(split(server, text) == tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    rendered, same, parted = 0, 0, []
    for messages in asked:
        shown, ids = show_prompt(tokenizer, messages), encode_prompt(tokenizer, messages)
        options = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
        rendered += post(server, "apply-template", options)["prompt"] == shown and split(server, shown) == ids
        [ours] = generator.generate_ids([ids])
        options = {"prompt": ids, "n_predict": CHECKED_TOKENS, "temperature": 0, "return_tokens": True}
        theirs = post(server, "completion", options)["tokens"]
        ends = set(generator.end_tokens())
        a, b = ([token for token in answer if token not in ends] for answer in (ours, theirs))
        same += a == b
        if a != b:
            parted.append(
                {"ours": tokenizer.decode(a), "llama.cpp": tokenizer.decode(b), "gap": gap(model, ids, ours, theirs)}
            )
    return {
        "texts with equal tokens": f"{tokens} of {len(texts)}",
        "prompts equal as text and tokens": f"{rendered} of {count}",
        "answers equal": f"{same} of {count}",
        "parted": parted,
    }


def gap(model, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """By how many standard deviations our model prefers our token to theirs where the answers part."""
    import torch

    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at in (len(ours), len(theirs)):
        return 0.0  # one stops where the other goes on: an end token that is not among the tokens returned
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + ours[:at]], device=model.device)).logits[0, -1].float()
    return round(float((logits[ours[at]] - logits[theirs[at]]) / logits.std()), 3)


def split(server: str, text: str) -> list[int]:
    return post(server, "tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def post(server: str, path: str, value: dict) -> dict:
    request = urllib.request.Request(
        f"{server}/{path}", json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())


if __name__ == "__main__":
    sys.exit(console.run(main))
