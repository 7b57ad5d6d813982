"""What is recorded of a call: the settings that an answer or a draft depends on, and an answer as JSON."""

from dataclasses import asdict

from qlora.evaluation.questions import digest_questions
from qlora.model import adapter


def evaluation_settings(args, prompt) -> dict:
    """The settings that an answer depends on; a question with equal settings and passages is not answered again."""
    names = ("base_model", "max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "top_k")
    names += ("mode", "fetch_k", "diversity", "refusal_bias", "rerank")
    ranking = asdict(args.ranking) if args.ranking else None
    digest = adapter.digest_weights(args.adapter) if args.adapter else None
    chosen = {name: getattr(args, name) for name in names}
    chosen |= {"server": args.base_url, "server_model": args.model} if args.base_url else {}
    return {**chosen, "adapter": digest, "prompt": prompt.digest, "ranking": ranking}


def asked_settings(args, questions, store, threshold: float | None) -> dict:
    """What was asked, and about which documents: two evaluations that differ in a digest are not comparable."""
    where = {"questions": str(args.questions), "collection": args.collection, "refusal_threshold": threshold}
    return {**where, "questions_digest": digest_questions(questions), "passages_digest": store.digest()}


def writing_settings(args) -> dict:
    """What drafts depend on: with equal settings a second run goes on from the drafts of the first."""
    names = ("writer_url", "writer_model", "per_passage", "refusal_share", "seed", "mode", "fetch_k", "top_k")
    digest = adapter.digest_weights(args.adapter) if args.adapter else None
    return {**{name: getattr(args, name) for name in names}, "adapter": digest}


def describe_turn(args, turn, prompt) -> dict:
    """The turn as JSON: question, answer, passages with scores, tokens and timings; model, prompt and collection."""
    model = {"base": args.base_model, "adapter": str(args.adapter) if args.adapter else None}
    model |= {"server": args.base_url, "name": args.model} if args.base_url else {}
    made = {"model": model, "prompt_digest": prompt.digest, "collection": args.collection, "rerank": args.rerank}
    return {**turn.as_json(), **made}
