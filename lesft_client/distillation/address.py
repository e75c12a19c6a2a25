"""Where the teacher is and which key opens it; neither secret part is ever shown."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from lesft.channel import check_open
from lesft.errors import InvalidInput

log = logging.getLogger(__name__)

KEY_VARIABLE = "LESFT_CLIENT_TEACHER_KEY"


@dataclass(frozen=True)
class TeacherAddress:
    """An address in its parts; `shown` is all of it that may be printed and recorded."""

    shown: str
    query: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    user: tuple[str, str] | None = field(default=None, repr=False)


def read_address(address: str) -> TeacherAddress:
    """The parts of an http or https address. Raises InvalidInput, without its secret parts."""
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidInput(
            "--teacher must be an http:// or https:// address with a host, such as "
            "http://127.0.0.1:8000/v1"
        )
    bracketed = f"[{host}]" if ":" in host else host
    place = bracketed if port is None else f"{bracketed}:{port}"
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if parts.scheme == "http" and not _stays_here(f"{bracketed}:{port or 80}"):
        log.warning("traffic to the teacher %s is not encrypted: anyone may read it", place)
    user = None
    if parts.username is not None:
        user = (unquote(parts.username), unquote(parts.password or ""))
    query = tuple(parse_qsl(parts.query, keep_blank_values=True))
    return TeacherAddress(urlunsplit((parts.scheme, place, path, "", "")), query, user)


def _stays_here(address: str) -> bool:
    try:
        check_open(address, insecure=False)
    except InvalidInput:
        return False
    return True


def read_key(file: Path | None) -> str:
    """The key from the file, or else from the environment; empty where there is none.

    Raises InvalidInput, never with the key, when the file cannot be read or holds no key.
    """
    where = f"--teacher-key-file {file}" if file else KEY_VARIABLE
    try:
        key = file.read_text("utf-8").strip() if file else os.environ.get(KEY_VARIABLE, "").strip()
    except OSError as error:
        raise InvalidInput(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{where} must be text: the key and nothing else") from None
    if file and not key:
        raise InvalidInput(f"{where} is empty; it must hold the key and nothing else")
    if not all("!" <= char <= "~" for char in key):
        raise InvalidInput(
            f"{where} must hold the key and nothing else: letters, digits and signs of ASCII, "
            "without spaces or line breaks in between"
        )
    return key
