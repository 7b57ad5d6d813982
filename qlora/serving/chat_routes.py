"""GET /v1/models and POST /v1/chat/completions: questions in, checked answers out, whole or piece by piece."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from qlora.answering.chat_session import REMEMBERED
from qlora.answering.conversation import Turn, write_trace
from qlora.console import UserError
from qlora.serving import shapes
from qlora.serving.shapes import ChatRequest
from qlora.serving.worker import Full, Job, Worker
from qlora.words import clean

SECONDS = 300  # that an answer may take
LOOK = 0.5  # seconds between two looks at whether the client is still there
# What Open WebUI asks beside questions begins like this: titles, tags, follow-up questions, search queries.
TASK = re.compile(r"\s*###\s*Task:", re.IGNORECASE)
TASKS = {"follow_ups": [], "tags": [], "queries": [], "title": ""}


class Refused(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def make_router(worker: Worker, models: dict[str, bool], trace: Path | None = None) -> APIRouter:
    """The routes. `models` are ids, each with whether the adapter answers; the first is the default."""
    router = APIRouter()

    @router.get("/v1/models")
    def list_models() -> dict:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "you"} for name in models]
        return {"object": "list", "data": cards}

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        """An answer from the documents, with checked citations; with `stream` as server-sent events."""
        if body.model not in models:
            known = ", ".join(models)
            raise Refused(404, f"the model {body.model[:200]} does not exist; there is {known}", "model_not_found")
        name, model = shapes.new_id(), body.model
        job = read_job(body, models[model])
        if TASK.match(job.question):
            return answer_task(body, name, job.question)
        events = submit(worker, job)
        if body.stream:
            pieces = stream(events, job, name, body, trace)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        turn = await wait(events, job, request)
        note_turn(trace, turn, model)
        return JSONResponse(shapes.completion(name, model, turn))

    return router


def read_job(body: ChatRequest, tuned: bool) -> Job:
    """The last question with the turns before it. Raises Refused when there is none, or it is too long."""
    said = [(message.role, clean(message.text)) for message in body.messages if message.role in ("user", "assistant")]
    if not said or said[-1][0] != "user" or not said[-1][1].strip():
        raise Refused(400, "the last message must be a question of the user's")
    if len(said[-1][1]) > shapes.LONGEST:
        raise Refused(400, f"the question is longer than {shapes.LONGEST} characters", "context_length_exceeded")
    history: list[dict] = []
    for (first, question), (second, answer) in pairwise(said[:-1]):
        if (first, second) == ("user", "assistant"):
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Job(
        said[-1][1].strip(),
        tuple(history[-2 * REMEMBERED :]),
        tuned,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        max_tokens=body.limit,
        stop=body.stops,
    )


def submit(worker: Worker, job: Job) -> asyncio.Queue:
    """The queue of the job's events. Raises Refused when too many questions wait."""
    events, loop = asyncio.Queue(), asyncio.get_running_loop()

    def emit(event) -> None:
        with contextlib.suppress(RuntimeError):  # the server has just stopped
            loop.call_soon_threadsafe(events.put_nowait, event)

    job.emit = emit
    try:
        worker.submit(job)
    except Full as error:
        message = "too many questions are waiting; try again in some seconds"
        raise Refused(429, message, "rate_limit_exceeded", {"Retry-After": "5"}) from error
    return events


async def wait(events: asyncio.Queue, job: Job, request: Request) -> Turn:
    """The finished turn; the job ends early when the client goes away, or takes too long."""
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(events.get(), LOOK)
                    if isinstance(event, Turn):
                        return event
                    if isinstance(event, Exception):
                        raise as_refused(event)
                if await request.is_disconnected():
                    raise Refused(499, "the client went away")
    except TimeoutError as error:
        raise Refused(504, f"the answer took longer than {SECONDS} seconds", "timeout") from error
    finally:
        job.cancelled.set()


async def stream(
    events: asyncio.Queue, job: Job, name: str, body: ChatRequest, trace: Path | None
) -> AsyncIterator[str]:
    """The answer as OpenAI's server-sent events. The last chunk has the checked answer and its citations."""
    try:
        yield event_line(shapes.chunk(name, body.model, {"role": "assistant", "content": ""}))
        async with asyncio.timeout(SECONDS):
            while isinstance(event := await events.get(), str):
                yield event_line(shapes.chunk(name, body.model, {"content": event}))
        if isinstance(event, Exception):
            refused = as_refused(event)
            yield event_line(shapes.error(refused.message, "server_error", refused.code))
        else:
            note_turn(trace, event, body.model)
            for line in last_chunks(event, name, body):
                yield event_line(line)
    except TimeoutError:
        yield event_line(shapes.error(f"the answer took longer than {SECONDS} seconds", "server_error", "timeout"))
    finally:
        job.cancelled.set()
    yield "data: [DONE]\n\n"


def last_chunks(turn: Turn, name: str, body: ChatRequest) -> list[dict]:
    """The end of an answer: its text where nothing was written (refused unread), citations, usage."""
    written = [] if turn.tokens.get("completion") else [shapes.chunk(name, body.model, {"content": turn.answer.text})]
    found = {**shapes.describe_answer(turn), "answer": turn.answer.text}
    lines = [*written, shapes.chunk(name, body.model, {}, "stop", **found)]
    if (body.stream_options or {}).get("include_usage"):
        lines.append({**shapes.chunk(name, body.model, {}), "choices": [], "usage": shapes.usage(turn)})
    return lines


def event_line(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def as_refused(error: Exception) -> Refused:
    """What a client is told of an exception: nothing but a user's mistake in words."""
    if isinstance(error, UserError):
        return Refused(400, "; ".join(f"{problem.what} - {problem.fix}" for problem in error.problems))
    return Refused(500, "the answer failed; the server's log says why", "server_error")


def note_turn(trace: Path | None, turn: Turn, model: str) -> None:
    """Appends the turn to the trace, where one is kept."""
    if trace:
        write_trace(trace, {**turn.as_json(), "model": model})


def answer_task(body: ChatRequest, name: str, text: str):
    """A chat program's request that is no question about the documents: an empty answer in the JSON that it wants."""
    wanted = next((field for field in TASKS if f'"{field}"' in text), None)
    said = re.search(r"USER:\s*(.+)", text)
    value = said[1].strip()[:60] if wanted == "title" and said else TASKS.get(wanted)
    content = json.dumps({wanted: value}, ensure_ascii=False) if wanted else ""
    head = {"id": name, "model": body.model}
    if body.stream:
        lines = [shapes.chunk(name, body.model, {"role": "assistant", "content": content}, "stop")]
        return StreamingResponse(
            iter([*map(event_line, lines), "data: [DONE]\n\n"]), media_type="text/event-stream", headers={}
        )
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    empty = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return JSONResponse({**head, "object": "chat.completion", "created": 0, "choices": [choice], "usage": empty})
