"""`/`: the page for people. It asks the same API as every caller, so it needs no key itself; what it asks for may.

Each file is read, hashed and compressed once. Its name never changes and its tag does, so that a browser asks each
time and is sent only what an upgrade has changed.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from fastapi import APIRouter, Header, HTTPException, Request, Response

from service.api.security import PUBLIC, GuardedRoute
from service.api.wire import names_tag

router = APIRouter(route_class=GuardedRoute, include_in_schema=False)

_FOLDER: Final = Path(__file__).parents[1] / "page"
_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class _File:
    """One file of the page as it is sent."""

    media_type: str
    plain: bytes
    zipped: bytes
    digest: str


def _file(suffix: str, plain: bytes) -> _File:
    digest = hashlib.sha256(plain).hexdigest()[:16]
    return _File(_MEDIA_TYPES[suffix], plain, gzip.compress(plain, mtime=0), digest)


_FILES: Final = {path.name: _file(path.suffix, path.read_bytes()) for path in _FOLDER.iterdir()}
_PAGE: Final = _FILES.pop("index.html")
_PAGE_WITHOUT_DOCS: Final = _file(".html", _PAGE.plain.replace(b'<a href="docs">API docs</a>', b""))

Optional = Annotated[str | None, Header()]


@router.get("/", openapi_extra=PUBLIC)
async def get_page(request: Request, accept_encoding: Optional = None, if_none_match: Optional = None) -> Response:
    """The page itself, which leads to the documentation where that is served."""
    return _answer(_PAGE if request.app.openapi_url else _PAGE_WITHOUT_DOCS, accept_encoding, if_none_match)


@router.get("/page/{name}", openapi_extra=PUBLIC)
async def get_file(name: str, accept_encoding: Optional = None, if_none_match: Optional = None) -> Response:
    """A style sheet, script or image of the page; 404 where it has none of this name."""
    if name not in _FILES:
        raise HTTPException(404)
    return _answer(_FILES[name], accept_encoding, if_none_match)


def _answer(file: _File, accept_encoding: str | None, if_none_match: str | None) -> Response:
    zipped = "gzip" in (accept_encoding or "")
    tag = f'"{file.digest}{"-gzip" if zipped else ""}"'
    if names_tag(if_none_match, tag):
        return Response(status_code=304, headers={**_HEADERS, "ETag": tag})
    encoding = {"Content-Encoding": "gzip"} if zipped else {}
    headers = {**_HEADERS, "ETag": tag, **encoding}
    return Response(file.zipped if zipped else file.plain, media_type=file.media_type, headers=headers)
