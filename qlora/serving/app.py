"""The application: routes, guard, errors in OpenAI's shape, and the page."""

import html
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from qlora.console import UserError
from qlora.retrieval.feedback import FeedbackLog, Judgement
from qlora.serving import chat_routes, document_routes, shapes
from qlora.serving.chat_routes import Refused, as_refused
from qlora.serving.document_routes import Library
from qlora.serving.guard import Guard, Rules
from qlora.serving.shapes import Feedback
from qlora.serving.worker import Worker

STATIC = Path(__file__).parent / "static"
log = logging.getLogger("qlora.serving")


@dataclass(frozen=True)
class Site:
    """What the application is made of."""

    worker: Worker
    models: dict[str, bool]  # id -> whether the adapter answers
    library: Library
    rules: Rules
    feedback: FeedbackLog | None  # None where the store keeps none
    digests: tuple[str, str]  # of the adapter's weights and of the prompt
    examples: list[str]  # questions to begin with
    trace: Path | None = None


def make_app(site: Site) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="Answers from your documents", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(Guard, rules=site.rules)
    app.include_router(chat_routes.make_router(site.worker, site.models, site.trace))
    app.include_router(document_routes.make_router(site.library))
    add_feedback(app, site)
    add_pages(app, site)
    add_errors(app)
    return app


def add_feedback(app: FastAPI, site: Site) -> None:
    """POST /feedback keeps a judgement, GET /feedback.jsonl gives all."""

    def keeper():
        if site.feedback is None:
            raise Refused(501, "this store keeps no feedback; use PostgreSQL", "not_implemented")
        return site.feedback

    @app.post("/feedback", status_code=201)
    def keep(body: Feedback) -> dict:
        return {"id": keeper().add(read_feedback(body, site))}

    @app.get("/feedback.jsonl", response_class=PlainTextResponse)
    def export() -> str:
        return "".join(json.dumps(asdict(one), ensure_ascii=False, default=str) + "\n" for one in keeper().all())


def read_feedback(body: Feedback, site: Site) -> Judgement:
    """The judgement with the texts of its passages, and with what answered."""
    values = body.model_dump()
    ids = dict.fromkeys([*values.pop("passages"), *([body.right_passage] if body.right_passage else [])])
    found = site.library.store.get_by_ids(list(ids))
    passages = tuple({"id": d.id, "source": d.metadata["source"], "text": d.page_content} for d in found)
    weights, prompt = site.digests
    is_tuned = site.models.get(values.pop("model"), False)
    return Judgement(**values, passages=passages, adapter=weights if is_tuned else "", prompt=prompt)


def add_pages(app: FastAPI, site: Site) -> None:
    """The page at /, its files, /health, and a list of the routes at /docs that needs no network."""

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    def health() -> dict:
        """Ready: everything was loaded before the port was opened."""
        return {"status": "ok", "needs_key": bool(site.rules.key)}

    @app.get("/about")
    def about() -> dict:
        """What the page needs to know."""
        collection = site.library.store.count()
        return {
            "models": site.models,
            "passages": collection,
            "examples": site.examples,
            "feedback": bool(site.feedback),
        }

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(describe_routes(app.openapi()))

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def describe_routes(schema: dict) -> str:
    """The routes as one page of HTML without a script."""
    rows = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            text = route.get("description") or route.get("summary", "")
            rows.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(text)}</p>")
    shapes_of = html.escape(json.dumps(schema.get("components", {}).get("schemas", {}), indent=2))
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>API</title>'
    link = '<link rel="stylesheet" href="static/style.css">'
    body = f'<main class="plain"><h1>API</h1>{"".join(rows)}<h2>Shapes</h2><pre>{shapes_of}</pre></main>'
    return f"{head}{link}<body>{body}</body></html>"


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, without traces and paths; the log has them."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(shapes.error(error.message, code=error.code), error.status, error.headers)

    @app.exception_handler(UserError)
    async def failed(request: Request, error: UserError) -> JSONResponse:
        return await refused(request, as_refused(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(shapes.error(f"{where or 'the body'}: {first['msg']}", param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(shapes.error(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=error)
        return JSONResponse(shapes.error("the server failed; its log says why", "server_error"), 500)
