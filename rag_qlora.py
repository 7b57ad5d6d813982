#!/usr/bin/env python
"""Answers questions from your documents with the fine-tuned model, and cites the passages it used.

    python rag_qlora.py ingest docs/ notes.pdf            # files -> passages -> PostgreSQL; again: what changed
    python rag_qlora.py documents                         # what is in the collection; `forget` removes
    python rag_qlora.py search "Who signs form B7?"       # passages and scores, no language model
    python rag_qlora.py ask "Who signs form B7?"          # an answer with citations
    python rag_qlora.py ask --json --adapter none "..."   # the base model, as JSON
    python rag_qlora.py chat                              # several turns
    python rag_qlora.py fit                               # learn which passage answers, and when none does
    python rag_qlora.py doctor                            # checks of machine and database

Without a command: chat at a terminal, otherwise a short demonstration over the sample documents.
Precedence: flag > environment > .env > default. Answers go to stdout, everything else to stderr.
"""

import contextlib
import shlex
import sys
from dataclasses import asdict, replace
from functools import partial

from qlora import console, machine, settings
from qlora.cli.rag_flags import (
    SAMPLE_DOCUMENTS,
    SAMPLE_QUESTIONS,
    WITHOUT_MODEL,
    WITHOUT_STORE,
    build_parser,
    resolve_arguments,
)
from qlora.cli.ranking_flags import rank_by
from qlora.cli.recorded import asked_settings, describe_turn, evaluation_settings, writing_settings
from qlora.console import json_line, note, say
from qlora.model import adapter, base_model
from qlora.writing import embedded_writer

CHOSEN = ("base_model", "adapter", "collection")
STEPS = ("Model and Tokenizer Setup", "Text Generation", "Database Integration", "Generate Response")


def main(argv: list[str]) -> int:
    args = resolve_arguments(argv, __doc__, STEPS)
    settings.quieten_libraries()
    parser = build_parser(__doc__, STEPS)[1][args.command]
    console.print_settings(f"RAG: {args.command}", args, argv, parser, CHOSEN)
    with machine.claiming(args.output) if "output" in args else contextlib.nullcontext():
        return run_command(args)


def run_command(args) -> int:
    if args.command in WITHOUT_STORE:
        return COMMANDS[args.command](args)
    if args.command in WITHOUT_MODEL:
        with console.step(STEPS, "Database Integration"):
            return COMMANDS[args.command](args, open_store(args))

    with console.step(STEPS, "Model and Tokenizer Setup"):
        if args.command == "write" and args.writer == embedded_writer.NAME:
            embedded_writer.prepare()
        model, tokenizer, prompt = load_model(args)
    with console.step(STEPS, "Text Generation"):
        generator = make_generator(args, model, tokenizer, prompt)
    with console.step(STEPS, "Database Integration"):
        store = open_store(args)
        if args.command != "serve":  # whose page says how to fill a collection
            fill_if_empty(args, store)
    with console.step(STEPS, "Generate Response"):
        return COMMANDS[args.command](args, store, prompt, generator)


# ============================================================================ Model and Tokenizer Setup


def load_model(args):
    """The 4-bit base with the adapter on it (or alone), its tokenizer, and the prompt to ask with.

    With --base-url no model: a server has it.
    """
    tokenizer, prompt, trained = load_prompt(args)
    if args.base_url:
        note(f"{args.base_url} answers, with the prompt of {args.adapter or args.base_model}")
        return None, tokenizer, prompt
    from qlora.model.lean_layers import cast_adapter, make_lean

    machine.check_card()
    source = base_model.resolve_base_model(args.base_model)
    check_room(args, tokenizer, prompt, base_model.load_config(source).max_position_embeddings)
    machine.threads()
    note(f"Computes on {machine.describe()}")
    if args.merge_for_speed:
        from qlora.training.export import merge_for_speed

        model = merge_for_speed(trained, tokenizer, SAMPLE_QUESTIONS)
        note(f"{args.base_model} merged in memory with {args.adapter}, 16 bit")
    else:
        model = base_model.load_base_model(source, keep=not args.no_cache)
        model = adapter.load_adapter(model, trained) if trained else model
        note(f"{args.base_model} in 4-bit {f'with {args.adapter}' if trained else 'without an adapter'}")
    cast_adapter(model)
    make_lean(model)
    return model, tokenizer, prompt


def load_prompt(args):
    """The tokenizer, the prompt, and the verified adapter that both are from (None: from the base model)."""
    from qlora.prompt import choose_prompt

    if args.adapter is None:
        tokenizer = base_model.load_tokenizer(base_model.resolve_base_model(args.base_model))
        return tokenizer, choose_prompt(tokenizer), None
    trained = adapter.read_adapter(args.adapter, args.base_model)
    tokenizer = base_model.load_tokenizer(str(args.adapter))
    tokenizer.chat_template = trained.prompt.chat_template
    return tokenizer, trained.prompt, trained


def check_room(args, tokenizer, prompt, window: int) -> None:
    """Raises UserError when the answer may fill the window, so that no question fits before it."""
    from qlora.prompt import encode_prompt

    most = window - len(encode_prompt(tokenizer, prompt.messages("?", ["?"])))
    if args.max_new_tokens > most:
        what = f"--max-new-tokens {args.max_new_tokens} leaves no room for a question in a window of {window} tokens"
        raise console.fail(what, args.base_model, f"give less than {most}: question and passages need room, too")


# ============================================================================ Text Generation


def make_generator(args, model, tokenizer, prompt):
    """The LangChain chat model, here or on a server: greedy at temperature 0, else seeded sampling."""
    from qlora.answering.generator import Decoding, Generator

    refusal = tokenizer(prompt.refusal, add_special_tokens=False).input_ids
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        first_bias={refusal[0]: args.refusal_bias} if args.refusal_bias else {},
    )
    how = f"sampling at temperature {args.temperature}" if args.temperature else "greedy"
    note(f"{how}, at most {args.max_new_tokens} new tokens")
    if args.base_url:
        from qlora.answering.server_model import connect

        server = connect(args.base_url, args.model, tokenizer, decoding, args.at_once)
        args.model, args.refusal_bias = server.model_name, 0.0
        check_room(args, tokenizer, prompt, server.window)
        return server
    return Generator(model=model, tokenizer=tokenizer, **vars(decoding))


# ============================================================================ Database Integration


def open_store(args, name: str | None = None, embeddings=None):
    """The store of a collection: in Pinecone, in PostgreSQL (to look things up in its copy), or in the embedded one."""
    from qlora.retrieval.opening import load_embeddings, open_collection

    from_copy = args.from_copy and not embeddings  # a second store beside the first is for writing
    embeddings = embeddings or load_embeddings(args.embedding_model)
    return open_collection(args.store, name or args.collection, embeddings, args.embedding_model, from_copy)


def ingest(args, store) -> int:
    from qlora.retrieval.ingest import choose_splitting, put_files

    splitting = choose_splitting(store, args.embedding_model, args.passage_tokens, args.overlap, args.ocr)
    put_files(store, args.paths, splitting, args.prune, args.dry_run, args.language)
    note(f'Next: python rag_qlora.py ask {same_places(args)} "Your question?"')
    return 0


def same_places(args) -> str:
    """The flags with which another command uses the same collection and model server."""
    places = {"--collection": args.collection, "--store": args.store if args.store != "pgvector" else None}
    places |= {"--base-url": vars(args).get("base_url"), "--model": vars(args).get("model")}
    return shlex.join(word for flag, value in places.items() if value for word in (flag, value))


def documents(args, store) -> int:
    """Prints what is in the collection."""
    entries = store.documents()
    if args.json:
        say(json_line([asdict(entry) for entry in entries]))
        return 0
    for entry in entries:
        size = f"{entry.passages:6}  {entry.bytes / 1e3:8.1f} kB"
        say(f"{size}  {entry.added:%Y-%m-%d %H:%M}  {entry.source}")
    note(f"{len(entries)} documents. Columns: passages, file size, date added, source")
    return 0


def forget(args, store) -> int:
    """Removes documents from the collection. Raises UserError, and removes none, when one is not there."""
    known = {entry.source for entry in store.documents()}
    problems = console.Problems()
    for source in set(args.sources) - known:
        problems.add("no such document", source, f"see: python rag_qlora.py documents --collection {args.collection}")
    problems.raise_if_any()
    note(f"{store.forget(args.sources)} documents removed")
    return 0


def feedback(args, store) -> int:
    """Lists what people think of answers; writes rows and questions made of it, or deletes it."""
    from qlora.writing import feedback_rows

    log = store.feedback()
    judgements = log.all()
    if args.forget:
        note(f"{log.forget(feedback_rows.find_numbers(judgements, args.forget))} judgements deleted")
    elif args.export:
        made = feedback_rows.make_rows(judgements, store.find, args.refusal)
        say(feedback_rows.write_made(args.export, made))
        note(f"Next: python instruct_train_qlora.py --dataset {args.export} --start-from ADAPTER")
    else:
        say(json_line(list(map(asdict, judgements))) if args.json else feedback_rows.as_text(judgements))
    return 0


def fill_if_empty(args, store) -> None:
    """Puts the sample documents into an empty collection, with a note.

    Raises UserError when other questions are to be evaluated on it.
    """
    from qlora.retrieval.ingest import choose_splitting, put_files

    if store.count() == 0:
        if args.command in ("evaluate", "sweep", "write") and args.questions != SAMPLE_QUESTIONS:
            fix = f"python rag_qlora.py ingest PATH --collection {args.collection}"
            raise console.fail(f"collection {args.collection} is empty", "--collection", fix)
        note(f"Collection {args.collection} is empty: filling it with the sample documents")
        splitting = choose_splitting(store, args.embedding_model, args.passage_tokens, args.overlap)
        put_files(store, [str(SAMPLE_DOCUMENTS)], splitting)


def search(args, store) -> int:
    """Prints the nearest passages; loads no language model."""
    from qlora.answering.citations import Cited
    from qlora.answering.conversation import print_passages

    fill_if_empty(args, store)
    found = make_finding(args, store).find(args.question, args.top_k)
    if args.json:
        passages = [Cited(n, document).as_json() for n, document in enumerate(found, 1)]
        say(json_line({"question": args.question, "passages": passages}))
    else:
        print_passages(found, args.explain)
    return 0


def make_search(args, store):
    """search(question, k) -> passages, as the flags want it."""
    return partial(store.find, mode=args.mode, where=args.where, fetch_k=args.fetch_k, diversity=args.diversity)


def make_finding(args, store, prompt=None, generator=None):
    """How passages are found and put in order, and when a question is refused."""
    from qlora.answering.chain import Finding, open_ranker

    ranker = open_ranker(args.ranking, prompt, generator, args.extra_bias, args.command == "serve")
    return Finding(make_search(args, store), args.top_k, ranker, store.refusal_threshold)


def doctor(args) -> int:
    """Prints the state of machine, server, collection and index; returns 1 when something is bad."""
    from qlora.retrieval.doctor import Finding, as_json, examine, examine_machine, print_findings

    findings = examine_machine()
    try:
        findings += examine(open_store(args), args.embedding_model)
    except console.UserError as error:
        findings += [Finding("database", "bad", str(problem)) for problem in error.problems]
    say(json_line(as_json(findings))) if args.json else print_findings(findings)
    return int(any(finding.state == "bad" for finding in findings))


# ============================================================================ Generate Response


def build_chain(args, store, prompt, generator):
    """retriever | ranker | prompt | model | check, as one LangChain runnable, from a question to its answer."""
    from qlora.answering import chain

    finding = make_finding(args, store, prompt, generator)
    return chain.build_chain(finding, chain.make_fill(prompt, generator), generator, prompt.refusal)


def ask(args, store, prompt, generator) -> int:
    """Prints an answer to each question; returns 3 with --strict when one was refused or has no support."""
    from qlora.answering.citations import refuse
    from qlora.answering.conversation import answer_question, print_turn, write_trace
    from qlora.answering.judging import ask_judgement

    chain, refused = build_chain(args, store, prompt, generator), False
    keep = make_keeper(args, store, prompt) if args.feedback else None
    for question in args.questions:
        turn = answer_question(chain, question)
        if args.strict and not turn.answer.refused and not turn.answer.is_supported:
            note(f"Refused because no cited passage supports it: {turn.answer.text}")
            turn.answer = refuse([cited.document for cited in turn.answer.passages], prompt.refusal)
        refused |= turn.answer.refused
        if args.json:
            say(json_line(describe_turn(args, turn, prompt)))
        else:
            print_turn(turn)
        if args.trace:
            write_trace(args.trace, describe_turn(args, turn, prompt))
        if args.feedback:
            ask_judgement(turn, keep)
    note(f"Next: python rag_qlora.py chat --adapter {args.adapter or 'none'} {same_places(args)}")
    return 3 if args.strict and refused else 0


def chat(args, store, prompt, generator) -> int:
    """Answers turn after turn."""
    from qlora.answering.chat_session import Session, converse, make_rewriter
    from qlora.answering.conversation import answer_question, write_trace

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    chain = build_chain(args, store, prompt, generator)
    session = Session(complete=make_rewriter(args.base_model, prompt, generator), keep=make_keeper(args, store, prompt))

    def answer(line: str, session: Session):
        return answer_question(chain, line, session.history(), session.stand_alone(line))

    def trace(turn) -> None:
        if args.trace:
            write_trace(args.trace, describe_turn(args, turn, prompt))

    converse(session, answer, trace)
    return 0


def make_keeper(args, store, prompt):
    """keep(judgement), with the digests of adapter and prompt; None where the store keeps none."""
    log = store.feedback()
    digest = adapter.digest_weights(args.adapter) if args.adapter else ""
    return log and (lambda judgement: log.add(replace(judgement, adapter=digest, prompt=prompt.digest)))


def serve(args, store, prompt, generator) -> int:
    """Answers over HTTP, in OpenAI's shapes and on a page, until it is stopped."""
    from qlora.retrieval.ingest import choose_splitting
    from qlora.serving import server

    asking = server.Asking(make_finding(args, store, prompt, generator), prompt, generator)
    again = open_store(args, embeddings=store.embeddings)  # uploads go on while questions are answered
    splitting = choose_splitting(again, args.embedding_model, args.passage_tokens, args.overlap)
    names = server.name_models(args.adapter, args.collection, with_base=not args.base_url)
    return server.run(server.Options.of(args), asking, again, splitting, names)


def evaluate(args, store, prompt, generator) -> int:
    """Answers all questions with base and tuned model from every context, scores them, and writes the report."""
    from qlora.answering.chain import answer_each, make_fill
    from qlora.evaluation import evaluation, report
    from qlora.evaluation.questions import load_questions

    questions = load_questions(args.questions, args.limit, prompt.refusal)
    finding = make_finding(args, store, prompt, generator)
    if args.calibrate:
        finding = replace(finding, threshold=None)
    found = evaluation.search_all(finding.find, questions, args.top_k)
    contexts = evaluation.gather_passages(questions, found, args.top_k, args.contexts)
    known = {"base": generator.without_adapter, "tuned": contextlib.nullcontext}
    if not args.adapter:
        note("No adapter: only the base model is evaluated")
    values = evaluation_settings(args, prompt)
    log = report.AnswerLog(args.output / "answers.jsonl", values)
    fill = make_fill(prompt, generator)
    complete = partial(answer_each, fill=fill, generator=generator, refusal=prompt.refusal)
    batch = len(questions) if args.base_url else args.batch_size  # a server gets them one by one
    asking = evaluation.Asking(log, complete, finding.refuses, batch, prompt.refusal)
    cells = evaluation.answer_cells(asking, {name: known[name] for name in args.models}, contexts)
    values |= asked_settings(args, questions, store, finding.threshold)
    result = evaluation.build_result(questions, found, cells, values, args.seed)
    if args.calibrate:
        scores = cells["tuned" if args.adapter else "base", "retrieved"]
        result["calibration"] = evaluation.calibrate(questions, [d[: args.top_k] for d in found], scores, args.seed)
    say(json_line(result) if args.json else report.as_text(result))  # before anything that could fail
    if args.calibrate:
        store.refusal_threshold = result["calibration"]["threshold"]
    report.write_report(args.output, result)
    if args.adapter:
        report.put_into_card(args.adapter, args.output)
    note(f"evaluation.md, .json, .png and answers.jsonl: {args.output}")
    return 0


def fit(args, store, prompt, generator) -> int:
    """Fits on held-out rows how passages are put in order, and when a question is refused; saved with the adapter."""
    from qlora.answering import chain, ranking
    from qlora.evaluation import fitting
    from qlora.training import reranker

    search = make_search(args, store)
    if args.rerank == ranking.TRAINED:
        pairs = reranker.mine_pairs(args.trained_on, search, prompt.refusal)
        embedder = base_model.resolve_embedding_model(args.embedding_model)
        reranker.train_reranker(pairs, embedder, args.adapter / ranking.FOLDER, args.seed)
    ranker = chain.open_ranker(args.ranking, prompt, generator)
    complete = partial(chain.answer_batch, fill=ranker.reader.fill, generator=generator, refusal=prompt.refusal)
    ranker = replace(ranker, reader=fitting.Remembering(ranker.reader))
    asked = fitting.gather(args.asked, search, ranker)
    ordered = replace(args.ranking, order=fitting.fit_order(asked, ranker))
    fitted = fitting.fit_ranking(asked, replace(ranker, ranking=ordered), complete)
    ranking.write_ranking(args.adapter, fitted)
    say(json_line(asdict(fitted)) if args.json else fitting.as_text(fitted))
    note(f"Next: python rag_qlora.py ask --adapter {args.adapter} {same_places(args)}")
    return 0


def write(args, store, prompt, generator) -> int:
    """Writes questions about the passages, with answers; checks each, and saves those that are kept as rows."""
    from qlora.writing import drafts, report, review, writing

    if args.writer == embedded_writer.NAME and not args.writer_url:
        embedded_writer.check_language(store.language)
    names = ("rows", "per_passage", "keep", "refusal_share", "hold_out", "asked", "seed")
    wanted = drafts.Wanted(**{name: getattr(args, name) for name in names}, refusal=prompt.refusal)
    writer = writing.choose_writer(args.writer_url, args.writer_model, generator, prompt)
    read = writing.make_reader(generator, prompt) if args.adapter else None
    tools = writing.Tools(writer, read, make_search(args, store), args.top_k, prompt.refusal)
    files = report.Files(args.output)
    log = drafts.DraftLog(files.drafts, writing_settings(args), args.overwrite)
    chosen, result = report.write_and_select(store.all_passages(), tools, log, wanted)
    say(json_line(result)) if args.json else report.print_report(result)
    if args.review:
        review.review_rows([*chosen.rows, *chosen.held_out], files, args.review)
    report.write_all(files, *review.apply_to(chosen, files), result)
    note(f"Rows: {args.output}, and beside them what each check dropped: {files.drafts}")
    start = f" --start-from {args.writer}" if args.adapter else ""  # who writes from passages answers from them as well
    note(f"Next: python instruct_train_qlora.py --dataset {args.output}{start} --output adapters/mine")
    return 0


def sweep(args, store) -> int:
    """Retrieval metrics for every value of each swept setting, best first; loads no language model."""
    from qlora.evaluation import sweep
    from qlora.evaluation.questions import load_questions
    from qlora.retrieval.ingest import choose_splitting, put_files

    fill_if_empty(args, store)
    questions = load_questions(args.questions, args.limit)

    search = make_search(args, store)

    @contextlib.contextmanager
    def searching(name: str, value):
        """A search with one value of one setting."""
        if name == "passages":
            trial = open_store(args, f"sweep {args.collection} {value}", store.embeddings)
            try:
                put_files(trial, args.documents, choose_splitting(trial, args.embedding_model, value, value // 5))
                yield partial(trial.find, **search.keywords)
            finally:
                trial.drop()
        elif name == "rerank":
            args.ranking = rank_by(value)
            yield make_finding(args, store).find
        else:
            yield partial(search, mode=value) if name == "search" else search

    results = [sweep.score_values(searching, questions, *setting, args.top_k) for setting in args.settings]
    say(json_line(results) if args.json else sweep.as_text(results))
    sweep.write_results(args.output, results)
    note(f"sweep.json, .md and .png: {args.output}")
    return 0


def compare(args) -> int:
    """The paired difference of two runs over the questions that both have, or whether the first is worse."""
    from qlora.evaluation import comparison, gate, report

    if args.fail_if_worse:
        result = gate.judge(*args.evaluations, args.margin, args.seed)
        if args.junit:
            gate.write_junit(args.junit, result)
        say(json_line(result) if args.json else gate.as_text(result))
        return gate.WORSE if result["worse"] else 0
    rows = comparison.compare_runs(*args.evaluations, args.seed)
    say(json_line(rows) if args.json else report.comparison_as_text(rows, *args.evaluations))
    return 0


COMMANDS = {
    **{"ask": ask, "demo": ask, "chat": chat, "serve": serve, "write": write, "fit": fit, "evaluate": evaluate},
    **{"doctor": doctor, "compare": compare},
    **{"ingest": ingest, "documents": documents, "forget": forget, "feedback": feedback},
    **{"search": search, "sweep": sweep},
}

if __name__ == "__main__":
    sys.exit(console.run(main))
