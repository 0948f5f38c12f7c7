"""What a browser needs to answer without the server; the page's service worker keeps it.

The model is the released ONNX file itself: each version is there as soon as it is served, and so is
the one before after a step back. `web/recognize.js` does around it what `FoodPredictor` does.
"""

import base64
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response

from app.api import Service, model_info
from app.inference import InferenceService, ModelMissingError, for_clients
from app.ml.artifacts import ArtifactError, file_name, read_centroids, read_checked
from app.ml.forms import FORM_SUFFIXES, Runtime
from app.ml.predictor import FoodPredictor, forms_of
from app.nutrition import food_facts
from app.schemas import Food
from app.settings import BROWSER_RUNTIME

FORMS: tuple[Runtime, ...] = ("int8", "onnx")  # the smaller one first
HEAD_LINES = """\
  <link rel="manifest" href="static/manifest.json">
  <script src="static/offline.js" type="module"></script>
</head>"""
WORKER_POLICY = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self'"
ASK_AGAIN = {"Cache-Control": "no-cache"}


def offline_routes(web: Path, page_policy: str, runtime: Path) -> APIRouter:
    """Build the page that works offline and the routes of what it loads.

    web: the folder of the pages. runtime: the folder of npm's onnxruntime-web.
    """
    router = APIRouter(include_in_schema=False)
    page = (web / "index.html").read_text(encoding="utf-8").replace("</head>", HEAD_LINES)
    build = f'const BUILD = "{_digest(web, runtime)}";\n'  # another one makes browsers fetch anew
    worker = build + (web / "worker.js").read_text(encoding="utf-8")

    @router.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": page_policy})

    @router.get("/worker.js")
    async def service_worker() -> Response:
        headers = {"Content-Security-Policy": WORKER_POLICY, **ASK_AGAIN}
        return Response(worker, media_type="text/javascript", headers=headers)

    @router.get("/offline/facts")
    def facts(service: Service) -> dict[str, Any]:
        return facts_of(service)

    @router.get("/offline/{name}")
    def file(name: str, service: Service) -> Response:
        if media_type := BROWSER_RUNTIME.get(name):
            return FileResponse(runtime / name, media_type=media_type, headers=ASK_AGAIN)
        return Response(model_bytes(service, name), headers=ASK_AGAIN)

    return router


def _digest(web: Path, runtime: Path) -> str:
    """Sum up all files that the page and its service worker are made of."""
    files = [*sorted(web.iterdir()), *(runtime / name for name in BROWSER_RUNTIME)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def facts_of(service: InferenceService) -> dict[str, Any]:
    """Return what a browser must know beside the model's file of the version being served.

    Raises:
        ModelMissingError: there is no version, or none of its forms runs in browsers.
    """
    predictor, form = _served(service)
    record, name = predictor.record, file_name(predictor.record.version, FORM_SUFFIXES[form])
    try:
        centroids = read_centroids(service.settings.model_dir, record, form)
    except ArtifactError as error:
        raise ModelMissingError(for_clients(error, service.settings.model_dir)) from error
    info = model_info(predictor, service)
    return {
        "file": f"offline/{name}",
        "sha256": record.sha256[name],
        "model": info.model_copy(update={"runtime": form, "metrics": record.metrics_of(form)}),
        "decision": asdict(record.decision_of(form)),
        "centroids": base64.b64encode(centroids.numpy().tobytes()).decode(),  # float32
        "foods": {name: Food(**Food.values(food_facts(name))) for name in record.classes},
    }


def model_bytes(service: InferenceService, name: str) -> bytes:
    """Read the file that `facts_of` names.

    Raises:
        HTTPException: another name was asked for. ModelMissingError: as there, or it is damaged.
    """
    predictor, form = _served(service)
    if name != file_name(predictor.record.version, FORM_SUFFIXES[form]):
        raise HTTPException(404, "no such file; /offline/facts names the one that is served now")
    try:
        return read_checked(service.settings.model_dir, name, predictor.record)
    except ArtifactError as error:
        raise ModelMissingError(for_clients(error, service.settings.model_dir)) from error


def _served(service: InferenceService) -> tuple[FoodPredictor, Runtime]:
    predictor = service.predictor
    if predictor is None:
        raise ModelMissingError(service.problem)
    forms = [form for form in FORMS if form in forms_of(predictor.record)]
    if not forms:
        raise ModelMissingError(
            f"version {predictor.record.version} has no ONNX form, which browsers need"
        )
    return predictor, forms[0]
