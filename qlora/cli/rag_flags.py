"""The command line of rag_qlora.py: its commands and flags, with every value resolved and checked."""

import argparse
import sys
from pathlib import Path

from qlora import console, presets, settings
from qlora.evaluation.comparison import CONTEXTS, MODELS
from qlora.model import adapter
from qlora.retrieval.search_modes import DEFAULT_MODE, FETCH, MODES

SAMPLE_DOCUMENTS = presets.SAMPLE_DATA / "documents"
SAMPLE_QUESTIONS = presets.SAMPLE_DATA / "questions.jsonl"
DEMO_QUESTIONS = (  # two that the demo's model gets right, one that the documents don't answer; README has the rates
    "Name the trees that serve as call signs for the supervisors.",
    "Why do rowing gigs have right of way over nearly everything?",
    "What is the penalty for going faster than 4 knots inside the harbour?",
)
TOP_K = 3
WITHOUT_STORE = ("doctor", "compare")  # commands; doctor opens the store itself, where it can
WITHOUT_MODEL = (*WITHOUT_STORE, "ingest", "documents", "forget", "search", "sweep")


def resolve_arguments(argv: list[str], description: str, steps: tuple[str, ...]) -> argparse.Namespace:
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["chat" if sys.stdin.isatty() else "demo", *argv]
    parser, commands = build_parser(description, steps)
    args, problems = console.parse_arguments(parser, argv, commands)
    if args.command == "compare":
        problems.raise_if_any()
        return args
    args.embedding_model = args.embedding_model or settings.get("QLORA_EMBEDDING_MODEL") or presets.EMBEDDED_EMBEDDER
    args.collection = args.collection or settings.get("QLORA_COLLECTION") or "documents"
    if args.command in ("evaluate", "sweep"):
        check_questions(args, problems)
    if args.command == "sweep":
        check_sweep(args, problems)
    if args.command == "ingest":
        check_ingest(args, problems)
    if args.command not in WITHOUT_MODEL:
        with problems.collecting():
            resolve_model(args, detect=not problems.found)
        check_serving(args, problems)
    if "top_k" in args:
        args.top_k = args.top_k or TOP_K
    with problems.collecting():
        check_store(args, problems)
    problems.raise_if_any()
    return args


def check_store(args, problems: console.Problems) -> None:
    """Resolves the store and how it is searched, and connects to a named database before anything heavy is loaded."""
    args.store = args.store or settings.get("QLORA_STORE") or "pgvector"
    if "mode" in args:
        args.mode = args.mode or (DEFAULT_MODE if args.store == "pgvector" else "dense")
    if args.store == "pinecone":
        if args.command == "doctor":
            problems.add("doctor examines PostgreSQL", "--store pinecone", "see app.pinecone.io")
        if getattr(args, "mode", "dense") != "dense":
            problems.add("Pinecone searches by meaning only", "--search", "give --search dense, or --store pgvector")
        if not settings.get("PINECONE_API_KEY"):
            problems.add(
                "no Pinecone key", "PINECONE_API_KEY", "set it in the environment or in .env (app.pinecone.io)"
            )
    elif args.store != "pgvector":
        problems.add(f"no such store: {args.store}", "QLORA_STORE", "pgvector or pinecone")
    elif url := settings.get("DATABASE_URL"):
        from qlora.retrieval.database import connect, is_unprotected

        if args.command != "doctor":  # which tells it itself, beside what it finds out about the machine
            connect(url).close()
        if is_unprotected(url):
            console.note("The server's certificate is not checked: add sslmode=verify-full to DATABASE_URL")


def resolve_model(args, detect: bool) -> None:
    """Sets base_model and adapter: the adapter names its base, so that naming either is enough."""
    preset = presets.PRESETS[presets.choose_preset(args.preset, detect)]
    named = args.base_model or (preset.base_model if args.preset else None)
    if not named and not args.adapter:
        named = settings.get("QLORA_BASE_MODEL")
    folder = args.adapter or settings.get("QLORA_ADAPTER")
    if folder == "none":
        args.adapter, args.base_model = None, named or preset.base_model
        args.refusal_bias = args.refusal_bias or 0.0
    else:
        args.adapter = Path(folder or f"adapters/{Path(named or preset.base_model).name}")
        trained = adapter.read_adapter(args.adapter, named)
        args.base_model = trained.base_model
        args.top_k = args.top_k or trained.passages
        args.refusal_bias = trained.refusal_bias if args.refusal_bias is None else args.refusal_bias
    del args.preset
    if args.command == "evaluate":
        args.output = args.output or Path("evaluations") / (args.adapter or Path(args.base_model)).name


def check_serving(args, problems: console.Problems) -> None:
    """Adds what is wrong with where the model is to run."""
    if args.model and not args.base_url:
        problems.add("--model is the name of a server's model", "--model", "give --base-url, too, or --base-model")
    if args.merge_for_speed and args.base_url:
        problems.add("the server's model cannot be merged here", "--merge-for-speed", "leave it out")
    elif args.merge_for_speed and not args.adapter:
        problems.add("no adapter to merge", "--merge-for-speed", "name one with --adapter")
    if args.base_url:
        from qlora.answering.server_model import check_url

        with problems.collecting():
            check_url(args.base_url)


def check_questions(args, problems: console.Problems) -> None:
    """Adds what is wrong with the file of questions."""
    from qlora.evaluation.questions import load_questions

    with problems.collecting():
        load_questions(args.questions)


def check_sweep(args, problems: console.Problems) -> None:
    """Adds what is wrong with the documents that are split anew."""
    from qlora.retrieval.documents import find_files

    sample = [str(SAMPLE_DOCUMENTS)] if args.questions == SAMPLE_QUESTIONS else []
    args.documents = args.documents or sample
    if not args.documents and any(setting[0] == "passages" for setting in args.settings):
        problems.add("no documents to split", "passages=...", "name them with --documents PATH ...")
    with problems.collecting():
        find_files(args.documents)


def check_ingest(args, problems: console.Problems) -> None:
    from qlora.retrieval import documents

    with problems.collecting():
        documents.find_files(args.paths)
    if args.overlap >= args.passage_tokens:
        problems.add("--overlap reaches --passage-tokens", "command line", "give a smaller --overlap")


def build_parser(description: str, steps: tuple[str, ...]):
    """The parser, and the parser of each command by name."""
    title, _, text = description.partition("\n\n")
    parser = console.Parser(usage="rag_qlora.py [command] [flags]", description=title, epilog=text)
    commands = parser.add_subparsers(dest="command", metavar="command")
    setup, generation, storage, answering = steps
    database, searching = database_flags(storage), search_flags(storage)
    model, answers = model_flags(setup, generation), answer_flags(answering)

    def add(name: str, parents: list, purpose: str, words: str = "") -> argparse.ArgumentParser:
        usage = f"rag_qlora.py {name} [flags] {words}".rstrip()
        return commands.add_parser(name, parents=parents, usage=usage, description=purpose, help=purpose)

    add_ingest_flags(add("ingest", [database], "put files and folders into the collection", "PATH ..."))
    add("documents", [database], "list what is in the collection")
    one = add("forget", [database], "remove documents from the collection", "SOURCE ...")
    one.add_argument("sources", nargs="+", metavar="SOURCE", help="as `documents` lists them")
    one = add("search", [database, searching, answers], "show the nearest passages", "question")
    one.add_argument("question")
    one.add_argument("--explain", action="store_true", help="show the rank of each passage in each leg of the search")
    answered = [model, database, searching, answers]
    one = add("ask", answered, "answer questions, citing passages", "question ...")
    one.add_argument("questions", nargs="+", metavar="question")
    text = "refuse answers that no passage supports, and end with exit code 3 when a question was refused"
    one.add_argument("--strict", action="store_true", help=text)
    add("chat", answered, "several turns")
    one = add("demo", answered, "answer three questions on the sample documents")
    one.set_defaults(questions=DEMO_QUESTIONS, strict=False)
    for name in ("ask", "chat", "demo"):
        add_serving_flags(commands.choices[name])
    add_evaluation_flags(add("evaluate", answered, "score base and tuned model on questions with known answers"))
    text = "compare retrieval for several values of a setting"
    add_sweep_flags(add("sweep", [database, searching, answers], text, "SETTING=A,B ..."))
    add_comparison_flags(add("compare", [], "show the paired difference of two evaluations", "FIRST SECOND"))
    add("doctor", [database], "check machine, server, indexes and embeddings, and measure what the index finds")
    for name in ("documents", "search", "ask", "demo", "evaluate", "sweep", "compare", "doctor"):
        commands.choices[name].add_argument("--json", action="store_true", help="JSON on stdout")
    return parser, commands.choices


def add_ingest_flags(one: argparse.ArgumentParser) -> None:
    """Which files become passages, and of what length."""
    text = "files, folders: .txt .md .html .pdf .docx .csv .json .jsonl"
    one.add_argument("paths", nargs="+", metavar="PATH", help=text)
    one.add_argument("--passage-tokens", type=console.number(int, 16), default=120, help="tokens per passage (120)")
    one.add_argument("--overlap", type=console.number(int, 0), default=24, help="tokens two passages share (24)")
    text = "also forget documents whose files are gone from the folders"
    one.add_argument("--prune", action="store_true", help=text)
    one.add_argument("--dry-run", action="store_true", help="show what would be done (+ new, ~ changed, - forgotten)")


def add_serving_flags(one: argparse.ArgumentParser) -> None:
    """Where the model runs, and what is kept of its answers: flags of ask, chat and demo."""
    text = "add the adapter to the weights in 16 bit: faster, more memory; checked on eight prompts first"
    one.add_argument("--merge-for-speed", action="store_true", help=text)
    text = "let an OpenAI-compatible server answer: http://HOST:PORT/v1; its key goes into QLORA_API_KEY"
    one.add_argument("--base-url", metavar="URL", help=text)
    one.add_argument("--model", metavar="NAME", help="of the server's models (its only one)")
    text = "append question, passages, answer, tokens and timings to this file, a line of JSON an answer"
    one.add_argument("--trace", type=Path, metavar="FILE.jsonl", help=text)


def add_question_flags(one: argparse.ArgumentParser) -> None:
    """Which questions are asked: flags of evaluate and sweep."""
    one.add_argument("--questions", type=Path, default=SAMPLE_QUESTIONS, help="ours, dataset rows, or SQuAD (sample's)")
    one.add_argument("--limit", type=console.number(int, 1), help="so many of the questions, evenly spread (all)")


def add_evaluation_flags(one: argparse.ArgumentParser) -> None:
    """What is asked of which models, and where the report goes."""
    add_question_flags(one)
    one.add_argument("--batch-size", type=console.number(int, 1), default=8, help="answers at a time (8)")
    for flag, names in (("--models", MODELS), ("--contexts", CONTEXTS)):
        one.add_argument(
            flag, nargs="+", type=console.choice(*names), default=names, help=f"of {', '.join(names)} (all)"
        )
    one.add_argument("--output", type=Path, help="folder of the report (evaluations/NAME-OF-ADAPTER)")
    text = "fit the collection's refusal threshold on half of the questions, report on the other half"
    one.add_argument("--calibrate", action="store_true", help=text)


def add_sweep_flags(one: argparse.ArgumentParser) -> None:
    """Which values are compared, on which questions and documents."""
    add_question_flags(one)
    text = "search=dense,lexical,hybrid, passages=120,200,256 or top-k=1,3,5"
    one.add_argument("settings", type=read_sweep, nargs="+", metavar="SETTING=A,B", help=text)
    text = "files and folders that passages=... splits (sample's)"
    one.add_argument("--documents", nargs="+", default=[], metavar="PATH", help=text)
    one.add_argument("--output", type=Path, default=Path("evaluations/sweep"), help="folder (evaluations/sweep)")


def add_comparison_flags(one: argparse.ArgumentParser) -> None:
    """Which evaluations are compared."""
    text = "evaluation.json of each, with its answers.jsonl beside it"
    one.add_argument("evaluations", type=Path, nargs=2, metavar="EVALUATION", help=text)
    one.add_argument("--seed", type=console.number(int, 0), default=0, help="of the bootstrap (0)")


def read_sweep(text: str):
    from qlora.evaluation.sweep import read_setting

    return read_setting(text)


def model_flags(setup: str, generation: str) -> argparse.ArgumentParser:
    """Which model answers, and how its words are chosen."""
    flags = argparse.ArgumentParser(add_help=False)
    share = console.number(float, 0, 1, above=True)
    group = flags.add_argument_group(setup)
    group.add_argument("--preset", help="auto (default), laptop, llama2-7b or llama2-13b-chat")
    group.add_argument("--base-model", help="hub id or folder (the adapter's own)")
    group.add_argument("--adapter", help="adapter folder, or none for the base model (adapters/NAME-OF-BASE)")
    text = "do not keep the base model in 4-bit for the next start"
    group.add_argument("--no-cache", action="store_true", help=text)
    flags.set_defaults(base_url=None, model=None, merge_for_speed=False, trace=None)  # not flags of `evaluate`
    group = flags.add_argument_group(generation)
    group.add_argument("--temperature", type=console.number(float, 0, 5), default=0.0, help="0 is greedy (0)")
    group.add_argument("--top-p", type=share, default=1.0, help="share of probability to sample from (1)")
    tokens = console.number(int, 1, 4096)
    group.add_argument("--max-new-tokens", type=tokens, default=96, help="length of an answer (96)")
    group.add_argument("--repetition-penalty", type=console.number(float, 1, 3), default=1.0, help="1 is none (1)")
    group.add_argument("--seed", type=console.number(int, 0), default=0, help="of the sampling (0)")
    text = 'added to the log-odds of saying "I don\'t know.": above 0 more often, below less (as training fitted it)'
    group.add_argument("--refusal-bias", type=console.number(float, -100, 100), help=text)
    return flags


def database_flags(storage: str) -> argparse.ArgumentParser:
    """Where the passages are."""
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(storage)
    stores = console.choice("pgvector", "pinecone")
    group.add_argument("--store", type=stores, help="pgvector (PostgreSQL) or pinecone (pgvector)")
    group.add_argument("--collection", help="name of the collection (documents)")
    group.add_argument("--embedding-model", help=f"sentence-transformers model ({presets.EMBEDDED_EMBEDDER})")
    flags.set_defaults(passage_tokens=120, overlap=24)  # for the sample documents in an empty collection
    return flags


def search_flags(storage: str) -> argparse.ArgumentParser:
    """How passages are found."""
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(f"{storage}: search")
    text = f"dense (meaning), lexical (words) or hybrid (both, added up) ({DEFAULT_MODE}; Pinecone: dense)"
    group.add_argument("--search", type=console.choice(*MODES), dest="mode", help=text)
    text = f"passages that each leg ranks ({FETCH})"
    group.add_argument("--fetch-k", type=console.number(int, 1, 1000), default=FETCH, help=text)
    text = "0 to 1: how much passages that repeat a better one give way (0)"
    group.add_argument("--diversity", type=console.number(float, 0, 1), default=0.0, help=text)
    text = "only passages whose metadata fulfil it: source=a.md, 'page>=3'; may be repeated"
    group.add_argument("--where", type=read_where, action="append", default=[], metavar="KEY=VALUE", help=text)
    return flags


def read_where(text: str):
    from qlora.retrieval.metadata_filter import read_condition

    try:
        return read_condition(text)
    except ValueError:
        return console.Invalid(text, "KEY=VALUE, or != < <= > >= between them")


def answer_flags(answering: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(answering)
    group.add_argument(
        "--top-k", type=console.number(int, 1, 50), help="passages a question (as many as in training, else 3)"
    )
    return flags
