#!/usr/bin/env python
"""Answers questions from your documents with the fine-tuned model, and cites the passages it used.

    python rag_qlora.py ingest docs/ notes.pdf            # files -> passages -> PostgreSQL
    python rag_qlora.py search "Who signs form B7?"       # passages and scores, no language model
    python rag_qlora.py ask "Who signs form B7?"          # an answer with citations
    python rag_qlora.py ask --json --adapter none "..."   # the base model, as JSON
    python rag_qlora.py chat                              # several turns

Without a command: chat at a terminal, otherwise a short demonstration over the sample documents.
Precedence: flag > environment > .env > default. Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import json
import sys
from operator import itemgetter
from pathlib import Path

from qlora import adapter, base_model, console, presets, settings
from qlora.console import note

STEPS = ("Model and Tokenizer Setup", "Text Generation", "Database Integration", "Generate Response")
SAMPLE_DOCUMENTS = presets.SAMPLE_DATA / "documents"
SAMPLE_QUESTIONS = presets.SAMPLE_DATA / "questions.jsonl"
DEMO_QUESTIONS = (
    "What commission does the Trust charge someone who sells fish at auction?",
    "Which four foods are kept in the moth cupboard?",
    "What is the price of having a hull antifouled by the boatyard?",
)


def main(argv: list[str]) -> int:
    args = resolve_arguments(argv)
    settings.quieten_libraries()
    console.print_settings(f"RAG: {args.command}", vars(args))
    without_model = {"ingest": ingest, "search": search, "sweep": sweep}
    if args.command == "compare":
        return compare(args)
    if args.command in without_model:
        with console.step(STEPS, "Database Integration"):
            return without_model[args.command](args, open_store(args))

    with console.step(STEPS, "Model and Tokenizer Setup"):
        model, tokenizer, prompt = load_model(args)
    with console.step(STEPS, "Text Generation"):
        generator = make_generator(args, model, tokenizer)
    with console.step(STEPS, "Database Integration"):
        store = open_store(args)
        fill_if_empty(args, store)
    with console.step(STEPS, "Generate Response"):
        if args.command == "evaluate":
            return evaluate(args, store, prompt, generator)
        chain = build_chain(args, store, prompt, generator)
        if args.command == "chat":
            return chat(args, chain)
        return ask(args, chain)


# ============================================================================ Model and Tokenizer Setup


def load_model(args):
    """The 4-bit base with the adapter on it (or alone), its tokenizer, and the prompt to ask with."""
    from qlora.prompt import choose_prompt

    source = base_model.resolve_base_model(args.base_model)
    model = base_model.load_base_model(source)
    if args.adapter is None:
        tokenizer = base_model.load_tokenizer(source)
        prompt = choose_prompt(tokenizer)
        note(f"{args.base_model} in 4-bit, without an adapter")
        return model, tokenizer, prompt
    trained = adapter.read_adapter(args.adapter, args.base_model)
    tokenizer = base_model.load_tokenizer(str(args.adapter))
    tokenizer.chat_template = trained.prompt.chat_template
    note(f"{args.base_model} in 4-bit with {args.adapter}")
    return adapter.load_adapter(model, trained), tokenizer, trained.prompt


# ============================================================================ Text Generation


def make_generator(args, model, tokenizer):
    """The LangChain chat model: greedy at temperature 0, else seeded sampling."""
    from qlora.generator import Generator

    how = f"sampling at temperature {args.temperature}" if args.temperature else "greedy"
    note(f"{how}, at most {args.max_new_tokens} new tokens")
    return Generator(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


# ============================================================================ Database Integration


def load_embeddings(args):
    """The embedding function: sentence-transformers, vectors of length 1."""
    from langchain_huggingface import HuggingFaceEmbeddings

    source = base_model.resolve_embedding_model(args.embedding_model)
    with base_model.explaining(source, "--embedding-model"):
        return HuggingFaceEmbeddings(
            model_name=source, encode_kwargs={"normalize_embeddings": True}, model_kwargs={"trust_remote_code": False}
        )


def open_store(args, name: str | None = None, embeddings=None):
    """The collection (or the one with another name) in the database that DATABASE_URL names, else the embedded one."""
    from qlora import embedded_postgres, pgvector_store

    url = settings.get("DATABASE_URL")
    connection = pgvector_store.connect(url or embedded_postgres.start_server())
    name, embeddings = name or args.collection, embeddings or load_embeddings(args)
    store = pgvector_store.PgVectorStore(connection, embeddings, args.embedding_model, name)
    where = pgvector_store.describe_url(url) if url else "the embedded PostgreSQL"
    note(f"Collection {name} in {where}: {store.count()} passages")
    return store


def ingest(args, store) -> int:
    from qlora.collection import put_files

    put_files(store, args.paths, args.embedding_model, args.passage_tokens, args.overlap)
    note(f'Next: python rag_qlora.py ask --collection {args.collection} "Your question?"')
    return 0


def fill_if_empty(args, store) -> None:
    """Puts the sample documents into an empty collection, after saying so.

    Raises UserError when other questions are to be evaluated on it.
    """
    from qlora.collection import put_files

    if store.count() == 0:
        if args.command in ("evaluate", "sweep") and args.questions != SAMPLE_QUESTIONS:
            fix = f"python rag_qlora.py ingest PATH --collection {args.collection}"
            raise console.fail(f"collection {args.collection} is empty", "--collection", fix)
        note(f"Collection {args.collection} is empty: filling it with the sample documents")
        put_files(store, [str(SAMPLE_DOCUMENTS)], args.embedding_model, args.passage_tokens, args.overlap)


def search(args, store) -> int:
    """Prints the nearest passages; loads no language model."""
    from qlora.conversation import indent
    from qlora.documents import place

    fill_if_empty(args, store)
    found = store.similarity_search(args.question, args.top_k)
    if args.json:
        passages = [
            {"n": n, "source": d.metadata["source"], "score": d.metadata["score"], "text": d.page_content}
            for n, d in enumerate(found, 1)
        ]
        print(json.dumps({"question": args.question, "passages": passages}, ensure_ascii=False))
        return 0
    for n, document in enumerate(found, 1):
        print(f"[{n}] {document.metadata['score']:.3f}  {place(document.metadata)}\n{indent(document.page_content)}\n")
    return 0


# ============================================================================ Generate Response


def build_chain(args, store, prompt, generator):
    """retriever | prompt | model | citations, as one LangChain runnable: {"question", "history"} -> state.

    The state that comes out also holds `documents`, `answer` and, unless the passages are all below the
    collection's refusal threshold, `message` (with token counts).
    """
    from langchain_core.runnables import RunnableBranch, RunnablePassthrough

    from qlora.citations import best_score, check_answer, refuse
    from qlora.prompt import as_langchain, fill_prompt

    retriever = store.as_retriever(search_kwargs={"k": args.top_k})
    threshold = store.refusal_threshold or -1.0

    def is_promising(state: dict) -> bool:
        return bool(state["documents"]) and best_score(state["documents"]) >= threshold

    def ask_with(state: dict):
        texts = [document.page_content for document in state["documents"]]
        budget = generator.window - generator.max_new_tokens
        return as_langchain(
            fill_prompt(generator.tokenizer, prompt, budget, state["question"], texts, state["history"])
        )

    def check(state: dict):
        return check_answer(state["message"].text, state["documents"], prompt.refusal)

    generate = (
        RunnablePassthrough.assign(prompt=ask_with)
        | RunnablePassthrough.assign(message=itemgetter("prompt") | generator)
        | RunnablePassthrough.assign(answer=check)
    )
    refuse_unread = RunnablePassthrough.assign(answer=lambda state: refuse(state["documents"], prompt.refusal))
    return RunnablePassthrough.assign(documents=itemgetter("question") | retriever) | RunnableBranch(
        (is_promising, generate), refuse_unread
    )


def ask(args, chain) -> int:
    """Answers each question; the answers go to stdout. 3 with --strict when one was refused."""
    from qlora.conversation import answer_question, print_turn

    refused = False
    for question in args.questions:
        turn = answer_question(chain, question)
        refused |= turn.answer.refused
        if args.json:
            print(json.dumps(turn.as_json(args), ensure_ascii=False), flush=True)
        else:
            print_turn(turn)
    note(f"Next: python rag_qlora.py chat --adapter {args.adapter or 'none'} --collection {args.collection}")
    return 3 if args.strict and refused else 0


def chat(args, chain) -> int:
    """Several turns; the last three are shown to the model. An empty line or Ctrl-D ends it."""
    from qlora.conversation import answer_question, print_turn

    history: list[dict] = []
    note("Ask about your documents. An empty line or Ctrl-D ends.")
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            question = ""
        if not question:
            return 0
        turn = answer_question(chain, question, tuple(history[-6:]))
        print_turn(turn, show_question=False)
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer.text}]


def evaluate(args, store, prompt, generator) -> int:
    """Answers all questions with base and tuned model from every context, scores them, and writes the report."""
    from qlora import evaluation, report

    questions = evaluation.load_questions(args.questions, args.limit)
    found = evaluation.search_all(store, questions, args.top_k)
    contexts = evaluation.gather_passages(questions, found, args.top_k)
    without_adapter = generator.model.disable_adapter if args.adapter else contextlib.nullcontext
    modes = {"base": without_adapter, **({"tuned": contextlib.nullcontext} if args.adapter else {})}
    if not args.adapter:
        note("No adapter: the base model alone is evaluated")
    values = evaluation_settings(args, prompt)
    args.output.mkdir(parents=True, exist_ok=True)
    log = report.AnswerLog(args.output / "answers.jsonl", values)
    threshold = None if args.calibrate else store.refusal_threshold
    with console.progress() as bar:
        task = bar.add_task("answers", total=len(modes) * sum(map(len, contexts.values())))
        cells = evaluation.answer_cells(
            log,
            modes,
            contexts,
            complete=lambda pairs: complete_batch(prompt, generator, pairs),
            threshold=threshold,
            batch=args.batch_size,
            advance=lambda count: bar.advance(task, count),
        )
    values |= {"questions": str(args.questions), "collection": args.collection, "refusal_threshold": threshold}
    result = evaluation.build_report(questions, found, cells, values, args.seed)
    if args.calibrate:
        scores = cells["tuned" if args.adapter else "base", "retrieved"]
        result["calibration"] = evaluation.calibrate(questions, [d[: args.top_k] for d in found], scores, args.seed)
        store.refusal_threshold = result["calibration"]["threshold"]
    report.write_report(args.output, result)
    if args.adapter:
        report.put_section(args.adapter / "README.md", args.output)
    print(json.dumps(result, ensure_ascii=False) if args.json else report.as_text(result))
    note(f"evaluation.md, .json, .png and answers.jsonl: {args.output}")
    return 0


def sweep(args, store) -> int:
    """Retrieval metrics for every value of each swept setting, best first; loads no language model."""
    from qlora import evaluation, sweep
    from qlora.collection import put_files

    fill_if_empty(args, store)
    questions = evaluation.load_questions(args.questions, args.limit)

    def open_trial(tokens: int):
        trial = open_store(args, f"sweep {args.collection} {tokens}", store.embeddings)
        put_files(trial, args.documents, args.embedding_model, tokens, tokens // 5)
        return trial

    results = [sweep.score_values(store, questions, *setting, args.top_k, open_trial) for setting in args.sweep]
    sweep.write_results(args.output, results)
    print(json.dumps(results, ensure_ascii=False) if args.json else sweep.as_text(results))
    note(f"sweep.json, .md and .png: {args.output}")
    return 0


def compare(args) -> int:
    """The paired difference of two runs over the questions that both have."""
    from qlora import comparison, report

    rows = comparison.compare_runs(*args.compare, args.seed)
    print(json.dumps(rows, ensure_ascii=False) if args.json else report.comparison_as_text(rows, *args.compare))
    return 0


def complete_batch(prompt, generator, pairs) -> list:
    """A checked Answer for each (question, documents), in the words that ask() uses."""
    from qlora.citations import check_answer
    from qlora.prompt import fill_prompt

    budget = generator.window - generator.max_new_tokens
    asked = [
        fill_prompt(generator.tokenizer, prompt, budget, question.question, [d.page_content for d in documents])
        for question, documents in pairs
    ]
    texts = generator.complete(asked)
    return [check_answer(text, documents, prompt.refusal) for text, (_, documents) in zip(texts, pairs, strict=True)]


def evaluation_settings(args, prompt) -> dict:
    """What an answer depends on besides question and passages: an answer of the same settings is not made again."""
    names = ("base_model", "max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "top_k")
    digest = adapter.digest_weights(args.adapter) if args.adapter else None
    return {**{name: getattr(args, name) for name in names}, "adapter": digest, "prompt": prompt.digest}


# ============================================================================ Command line


def resolve_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["chat" if sys.stdin.isatty() else "demo", *argv]
    parser, commands = build_parser()
    args, problems = console.parse_arguments(parser, argv, commands)
    args.embedding_model = args.embedding_model or settings.get("QLORA_EMBEDDING_MODEL") or base_model.EMBEDDED_EMBEDDER
    args.collection = args.collection or settings.get("QLORA_COLLECTION") or "documents"
    if args.command == "evaluate":
        check_evaluation(args, problems)
    if args.command == "ingest":
        check_ingest(args, problems)
    elif args.command not in ("search", "sweep", "compare"):
        with problems.collecting():
            resolve_model(args, detect=not problems.found)
    if args.command != "compare":
        with problems.collecting():
            check_database()
    problems.raise_if_any()
    return args


def check_database() -> None:
    """Connects to a named database at once, before anything heavy is loaded."""
    if url := settings.get("DATABASE_URL"):
        from qlora.pgvector_store import connect

        connect(url).close()


def resolve_model(args, detect: bool) -> None:
    """Sets base_model and adapter: the adapter names its base, so that naming either is enough."""
    preset = presets.PRESETS[presets.choose_preset(args.preset, detect)]
    named = args.base_model or (preset.base_model if args.preset else None)
    if not named and not args.adapter:
        named = settings.get("QLORA_BASE_MODEL")
    folder = args.adapter or settings.get("QLORA_ADAPTER")
    if folder == "none":
        args.adapter, args.base_model = None, named or preset.base_model
    else:
        args.adapter = Path(folder or f"adapters/{Path(named or preset.base_model).name}")
        args.base_model = adapter.read_adapter(args.adapter, named).base_model
    del args.preset
    if args.command == "evaluate":
        args.output = args.output or Path("evaluations") / (args.adapter or Path(args.base_model)).name


def check_evaluation(args, problems: console.Problems) -> None:
    """Makes sweep and compare commands of their own; adds what is wrong with questions and documents."""
    from qlora.documents import find_files
    from qlora.evaluation import load_questions

    args.command = "compare" if args.compare else "sweep" if args.sweep else "evaluate"
    with problems.collecting():
        load_questions(args.questions)
    if args.command == "sweep":
        args.output = args.output or Path("evaluations/sweep")
        sample = [str(SAMPLE_DOCUMENTS)] if args.questions == SAMPLE_QUESTIONS else []
        args.documents = args.documents or sample
        if not args.documents and any(setting[0] == "passages" for setting in args.sweep):
            problems.add("no documents to split", "--sweep passages", "name them with --documents PATH ...")
        with problems.collecting():
            find_files(args.documents)


def check_ingest(args, problems: console.Problems) -> None:
    from qlora import documents

    with problems.collecting():
        documents.find_files(args.paths)
    if isinstance(args.overlap, int) and isinstance(args.passage_tokens, int) and args.overlap >= args.passage_tokens:
        problems.add("--overlap reaches --passage-tokens", "command line", "give a smaller --overlap")


def build_parser():
    """The parser, and the parser of each command by name."""
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="rag_qlora.py [command] [flags]", description=title, epilog=text)
    commands = parser.add_subparsers(dest="command", metavar="command")
    database, model, answers = database_flags(), model_flags(), answer_flags()

    def add(name: str, parents: list, purpose: str, words: str = "") -> argparse.ArgumentParser:
        usage = f"rag_qlora.py {name} [flags] {words}".rstrip()
        return commands.add_parser(name, parents=parents, usage=usage, description=purpose, help=purpose)

    one = add("ingest", [database], "put files and folders into the collection", "PATH ...")
    one.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders: .txt .md .html .pdf .docx .csv .json .jsonl"
    )
    one.add_argument("--passage-tokens", type=console.number(int, 16), default=200, help="tokens a passage (200)")
    one.add_argument("--overlap", type=console.number(int, 0), default=40, help="tokens two passages share (40)")
    one = add("search", [database, answers], "show the nearest passages", "question")
    one.add_argument("question")
    one = add("ask", [model, database, answers], "answer questions, citing passages", "question ...")
    one.add_argument("questions", nargs="+", metavar="question")
    one.add_argument("--strict", action="store_true", help="exit code 3 when a question is refused")
    one = add("evaluate", [model, database, answers], "score base and tuned model on questions with known answers")
    one.add_argument("--questions", type=Path, default=SAMPLE_QUESTIONS, help="ours, dataset rows, or SQuAD (sample's)")
    one.add_argument("--limit", type=console.number(int, 1), help="so many of the questions, evenly spread (all)")
    one.add_argument("--batch-size", type=console.number(int, 1), default=8, help="answers at a time (8)")
    one.add_argument("--output", type=Path, help="folder of the report (evaluations/NAME-OF-ADAPTER)")
    text = "fit the collection's refusal threshold on half of the questions, report on the other half"
    one.add_argument("--calibrate", action="store_true", help=text)
    text = "retrieval alone, for several values: passages=120,200,256 or top-k=1,3,5"
    one.add_argument("--sweep", type=read_sweep, action="append", default=[], metavar="SETTING=A,B", help=text)
    one.add_argument(
        "--documents", nargs="+", default=[], metavar="PATH", help="what --sweep passages splits (sample's)"
    )
    text = "two evaluation.json: the paired difference of their answers, nothing is run"
    one.add_argument("--compare", type=Path, nargs=2, metavar=("FIRST", "SECOND"), help=text)
    one = add("demo", [model, database, answers], "answer three questions on the sample documents")
    one.set_defaults(questions=DEMO_QUESTIONS, strict=False)
    for name in ("search", "ask", "demo", "evaluate"):
        commands.choices[name].add_argument("--json", action="store_true", help="JSON on stdout")
    add("chat", [model, database, answers], "several turns")
    return parser, commands.choices


def read_sweep(text: str):
    from qlora.sweep import read_setting

    return read_setting(text)


def model_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    share = console.number(float, 0, 1, above=True)
    group = flags.add_argument_group(STEPS[0])
    group.add_argument("--preset", help="auto (default), laptop, llama2-7b or llama2-13b")
    group.add_argument("--base-model", help="hub id or folder (the adapter's own)")
    group.add_argument("--adapter", help="adapter folder, or none for the base model (adapters/NAME-OF-BASE)")
    group = flags.add_argument_group(STEPS[1])
    group.add_argument("--temperature", type=console.number(float, 0, 5), default=0.0, help="0 is greedy (0)")
    group.add_argument("--top-p", type=share, default=1.0, help="share of probability to sample from (1)")
    tokens = console.number(int, 1, 4096)
    group.add_argument("--max-new-tokens", type=tokens, default=96, help="length of an answer (96)")
    group.add_argument("--repetition-penalty", type=console.number(float, 1, 3), default=1.0, help="1 is none (1)")
    group.add_argument("--seed", type=console.number(int, 0), default=0, help="of the sampling (0)")
    return flags


def database_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(STEPS[2])
    group.add_argument("--collection", help="name of the collection (documents)")
    group.add_argument("--embedding-model", help=f"sentence-transformers model ({base_model.EMBEDDED_EMBEDDER})")
    flags.set_defaults(passage_tokens=200, overlap=40)  # for the sample documents in an empty collection
    return flags


def answer_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(STEPS[3])
    group.add_argument("--top-k", type=console.number(int, 1, 50), default=3, help="passages a question (3)")
    return flags


if __name__ == "__main__":
    sys.exit(console.run(main))
