"""The flag --rerank, resolved: which ranking puts passages in order, and whose scores it takes."""

from dataclasses import asdict, replace
from pathlib import Path

from qlora import console
from qlora.answering.ranking import FOLDER, LIKELIHOOD, NONE, TRAINED, UNFITTED, Ranking, read_ranking
from qlora.evaluation.questions import load_questions, read_question, spread
from qlora.model import adapter
from qlora.refusal import FEW
from qlora.retrieval.reranker import check_reranker, is_url
from qlora.retrieval.search_modes import DEFAULT_MODE
from qlora.training.held_out import split_again

FIT = "python rag_qlora.py fit"


def add_ranking_flag(flag) -> None:
    text = "none, likelihood, cross-encoder, a model, or http://HOST/rerank (as fitted, else likelihood)"
    flag("--rerank", metavar="NAME", help=text)


def resolve_ranking(args, problems: console.Problems) -> None:
    """Sets args.ranking: None leaves passages in the order of the search."""
    folder = getattr(args, "adapter", None)
    reads = bool(folder) and not args.base_url
    with problems.collecting():
        fitted = read_ranking(Path(folder)) if folder else None
        if not (args.rerank or fitted):
            # Measured with hybrid search alone; the total of another one has another scale.
            args.ranking = rank_by(LIKELIHOOD, reads) if reads and args.mode == DEFAULT_MODE else None
        elif args.rerank == NONE:
            pass
        elif fitted and args.rerank in (None, fitted.rerank):
            why = why_unusable(fitted, args.mode, reads)
            if why and args.rerank:
                raise console.fail(why, f"--rerank {args.rerank}", "leave it out, or fit it again")
            if why:
                console.note(f"The ranking of {folder} is not used: {why}")
            args.ranking = None if why else at_home(fitted, args.collection)
        else:
            args.ranking = rank_by(args.rerank, reads)
        args.rerank = args.ranking.rerank if args.ranking else NONE
        if getattr(args, "calibrate", False) and args.ranking and args.ranking.decides:
            what = "the confidence of the adapter's ranking decides when to refuse, not a threshold of the similarity"
            raise console.fail(what, "--calibrate", "give --rerank none, or leave --calibrate out")


def at_home(fitted: Ranking, collection: str) -> Ranking:
    """The ranking, without the confidence where it was fitted in another collection: the order carries over."""
    if not fitted.decides or fitted.collection == collection:
        return fitted
    console.note(f"The confidence was fitted in the collection {fitted.collection}: the model decides when to refuse")
    return replace(fitted, answers={})


def why_unusable(fitted: Ranking, mode: str, reads: bool) -> str:
    """Why a fitted ranking cannot be used here; empty where it can."""
    if fitted.mode != mode:
        return f"it was fitted for {fitted.mode} search, not for {mode}"
    return "" if reads or not fitted.reads else "a model server does not say how likely its answers are"


def rank_by(name: str, reads: bool = False) -> Ranking | None:
    """The ranking by a name, with weights that were fitted elsewhere. Raises UserError where there is none."""
    if name == NONE:
        return None
    if name == TRAINED:
        raise console.fail("no cross-encoder was trained", f"--rerank {name}", f"train it: {FIT} --rerank {name}")
    if name == LIKELIHOOD:
        if not reads:
            raise console.fail("no adapter reads here", f"--rerank {name}", "name one with --adapter, without a server")
        return Ranking(name, {score: UNFITTED[score] for score in ("total", "odds")})
    check_reranker(name)
    return Ranking(name, {"cross": 1.0}, scored_by=name if is_url(name) else str(Path(name).expanduser()))


# ------------------------------------------------------------------------------- fit


def add_fit_flags(one: console.Parser) -> None:
    """What is fitted, and on which questions."""
    flag = one.add_argument
    text = "likelihood, cross-encoder (trained first), a model, http://HOST/rerank, or none: only when to refuse"
    flag("--rerank", metavar="NAME", default=LIKELIHOOD, help=text)
    text = "questions that the adapter was not trained on (the rows that training held out)"
    flag("--questions", type=Path, metavar="FILE", help=text)
    flag("--limit", type=console.number(int, 2 * FEW), default=300, help="questions to fit on, at most, evenly spread")


def resolve_fit(args, problems: console.Problems) -> None:
    """Sets args.ranking, whose weights are to be fitted, args.asked (questions), and args.trained_on (rows)."""
    args.asked, args.trained_on = [], []
    if not args.adapter:
        problems.add("a ranking is fitted to an adapter", "--adapter none", "name one with --adapter")
        return
    if args.base_url:
        problems.add("a model server does not say how likely its answers are", "--base-url", "leave it out")
        return
    with problems.collecting():
        if args.rerank not in (NONE, LIKELIHOOD, TRAINED):
            check_reranker(args.rerank)
        trained = adapter.read_adapter(args.adapter)
        training, held_out = [], []
        if not args.questions or args.rerank == TRAINED:
            training, held_out = split_again(trained.run, str(args.adapter))
        args.trained_on = training
        args.asked = choose_questions(args, trained.prompt.refusal, held_out)
        cross = [] if args.rerank in (NONE, LIKELIHOOD) else ["cross"]
        order = ["total", *([] if args.rerank == NONE else ["odds", *cross])]
        scored_by = str(args.adapter / FOLDER) if args.rerank == TRAINED else args.rerank if cross else ""
        answers = dict.fromkeys(["total", "odds", *cross], 1.0)
        weights = {score: UNFITTED[score] for score in order}
        args.ranking = Ranking(
            args.rerank, weights, answers, scored_by=scored_by, mode=args.mode, collection=args.collection
        )


def choose_questions(args, refusal: str, held_out: list) -> list:
    """The questions to fit on: those of the file, or the held-out rows."""
    if args.questions:
        return load_questions(args.questions, args.limit, refusal)
    asked = [read_question(asdict(row), refusal) for row in held_out if not row.turns]
    return spread(asked, args.limit)
