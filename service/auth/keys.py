"""Who may call: API keys, kept as hashes only.

A key's entry is one line of JSON, so that every complaint has a line number; blank lines and comments (#) are skipped:

    {"name": "team-a", "sha256": "9f86d0…", "scopes": ["infer"], "requests_per_minute": 600, "tokens_per_minute": 90000}

The hash is SHA-256 and not a slow one. Slow hashes protect secrets that can be guessed; a key is 256 random bits, and
working for a tenth of a second on every request would only help whoever sends many wrong ones.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from latentwire.bridge.errors import InvalidRequest, shorten

Scope = Literal["infer", "evaluate", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
PerMinute = Annotated[int, Field(ge=1)] | None


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the tenant's name, empty for anyone, and what it may do."""

    name: str
    scopes: frozenset[Scope]


class Entry(BaseModel):
    """One key of the list. The key itself is nowhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str
    scopes: frozenset[Scope]
    requests_per_minute: PerMinute = None
    tokens_per_minute: PerMinute = None

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, digest: str) -> str:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"expected the SHA-256 of a key, 64 hex digits, got {len(digest)} characters that are none; "
                "the key itself is never kept (`latentwire key` makes both)"
            )
        return digest


class Keys:
    """The keys of a service; false when there are none, and then everyone may do everything."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = tuple(entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, key: bytes) -> Caller | None:
        """Whose key this is. Every entry is compared to the end, so that time tells nothing about any of them."""
        digest, found = hash_of(key), None
        for entry in self.entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = Caller(entry.name, entry.scopes)
        return found


def load_keys(file: Path | None, text: str | None) -> Keys:
    """The keys of a file (``LW_API_KEYS_FILE``) and of the environment (``LW_API_KEYS``) together.

    A source that is named but holds no key is refused: a secret that failed to arrive must not open the service.

    Raises:
        InvalidRequest: Unreadable, damaged, empty, or two entries with one name or one hash. No secret is repeated.
    """
    sources = {} if text is None else {"LW_API_KEYS": text}
    if file is not None:
        try:
            sources[str(file)] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise InvalidRequest(f"LW_API_KEYS_FILE {str(file)!r}: {why}") from None
    entries: dict[str, Entry] = {}  # by line: places are unique, names may not be
    for source, lines in sources.items():
        found = {f"{source}, line {number}": _entry(source, number, line) for number, line in _lines(lines)}
        if not found:
            raise InvalidRequest(f"{source} holds no key; expected one line of JSON for each")
        entries |= found
    _check_unique(entries.items())
    return Keys(list(entries.values()))


def new_key() -> tuple[str, str]:
    """A fresh key of 256 random bits, and the hash to keep of it."""
    key = "lw_" + secrets.token_urlsafe(32)
    return key, hash_of(key.encode())


def hash_of(key: bytes) -> str:
    """SHA-256 of a key in hex."""
    return hashlib.sha256(key).hexdigest()


def key_line(
    name: str,
    digest: str,
    scopes: Iterable[str],
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> str:
    """The line of the keys file for a key (InvalidRequest when the file would be refused for it)."""
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    line = json.dumps({"name": name, "sha256": digest, "scopes": list(scopes), **given})
    _entry(f"key {name!r}", 1, line)
    return line


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _entry(source: str, number: int, line: str) -> Entry:
    try:
        return Entry.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        why = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":  # somebody's "key" or "secret": its value is not repeated
            why = f"is unknown; expected {', '.join(Entry.model_fields)}"
        elif field and field != "sha256" and not isinstance(first["input"], dict):
            why += f", got {shorten(repr(first['input']), 80)}"
        raise InvalidRequest(f"{source}, line {number}: {shorten(field, 80)}{field and ': '}{why}") from None


def _check_unique(entries: Iterable[tuple[str, Entry]]) -> None:
    places: dict[str, str] = {}
    for place, entry in entries:
        for what, value in (("name", entry.name), ("sha256", entry.sha256)):
            if value in places:
                raise InvalidRequest(f"{place}: {what} {value!r} is taken by {places[value]}; each key has its own")
        places |= {entry.name: place, entry.sha256: place}
