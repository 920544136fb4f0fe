"""The page at ``/`` and the reference at ``/docs``: static files, no build step. Nothing comes from afar, because a GPU
node often reaches nothing; and every address is relative, because a proxy may show them below any path.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).resolve().parents[2] / "page"
NOWHERE = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "cache-control": "no-cache",  # ask whether the ETag is still the one: a new release is seen at once
    "content-security-policy": f"default-src 'self'; {NOWHERE}",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# Their scripts stand in the page; ReDoc's search is a blob, and its picture from afar is not asked for.
REFERENCE_HEADERS = HEADERS | {"content-security-policy": f"default-src 'self' 'unsafe-inline' data: blob:; {NOWHERE}"}


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
    return _as_ours(
        get_swagger_ui_html(
            openapi_url="openapi.json",
            title="LatentWire - Swagger UI",
            swagger_js_url="static-offline-docs/swagger-ui-bundle.js",
            swagger_css_url="static-offline-docs/swagger-ui.css",
            swagger_favicon_url="page/icon.svg",
        )
    )


@router.get("/redoc")
async def redoc() -> Response:
    """The reference, to read."""
    return _as_ours(
        get_redoc_html(
            openapi_url="openapi.json",
            title="LatentWire - ReDoc",
            redoc_js_url="static-offline-docs/redoc.standalone.js",
            redoc_favicon_url="page/icon.svg",
            with_google_fonts=False,
        )
    )


def _as_ours(page: Response) -> Response:
    page.headers.update(REFERENCE_HEADERS)
    return page
