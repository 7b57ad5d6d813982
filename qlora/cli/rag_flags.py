"""The command line of rag_qlora.py: its commands and flags, with every value resolved and checked."""

import argparse
import sys
from pathlib import Path

from qlora import console, machine, presets, settings
from qlora.cli.ranking_flags import add_fit_flags, add_ranking_flag, resolve_fit, resolve_ranking
from qlora.cli.writing_flags import add_writing_flags, resolve_writer
from qlora.evaluation.comparison import CONTEXTS, MODELS
from qlora.model import adapter
from qlora.prompt import Prompt
from qlora.refusal import FEW
from qlora.retrieval.search_modes import DEFAULT_MODE, FETCH, MODES
from qlora.writing import embedded_writer

SAMPLE_DOCUMENTS = presets.SAMPLE_DATA / "documents"
SAMPLE_QUESTIONS = presets.SAMPLE_DATA / "questions.jsonl"
DEMO_QUESTIONS = (  # two that the demo's model gets right, one that the documents don't answer
    "Name the trees that serve as call signs for the supervisors.",
    "Why do rowing gigs have right of way over nearly everything?",
    "What is the penalty for going faster than 4 knots inside the harbour?",
)
TOP_K = 3
BATCH = 8  # answers at a time
WITHOUT_STORE = ("doctor", "compare")  # commands; doctor opens the store itself, where it can
FROM_COPY = ("search", "ask", "chat", "serve")  # look in the copy of the database, where there is one
PRINTS_JSON = (*WITHOUT_STORE, "documents", "feedback", "search", "ask", "demo", "write", "fit", "evaluate", "sweep")
WITHOUT_MODEL = (*WITHOUT_STORE, "ingest", "documents", "forget", "feedback", "search", "sweep")


def resolve_arguments(argv: list[str], description: str, steps: tuple[str, ...]) -> argparse.Namespace:
    """The arguments with every value resolved. Raises UserError with all mistakes of the call."""
    settings.load_dotenv_once()
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["chat" if sys.stdin.isatty() else "demo", *argv]
    parser, commands = build_parser(description, steps)
    args, problems = console.parse_arguments(parser, argv, commands)
    if args.command == "compare":
        check_comparison(args, problems)
        problems.raise_if_any()
        return args
    args.ranking, args.extra_bias = None, 0.0
    args.embedding_model = args.embedding_model or settings.get("QLORA_EMBEDDING_MODEL") or presets.EMBEDDED_EMBEDDER
    args.collection = args.collection or choose_collection(problems)
    if args.command in ("evaluate", "sweep"):
        check_questions(args, problems)
    if args.command == "sweep":
        check_sweep(args, problems)
    if args.command == "ingest":
        check_ingest(args, problems)
    args.at_once = getattr(args, "batch_size", BATCH)  # requests to a model server
    if args.command == "write":
        resolve_writer(args, problems)
    elif args.command not in WITHOUT_MODEL:
        with problems.collecting():
            resolve_model(args, detect=not problems.found)
        check_serving(args, problems)
    if args.command == "serve":
        from qlora.serving.server import check_options

        with problems.collecting():
            check_options(args.host, args.port)
    if args.command == "evaluate" and not problems.found:
        check_cells(args, problems)
    if "top_k" in args:
        args.top_k = args.top_k or TOP_K
    with problems.collecting():
        if getattr(args, "output", None) and args.command != "write":
            machine.check_writable(args.output)
        if getattr(args, "trace", None):
            machine.check_file(args.trace)
    with problems.collecting():
        check_store(args, problems)
    if args.command == "fit" and not problems.found:
        resolve_fit(args, problems)
    elif "rerank" in args:
        resolve_ranking(args, problems)
    problems.raise_if_any()
    return args


def choose_collection(problems: console.Problems) -> str:
    """QLORA_COLLECTION, or the default."""
    name = settings.get("QLORA_COLLECTION") or "documents"
    if isinstance(invalid := console.name(name), console.Invalid):
        problems.add(f"{invalid.text} is not a name", "QLORA_COLLECTION", f"give {invalid.expected}")
    return name


def check_store(args, problems: console.Problems) -> None:
    """Resolves store and search mode, and connects to DATABASE_URL before anything heavy is loaded."""
    args.from_copy = args.command in FROM_COPY
    args.store = args.store or settings.get("QLORA_STORE") or "pgvector"
    if "mode" in args:
        args.mode = args.mode or (DEFAULT_MODE if args.store == "pgvector" else "dense")
    if args.store == "pinecone":
        if getattr(args, "feedback", False) or args.command == "feedback":
            problems.add("Pinecone keeps no feedback", "--store pinecone", "use PostgreSQL (pgvector)")
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
    else:
        check_servers(args, problems)


def check_servers(args, problems: console.Problems) -> None:
    """Adds the problems of connecting to the database, and to its copy where the command looks in that."""
    keys = [key for key in ("DATABASE_URL", "DATABASE_REPLICA_URL") if settings.get(key)]
    if keys == ["DATABASE_REPLICA_URL"]:
        problems.add("a copy of which database?", keys[0], "set DATABASE_URL as well")
    for key in keys if args.from_copy else keys[:1]:
        from qlora.retrieval.database import connect, is_unprotected

        with problems.collecting():
            if args.command != "doctor":  # doctor reports the connection itself
                connect(settings.get(key), key).close()
            if is_unprotected(settings.get(key)):
                console.note(f"The server's certificate is not checked: add sslmode=verify-full to {key}")


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
        own = Path(folder or f"adapters/{Path(named or preset.base_model).name}")
        args.adapter = embedded_writer.find() if folder == embedded_writer.NAME else own
        trained = adapter.read_adapter(args.adapter, named)
        args.base_model = trained.base_model
        args.top_k = args.top_k or trained.passages
        args.extra_bias = args.refusal_bias or 0.0
        args.refusal_bias = trained.refusal_bias if args.refusal_bias is None else args.refusal_bias
    del args.preset
    if args.command == "evaluate":
        args.output = args.output or Path("evaluations") / (args.adapter or Path(args.base_model)).name


def check_serving(args, problems: console.Problems) -> None:
    """Adds problems of the flags that say where the model runs."""
    if args.model and not args.base_url:
        problems.add("--model is the name of a server's model", "--model", "add --base-url, or give --base-model")
    if args.merge_for_speed and args.base_url:
        problems.add("the server's model cannot be merged here", "--merge-for-speed", "leave it out")
    elif args.merge_for_speed and not args.adapter:
        problems.add("no adapter to merge", "--merge-for-speed", "name one with --adapter")
    if args.base_url:
        from qlora.answering.server_model import check_url

        with problems.collecting():
            check_url(args.base_url)
        if args.extra_bias or (args.refusal_bias and not args.adapter):
            fix = "leave it out: a server would add it to every token of the answer"
            problems.add("a refusal bias is for the first token", "--refusal-bias", fix)


def check_questions(args, problems: console.Problems) -> None:
    """Adds problems of the file of questions."""
    from qlora.evaluation.questions import load_questions

    with problems.collecting():
        count = len(load_questions(args.questions, args.limit))
        if getattr(args, "calibrate", False) and count < FEW:
            problems.add(f"{count} questions are too few", "--calibrate", f"give {FEW} or more, half of them to fit on")


def check_cells(args, problems: console.Problems) -> None:
    """Adds problems of --models and --contexts that leave nothing to answer or to calibrate."""
    fitted = "tuned" if args.adapter else "base"
    chosen = args.models or ([fitted] if args.base_url or not args.adapter else MODELS)
    args.models = [name for name in MODELS if name in chosen]
    if args.base_url and args.models != [fitted]:
        fix = f"give --models {fitted}; for the base model, give --adapter none and --model NAME"
        problems.add("a server's model is the tuned one or the base model, not both", "--models", fix)
    elif not args.adapter and "tuned" in args.models:
        problems.add("no adapter to evaluate", "--models tuned", "name one with --adapter, or give --models base")
    elif args.calibrate and (fitted not in args.models or "retrieved" not in args.contexts):
        fix = f"give --models {fitted} and --contexts retrieved, or leave both out"
        problems.add("--calibrate needs answers from retrieved passages", "command line", fix)


def check_sweep(args, problems: console.Problems) -> None:
    """Adds problems of the documents to split."""
    from qlora.retrieval.documents import find_files

    sample = [str(SAMPLE_DOCUMENTS)] if args.questions == SAMPLE_QUESTIONS else []
    args.documents = args.documents or sample
    if not args.documents and any(setting[0] == "passages" for setting in args.settings):
        problems.add("no documents to split", "passages=...", "name them with --documents PATH ...")
    with problems.collecting():
        find_files(args.documents)


def check_ingest(args, problems: console.Problems) -> None:
    """Adds problems of the paths, of --overlap and of --ocr, which becomes the languages."""
    from qlora.reading.kinds import choose_ocr
    from qlora.retrieval import documents

    with problems.collecting():
        documents.find_files(args.paths)
    with problems.collecting():
        args.ocr = choose_ocr(args.ocr)
    if args.overlap >= args.passage_tokens:
        problems.add("--overlap reaches --passage-tokens", "command line", "give a smaller --overlap")


def build_parser(description: str, steps: tuple[str, ...]):
    """The parser, and the parser of each command by name."""
    title, _, text = description.partition("\n\n")
    parser = console.Parser(usage="rag_qlora.py [command] [flags]", description=title, epilog=text)
    commands = parser.add_subparsers(title="Commands", dest="command", metavar="command")
    setup, generation, storage, answering = steps

    def add(name: str, purpose: str, words: str = "") -> console.Parser:
        usage = f"rag_qlora.py {name} [flags] {words}".rstrip()
        return commands.add_parser(name, usage=usage, description=purpose, help=purpose)

    one = add("ingest", "Put files and folders into the collection.", "PATH ...")
    add_ingest_flags(one)
    add("documents", "List the documents of the collection.")
    one = add("forget", "Remove documents from the collection.", "SOURCE ...")
    one.add_argument("sources", nargs="+", metavar="SOURCE", help="a document, as `documents` lists it")
    add_feedback_flags(add("feedback", "Show what people think of answers, make rows of it, or delete it."))
    one = add("search", "Show the nearest passages, without a language model.", "QUESTION")
    one.add_argument("question", metavar="QUESTION")
    one.add_argument("--explain", action="store_true", help="show the rank of each passage in each leg of the search")
    one = add("ask", "Answer questions and cite passages.", "QUESTION ...")
    one.add_argument("questions", nargs="+", metavar="QUESTION")
    add("chat", "Answer questions one after the other; later ones may refer to earlier ones.")
    one = add("demo", "Answer three questions on the sample documents.")
    one.set_defaults(questions=DEMO_QUESTIONS, strict=False, feedback=False)
    add_server_flags(add("serve", "Answer over HTTP: a web page, and OpenAI's API."), answering)
    one = add("write", "Write training rows from the documents; each is checked.")
    add_writing_flags(one, setup)
    add_fit_flags(add("fit", "Fit which passage answers, and when none does, on rows that training held out."))
    add_evaluation_flags(add("evaluate", "Score the base and the tuned model on questions with known answers."))
    add_sweep_flags(add("sweep", "Compare retrieval for several values of a setting.", "SETTING=A,B ..."))
    add_comparison_flags(add("compare", "Show the paired difference of two evaluations.", "FIRST SECOND"))
    add("doctor", "Check the machine, the server, indexes and embeddings; measure the recall of the index.")
    for name in ("ask", "chat", "demo", "serve", "fit", "evaluate"):
        add_model_flags(commands.choices[name], setup)
        add_generation_flags(commands.choices[name], generation)
    for name in commands.choices:
        if name != "compare":
            add_database_flags(commands.choices[name].group(storage).add_argument, commands.choices[name])
    for name in ("search", "ask", "chat", "demo", "serve", "fit", "evaluate", "sweep"):
        add_search_flags(commands.choices[name].group(storage).add_argument, ranked=name not in ("fit", "sweep"))
    for name in ("ask", "chat", "demo", "serve"):
        add_serving_flags(commands.choices[name], setup)
        add_trace_flags(commands.choices[name].group(answering).add_argument, strict=name == "ask")
    add_url_flags(commands.choices["evaluate"], setup)
    for name, one in commands.choices.items():
        if name in PRINTS_JSON:
            one.add_argument("--json", action="store_true", help="print JSON on stdout")
        one.add_argument("--verbose", action="store_true", help="show all settings, also those with their default")
    return parser, commands.choices


def add_ingest_flags(one: console.Parser) -> None:
    """Which files become passages, and of what length."""
    text = "files and folders: text, Markdown, HTML, PDF, Office, CSV, JSON, e-mails, e-books (docs/documents.md)"
    one.add_argument("paths", nargs="+", metavar="PATH", help=text)
    flag = one.add_argument
    flag("--passage-tokens", type=console.number(int, 16), default=120, help="tokens per passage, at most")
    flag("--overlap", type=console.number(int, 0), default=24, help="tokens that neighbouring passages share")
    text = "scanned PDF pages by Tesseract: auto if it is installed, off, or languages such as deu+eng"
    flag("--ocr", metavar="LANG", default="auto", help=text)
    text = "language of a new collection, such as german; auto finds it in the text"
    flag("--language", type=read_named_language, metavar="NAME", default="auto", help=text)
    flag("--prune", action="store_true", help="also remove documents whose files are gone from the folders")
    flag("--dry-run", action="store_true", help="show what would be done: + new, ~ changed, - removed")


def read_named_language(text: str):
    from qlora.retrieval.languages import read_language

    return read_language(text)


def add_question_flags(flag) -> None:
    """Which questions are asked: flags of evaluate and sweep."""
    text = "questions in our format, dataset rows, or a SQuAD file"
    flag("--questions", type=Path, metavar="FILE", default=SAMPLE_QUESTIONS, help=text)
    flag("--limit", type=console.number(int, 1), help="only N questions, evenly spread (all)")


def add_evaluation_flags(one: console.Parser) -> None:
    """What is asked of which models, and where the report goes."""
    flag = one.add_argument
    add_question_flags(flag)
    text = "answers per batch; with --base-url requests at a time"
    flag("--batch-size", type=console.number(int, 1), default=BATCH, help=text)
    text = "base, tuned (both; with --base-url the adapter)"
    flag("--models", nargs="+", type=console.choice(*MODELS), metavar="NAME", help=text)
    contexts = console.choice(*CONTEXTS)
    flag("--contexts", nargs="+", type=contexts, metavar="NAME", default=CONTEXTS, help="some of them")
    flag("--output", type=Path, metavar="FOLDER", help="folder of the report (evaluations/NAME-OF-ADAPTER)")
    text = "fit the collection's refusal threshold on half of the questions, report on the other half"
    flag("--calibrate", action="store_true", help=text)


def add_sweep_flags(one: console.Parser) -> None:
    """Which values are compared, on which questions and documents."""
    text = "search=dense,lexical,hybrid, passages=120,200,256, top-k=1,3,5 or rerank=none,MODEL"
    one.add_argument("settings", type=read_sweep, nargs="+", metavar="SETTING=A,B", help=text)
    flag = one.add_argument
    add_question_flags(flag)
    text = "files and folders that passages=... splits (the sample's)"
    flag("--documents", nargs="+", default=[], metavar="PATH", help=text)
    flag("--output", type=Path, metavar="FOLDER", default=Path("evaluations/sweep"), help="folder of the report")


def add_feedback_flags(one: console.Parser) -> None:
    """What is done with judgements."""
    flag = one.add_argument
    text = "write training rows, and beside them questions (half, by hash) and what needs review"
    flag("--export", type=Path, metavar="ROWS.jsonl", help=text)
    flag("--refusal", metavar="TEXT", default=Prompt.refusal, help="the response where the documents do not answer")
    flag("--forget", nargs="+", metavar="N", default=[], help="delete judgements by number, or all")


def add_comparison_flags(one: console.Parser) -> None:
    """Which evaluations are compared, and whether the first may be worse."""
    flag = one.add_argument
    text = "evaluation.json of each, with its answers.jsonl beside it"
    flag("evaluations", type=Path, nargs=2, metavar="EVALUATION", help=text)
    flag("--seed", type=console.number(int, 0, presets.SEEDS), default=0, help="of the bootstrap")
    text = "exit code 4 when the first (new) is worse than the second (old); names the documents that lost"
    flag("--fail-if-worse", action="store_true", help=text)
    flag("--margin", type=console.number(float, 0, 1), default=0.0, help="loss of overall F1 that is allowed")
    flag("--junit", type=Path, metavar="FILE", help="write the result as JUnit XML (with --fail-if-worse)")


def check_comparison(args, problems: console.Problems) -> None:
    if (args.margin or args.junit) and not args.fail_if_worse:
        name = "--junit" if args.junit else "--margin"
        problems.add("nothing is judged", name, "add --fail-if-worse, or leave it out")
    if args.junit:
        with problems.collecting():
            machine.check_file(args.junit)


def read_sweep(text: str):
    from qlora.evaluation.sweep import read_setting

    return read_setting(text)


def add_model_flags(one: console.Parser, setup: str) -> None:
    """Which model answers."""
    flag = one.group(setup).add_argument
    flag("--preset", metavar="NAME", help="auto (by the GPU), laptop, llama2-7b or another")
    flag("--base-model", metavar="MODEL", help="hub id or folder (the adapter's own)")
    text = "adapter, `none` (the base model), or `embedded` (the writer) (adapters/NAME-OF-BASE)"
    flag("--adapter", metavar="FOLDER", help=text)
    text = "do not keep the base model in 4-bit for the next start"
    flag("--no-cache", action="store_true", help=text)
    one.set_defaults(base_url=None, model=None, merge_for_speed=False, trace=None)  # flags of some commands


def add_generation_flags(one: console.Parser, generation: str) -> None:
    """How the words of an answer are chosen."""
    flag, share = one.group(generation).add_argument, console.number(float, 0, 1, above=True)
    flag("--temperature", type=console.number(float, 0, 5), default=0.0, help="0 is greedy")
    flag("--top-p", type=share, default=1.0, help="share of the probability to sample from")
    flag("--max-new-tokens", type=console.number(int, 1, 4096), default=96, help="tokens per answer, at most")
    flag("--repetition-penalty", type=console.number(float, 1, 3), default=1.0, help="1 is no penalty")
    flag("--seed", type=console.number(int, 0, presets.SEEDS), default=0, help="of the sampling")
    text = "added to the log-odds of a refusal: above 0 refuses more often (fitted in training)"
    flag("--refusal-bias", type=console.number(float, -100, 100), help=text)


def add_serving_flags(one: console.Parser, setup: str) -> None:
    """Where the model runs: flags of ask, chat and demo."""
    flag = one.group(setup).add_argument
    text = "add the adapter to the 16-bit weights: faster, more memory; checked first"
    flag("--merge-for-speed", action="store_true", help=text)
    add_url_flags(one, setup)


def add_url_flags(one: console.Parser, setup: str) -> None:
    """Which server answers: also flags of evaluate."""
    flag = one.group(setup).add_argument
    text = "an OpenAI-compatible server answers: http://HOST:PORT/v1 (key: QLORA_API_KEY)"
    flag("--base-url", metavar="URL", help=text)
    flag("--model", metavar="NAME", help="the server's name of the model (its only one)")


def add_server_flags(one: console.Parser, answering: str) -> None:
    """Where the server listens, and whom it answers."""
    flag = one.group(answering).add_argument
    flag("--host", default="127.0.0.1", help="address to listen at; others than this machine's need QLORA_SERVE_KEY")
    flag("--port", type=console.number(int, 1, 65535), default=8000, help="port to listen at")
    flag("--queue", type=console.number(int, 1, 10**4), default=32, help="questions that may wait")
    flag("--allow-origin", nargs="+", metavar="URL", default=[], help="other sites that may ask, as https://HOST")
    flag("--read-only", action="store_true", help="take and delete no documents")


def add_trace_flags(flag, strict: bool) -> None:
    """What is kept of answers, and when an answer is refused."""
    if strict:
        text = "refuse an answer that no passage supports; exit code 3 after any refusal"
        flag("--strict", action="store_true", help=text)
        flag("--feedback", action="store_true", help="ask whether each answer was right, and keep what is said")
    text = "append every answer with passages, tokens and timings, one JSON object per line"
    flag("--trace", type=Path, metavar="FILE.jsonl", help=text)


def add_database_flags(flag, one: console.Parser) -> None:
    """Where the passages are."""
    stores = console.choice("pgvector", "pinecone")
    flag("--store", type=stores, help="PostgreSQL or Pinecone (pgvector)")
    flag("--collection", type=console.name, metavar="NAME", help="name of the collection (documents)")
    text = f"sentence-transformers model ({presets.EMBEDDED_EMBEDDER.partition('/')[2]})"
    flag("--embedding-model", metavar="MODEL", help=text)
    if one.get_default("passage_tokens") is None:  # for the sample documents in an empty collection
        one.set_defaults(passage_tokens=120, overlap=24)


def add_search_flags(flag, ranked: bool) -> None:
    """How passages are found and put in order."""
    flag("--top-k", type=console.number(int, 1, 50), help="passages per question (as in training, else 3)")
    text = f"meaning, words, or both ({DEFAULT_MODE}; Pinecone: dense)"
    flag("--search", type=console.choice(*MODES), dest="mode", help=text)
    flag("--fetch-k", type=console.number(int, 1, 1000), default=FETCH, help="passages that each leg ranks")
    text = "0 to 1: how far passages that repeat a better one move down"
    flag("--diversity", type=console.number(float, 0, 1), default=0.0, help=text)
    if ranked:
        add_ranking_flag(flag)
    text = "only passages with such metadata: source=a.md, 'page>=3'; may be repeated"
    flag("--where", type=read_where, action="append", default=[], metavar="KEY=VALUE", help=text)


def read_where(text: str):
    from qlora.retrieval.metadata_filter import read_condition

    try:
        return read_condition(text)
    except ValueError:
        return console.Invalid(text, "KEY=VALUE, or != < <= > >= between them")
