"""The flags of `rag_qlora.py write`, with every value resolved and checked."""

from pathlib import Path

from qlora import console, machine, presets
from qlora.model import adapter
from qlora.retrieval.search_modes import FETCH
from qlora.writing import embedded_writer

READ_TOKENS = 48  # of an answer that a draft is compared with
KEEP = 0.5  # halves the share of wrong rows (docs/measurements.md)


def add_writing_flags(one: console.Parser, setup: str) -> None:
    """Who writes how many rows, and which are kept."""
    share = console.number(float, 0, 0.9)
    flag = one.add_argument
    flag(
        "--output",
        type=Path,
        metavar="ROWS.jsonl",
        default=Path("rows.jsonl"),
        help="the rows; reports lie beside them",
    )
    flag("--rows", type=console.number(int, 1, 10**6), help="rows to write (2 per passage, 1000 at most)")
    flag("--per-passage", type=console.number(int, 1, 20), default=3, help="rows about one passage, at most")
    text = f"share of the rows that pass all checks: the likeliest questions ({KEEP}; all of a server's)"
    flag("--keep", type=console.number(float, 0, 1, above=True), help=text)
    flag("--refusal-share", type=share, default=0.1, help="share of rows whose context does not hold the answer")
    text = "share of the documents whose rows become questions: ROWS.questions.jsonl"
    flag("--hold-out", type=share, default=0.0, help=text)
    text = "passages of a search among which a question must find its own"
    flag("--top-k", type=console.number(int, 1, 50), default=3, help=text)
    text = "questions of an evaluation, which no row may resemble"
    flag("--questions", type=Path, nargs="+", metavar="FILE", default=[], help=text)
    flag("--review", metavar="WHERE", help="look at every row: terminal, or a .csv file to edit and read back")
    flag("--seed", type=console.number(int, 0, presets.SEEDS), default=0, help="of the sampling")
    flag("--overwrite", action="store_true", help="write anew instead of going on from the drafts that are there")
    flag = one.group(setup).add_argument
    text = "embedded, an adapter trained with --writer, or none: only a server writes, and nothing is read back"
    flag("--writer", metavar="WRITER", default=embedded_writer.NAME, help=text)
    flag(
        "--base-url", dest="writer_url", metavar="URL", help="a server writes: http://HOST:PORT/v1 (key: QLORA_API_KEY)"
    )
    flag("--model", dest="writer_model", metavar="NAME", help="the server's name of the model (its only one)")
    flag("--no-cache", action="store_true", help="do not keep the base model in 4-bit for the next start")
    one.set_defaults(base_url=None, model=None, merge_for_speed=False, preset=None, base_model=None, refusal_bias=None)
    one.set_defaults(mode=None, fetch_k=FETCH, diversity=0.0, where=[])  # every passage is written about
    one.set_defaults(temperature=0.0, top_p=1.0, max_new_tokens=READ_TOKENS, repetition_penalty=1.0)


def resolve_writer(args, problems: console.Problems) -> None:
    """Sets adapter, base_model and refusal_bias of the model that writes or reads; no adapter with --writer none.

    Adds problems of the writer, the output and the questions.
    """
    args.adapter, args.base_model = None, presets.EMBEDDED
    if args.writer == embedded_writer.NAME:
        args.adapter = embedded_writer.folder()
    elif args.writer != "none":
        args.adapter = Path(args.writer)
        with problems.collecting():
            trained = adapter.read_adapter(args.adapter)
            args.base_model, args.refusal_bias = trained.base_model, trained.refusal_bias
            if not args.writer_url and not trained.run["arguments"].get("writer"):
                fix = "train it with --writer, leave --writer out, or name a server with --base-url"
                problems.add("the adapter was not trained to write questions", f"--writer {args.writer}", fix)
    else:
        args.base_url, args.model = args.writer_url, args.writer_model  # no model is loaded
    if not (args.adapter or args.writer_url):
        problems.add("nobody writes", "--writer none", "name a server with --base-url, or leave --writer out")
    if args.writer_model and not args.writer_url:
        problems.add("--model is the name of a server's model", "--model", "add --base-url")
    if args.keep and args.writer_url:
        problems.add("a server does not say how likely its questions are", f"--keep {args.keep}", "leave it out")
    args.keep = args.keep or (1.0 if args.writer_url else KEEP)
    if args.writer_url:
        from qlora.answering.server_model import check_url

        with problems.collecting():
            check_url(args.writer_url)
    if args.output.suffix != ".jsonl":
        problems.add("rows are JSON lines", f"--output {args.output}", "give a name that ends with .jsonl")
    with problems.collecting():
        machine.check_file(args.output)
    if args.review not in (None, "terminal") and not args.review.endswith(".csv"):
        problems.add("neither a terminal nor a table", f"--review {args.review}", "give terminal, or a name.csv")
    check_asked(args, problems)


def check_asked(args, problems: console.Problems) -> None:
    """Adds problems of the files of questions; args.asked becomes their texts."""
    from qlora.evaluation.questions import load_questions

    args.asked = []
    for path in args.questions:
        with problems.collecting():
            args.asked += [question.question for question in load_questions(path)]
