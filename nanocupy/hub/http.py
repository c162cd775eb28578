"""HTTP as a model hub needs it: small JSON answers, and large files that resume.

It owns connections, redirects, retries and the token, which goes to the endpoint's own host and
nowhere else. It knows nothing of models. What a server says is untrusted: answers are bounded, and
a file gets exactly as many bytes as were promised beforehand.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from nanocupy import __version__
from nanocupy.errors import ConfigError, DownloadError

_CHUNK_BYTES = 1 << 20
_MAX_ERROR_TEXT = 200


class _Interrupted(Exception):
    """A transfer that broke off and may be taken up again."""


@dataclass(frozen=True)
class HttpClient:
    """Talks to one endpoint.

    endpoint    scheme://host[:port][/prefix], no trailing slash
    token       bearer token for the endpoint's host, or None
    timeout_s   for each connection and each read
    stalls      how often in a row a transfer may break off without a new byte before giving up
    """

    endpoint: str
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    stalls: int = 4
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"hub endpoint {self.endpoint!r} is not an address; HF_ENDPOINT must look like "
                "https://host"
            )
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise ConfigError(
                "HF_TOKEN holds blanks or control characters; set it to the bare token"
            )

    def get_json(self, path: str, *, what: str, max_bytes: int = 1 << 25) -> Any:
        """The JSON answer to GET endpoint + path. Raises DownloadError."""
        for attempt in range(self.stalls):
            try:
                with self._open(self.endpoint + path, {}, what) as response:
                    body = _read(response, max_bytes + 1)
                break
            except _Interrupted as exc:
                reason = str(exc)
                self._wait(attempt)
        else:
            raise self._unreachable(what, reason)
        if len(body) > max_bytes:
            raise DownloadError(f"{what}: the answer of {self.endpoint} is over {max_bytes} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise DownloadError(
                f"{what}: the answer of {self.endpoint} is not JSON ({exc}); is it a model hub?"
            ) from exc

    def fetch(
        self, path: str, part: Path, num_bytes: int, report: Callable[[int], None], *, what: str
    ) -> None:
        """Bring the file at endpoint + path to `part`, taking up what is already there.

        Afterwards `part` has exactly `num_bytes`. `report` gets the bytes that are there so far.
        Raises DownloadError; what has arrived stays for a later attempt.
        """
        if num_bytes == 0:
            part.write_bytes(b"")
        stalled = 0
        while (have := part.stat().st_size if part.exists() else 0) != num_bytes:
            if have > num_bytes:
                part.unlink()
                have = 0
            reason = "the answer ended early"
            try:
                self._fetch_rest(path, part, have, num_bytes, report, what)
            except _Interrupted as exc:
                reason = str(exc)
            gained = (part.stat().st_size if part.exists() else 0) - have
            # An attempt that brings next to nothing counts as a stall, or a server that sends one
            # byte a time would keep us for ever.
            stalled = 0 if gained >= min(_CHUNK_BYTES, num_bytes - have) else stalled + 1
            if stalled >= self.stalls:
                raise self._unreachable(what, reason)
            if stalled:
                self._wait(stalled - 1)

    def _fetch_rest(
        self,
        path: str,
        part: Path,
        have: int,
        num_bytes: int,
        report: Callable[[int], None],
        what: str,
    ) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._open(self.endpoint + path, headers, what) as response:
            if response.status == 416:  # the server knows no such rest: begin again
                part.unlink()
                return
            resumes = response.status == 206 and (response.headers.get("Content-Range") or "")
            if have and not str(resumes).startswith(f"bytes {have}-"):
                have = 0
            with part.open("ab" if have else "wb") as file:
                while have < num_bytes:
                    chunk = _read(response, min(_CHUNK_BYTES, num_bytes - have + 1))
                    if not chunk:
                        return
                    have += len(chunk)
                    if have > num_bytes:
                        break
                    file.write(chunk)
                    report(have)
        if have > num_bytes:
            part.unlink()
            raise DownloadError(
                f"{what}: the server sends more than the {num_bytes} bytes it announced"
            )

    @contextmanager
    def _open(self, url: str, headers: dict[str, str], what: str) -> Iterator[Any]:
        """The response. Raises DownloadError where asking again is no use, else _Interrupted."""
        request = urllib.request.Request(
            url, headers={"User-Agent": f"nanocupy/{__version__}", **headers}
        )
        _authorize(request, self)
        opener = urllib.request.build_opener(_Redirects(self))
        try:
            response = opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as exc:
            if exc.code == 416:
                with exc:
                    yield exc
                return
            with exc:
                raise self._refused(exc, what) from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as exc:
            raise _Interrupted(_plain(exc)) from exc
        except ValueError as exc:  # an address that cannot be asked for
            raise DownloadError(f"{what}: {url}: {exc}") from exc
        with response:
            yield response

    def _refused(self, error: urllib.error.HTTPError, what: str) -> Exception:
        if error.code == 401:
            mend = (
                "HF_TOKEN is not accepted"
                if self.token
                else "it does not exist, or is private or gated: check the name, or set HF_TOKEN"
            )
        elif error.code == 403:
            mend = "access is gated: ask for it on the model's page, then set HF_TOKEN"
        elif error.code == 404:
            mend = "there is no such model, revision or file; check the name"
        elif error.code in (408, 425, 429) or error.code >= 500:
            return _Interrupted(f"HTTP status {error.code} {_clip(error.reason)}")
        else:
            mend = _clip(error.reason)
        return DownloadError(f"{what}: {self.endpoint} answers {error.code}: {mend}")

    def _unreachable(self, what: str, reason: str) -> DownloadError:
        return DownloadError(
            f"{what}: no answer to use from {self.endpoint} ({reason}); check the network, set "
            "HF_ENDPOINT to a mirror, or copy the model's folder here and give its path"
        )

    def _wait(self, attempt: int) -> None:
        time.sleep(self.backoff_s * 2**attempt)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without carrying the token to another host or leaving https."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        old_scheme, new_scheme = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new_scheme != "https" and new_scheme != old_scheme:
            raise DownloadError(
                f"{req.full_url}: redirects from {old_scheme} to {_clip(new_scheme)!r}, which is "
                "not followed"
            )
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            _authorize(new, self._client)
        return new


def _authorize(request: urllib.request.Request, client: HttpClient) -> None:
    """Add the token where the request goes to the endpoint's own origin. urllib never copies an
    unredirected header to the next request, so this is the only way it gets anywhere."""
    if client.token and _origin(request.full_url) == _origin(client.endpoint):
        request.add_unredirected_header("Authorization", f"Bearer {client.token}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _read(response: IO[bytes], num_bytes: int) -> bytes:
    try:
        return response.read(num_bytes)
    except (OSError, http.client.HTTPException) as exc:
        raise _Interrupted(_plain(exc)) from exc


def _plain(exc: BaseException) -> str:
    reason = getattr(exc, "reason", None) or exc
    return _clip(getattr(reason, "strerror", None) or reason or type(exc).__name__)


def _clip(text: object) -> str:
    return str(text)[:_MAX_ERROR_TEXT]
