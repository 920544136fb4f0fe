"""The page at ``/`` and the reference at ``/docs``: static files, no build step. Nothing comes from afar, because a GPU
node often reaches nothing; and every address is relative, because a proxy may show them below any path.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).resolve().parents[1] / "page"
HEADERS = {
    "cache-control": "no-cache",  # ask whether the ETag is still the one: a new release is seen at once
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Page(StaticFiles):
    """The page's files, to be mounted at ``/page``."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """The file, or 304 to those who have it, with ``HEADERS``."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


files = Page(directory=FOLDER)
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page itself."""
    return await files.get_response("index.html", request.scope)


@router.get("/docs")
async def docs() -> Response:
    """The reference, to try out."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="LatentWire - Swagger UI",
        swagger_js_url="static-offline-docs/swagger-ui-bundle.js",
        swagger_css_url="static-offline-docs/swagger-ui.css",
        swagger_favicon_url="page/icon.svg",
    )


@router.get("/redoc")
async def redoc() -> Response:
    """The reference, to read."""
    return get_redoc_html(
        openapi_url="openapi.json",
        title="LatentWire - ReDoc",
        redoc_js_url="static-offline-docs/redoc.standalone.js",
        redoc_favicon_url="page/icon.svg",
        with_google_fonts=False,
    )
