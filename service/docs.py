"""The page at `/docs`: Swagger UI from files of ours, where FastAPI's own would have the browser ask a third party."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.staticfiles import StaticFiles

_SCRIPT, _STYLE, _ICON = "docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/favicon.png"
PATHS = ("/docs", f"/{_SCRIPT}", f"/{_STYLE}", f"/{_ICON}")


def install(api: FastAPI) -> None:
    """Serve the page and its files; `api` is made with `docs_url=None`."""
    page = get_swagger_ui_html(  # what it asks for is named relative to it: the endpoint may stand behind a prefix
        openapi_url="openapi.json",
        title=api.title,
        swagger_js_url=_SCRIPT,
        swagger_css_url=_STYLE,
        swagger_favicon_url=_ICON,
    )

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page

    api.mount("/docs", StaticFiles(directory=Path(str(files("fastapi_offline"))) / "static"))
