"""asbridge: a Matrix homeserver with its Application Service API, and an IRC bridge, in one file.

Quick start
===========
    python asbridge.py                        homeserver on port 8008, IRC network on port 6667, bridged
    python asbridge.py --config bridge.yaml   a homeserver for the bridge whose registration this is
    with asbridge.Homeserver(registrations=[...]) as hs: ...              the same, inside a test

An application service of your own is a class and its registration (`python asbridge.py generate echo` prints one):

    class Echo(asbridge.AppService):
        def on_event(self, event):                                        # each once, and in order
            if event["type"] == "m.room.message" and event["sender"] != self.bot.user_id:
                self.bot.say(event["room_id"], event["content"].get("body", "?"), txn_id=event["event_id"])

    Echo(asbridge.load_registration("registration.json"), "http://127.0.0.1:8008").start()
    input("Enter ends it")                                                # it works on threads of its own

The picture
===========
                           this file                                   this file, or any bridge
                +---------------------------+   PUT transactions    +-------------------------+
    Matrix ---->|        homeserver         |   GET users, rooms    |   application service   |<---- IRC
    client      |  rooms, events, one tick  |---------------------->|  ghosts, portals: what  |      client
           <----|  for every change; an     |                       |  is said there is said  |---->
     /sync      |  outbox for each AS       |<----------------------|  here, and back         |
                +---------------------------+   the client-server   +-------------------------+
                                                API, as its ghosts

A message from Matrix is checked by the rules of the room (4), stored with its tick (5) and, in the same
database transaction, put into the outbox of every application service whose namespaces (3) have to do
with it. When it is durable, whoever waits in /sync is woken (6), and a worker pushes it until the
application service has acknowledged it (7). The application service (10) sees to it that an event is
handled once; the bridge (11) writes it to IRC. A line from IRC goes the other way: as a request of a
ghost, with the application service's token and `user_id=` (8).

Three decisions carry all the rest. One thread writes, so that what a change saw is still true when it is
stored; many changes share a COMMIT. Every change takes the next number of one counter, so that "what is
new for me" is always "what lies after N". And whether an application service is interested in an event
is decided, and written down, in the database transaction that stores the event, so that none is lost.

The way of a line, there and back
=================================
    IRC client, "PRIVMSG #lobby :hello"     11 IrcClient.lines, obey, do_privmsg, speak, say
    the bridge, as the ghost of the nick    11 IrcBridge._send, _do_say; 10 Client.send, Intent.call
    PUT ...send/m.room.message?user_id=     2 Connection.exchange; 8 Api._answer, identify, act_as; the handler: send
    may it, in this room?                   6 Rooms.send, _append; 4 authorise
    stored, with a row for each AS          5 Tx.append, _insert; 3 Audience.interested
    a transaction, after COMMIT offered     5 Tx.freeze, Store._commit, _publish; 7 Worker.offer
    PUT transactions/..., until 200         7 Worker._push, Line.attempt
    any other AS, or this one               10 AppService._put_transaction, _handle, on_event
    the bridge again, and IRC               11 IrcBridge.on_event, _on_message, _relay; Channel.hear, IrcClient.tell

Words
=====
    tick           the number of a change; a sync token is one
    job, batch     a change that waits for the writer; the jobs that share a COMMIT
    outbox         the events that wait for one application service, each with the reason why it gets it
    transaction    what one PUT brings it: made of the outbox once ("frozen"), then sent, always the same,
                   until it is acknowledged; until then it is "open". Not to be mixed up with a transaction
                   of the database (a Tx is what a job may do in one), nor with a client transaction, the
                   ID in a request that makes it harmless to send it twice
    claim          why an application service has to do with an ID: one of its regexes, or its own user
    ghost, portal  a user that an application service made for somebody, a room that it made for a channel

Contents
========
     1. Vocabulary                          IDs, the one error, JSON, clocks
     2. Plumbing                            HTTP server and client, opening SQLite; to be skipped at first reading
     3. Registrations and namespaces        who owns an ID, who is interested in it, and why
     4. Room rules                          power, membership, redaction, who may see what
     5. Store                               the tables, every SQL statement, the writer, the outbox
     6. The homeserver                      what users do, as verbs: register, create a room, send, sync ...
     7. Delivery                            transactions, retries, pings, questions; faults on demand
     8. Routes                              who is asking, and the table of endpoints
     9. Inspector                           why an event went there or not; its page; the bridge examiner
    10. The application service             the other side: AppService and Intent
    11. The sample: an IRC bridge           an application service in earnest
    12. Running it                          Homeserver, configuration, command line

A section uses only what stands above it. A part that says "to be skipped at first reading" is not needed
to follow the rest.

Reading paths
=============
    The Application Service API in two hours (about 2,100 lines)
        3 down to "Why?"; in 5, of Tx, "events" and "the outbox"; 7 down to "What passes"; in 8 "Who is
        asking?"; 10. How jobs and batches work: the beginning of Tx, and "the writer thread" in 5. How a
        ghost is made, and when an alias is asked for: Accounts and Aliases in 6
    Write a bridge       10, then 11
    Test a bridge        "The homeserver in one piece" in 12, and the faults at the end of 7
    Change the server    1, 4, 5, 6, 8

To add ...                begin at ...
==========
    an endpoint           its row in ROUTES (8): the handler, or just() the verb in 6, the SQL in Reader or Tx (5)
    a key of the config   a field of Settings (6) or Config (12), its row in CONFIG_KEYS; a flag: FLAGS, parse_args
    a registration key    REGISTRATION_KEYS, a field of Registration, RegistrationReader (3)
    a rule of interest    Audience (3), or where the database must be asked Tx._insert (5); explain_rule (3)
    a table, a column     SCHEMA (a column last, for rows go in by position), SCHEMA_VERSION, UPGRADES, its ...Row (5)
    a room rule           MEMBERSHIP_RULES, authorise (4); one that looks beyond the room: Rooms._append (6)
    a push condition      CONDITION_KINDS, what it asks of Notable, Notifications.set_rule (6)
    a fault on the wire   FAULTS, Faults, Line (7); its form in the page (9)
    a crash               Store._commit (5), where things become durable; Worker._push (7), where they are sent
    an errcode            ERRORS (1)
    an IRC command        COMMANDS, NUMERICS, a method do_... of IrcClient (11)
    an event for IRC      IrcBridge.EVENTS, and the method that it names (11)
    ephemeral data        Tx.push_ephemeral (5), and who calls it: Typing (6), Tx.add_receipt (5), and Presence (6)
    a check of a bridge   Examiner.CHECKS (9)
    a question to ask it  its row in ADMIN_ROUTES, Inspector (9); a sentence of why: Inspector._summary
    a command             parse_args, a function add_... and one run_... (12)

The test stands in the section of the same number of test_asbridge.py, if it takes long in .ci; the README
tells of what can be seen from outside.

Left out on purpose
===================
Federation, guests, third-party identifiers, single sign-on, OAuth 2.0, refresh tokens, sliding sync, search,
reports, room upgrades: this is a homeserver to learn, build and test with. It listens on the loopback
interface. When it is outgrown, the registration and the application service run unchanged on Synapse or
another homeserver (README, Moving on).
"""

from __future__ import annotations

import _thread
import argparse
import base64
import collections
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http
import http.client
import http.server
import importlib
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import string
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

__version__ = "0.1.0"

# ============================================================================
# 1. Vocabulary
# ============================================================================
# The words that the rest of the file is written in: identifiers and their
# grammar, the one error type, canonical JSON, and the two clocks.
# Spec: Appendices (Identifier Grammar, Canonical JSON); Client-Server API
# (Standard error response). Knows of nothing else in this file.

JsonObject = dict[str, Any]

#: Every errcode that is used here, with the HTTP status that it has unless told otherwise.
ERRORS = {
    "M_BAD_ALIAS":                400,  # an alias in m.room.canonical_alias does not point to the room
    "M_BAD_JSON":                 400,  # JSON, but not of the shape that the endpoint takes
    "M_BAD_STATE":                403,  # not possible in the present state, such as joining while banned
    "M_BAD_STATUS":               502,  # the application service answered a ping with an error
    "M_CANNOT_OVERWRITE_MEDIA":   409,  # an asynchronous upload that has been done already
    "M_CONNECTION_FAILED":        502,  # the application service could not be reached for a ping
    "M_CONNECTION_TIMEOUT":       504,  # the application service took too long for a ping
    "M_DUPLICATE_ANNOTATION":     400,  # the same reaction to the same event again
    "M_EXCLUSIVE":                400,  # inside another's exclusive namespace, or outside one's own
    "M_FORBIDDEN":                403,
    "M_INVALID_PARAM":            400,
    "M_INVALID_ROOM_STATE":       400,  # createRoom was asked for a state that the room rules refuse
    "M_INVALID_SIGNATURE":        400,  # a key that is not signed as it must be
    "M_INVALID_USERNAME":         400,
    "M_KEY_TOO_LARGE":            400,  # the name of a profile field
    "M_LIMIT_EXCEEDED":           429,
    "M_MISSING_PARAM":            400,
    "M_MISSING_TOKEN":            401,
    "M_NOT_FOUND":                404,
    "M_NOT_JSON":                 400,
    "M_NOT_YET_UPLOADED":         504,  # the content of this mxc: URI is still to come
    "M_PROFILE_TOO_LARGE":        400,
    "M_ROOM_IN_USE":              400,  # the alias asked for in createRoom is taken
    "M_TOO_LARGE":                413,
    "M_UNKNOWN":                  500,
    "M_UNKNOWN_DEVICE":           400,  # device_id names no device of the user
    "M_UNKNOWN_TOKEN":            401,
    "M_UNRECOGNIZED":             404,
    "M_UNSUPPORTED_ROOM_VERSION": 400,
    "M_URL_NOT_SET":              400,  # a ping for an application service whose url is null
    "M_USER_DEACTIVATED":         403,
    "M_USER_IN_USE":              400,
    "M_WRONG_ROOM_KEYS_VERSION":  403,  # a write to a key backup that is not the last
}


class MatrixError(Exception):
    """The one error: raised anywhere, rendered in one place as the spec's standard error response.

    `error` says what is wrong, what would be right, and if need be what to do.
    `extra` goes into the body beside `errcode` and `error`.
    """

    def __init__(self, errcode: str, error: str, http_status: int | None = None, /, **extra: Any) -> None:
        super().__init__(error)
        self.errcode, self.error, self.extra = errcode, error, extra
        self.status = http_status or ERRORS.get(errcode, 400)

    def body(self) -> JsonObject:
        return {"errcode": self.errcode, "error": self.error, **self.extra}

    def __str__(self) -> str:
        return f"{self.status} {self.errcode}: {self.error}"


# -- Identifiers. '@localpart:server', '#localpart:server', '!opaque:server', '$opaque'.

STRICT_LOCALPART = re.compile(r"[a-z0-9._=/+-]+")           # what people may register
HISTORICAL_LOCALPART = re.compile(r"[\x21-\x39\x3b-\x7e]+")  # what an AS may register, too
PROFILE_KEY = re.compile(r"[a-z][a-z0-9._-]*")               # Common Namespaced Identifier Grammar
SERVER_NAME = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
MAX_ID_BYTES, MAX_URI_BYTES = 255, 2048
KINDS = {"users": "@", "aliases": "#", "rooms": "!"}         # the namespaces and their sigils


def localpart_of(id: str) -> str:
    return id[1:].partition(":")[0]


def server_of(id: str) -> str:
    return id.partition(":")[2]


def is_uri(text: str) -> bool:
    return len(text.encode("utf-8", "replace")) <= MAX_URI_BYTES and bool(
        re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x1f]+", text))


def check_id(sigil: str, text: object, server_name: str | None = None) -> str:
    """`text`, if it is an ID with this sigil (and on this server, if one is named); else M_INVALID_PARAM."""
    form = f"{sigil}localpart:server"
    if not isinstance(text, str) or text[:1] != sigil or len(text.encode("utf-8", "replace")) > MAX_ID_BYTES:
        hint = "; in a URL a '#' is written %23" if text == "" else ""
        raise MatrixError("M_INVALID_PARAM", f"{shorten(text) or 'nothing'} is not of the form {form}, {MAX_ID_BYTES} "
                          f"bytes at most{hint}")
    if ("\0" in text) or (sigil in "@#" and not (localpart_of(text)
                                                 and SERVER_NAME.fullmatch(server_of(text)))):
        raise MatrixError("M_INVALID_PARAM", f"{shorten(text)} is not of the form {form}")
    if server_name is not None and server_of(text) != server_name:
        raise MatrixError("M_INVALID_PARAM", f"{shorten(text)} is not on this server, whose name is "
                          f"{server_name}")
    return text


def number_in(text: str) -> int | None:
    """The number in an ID that is one. Spelled otherwise (01, in Arabic digits) it is another ID, which nothing has."""
    return int(text) if re.fullmatch("0|[1-9][0-9]{0,14}", text) else None


def shorten(value: object, limit: int = 80) -> str:
    """A value as it can stand in an error text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "…"


def printable(text: str) -> str:
    """What a stranger has written, so that it can't move the cursor of a terminal or begin a line of its own."""
    return text if text.isprintable() else "".join([char if char.isprintable() else repr(char)[1:-1] for char in text])


TOKEN_IN_URL = re.compile(r"""(token(?:=|%3D))[^\s&/"'<;\\]+""", re.I)
SECRET_KEY = re.compile("token|password|secret|^(pass|auth|identifier)$", re.I)      # keys whose values are not shown


def cut_path(path: str) -> str:
    """Without the token that somebody put after a '&' in place of a '?'. For error texts, too, which repeat what was asked."""
    return TOKEN_IN_URL.sub(r"\1…", shorten(path, 2000))


def counted(n: int, word: str) -> str:
    """As in "1 event" and "2 events"."""
    return f"{n} {word}" + "s" * (n != 1)


def digest(token: str) -> bytes:
    """What is kept of an access token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def quoted(value: object) -> str:
    """A value as JSON for an error text, so that 1 and "1" can be told apart."""
    return shorten(json.dumps(value, ensure_ascii=False))


def to_localpart(text: str) -> str:
    """Any text in the alphabet of user IDs: lower case, every other byte as =xx (Appendices, Mapping from other character sets;
    where case counts, as it does not on IRC, that has '_a' for 'A' and '__' for '_').
    """
    return re.sub(rb"[^a-z0-9._/+-]", lambda m: b"=%02x" % m[0][0],
                  text.encode("utf-8", "replace").lower()).decode("ascii")


def from_localpart(localpart: str) -> str:
    """The reverse of to_localpart (what was upper case stays lower case)."""
    return re.sub(rb"=([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]),
                  localpart.encode("utf-8", "replace")).decode("utf-8", "replace")


# -- JSON.

class Raw(str):
    """JSON that is already written: events are stored as they are sent."""


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
canonical_json: Callable[[Any], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False).encode
MAX_INT = 2**53 - 1
MAX_DEPTH = 100                  # of nested objects and lists


# What these types become is said at once, without an encoder that would have to be set up for it.
SCALARS: dict[type, Callable[[Any], str]] = {
    Raw: lambda text: text, str: encode_basestring, int: int.__repr__, bool: {True: "true", False: "false"}.__getitem__,
    type(None): lambda none: "null"}


def to_json(value: Any) -> str:
    """Compact JSON of plain values in which finished pieces (Raw) may stand anywhere."""
    write = SCALARS.get(type(value))
    if write:
        return write(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{encode_basestring(key)}:{to_json(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([to_json(item) for item in value]) + "]"
    return _encode(value)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number of JSON")
    return value


_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode


def nests_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [item for one in level if isinstance(one, (dict, list))
                 for item in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def parse_json(data: bytes | str, what: str = "the body") -> Any:
    """The value of a JSON text; M_NOT_JSON if it is none. A lone surrogate is not text and is refused, too."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and nests_deeper(value, MAX_DEPTH):
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if "\\ud" in text or "\\uD" in text:
            _encode(value).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise MatrixError("M_NOT_JSON", f"{what} is not JSON in UTF-8: {why_not_json(data, error)}") from None


def why_not_json(data: bytes | str, error: Exception) -> str:
    start = data[:4] if isinstance(data, bytes) else data[:4].encode("utf-8", "replace")
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH} levels"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        return "it is UTF-16 or UTF-32"
    if start.startswith(b"\xef\xbb\xbf"):
        return "it begins with a byte order mark, which has no place there"
    return "a number has too many digits" if "set_int_max_str_digits" in str(error) else shorten(str(error), 200)


def parse_object(data: bytes | str, what: str = "the body") -> JsonObject:
    """A JSON object from a request body; an empty body is {}."""
    value = parse_json(data, what) if data else {}
    if not isinstance(value, dict):
        raise MatrixError("M_BAD_JSON", f"{what} must be a JSON object, not {TYPE_NAMES[type(value)]}")
    return value


def check_canonical(value: Any) -> None:
    """Events hold canonical JSON: integers of 53 bits, no fractions (Appendices, Canonical JSON); else M_BAD_JSON."""
    if isinstance(value, dict):
        for item in value.values():
            check_canonical(item)
    elif isinstance(value, list):
        for item in value:
            check_canonical(item)
    elif isinstance(value, float) or (isinstance(value, int) and abs(value) > MAX_INT):
        raise MatrixError("M_BAD_JSON", f"{value!r} can't stand in an event: numbers are integers from "
                          "-(2^53)+1 to (2^53)-1")


TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object",
              list: "a list", type(None): "null"}
S = TypeVar("S")
T = TypeVar("T")


def is_a(value: object, type_: Any) -> bool:
    """isinstance, but true is no integer, as in JSON."""
    return isinstance(value, type_) and not (isinstance(value, bool) and type_ is int)


def is_number(value: object) -> bool:
    return is_a(value, int) or isinstance(value, float)


def field(body: JsonObject, key: str, type_: type[T], default: Any = ...) -> T:
    """One key of a request body; M_BAD_JSON if it has the wrong type, M_MISSING_PARAM if there must be one."""
    value = body.get(key)
    if value is None:
        if default is ...:
            raise MatrixError("M_MISSING_PARAM", f"the body must have {key!r}: {TYPE_NAMES[type_]}")
        return cast(T, default)
    if not is_a(value, type_):
        shown = TYPE_NAMES[type(value)] if SECRET_KEY.search(key) else quoted(value)
        raise MatrixError("M_BAD_JSON", f"{key!r} must be {TYPE_NAMES[type_]}, not {shown}")
    return cast(T, value)


def without_none(source: Mapping[str, Any]) -> JsonObject:
    return {key: value for key, value in source.items() if value is not None}


# -- Time.

DAY_MS = 86_400_000


class Clock:
    """Two clocks: now() stamps, wait() delays. advance() winds both on, so that a minute of backoff can pass
    in a test. With a start (milliseconds since 1970) now() stands still there but for advance().
    """

    def __init__(self, start: int | None = None) -> None:
        self.start = start
        self.wound = 0.0                                   # seconds that advance() has added
        self._waiting: set[Any] = set()                    # locks that somebody waits on
        self._guard = threading.Lock()                     # guards _waiting

    def now(self) -> int:
        """Milliseconds since 1970, for origin_server_ts and the like."""
        return int(self.wound * 1000) + (self.start if self.start is not None else int(time.time() * 1000))

    def monotonic(self) -> float:
        """Seconds, for delays only."""
        return time.monotonic() + self.wound

    def wait(self, lock: Any, until: float) -> None:
        """Returns when `lock` (taken, a threading.Lock) is released, at `until` by monotonic(), or when the clock
        was wound on. The caller looks again at what it waits for."""
        with self._guard:
            self._waiting.add(lock)
        try:
            lock.acquire(timeout=max(0.0, min(until - self.monotonic(), threading.TIMEOUT_MAX)))
        finally:
            with self._guard:
                self._waiting.discard(lock)

    def advance(self, seconds: float) -> None:
        self.wound += seconds
        with self._guard:
            waiting = list(self._waiting)
        for lock in waiting:
            release(lock)


def bell() -> Any:
    """A lock to wait on: taken, until somebody releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def release(lock: Any) -> None:
    """Rings a bell. Once is enough, twice is no error."""
    with contextlib.suppress(RuntimeError):
        lock.release()


# -- Chance.

class Chance:
    """Where random IDs and tokens come from. With a seed the n-th that is drawn for an owner is the same in every run,
    whatever others draw meanwhile.
    """

    def __init__(self, seed: str | None = None) -> None:
        self.seed = seed
        self._drawn: collections.Counter[str] = collections.Counter()
        self._guard = threading.Lock()                     # guards _drawn

    def text(self, owner: str, length: int = 18) -> str:
        """Letters; 43 of them are more than 240 bits."""
        if self.seed is None:
            return "".join([secrets.choice(string.ascii_letters) for _ in range(length)])
        with self._guard:
            self._drawn[owner] += 1
            n = self._drawn[owner]
        drawn = hmac.digest(self.seed.encode(), f"{owner}\0{n}".encode("utf-8", "replace"), "sha512")
        return "".join([string.ascii_letters[byte % 52] for byte in drawn[:length]])


log = logging.getLogger("asbridge")
# what passes between homeserver and application services
trace = logging.getLogger("asbridge.trace")


# ============================================================================
# 2. Plumbing
# ============================================================================
# What carries everything else and can be skipped at first reading: an HTTP
# server on http.server with a receive loop of its own and limits, a small HTTP
# client with one deadline over the whole exchange, and how SQLite is opened.
# Does not know Matrix, but for its error type.

HEAD_SECONDS = 10.0                # from the first byte of a request to the end of its head
LOCKED_MS = 5000                   # how long a statement waits for another process that has locked the database
STATEMENTS = 500                   # of SQL that a connection keeps ready: more than there are
IDLE_SECONDS = 10.0                # how often a silent connection looks whether the server stops
LINGER_SECONDS = 2.0               # before a connection is closed on somebody who is still sending
ANSWER_SECONDS = 30.0              # for an answer to be taken
BODY_BYTES_PER_SECOND = 20_000     # a body may take HEAD_SECONDS and its size at this rate
SPARE_HANDLES = 100                # not for connections of clients: for the database, application services, IRC
MAX_HEAD_BYTES = 65_536
MAX_HEADERS, MAX_METHOD = 100, 32
KEPT_BYTES = 4096                  # of a body, to be looked at
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")   # RFC 9110, 5.6.2
CONTROLS = re.compile(r"[\x00-\x20\x7f]")
STRAY = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")         # what no line may have in it
AUTHORITY = r"(?:[\w.~!$&'()*+;=%-]+|\[[\w:.%~-]+\])(?::[0-9]*)?"
HOST = re.compile(f"(?:{AUTHORITY})?", re.ASCII)
ABSOLUTE = re.compile(rf"https?://({AUTHORITY})((?:[/?].*)?)", re.ASCII | re.IGNORECASE)
CHUNK = re.compile(r"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")      # its size, and extensions
BARE_LF = re.compile(rb"(?<!\r)\n")


@dataclass(slots=True)
class Response:
    """An answer before it is rendered. `headers` are whole lines, each with its CRLF."""
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: bytes = b""

    def render(self, head_only: bool = False, connection: str = "") -> bytes:
        """`connection`: the header's value, if it says something else than what is understood."""
        reason = REASONS.get(self.status, b"Unknown")
        return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
            self.status, reason, self.content_type.encode("latin-1", "replace"), len(self.body), self.headers,
            b"Connection: %b\r\n" % connection.encode() if connection else b"", b"" if head_only else self.body)


REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}


def json_response(status: int, value: Any, headers: bytes = b"") -> Response:
    return Response(status, to_json(value).encode("utf-8", "replace"), headers=headers)


def error_response(error: MatrixError, headers: bytes = b"") -> Response:
    """The standard error response. Who is to come again later is told when in a header, too (Rate limiting)."""
    wait_ms: Any = error.extra.get("retry_after_ms")
    if is_a(wait_ms, int):
        headers += b"Retry-After: %d\r\n" % math.ceil(wait_ms / 1000)
    return json_response(error.status, error.body(), headers)


class Request:
    """One HTTP request: its head, and its body once somebody asks for it."""

    __slots__ = ("method", "path", "query", "headers", "version", "seen", "small", "_connection", "_unread", "_chunked")

    def __init__(self, head: str, connection: Connection | None = None) -> None:
        line, _, headers = head.partition("\r\n")
        try:
            self.method, target, self.version = line.split(" ")
        except ValueError:
            raise bad_request(f"the request line {shorten(cut_path(line))!r} is not 'METHOD target "
                              "HTTP/1.1'") from None
        if (self.version not in ("HTTP/1.1", "HTTP/1.0") or len(self.method) > MAX_METHOD or not TOKEN.fullmatch(self.method)
                or CONTROLS.search(target)):
            raise bad_request(f"{shorten(cut_path(line))!r} is not an HTTP/1.1 request")
        self.headers = parse_same_headers(headers) if len(headers) < 1024 else parse_headers(headers)
        if self.version == "HTTP/1.1" and "host" not in self.headers:
            raise bad_request("a request of HTTP/1.1 must have a Host header")
        self.path, _, query = (target if target[:1] == "/" else self._origin_form(target)).partition("?")
        self.query = parse_query(query) if query else {}
        self.small = len(head) < 2048                        # so that it can be kept
        self._connection, self._chunked = connection, "transfer-encoding" in self.headers
        self._unread = self._length()
        self.seen = b""                                      # the body's beginning, once somebody has read it

    def _origin_form(self, target: str) -> str:
        """Path and query of a target in another form (RFC 9112, 3.2): as to a proxy, or the * of OPTIONS."""
        if absolute := ABSOLUTE.fullmatch(target):
            self.headers = {**self.headers, "host": absolute[1]}     # it counts, whatever Host says
            return absolute[2] if absolute[2][:1] == "/" else "/" + absolute[2]
        if target == "*" and self.method == "OPTIONS":
            return target
        raise bad_request(f"the target of a request is a path that begins with /, not {shorten(cut_path(target))!r}")

    def _length(self) -> int:
        """Bytes of body that are still to be read; -1: chunked, not known."""
        lengths = set(self.headers.get("content-length", "0").split(", "))
        if self._chunked:
            if ("content-length" in self.headers or self.headers["transfer-encoding"].lower() != "chunked"
                    or self.version == "HTTP/1.0"):
                raise bad_request("only Transfer-Encoding: chunked is taken, in HTTP/1.1, and never beside a Content-Length")
            return -1
        length = lengths.pop()
        if lengths or not (length.isascii() and length.isdigit() and len(length) < 16):
            raise bad_request("Content-Length must be one decimal number")
        return int(length)

    @property
    def shown(self) -> str:
        """The path as it may stand in a log."""
        return printable(cut_path(self.path))

    @property
    def client_ip(self) -> str | None:
        return self._connection.client_address[0] if self._connection else None

    def check_client(self) -> None:
        """ClientGone if nobody waits for the answer any more."""
        if self._connection:
            self._connection.check_there()

    @property
    def keep_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return "close" not in wish if self.version == "HTTP/1.1" else "keep-alive" in wish

    def is_larger(self, size: int) -> bool:
        """Whether the body, which nobody has read yet, has or may have more bytes than that."""
        return not 0 <= self._unread <= size

    def body(self, limit: int) -> bytes:
        """The body, read at the first call; M_TOO_LARGE past `limit` bytes."""
        unread, self._unread = self._unread, 0
        if not unread or self._connection is None:
            return b""
        if unread > limit:
            self._unread = unread
            raise too_large(limit)
        if self.headers.get("expect", "").lower() == "100-continue" and self.version == "HTTP/1.1":
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._unread = -1                                    # until it is here
        body = self._connection.read(unread, body_deadline(unread)) if unread > 0 else self._connection.read_chunks(limit)
        self._unread, self.seen = 0, body[:KEPT_BYTES]
        return body

    def finish(self) -> bool:
        """Gets an unread body out of the way; False if the connection can't go on."""
        if not self._unread:
            return True
        if self._unread < 0 or self._unread > 65_536 or "expect" in self.headers:
            return False
        with contextlib.suppress(MatrixError):
            self.body(65_536)
            return True
        return False


def bad_request(error: str, status: int = 400) -> MatrixError:
    return MatrixError("M_UNKNOWN", error, status)


def body_deadline(size: int) -> float:
    return time.monotonic() + HEAD_SECONDS + size / BODY_BYTES_PER_SECOND


def too_large(limit: int) -> MatrixError:
    return MatrixError("M_TOO_LARGE", f"the body may have {limit} bytes at most here")


def parse_query(text: str) -> dict[str, str]:
    """Names and values, percent-encoded UTF-8. What can't be decoded is refused: replaced, two IDs could be one."""
    try:
        text = text if text.isascii() else text.encode("latin-1").decode("utf-8")
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError:
        raise MatrixError("M_INVALID_PARAM", "the query is not percent-encoded UTF-8") from None


def decode_segment(segment: str) -> str:
    """One segment of a path: decoded after splitting, so that %2F is no separator."""
    if "%" not in segment and segment.isascii():
        return segment
    try:
        return urllib.parse.unquote_to_bytes(segment.encode("latin-1")).decode("utf-8")
    except ValueError:
        raise MatrixError("M_INVALID_PARAM", f"{shorten(segment)} in the path is not percent-encoded "
                          "UTF-8") from None


def parse_headers(text: str) -> Mapping[str, str]:
    """Names in lower case; what comes twice is joined by ', '. Refused: folding, bare LF, space before the colon, controls,
    and a Host that is none or comes twice.
    """
    lines = text.split("\r\n") if text else []
    if len(lines) > MAX_HEADERS:
        raise bad_request(f"more than {MAX_HEADERS} headers", 431)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or STRAY.search(value):
            known = re.match(r"[ \t]*[\w-]+(?=[ \t]*[:=])", line)      # the value may be a token
            where = repr(shorten(known[0]) + "…") if known else "a folded line" if line[:1] in (" ", "\t") else "a line of the head"
            raise bad_request(f"{where} is not a header line 'Name: value'")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if not HOST.fullmatch(headers.get("host", "")):
        raise bad_request(f"Host is one name or address, with a port or without, not {shorten(headers['host'])!r}")
    return headers


#: A client sends the same lines again and again.
parse_same_headers = functools.lru_cache(512)(parse_headers)


def bearer(headers: Mapping[str, str]) -> str:
    """The token in the Authorization header; '' if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class ClientGone(OSError):
    """The client went away in the middle of its request: there is nobody to answer."""


class Connection(http.server.BaseHTTPRequestHandler):
    """One client's connection, on a thread of its own: requests in, answers out, until either side has enough."""

    server: HttpServer

    def setup(self) -> None:
        self.buffer = b""                                    # received, not yet used
        self.idle_since: float | None = time.monotonic()     # None while a request is worked on
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time_limit(self.request, IDLE_SECONDS)
        self.server.connections.add(self)

    def finish(self) -> None:
        self.server.connections.discard(self)

    def handle(self) -> None:
        head: bytes | None = None
        try:
            while (head := self.read_head()) is not None and self.exchange(head):
                self.idle_since = time.monotonic()
        except MatrixError as error:
            with contextlib.suppress(OSError):
                self.send(error_response(error).render(head is not None and head[:5] == b"HEAD ", "close"))
                self.linger()
        except OSError:
            pass                                             # the client went away

    def exchange(self, head: bytes) -> bool:
        """Answers one request; False if the connection is to be closed."""
        self.idle_since = None
        request = Request(head.decode("latin-1"), self)
        response = self.server.app(request)
        read = request.finish()
        keep = read and request.keep_alive and not self.server.stopping
        connection = "close" if not keep else "keep-alive" if request.version == "HTTP/1.0" else ""
        data = response.render(request.method == "HEAD", connection)
        del response                                         # a slow reader is to hold it once only
        self.send(data)
        if not read:
            self.linger()
        return keep

    def linger(self) -> None:
        """Takes what is still being sent, for a moment: closed at once, the client would not get to read the answer."""
        self.request.shutdown(socket.SHUT_WR)
        time_limit(self.request, LINGER_SECONDS)
        deadline = time.monotonic() + LINGER_SECONDS
        while self.request.recv(65_536) and time.monotonic() < deadline:
            pass

    def read_head(self) -> bytes | None:
        """The next head, without its empty line; None when the client has closed."""
        deadline = time.monotonic() + HEAD_SECONDS if self.buffer else None
        seen = 0                                             # so far there is no end in it, and no bare LF
        while (end := self.skip_empty_lines().find(b"\r\n\r\n", seen)) < 0 and len(self.buffer) <= MAX_HEAD_BYTES:
            if BARE_LF.search(self.buffer, seen):
                raise bad_request("the lines of a head end in CRLF, not in LF alone")
            seen = max(0, len(self.buffer) - 3)
            if not self.receive(deadline):
                return None
            deadline = deadline or time.monotonic() + HEAD_SECONDS
        if not 0 <= end <= MAX_HEAD_BYTES:
            raise bad_request(f"the head of a request may have {MAX_HEAD_BYTES} bytes at most", 431)
        head, self.buffer = self.buffer[:end], self.buffer[end + 4:]
        return head

    def skip_empty_lines(self) -> bytes:
        """The buffer, without what may stand before a request (RFC 9112, 2.2)."""
        if self.buffer[:1] in (b"\r", b"\n"):
            self.buffer = self.buffer.lstrip(b"\r\n")
        return self.buffer

    def receive(self, deadline: float | None, most: int = 4096) -> bool:
        """Adds to the buffer; False at the end of the stream. Without a deadline it waits for ever, so it asks for no more
        memory than a head needs.
        """
        while True:
            try:
                data = self.request.recv(most)
                if deadline is None or time.monotonic() < deadline:
                    self.buffer += data
                    return bool(data)
            except (TimeoutError, BlockingIOError):
                if deadline is None and not self.server.stopping:
                    continue
            except OSError as error:
                raise ClientGone(str(error)) from None
            raise bad_request("the request did not come in time", 408)

    def read(self, size: int, deadline: float) -> bytes:
        if len(self.buffer) < size:
            have = bytearray(self.buffer)                    # not a list: a part of one byte would take fifty
            while len(have) < size:
                self.buffer = b""
                if not self.receive(deadline, min(65_536, size - len(have))):
                    raise ClientGone("closed inside a body")
                have += self.buffer
            self.buffer = bytes(have)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_line(self, deadline: float) -> str:
        """One line between chunks. With a CR or LF of its own in it another reader would see two."""
        while (end := self.buffer.find(b"\r\n")) < 0:
            if len(self.buffer) > 4096 or not self.receive(deadline):
                raise bad_request("a line of a body in chunks is too long, or does not end")
        line, self.buffer = self.buffer[:end].decode("latin-1"), self.buffer[end + 2:]
        if STRAY.search(line):
            raise bad_request("a line of a body in chunks has a control character in it")
        return line

    def read_chunks(self, limit: int) -> bytes:
        body, began = bytearray(), body_deadline(0)
        while True:
            deadline = began + len(body) / BODY_BYTES_PER_SECOND
            if not (size := CHUNK.fullmatch(self.read_line(deadline))):
                raise bad_request("a chunk of the body does not start with its size")
            if not (count := int(size[1], 16)):
                self.skip_trailers(deadline)
                return bytes(body)
            if len(body) + count > limit:
                raise too_large(limit)
            body += self.read(count, deadline)
            if self.read(2, deadline) != b"\r\n":
                raise bad_request("a chunk of the body is longer than it says")

    def skip_trailers(self, deadline: float) -> None:
        for _ in range(MAX_HEADERS + 1):
            if not self.read_line(deadline):
                return
        raise bad_request(f"more than {MAX_HEADERS} trailers", 431)

    def send(self, data: bytes) -> None:
        """All of it. OSError when the client takes nothing for ANSWER_SECONDS, or the whole too slowly."""
        sent = self.request.send(data)
        if sent < len(data):                                 # it does not fit: give a slow reader its time
            left, deadline = memoryview(data)[sent:], time.monotonic() + ANSWER_SECONDS + len(data) / BODY_BYTES_PER_SECOND
            while left:
                time_limit(self.request, min(ANSWER_SECONDS, max(0.001, deadline - time.monotonic())))
                left = left[self.request.send(left):]
            time_limit(self.request, IDLE_SECONDS)

    def check_there(self) -> None:
        """ClientGone if the client has hung up while it waits for its answer."""
        try:
            there = not hasattr(socket, "MSG_DONTWAIT") or self.request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise ClientGone(str(error)) from None
        if not there:
            raise ClientGone("hung up while it waited")


#: What accept() says when there is no room for another connection.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Stopped(Exception):
    """Ends the thread that accepts connections."""


class Seldom:
    """Whether to say again what may happen again and again: once a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 60
        return True


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves `app`, a function from Request to Response that raises nothing but ClientGone. start() and stop() may be
    called once each.
    """

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"

    def __init__(self, address: tuple[str, int], app: Callable[[Request], Response],
                 max_connections: int = 10_000) -> None:
        self.app, self.max_connections = app, min(max_connections, max(10, most_handles() - SPARE_HANDLES))
        self.connections: set[Connection] = set()
        self.stopping = False
        self._thread: threading.Thread | None = None
        self._seldom = Seldom()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Connection)

    def server_bind(self) -> None:
        host, port = self.server_address[:2]
        with failing(f"{host!s}:{port} can't be listened at"):
            socketserver.TCPServer.server_bind(self)         # without http.server's reverse look-up
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def port(self) -> int:
        return self.server_address[1]

    def get_request(self) -> tuple[Any, Any]:
        """What comes while it stops ends the thread."""
        try:
            request, client_address = super().get_request()
        except OSError as error:
            if self.stopping:
                raise Stopped from None
            if error.errno in NO_ROOM:
                self.make_room(error.strerror)
            raise
        if self.stopping:
            request.close()
            raise Stopped
        return request, client_address

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.connections) >= self.max_connections and not self.close_longest_idle():
            self.shutdown_request(request)                   # all are busy
            return
        try:
            _thread.start_new_thread(self.process_request_thread, (request, client_address))
        except RuntimeError as error:                        # no more threads
            self.shutdown_request(request)
            self.make_room(error)

    def make_room(self, why: object) -> None:
        """The machine has nothing left for another connection: who is idle for longest has to go, and those to come wait."""
        if self._seldom():
            log.error("no more connections can be taken on port %d: %s; there are %d (ulimit -n and -u say what a process may have)",
                      self.port, why, len(self.connections))
        time.sleep(0.001 if self.close_longest_idle() else 0.05)     # until its thread lets go of it; what waits is known again at once

    def close_longest_idle(self) -> bool:
        idle = [(c.idle_since, id(c), c) for c in list(self.connections) if c.idle_since is not None]
        if idle:
            hang_up(min(idle)[2].request)
        return bool(idle)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")

    def start(self) -> None:
        thread = threading.Thread(target=self._serve, name="http", daemon=True)
        thread.start()
        self._thread = thread

    def _serve(self) -> None:
        with contextlib.suppress(Stopped):
            self.serve_forever(3600)                         # it looks up when somebody calls

    def stop(self) -> None:
        """Takes no more connections and ends those that there are."""
        self.stopping = True
        own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name, self.server_name)
        while self._thread and self._thread.is_alive():      # it sleeps until somebody calls
            try:
                socket.create_connection((own, self.port), 1).close()
            except OSError:                                  # no handle is left, say
                hang_up(self.socket)
            self._thread.join(0.01)
        self.server_close()
        for connection in list(self.connections):
            hang_up(connection.request)


def most_handles() -> int:
    """How many files and sockets this process may have open at once."""
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
    return limit if limit > 0 else 1_000_000


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """An OSError says of what it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None


def time_limit(sock: socket.socket, seconds: float) -> None:
    """For each read and write. The kernel's: a time-out of Python's own is a poll() before each call, and one more wait for
    the interpreter's lock.
    """
    limit = int(seconds * 1000) if os.name == "nt" else struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


def hang_up(sock: socket.socket) -> None:
    """Closes a socket that another thread may be reading."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _TimedSocket(socket.socket):
    """A socket whose reads all end by one deadline, however slowly the bytes trickle in, and after so many bytes."""

    deadline, left = 0.0, 0
    quiet = False                                            # nothing more is to be received

    def recv_into(self, *args: Any) -> int:
        if self.quiet:
            raise BlockingIOError(errno.EAGAIN, "not now")
        self.settimeout(max(0.001, self.deadline - time.monotonic()))
        count = super().recv_into(*args)
        self.left -= count
        if self.left < 0:
            raise ValueError("the answer does not end")
        return count


def _tls_context() -> Any:
    """For the same over TLS, which not every Python has."""
    ssl = importlib.import_module("ssl")
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = type("_TimedTls", (_TimedSocket, ssl.SSLSocket), {})
    return context


class _Reply(http.client.HTTPResponse):
    """An answer, after those that only say that there will be one (1xx), and whether more than it has come."""

    def __init__(self, sock: _TimedSocket, *args: Any, **keys: Any) -> None:
        super().__init__(sock, *args, **keys)
        self.sock, self.more = sock, False

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status >= 200:
                return version, status, reason
            http.client.parse_headers(self.fp)

    def _close_conn(self) -> None:
        """When all of it is read. What stands behind it in the buffer, nobody asked for."""
        self.sock.quiet = True
        with contextlib.suppress(OSError):                   # a read that failed before fails again
            self.more = bool(self.fp.peek())
        self.sock.quiet = False
        super()._close_conn()  # type: ignore[misc]


class HttpClient:
    """Asks one server, over one kept connection. For one thread at a time.

    Raises OSError (TimeoutError among them) or http.client.HTTPException. Follows no redirect and uses no proxy.
    """

    _connection: http.client.HTTPConnection | None = None

    def __init__(self, url: str, cut: bool = False) -> None:
        parts, self.cut = urllib.parse.urlsplit(url), cut    # cut: a longer answer is shortened, no error
        self.base, self._https = parts.path.rstrip("/"), parts.scheme == "https"
        self.host, self.port = parts.hostname or "", parts.port or (443 if self._https else 80)
        self._given_up = False                               # by abort(), while it was asked

    def request(self, method: str, path: str, body: bytes | None = None,
                headers: Mapping[str, str] | None = None,
                seconds: float = 60.0, limit: int = 65_536) -> tuple[int, bytes]:
        """Status and body of the answer, all of it within `seconds`; at most `limit` bytes of body, else ValueError."""
        self._given_up = False
        kept = self._connection is not None and not self._went_away()
        deadline = time.monotonic() + seconds
        try:
            return self._exchange(method, path, body, headers or {}, deadline, limit)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            if not kept or method == "POST" or self._given_up:       # a POST may have been done already
                raise
        return self._exchange(method, path, body, headers or {}, deadline, limit)

    def _exchange(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str],
                  deadline: float, limit: int) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = self._connect(deadline)
        connection: Any = self._connection                   # where abort() finds it, too
        try:
            if self._given_up:                               # while it connected
                raise ConnectionAbortedError(errno.ECONNABORTED, "given up")
            connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
            connection.sock.deadline, connection.sock.left = deadline, MAX_HEAD_BYTES + 2 * limit     # for the sizes of chunks
            taken = self._send(connection, method, self.base + path, body, dict(headers))
            response = connection.getresponse()
            data = response.read(limit + 1)
            if not taken and response.status < 400:
                raise ConnectionResetError(errno.ECONNRESET, f"it answered {response.status} and closed before it had the request")
            if len(data) > limit and self.cut:
                self.close()
                return response.status, data[:limit]
            if len(data) > limit:
                raise ValueError(f"the answer has more than {limit} bytes")
            if response.length:
                raise http.client.IncompleteRead(data, response.length)
        except BaseException:
            self.close()                                     # what else comes on it would be taken for the next answer
            raise
        if response.will_close or response.more or not taken:
            self.close()
        return response.status, data

    @staticmethod
    def _send(connection: http.client.HTTPConnection, *request: Any) -> bool:
        """Whether the server took all of it; if not, it may have said why before it closed."""
        try:
            connection.request(*request)
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        seconds = max(0.001, deadline - time.monotonic())
        connection = http.client.HTTPConnection(self.host, self.port, timeout=seconds)
        if self._https:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=seconds, context=_tls_context())
        connection.connect()
        if not self._https:
            connection.sock = _TimedSocket(fileno=connection.sock.detach())
        connection.response_class = _Reply
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _went_away(self) -> bool:
        """Whether the server has closed the kept connection (or said something that nobody asked for)."""
        assert self._connection is not None
        try:
            with selectors.DefaultSelector() as look:        # select() takes no handle from 1,024 on
                look.register(self._connection.sock, selectors.EVENT_READ)
                readable = bool(look.select(0))
        except (OSError, ValueError):
            readable = True
        if readable:
            self.close()
        return readable

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def __del__(self) -> None:
        """Who keeps it no more need not have closed it: a Client makes as many as it has threads."""
        self.close()

    def abort(self) -> None:
        """Ends the request that another thread is waiting for."""
        connection, self._given_up = self._connection, True
        if connection and connection.sock:
            hang_up(connection.sock)


def at_once(fn: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """fn of each, on threads of their own, so that who does not answer holds up nobody. fn raises nothing."""
    results: dict[int, T] = {}
    threads = [threading.Thread(target=lambda n=n, item=item: results.__setitem__(n, fn(item)), daemon=True)
               for n, item in enumerate(items)]
    for thread in threads:
        try:
            thread.start()
        except RuntimeError:                                 # no more threads: then one after the other
            thread.run()
    for thread in threads:
        if thread.ident:
            thread.join()
    return [results[n] for n in range(len(items))]


class DatabaseError(Exception):
    """The database can't be used; the text says why and what to do."""


@contextlib.contextmanager
def legible(path: str) -> Iterator[None]:
    """What is read from a database at the start can be nonsense only in a damaged file. ':memory:' has none: that is a bug."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if path == ":memory:":
            raise
        raise DatabaseError(f"{path} is damaged ({type(error).__name__}: {printable(str(error))}); "
                            "put back a copy of it, or name another --database") from error


def open_sqlite(path: str, durable: bool = True, read_only: bool = False, closed: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode on a write-ahead log: one writes while others read. DatabaseError if there is none.

    Durable: a COMMIT returns when the log is on the disk. Closed: nobody has it open, so no file is made beside it to read it.
    May be used from any thread, by one at a time.
    """
    where = urllib.parse.quote(os.fsencode(os.path.abspath(path))) + ("?mode=ro" if read_only else "") + "&immutable=1" * closed
    with unusable(path), contextlib.ExitStack() as undo:
        db = sqlite3.connect(f"file:{where}", uri=True, isolation_level=None, check_same_thread=False, timeout=LOCKED_MS / 1000,
                             cached_statements=STATEMENTS)
        undo.callback(db.close)
        if not read_only:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
        undo.pop_all()
    return db


@contextlib.contextmanager
def unusable(path: str) -> Iterator[None]:
    """Makes of SQLite's error one that names the file, and why it is so where that can be seen."""
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(f"{path} can't be used as a database: {trouble_with(path) or error}") from None


def trouble_with(path: str) -> str:
    """Why no database can be written there, if that can be seen from outside."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        return "it is a directory"
    if not os.path.isdir(folder):
        return f"there is no directory {folder}"
    if os.path.exists(path) and not os.access(path, os.W_OK):
        return "it may only be read, not written"
    if not os.access(folder, os.W_OK):
        return f"nothing may be written in {folder}, and it needs files beside it"
    return ""


# ============================================================================
# 3. Registrations and namespaces
# ============================================================================
# What an application service is to the homeserver: its registration, and the
# regexes with which it claims user IDs, aliases and rooms. Here it is decided
# who owns an ID, who may create it, and who is interested, each answer with its
# reason. Spec: Application Service API, Registration; its 2016 text for URIs.
# Does not know of storage or HTTP. The ideas come first: what is claimed, whose
# it is, and why. How a registration is read, and what may be wrong with it, follows.

# -- What an application service claims. Decides what a regex means: POSIX extended or Python's, from the start of an ID.

POSIX_CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z",    "blank": r" \t",         "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",       "graph": r"\x21-\x7e", "lower": "a-z",          "print": r"\x20-\x7e",
    "space": r"\t-\r ",   "upper": "A-Z",       "xdigit": "0-9A-Fa-f",   "punct": r"!-/:-@\[-`{-~",
}
# One that is open at the end is matched, too, and refused later: to look for its end from each of its characters takes long.
BRACKETS = re.compile(r"\\.|\[\^?\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*(?:\]|\\?\Z)", re.S)


def compile_regex(regex: str) -> re.Pattern[str]:
    """A POSIX extended regex as Python's: [[:alnum:]] and its kin are translated; re.error if it is none."""
    def translated(match: re.Match[str]) -> str:
        is_bracket = match[0].startswith("[")
        return re.sub(r"\[:([a-z]+):\]", lambda one: POSIX_CLASSES[one[1]], match[0]) if is_bracket else match[0]
    try:
        return re.compile(BRACKETS.sub(translated, regex))
    except KeyError as error:
        raise re.error(f"[:{error.args[0]}:] is no POSIX character class") from None
    except (ValueError, OverflowError, RecursionError) as error:      # flags that exclude each other, 10^20 repeats, brackets
        raise re.error(str(error)) from None


@dataclass(frozen=True)
class Namespace:
    """One entry of `namespaces`: matched from the start of the ID, as Synapse does."""
    kind: str                                                # "users", "aliases" or "rooms"
    index: int                                               # its place among those of its kind
    regex: str                                               # as it is written
    exclusive: bool                                          # nobody else may have what it matches
    pattern: re.Pattern[str] = dataclasses.field(compare=False, repr=False)      # the regex as Python's

    def __str__(self) -> str:
        return f"{self.kind}[{self.index}] {self.regex!r}"


@dataclass(frozen=True)
class UriRule:
    """One entry of our own key `uris`: a URI that matches as a whole becomes the ID in `template` (2016 text, URI mapping). The
    homeserver is asked for it, so that no client need know by what rule a bridge names its ghosts.
    """
    kind: str                                                # "users" or "aliases"
    pattern: re.Pattern[str]
    template: str                                            # with named groups of the regex: "@_irc_{nick}:{server_name}"

    def apply(self, uri: str, server_name: str) -> str | None:
        match = self.pattern.fullmatch(uri)
        if not match:
            return None
        write = to_localpart if self.kind == "users" else str
        groups = {name: write(urllib.parse.unquote(value or "")) for name, value in match.groupdict().items()}
        return self.template.format(**groups, server_name=server_name)


@dataclass(frozen=True, eq=False)
class Registration:
    """An application service as its registration file has it (Application Service API, Registration)."""
    id: str                                                  # unique on this homeserver
    url: str | None                                          # where it listens; None: nothing is sent to it and nothing queued
    as_token: str = dataclasses.field(repr=False)            # it shows this one to the homeserver
    hs_token: str = dataclasses.field(repr=False)            # the homeserver shows this one to it
    sender_localpart: str                                    # of its own user
    namespaces: Mapping[str, Sequence[Namespace]]            # what it claims, by kind
    rate_limited: bool = True                                # whether its ghosts are; its own user never is
    protocols: Sequence[str] = ()                            # the third-party networks that it knows
    receive_ephemeral: bool = False                          # it wants typing, receipts and presence
    push_ephemeral: bool = False                             # the same by an older name (de.sorunome.msc2409.push_ephemeral)
    msc3202: bool = False                                    # it encrypts without /sync (org.matrix.msc3202): see takes_to_device
    uris: Sequence[UriRule] = ()                             # our own: which URI stands for which ID
    sample: Mapping[str, Any] | None = None                  # asbridge.sample: run the IRC bridge for it
    unknown: Sequence[str] = ()                              # keys that nobody here reads

    @property
    def hears_ephemeral(self) -> bool:
        """Whether ephemeral data is pushed to it."""
        return self.url is not None and bool(self.ephemeral_keys)

    @property
    def takes_to_device(self) -> bool:
        """Whether messages to its users' devices are for its transactions. Else they are for the /sync of these devices, with which
        most bridges encrypt, also such as take ephemeral data.
        """
        return self.msc3202 and bool(self.ephemeral_keys)

    @property
    def hears_keys(self) -> bool:
        """Whether it is told whose device lists change, and how many keys its ghosts have left."""
        return self.url is not None and self.msc3202

    @property
    def ephemeral_keys(self) -> list[str]:
        """Under what names it wants ephemeral data in a transaction; none, if it wants none."""
        return (["ephemeral"] if self.receive_ephemeral else []) + (
            ["de.sorunome.msc2409.ephemeral"] if self.push_ephemeral else [])

    def sender(self, server_name: str) -> str:
        """The user ID of the application service's own user."""
        return f"@{self.sender_localpart}:{server_name}"

    def regexes(self, kind: str) -> str:
        """Its regexes for an error text."""
        return ", ".join(repr(namespace.regex) for namespace in self.namespaces[kind]) or "no regex"


@dataclass(frozen=True)
class Claim:
    """Why an application service has to do with an ID. `namespace` is None for its own sender_localpart user."""
    registration: Registration
    id: str                                                  # of a user or room, or an alias
    namespace: Namespace | None                              # that matches the ID

    @property
    def exclusive(self) -> bool:
        return self.namespace is None or self.namespace.exclusive

    def __str__(self) -> str:
        if self.namespace is None:
            return f"{self.id} is its sender_localpart user"
        return f"{self.id} matches {self.namespace.kind}[{self.namespace.index}]"


# -- Whose is it? Decides who owns an ID, who may create it or act as it, who is interested in a room, and which ID a URI stands for.

class Registrations:
    """All registrations of a homeserver, and the questions about them.

    What an ID matches is remembered (bounded), so that a busy ID costs no regex, whatever the number of registrations.
    """

    def __init__(self, server_name: str, registrations: Sequence[Registration] = ()) -> None:
        self.server_name = server_name                       # only its users are in a namespace
        self.by_id = {one.id: one for one in registrations}
        self._by_as_token = {digest(one.as_token): one for one in registrations}
        self._by_hs_token = {digest(one.hs_token): one for one in registrations}
        self.known = functools.lru_cache(maxsize=100_000)(self._claims)      # what is remembered

    def __iter__(self) -> Iterator[Registration]:
        return iter(self.by_id.values())

    def of_as_token(self, token_digest: bytes) -> Registration | None:
        return self._by_as_token.get(token_digest)

    def of_hs_token(self, token_digest: bytes) -> Registration | None:
        return self._by_hs_token.get(token_digest)

    def claims(self, kind: str, id: str) -> tuple[Claim, ...]:
        """Every application service that claims this ID, each with one reason: an exclusive regex before a shared one, for who has
        both owns the ID. Only local users count, and only what is short enough to be an ID.
        """
        return self.known(kind, id) if len(id) <= MAX_ID_BYTES else ()

    def _claims(self, kind: str, id: str) -> tuple[Claim, ...]:
        if kind == "users" and server_of(id) != self.server_name:
            return ()
        found = []
        for registration in self:
            if kind == "users" and id == registration.sender(self.server_name):
                found.append(Claim(registration, id, None))
                continue
            for namespace in sorted(registration.namespaces[kind], key=lambda one: not one.exclusive):
                if namespace.pattern.match(id):
                    found.append(Claim(registration, id, namespace))
                    break
        return tuple(found)

    def claim_of(self, registration: Registration, kind: str, id: str) -> Claim | None:
        return next((claim for claim in self.claims(kind, id) if claim.registration is registration), None)

    def owner(self, kind: str, id: str, other_than: Registration | None = None) -> Claim | None:
        """The exclusive claim on this ID, if somebody (else) has one."""
        return next((claim for claim in self.claims(kind, id)
                     if claim.exclusive and claim.registration is not other_than), None)

    def check_may_create(self, kind: str, id: str, by: Registration | None) -> None:
        """M_EXCLUSIVE if a person (by=None) or an application service may not create or delete this ID."""
        owner = self.owner(kind, id, by)
        if owner:
            why = f"{owner.namespace} claims it exclusively" if owner.namespace else "it is its sender_localpart user"
            raise MatrixError("M_EXCLUSIVE",
                              f"{id} is reserved by the application service {owner.registration.id!r}: {why}")
        if by:
            self.check_claims(by, kind, id, "M_EXCLUSIVE")

    def check_claims(self, registration: Registration, kind: str, id: str, errcode: str) -> None:
        """Raises `errcode` if the ID is in none of the application service's namespaces."""
        if not self.claim_of(registration, kind, id):
            raise MatrixError(errcode, f"{shorten(id)} is outside the namespaces of the application service "
                              f"{registration.id!r}: its regexes for {kind} are {registration.regexes(kind)}, matched "
                              "from the start of the whole ID" + f" of users of {self.server_name}" * (kind == "users"))

    def map_uri(self, kind: str, uri: str) -> str | None:
        """The user ID or alias that a URI stands for (2016 text, URI mapping), or None. The first rule that matches decides."""
        for registration in self:
            for rule in registration.uris:
                if rule.kind == kind and (id := rule.apply(uri, self.server_name)):
                    return id if self.is_own(registration, kind, id) else None
        return None

    def is_own(self, registration: Registration, kind: str, id: str) -> bool:
        """Whether it is an ID of this server that the application service claims."""
        with contextlib.suppress(MatrixError):
            return self.claim_of(registration, kind, check_id(KINDS[kind], id, self.server_name)) is not None
        return False


class Audience:
    """Which application services are interested in a room, and because of what: a joined member, an alias, its ID (Registration).

    Kept with the room and changed by the few events that change it, so that a message costs no regex.
    """

    def __init__(self, registrations: Registrations, room_id: str, members: Iterable[str],
                 aliases: Iterable[str]) -> None:
        self.registrations = registrations
        self.why: dict[str, dict[str, Claim]] = {}           # application service's ID → ID in the room → claim
        self.add("rooms", room_id)
        for user_id in members:
            self.add("users", user_id)
        for alias in aliases:
            self.add("aliases", alias)

    def add(self, kind: str, id: str) -> None:
        for claim in self.registrations.claims(kind, id):
            self.why.setdefault(claim.registration.id, {})[id] = claim

    def remove(self, kind: str, id: str) -> None:
        for claim in self.registrations.claims(kind, id):
            held = self.why.get(claim.registration.id, {})
            held.pop(id, None)
            if not held:
                self.why.pop(claim.registration.id, None)

    def interested(self, sender: str, target: str | None) -> dict[str, str]:
        """Application services that are interested in an event, each with the reason: they claim its sender, the target of a
        membership, or something that makes them interested in the room. Whether the claim is exclusive makes no difference.
        """
        found: dict[str, str] = {}
        for part, user_id in (("sender", sender), ("target", target)):
            for claim in self.registrations.claims("users", user_id) if user_id else ():
                found.setdefault(claim.registration.id, f"{part} {claim}")
        for id, claims in self.why.items():
            claim = next(iter(claims.values()))
            part = {"@": "member", "#": "alias", "!": "room"}[claim.id[0]]
            found.setdefault(id, f"{part} {claim}")
        return found


def query_path(kind: str, id: str) -> str:
    """With which an application service is asked for a user or alias that does not exist yet (Querying)."""
    return f"/_matrix/app/v1/{'users' if kind == 'users' else 'rooms'}/{urllib.parse.quote(id, safe='')}"


# -- Why? The same answers with all that led to them, for people. Decides nothing.

@functools.lru_cache(maxsize=1000)
def beginnings(regex: str) -> list[tuple[int, re.Pattern[str]]]:
    """The beginnings of a regex that are regexes themselves, the longest first, each with its length."""
    found = []
    for end in range(min(len(regex) - 1, MAX_ID_BYTES), 0, -1):
        with contextlib.suppress(re.error):
            found.append((end, compile_regex(regex[:end])))
    return found


@functools.lru_cache(maxsize=1000)
def without_case(regex: str) -> re.Pattern[str] | None:
    """The regex for IDs in any case, if it is harmless to ask that."""
    pattern = re.compile(compile_regex(regex).pattern, re.I)
    return pattern if cost_of(pattern).verdict == "harmless" else None


def nearest_miss(regex: str, id: str) -> tuple[int, str]:
    """Where an ID stops being what the regex wants: after the longest beginning of the regex that it does match. As the
    number of characters that are right, and in words.
    """
    any_case = without_case(regex)
    case = "; it is only the case" if any_case and any_case.match(id) else ""
    for end, beginning in beginnings(regex):
        if match := beginning.match(id):
            there = repr(shorten(id[match.end():], 40)) if id[match.end():] else "nothing"
            wanted = repr(shorten(regex[end:], 40))
            return match.end(), f"differs at character {match.end() + 1}: {wanted} is wanted, {there} is there{case}"
    return 0, f"differs at character 1: {shorten(regex, 40)!r} is wanted{case}"


def explain_namespace(namespace: Namespace, id: str) -> JsonObject:
    """Whether a namespace matches an ID, the nearest miss if not, and what those would say who read regexes in another way."""
    matches = namespace.pattern.match(id) is not None
    return {"kind": namespace.kind, "index": namespace.index, "regex": namespace.regex, "exclusive": namespace.exclusive,
            "matches": matches, "miss": None if matches else nearest_miss(namespace.regex, id)[1],
            "unanchored": namespace.pattern.search(id) is not None, "whole": namespace.pattern.fullmatch(id) is not None}


def explain_rule(registrations: Registrations, registration: Registration, rule: str, kind: str, id: str) -> JsonObject:
    """One rule of interest: whether this ID makes events interesting to the application service, or what is nearest to that."""
    claim = registrations.claim_of(registration, kind, id)
    told: JsonObject = {"rule": rule, "id": id, "matches": claim is not None, "namespace": None, "miss": None}
    if claim:
        return {**told, "namespace": str(claim.namespace) if claim.namespace else "its sender_localpart user"}
    if kind == "users" and server_of(id) != registrations.server_name:
        return {**told, "miss": f"is not a user of {registrations.server_name}; only those count"}
    misses = [(*nearest_miss(one.regex, id), one) for one in registration.namespaces[kind]]
    if not misses:
        return {**told, "miss": f"can't match, for the registration has no regex for {kind}"}
    _, miss, nearest = max(misses, key=lambda one: one[0])
    return {**told, "namespace": str(nearest), "miss": miss}


def explain_appservice(registrations: Registrations, registration: Registration, kind: str, id: str) -> JsonObject:
    claim = registrations.claim_of(registration, kind, id)
    return {"id": registration.id, "matches": claim is not None, "exclusive": bool(claim and claim.exclusive),
            "reason": str(claim) if claim else None,
            "namespaces": [explain_namespace(namespace, id) for namespace in registration.namespaces[kind]]}


def creators(registrations: Registrations, kind: str, id: str) -> list[str]:
    """Who may create it: "people", and application services."""
    def may(by: Registration | None) -> bool:
        with contextlib.suppress(MatrixError):
            registrations.check_may_create(kind, id, by)
            return True
        return False
    people = ["people"] if may(None) and (kind != "users" or STRICT_LOCALPART.fullmatch(localpart_of(id))) else []
    return people + [registration.id for registration in registrations if may(registration)]


def explain_claims(registrations: Registrations, kind: str, id: str) -> JsonObject:
    local = kind == "rooms" or server_of(id) == registrations.server_name
    owner = registrations.owner(kind, id)
    return {
        "appservices": [explain_appservice(registrations, registration, kind, id) for registration in registrations],
        "owner": {"appservice": owner.registration.id, "reason": str(owner)} if owner else None,
        "may_create": creators(registrations, kind, id) if local and kind != "rooms" else [],
        "query": [{"appservice": claim.registration.id, "request": f"GET {query_path(kind, id)}"}
                  for claim in registrations.claims(kind, id)
                  if claim.namespace and claim.registration.url and kind != "rooms"],
        "local": local}


def explain_uri(registrations: Registrations, uri: str) -> JsonObject:
    rules = [{"appservice": registration.id, "kind": rule.kind, "regex": rule.pattern.pattern,
              "maps_to": rule.apply(uri, registrations.server_name)}
             for registration in registrations for rule in registration.uris]
    return {"uris": rules, "maps_to": registrations.map_uri("users", uri) or registrations.map_uri("aliases", uri)}


def explain(registrations: Registrations, id: str) -> JsonObject:
    """Who claims an ID or maps a URI, and why: each namespace with what it decides (README, The inspector's API)."""
    kind = next((kind for kind, sigil in KINDS.items() if id[:1] == sigil), "uris" if is_uri(id) else None)
    if kind is None or (kind != "uris" and len(id) > MAX_ID_BYTES):
        example = f"{MAX_ID_BYTES} bytes at most" if kind else f"@{id}:{registrations.server_name} would be a user ID"
        raise MatrixError("M_INVALID_PARAM", f"{shorten(id)!r} is no user ID (@…), alias (#…), room ID (!…) or URI (irc://…); "
                          f"{shorten(example, 150)}")
    told: JsonObject = {"id": id, "kind": {"users": "user", "aliases": "alias", "rooms": "room", "uris": "uri"}[kind],
                        "appservices": [], "owner": None, "may_create": [], "query": [], "uris": [], "maps_to": None, "local": True}
    return {**told, **(explain_uri(registrations, id) if kind == "uris" else explain_claims(registrations, kind, id))}


# -- Reading a registration. Decides what one must have, and says at once all that is wrong with it.

@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a configuration or a registration."""
    where: str                                               # the file, and the key in it
    what: str
    right: str = ""                                          # what to write
    why: str = ""
    level: str = "error"                                     # or "warning"

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}" + (f"; {self.right}" if self.right else ""))


class ConfigError(Exception):
    """A configuration that can't be used; `findings` has everything that is wrong with it."""

    def __init__(self, findings: Sequence[Finding], rest: Sequence[Namespace] = ()) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings, self.rest = list(findings), rest      # rest: what can be read of a registration, for the doctor


# key: its type, whether it must be there, and what would be right
REGISTRATION_KEYS: dict[str, tuple[Any, bool, str]] = {
    "id":                                     (str,                True,  "a text that is unique on this homeserver"),
    "url":                                    ((str, type(None)),  True,  "'http://host:port', or null if nothing is to be sent"),
    "as_token":                               (str,                True,  "a long random text"),
    "hs_token":                               (str,                True,  "another long random text"),
    "sender_localpart":                       (str,                True,  "the localpart of its own user, without '@' and server name"),
    "namespaces":                             (dict,               True,  "an object with users, aliases and rooms"),
    "rate_limited":                           (bool,               False, "true or false"),
    "protocols":                              ((list, type(None)), False, "a list of texts"),
    "receive_ephemeral":                      (bool,               False, "true or false"),
    "de.sorunome.msc2409.push_ephemeral":     (bool,               False, "true or false"),
    "push_ephemeral":                         (bool,               False, "true or false"),
    "org.matrix.msc3202":                     (bool,               False, "true or false"),
    "io.element.msc4190":                     (bool,               False, "true or false"),      # always so: see 6, set_device
    "uris":                                   (dict,               False, "an object with users and aliases"),
    "asbridge.sample":                        (dict,               False, '{"irc_port": 6667}'),
}
KNOWN_KEYS = (*REGISTRATION_KEYS, *(f"namespaces.{kind}" for kind in KINDS))


def is_base_url(url: str) -> bool:
    """Whether an application service can be called there: http or https, a host, perhaps a port and a path."""
    try:
        parts = urllib.parse.urlsplit(url)
        return (parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
                and (parts.port is None or parts.port >= 0) and not CONTROLS.search(url))
    except ValueError:                                       # the port is none, or a bracket is open
        return False


class RegistrationReader:
    """Turns one parsed registration into a Registration and collects everything that is wrong with it."""

    def __init__(self, data: Any, where: str) -> None:
        self.where = where                                   # the file, say, for the findings
        self.data: JsonObject = data if isinstance(data, dict) else {}
        self.findings: list[Finding] = []
        self.rest: list[Namespace] = []                      # what can be read of one that can't be used
        if not isinstance(data, dict):
            self.wrong("", "is not an object", "a registration has the keys " + ", ".join(REGISTRATION_KEYS))

    def wrong(self, key: str, what: str, right: str) -> None:
        self.findings.append(Finding(f"{self.where}: {key}" if key else self.where, what, right))

    def read(self) -> Registration | None:
        """The registration, or None if anything in `findings` stands against it."""
        if self.findings:
            return None
        self._check_types()
        self._check_values()
        namespaces = {kind: self._namespaces(kind) for kind in KINDS}
        uris = self._uris()
        self._check_sample()
        if self.findings:
            self.rest = [one for kind in KINDS for one in namespaces[kind]]
            return None
        data = self.data
        as_written = {key: data[key] for key in ("id", "url", "as_token", "hs_token", "sender_localpart", "rate_limited",
                                                 "receive_ephemeral") if key in data}
        keys = (*data, *(f"namespaces.{kind}" for kind in data["namespaces"]))
        return Registration(
            **as_written, namespaces=namespaces, uris=uris, protocols=tuple(data.get("protocols") or ()),
            push_ephemeral=data.get("de.sorunome.msc2409.push_ephemeral") or data.get("push_ephemeral", False),
            msc3202=data.get("org.matrix.msc3202", False), sample=data.get("asbridge.sample"),
            unknown=tuple(key for key in keys if key not in KNOWN_KEYS))

    def _check_types(self) -> None:
        for key, (type_, required, right) in REGISTRATION_KEYS.items():
            if required and key not in self.data:
                self.wrong(key, "is missing", f"write {right}")
            elif key in self.data and not is_a(self.data[key], type_):
                shown = "is no text" if key.endswith("_token") else f"is {quoted(self.data[key])}"
                self.wrong(key, shown, f"write {right}")

    def _check_values(self) -> None:
        """What else is asked of values that have the right type."""
        self._require("url", lambda url: url is None or is_base_url(url), "is {}")
        self._require("sender_localpart", lambda name: HISTORICAL_LOCALPART.fullmatch(name) and name[0] != "@" and len(name) <= 200,
                  "is {}", f"{REGISTRATION_KEYS['sender_localpart'][2]}; 200 characters at most, of ASCII, no space or ':'")
        self._require("id", bool, "is empty")
        for key in ("as_token", "hs_token"):
            self._require(key, bool, "is empty")
            self._require(key, re.compile("[ -~]*").fullmatch, "has characters that no header can carry",
                      "a long random text of printable ASCII")
        if self.data.get("as_token") and self.data["as_token"] == self.data.get("hs_token"):
            self.wrong("hs_token", "is the same as as_token", "write another long random text")
        self._require("protocols", lambda found: all(isinstance(one, str) for one in found or ()), "has an entry that is no text")

    def _require(self, key: str, is_right: Callable[[Any], object], what: str, right: str = "") -> None:
        type_, _, usual = REGISTRATION_KEYS[key]
        value = self.data.get(key)
        if key in self.data and is_a(value, type_) and not is_right(value):
            self.wrong(key, what.format(quoted(value)), f"write {right or usual}")

    def _check_sample(self) -> None:
        sample = self.data.get("asbridge.sample")
        port = sample.get("irc_port", 6667) if isinstance(sample, dict) else 0
        if not is_a(port, int) or not 0 <= port <= 65535:
            self.wrong("asbridge.sample.irc_port", f"is {quoted(port)}", "write a port from 0 to 65535")

    def _namespaces(self, kind: str) -> tuple[Namespace, ...]:
        found = []
        for index, (path, entry, pattern) in enumerate(self._entries("namespaces", kind)):
            exclusive = entry.get("exclusive")
            if not isinstance(exclusive, bool):
                self.wrong(f"{path}.exclusive",
                           "is missing" if exclusive is None else f"is {quoted(exclusive)}, neither true nor false",
                           "write true to keep everybody else out, false to share")
            elif pattern:
                found.append(Namespace(kind, index, entry["regex"], exclusive, pattern))
        return tuple(found)

    def _uris(self) -> tuple[UriRule, ...]:
        found = []
        for kind, key in (("users", "user_id"), ("aliases", "alias")):
            for path, entry, pattern in self._entries("uris", kind):
                template = entry.get(key)
                if pattern and self._fits(template, pattern):
                    found.append(UriRule(kind, pattern, str(template)))
                elif pattern:
                    self.wrong(f"{path}.{key}", f"is {quoted(template)}",
                               "write an ID with the regex's named groups and server_name in braces: "
                               f"{KINDS[kind]}irc_{{nick}}:{{server_name}}")
        return tuple(found)

    def _entries(self, key: str, kind: str) -> Iterator[tuple[str, JsonObject, re.Pattern[str] | None]]:
        """Where each entry of a list stands, the entry, and its regex unless that is wrong."""
        lists = self.data.get(key)
        entries = lists.get(kind) if isinstance(lists, dict) else None
        if not is_a(entries, (list, type(None))):
            self.wrong(f"{key}.{kind}", f"is {quoted(entries)}", "write a list")
            return
        for index, entry in enumerate(entries or ()):
            path, entry = f"{key}.{kind}[{index}]", entry if isinstance(entry, dict) else {}
            yield path, entry, self._regex(entry.get("regex"), f"{path}.regex", uri=key == "uris")

    def _regex(self, regex: object, path: str, uri: bool) -> re.Pattern[str] | None:
        if not isinstance(regex, str):
            self.wrong(path, "is missing or no text", "write a POSIX extended regex such as '@irc_.*:example\\.org'")
            return None
        try:
            pattern = compile_regex(regex)
        except re.error as error:
            self.wrong(path, f"{shorten(regex)!r} is not a regex: {error}", "write one of Python's, or a POSIX extended one")
            return None
        cost = glance_at_cost(pattern, uri)
        if cost.verdict == "exponential":
            self.wrong(path, f"'{shorten(regex)}' can take for ever: {cost.reason}",
                       "let there be one way only to match a text: write [a-z_]* for ([a-z]*_*)*")
        return pattern

    @staticmethod
    def _fits(template: object, pattern: re.Pattern[str]) -> bool:
        """Whether there is nothing in the braces of a template but names of the regex's groups, and server_name."""
        names = "|".join([*pattern.groupindex, "server_name"])
        return isinstance(template, str) and "server_name" not in pattern.groupindex and bool(
            re.fullmatch(r"(?:[^{}]|\{\{|\}\}|\{(?:NAMES):?\})*".replace("NAMES", names), template))


def read_registration(data: Any, where: str) -> Registration:
    """A registration from its plain value; ConfigError with everything that is wrong with it."""
    reader = RegistrationReader(data, where)
    registration = reader.read()
    if registration is None:
        raise ConfigError(reader.findings, reader.rest)
    return registration


def check_together(registrations: Sequence[tuple[str, Registration]]) -> list[Finding]:
    """What is wrong between registrations: each is given with where it stands."""
    findings, holders = [], collections.defaultdict[tuple[str, str], list[str]](list)     # key, value → where that stands
    for where, registration in registrations:
        for key in ("id", "as_token", "hs_token"):
            holders[key, getattr(registration, key)].append(where)
    for where, registration in registrations:
        for key in ("id", "as_token"):
            first = holders[key, getattr(registration, key)][0]
            if first is not where:
                findings.append(Finding(f"{where}: {key}", f"is already that of {first}", f"every {key} must be unique"))
        for key, twin in (("as_token", "hs_token"), ("hs_token", "as_token")):
            findings += [Finding(f"{where}: {key}", f"is the {twin} of {other}", "tokens must differ from each other")
                         for other in holders[twin, getattr(registration, key)] if other is not where]
    return findings


def parse_registration(text: str) -> Any:
    """The plain value of a registration file, JSON or YAML; ValueError says where it is neither."""
    try:
        is_json = text.lstrip("\ufeff \r\n\t").startswith("{")
        value = json.loads(text.lstrip("\ufeff")) if is_json else Yaml(text).read()
        to_json(value).encode("utf-8")                       # neither NaN nor half a character
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_file(path: str) -> Any:
    """The plain value of a JSON or YAML file; ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse_registration(file.read())
    except OSError as error:
        raise ConfigError([Finding(path, f"can't be read: {error.strerror}", "name a file that can be read")]) from None
    except ValueError as error:
        raise ConfigError([Finding(path, f"is neither JSON nor plain YAML: {error}", "see the README, Registration")]) from None


def load_registration(path: str) -> Registration:
    """The registration in a file, JSON or YAML; ConfigError with everything that is wrong with it."""
    return read_registration(load_file(path), path)


# -- YAML, as far as bridges write it. Decides what a file says, and not whether that is right. To be skipped at first reading.

class YamlError(ValueError):
    pass


class Yaml:
    """Reads block mappings and lists, plain and quoted scalars, comments, and flow collections on one line.

    Anything else (anchors, tags, block scalars, several documents) is refused with its line number.
    """

    QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'"""
    PLAIN_KEY = r"""[A-Za-z0-9_.](?:[^:#'"]*[^:#'" \t])?"""
    QUOTES = re.compile(QUOTED)
    REST = r"(?:[ \t]+(?:#.*|(.*)))?$"                       # what is in the line behind a key or '-', unless it is a comment
    KEY = re.compile(rf"({QUOTED}|{PLAIN_KEY})[ \t]*:{REST}")
    ITEM = re.compile(rf"-{REST}")
    END = re.compile(r"[ \t]*(?:(?<=[ \t])#.*)?$")           # of what counts in a line; a '#' behind a space starts a comment
    FLOW = re.compile(rf"[ \t]*({QUOTED}" r"""|[\[\]{},]|:(?=[ \t,\]}'"]|$)"""
                      r"""|(?!['" \t])(?:[^\[\]{},:#]|(?<![ \t])#|:(?=[^ \t,\]}]))+)""")
    STRANGE = re.compile(r"[^\t -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
    ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
    ESCAPES = {"0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "e": "\x1b",
               " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029"}
    NO_START = re.compile(r"[,\]}#&*!|>%@`]|[-?:](?:[ \t]|$)")
    WORDS = {"null": None, "Null": None, "NULL": None, "~": None,
             "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

    def __init__(self, text: str) -> None:
        self.lines: list[tuple[int, int, str]] = []          # number, indent, content; without empty ones and comments
        self.at = 0                                          # which of them is read next
        self.marked = False                                  # a document has begun
        for number, line in enumerate(re.split("\r\n|\r|\n", text.removeprefix("\ufeff")), 1):
            self._add_line(number, line)

    def _add_line(self, number: int, line: str) -> None:
        if strange := self.STRANGE.search(line):
            raise YamlError(f"line {number}: {strange[0]!r} can't stand in YAML")
        content, indent = line.strip(" \t"), len(line) - len(line.lstrip(" \t"))
        if "\t" in line[:indent]:
            raise YamlError(f"line {number}: a tab can't indent")
        if re.match(r"%|(?:---|\.\.\.)(?:[ \t]|$)", line):
            if self.lines or self.marked or not (line.startswith("---") and self.END.match(line, 3)):
                raise YamlError(f"line {number}: only one document, without directives, is read")
            self.marked = True
        elif content and content[0] != "#":
            self.lines.append((number, indent, content))

    def read(self) -> Any:
        value = self._block(0)
        if self.at < len(self.lines):
            raise self._error("is indented in a way that fits nothing above it")
        return value

    def _error(self, what: str) -> YamlError:
        number, _, content = self.lines[self.at]
        return YamlError(f"line {number}: {shorten(content)!r} {what}")

    @property
    def indent(self) -> int:
        """That of the line that is read next; -1 after the last."""
        return self.lines[self.at][1] if self.at < len(self.lines) else -1

    def _next_is(self, form: re.Pattern[str], indent: int) -> re.Match[str] | None:
        """Whether the next line stands at this indent and is a list item, or begins with a key."""
        return form.match(self.lines[self.at][2]) if self.indent == indent else None

    def _block(self, least: int) -> Any:
        """What stands from here on at this indent or deeper, if anything does."""
        indent = self.indent
        if indent < least:
            return None
        if self._next_is(self.ITEM, indent):
            return self._list(indent)
        if self._next_is(self.KEY, indent):
            return self._mapping(indent)
        value = self._scalar(self.lines[self.at][2])
        self.at += 1
        return value

    def _mapping(self, indent: int) -> JsonObject:
        out: JsonObject = {}
        while match := self._next_is(self.KEY, indent):
            key = self._key(match[1])
            if key in out:
                raise self._error("stands here a second time")
            value = self._scalar(match[2]) if match[2] else None
            self.at += 1
            if not match[2]:                                 # it is the block below; a list may stand at the key's own indent
                value = self._block(indent if self._next_is(self.ITEM, indent) else indent + 1)
            out[key] = value
        return out

    def _key(self, text: str) -> str:
        return str(self._scalar(text)) if text[0] in "'\"" else text

    def _list(self, indent: int) -> list[Any]:
        out: list[Any] = []
        while match := self._next_is(self.ITEM, indent):
            if match[1] is None:
                self.at += 1
            else:                                            # "- key: value": a block that starts in this line
                self.lines[self.at] = (self.lines[self.at][0], indent + match.start(1), match[1])
            out.append(self._block(indent + 1))
        return out

    def _scalar(self, text: str) -> Any:
        if text[0] in "[{":
            return self._flow(text)
        if text[0] in "'\"":
            return self._quoted(text)
        text = re.split(r"[ \t]#", text, maxsplit=1)[0].rstrip(" \t")
        if self.NO_START.match(text):
            raise self._error(f"starts with {text[0]!r}, which means something else in YAML, or nothing; quote "
                              f"the whole: '{text}'")
        if re.search(r":[ \t]|:$", text):
            raise self._error("has a second ':' in the line; quote the value")
        if text in self.WORDS:
            return self.WORDS[text]
        try:
            if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text):
                return int(text)
            if re.fullmatch(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", text):
                return _finite(text)
        except ValueError:
            raise self._error("is too large a number") from None
        return text

    def _quoted(self, text: str) -> str:
        match = self.QUOTES.match(text)
        if not match or not self.END.match(text, match.end()):
            raise self._error("is not a double-quoted text in one line" if text[0] == '"' else
                              "has a quote that does not end in its line")
        inner = match[0][1:-1]
        if text[0] == "'":
            return inner.replace("''", "'")
        try:                                                 # JSON has pairs of surrogates; half a character is none
            value = self.ESCAPE.sub(lambda one: self.ESCAPES.get(one[1]) or chr(int(one[1][1:], 16)), inner)
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except (ValueError, OverflowError):
            raise self._error("has a backslash that means nothing; write two, or quote with '") from None

    def _flow(self, text: str) -> Any:
        """A collection within one line: [], {}, [a, 'b'], {exclusive: true, regex: '…'}."""
        tokens, at = list[str](), 0
        while not self.END.match(text, at):
            match = self.FLOW.match(text, at)
            if not match:
                raise self._error("is not a list or mapping in one line")
            tokens.append(match[1].rstrip(" \t"))
            at = match.end()
        tokens.reverse()
        value = self._flow_value(tokens)
        if tokens:
            raise self._error("goes on after its end")
        return value

    def _flow_value(self, tokens: list[str]) -> Any:
        """Takes it from the end of the tokens, which are in reverse."""
        token = tokens.pop() if tokens else "]"
        if token not in "[{":
            if token in "]},:" or token[0] == "?":
                raise self._error("is not a list or mapping in one line")
            return self._scalar(token)
        items: list[Any] = []
        while tokens and tokens[-1] != {"[": "]", "{": "}"}[token]:
            items.append(self._flow_pair(tokens) if token == "{" else self._flow_value(tokens))
            if tokens and tokens[-1] == ",":
                tokens.pop()
            elif not tokens or tokens[-1] not in "]}":
                raise self._error("lacks a comma or its end")
        if not tokens:
            raise self._error("does not end in its line")
        tokens.pop()
        if token == "{" and len(dict(items)) < len(items):
            raise self._error("has a key twice")
        return dict(items) if token == "{" else items

    def _flow_pair(self, tokens: list[str]) -> tuple[str, Any]:
        key = tokens.pop()
        if not re.fullmatch(f"{self.QUOTED}|{self.PLAIN_KEY}", key):
            raise self._error("has a key that this reader does not take; quote it")
        if not tokens or tokens.pop() != ":":
            raise self._error("has a key without a value")
        return self._key(key), self._flow_value(tokens)


# -- What a regex can match. To be skipped at first reading.
#
# Read into a tree, a regex tells in how many ways a text can be matched, which bounds the steps of Python's backtracking, and
# what remains of it when a character is read, by which a text is found that several regexes match.

Chars = frozenset[str]
START, END = "start", "end"                                  # what ^ and $ match: any number of these stand around a text
EDGES: Chars = frozenset({START, END})
ASCII: Chars = frozenset(map(chr, range(128)))
BEYOND: Chars = frozenset("é٣\u2003€")                       # stand for all others: letters, digits, spaces, and the rest
ALPHABET = ASCII | BEYOND
NOTHING: Chars = frozenset()
HARMLESS_WAYS, ENDLESS_WAYS = 10**5, 2 * 10**7
MAX_SEARCH, MAX_WORK, MANY = 1000, 20_000, 8                 # steps and reads for a common text; repeats that are counted in it


class NotAnalysable(ValueError):
    """A regex that has what no tree can show; the text says what."""


class Exponential(ValueError):
    """A regex for which each further character multiplies the ways of matching; the text says why."""


@contextlib.contextmanager
def not_too_deep() -> Iterator[None]:
    """All this calls itself once for each bracket in another: NotAnalysable where those are too many."""
    try:
        yield
    except RecursionError:
        raise NotAnalysable("too many brackets in each other") from None


# Each kind of Tree has: `first`, the characters it can start with; `least`, its shortest length; ways(), in how many ways it can
# match in one place of a text of this length at most, one of `after` being next; read(), what can remain of it when a character
# is read.

class OneOf(NamedTuple):
    """One character of a set."""
    first: Chars
    least: int = 1

    def ways(self, after: Chars, length: int) -> int:
        return 1

    def read(self, char: str) -> set[Chain]:
        return {Chain(())} if char in self.first else set()


@dataclass(frozen=True)
class Chain:
    """One part after the other: the ways multiply."""
    parts: tuple[Tree, ...]

    @functools.cached_property
    def first(self) -> Chars:
        return functools.reduce(lambda after, part: opening(part, after), reversed(self.parts), NOTHING)

    @functools.cached_property
    def least(self) -> int:
        return sum(part.least for part in self.parts)

    def ways(self, after: Chars, length: int) -> int:
        total = 1
        for part in reversed(self.parts):
            total *= part.ways(after, length)
            after = opening(part, after)
        return not_endless(total)

    def read(self, char: str) -> set[Chain]:
        found: set[Chain] = set()
        for at, part in enumerate(self.parts):
            found |= {Chain(rest.parts + self.parts[at + 1:]) for rest in part.read(char)}
            if part.least:
                break
        return found


@dataclass(frozen=True)
class Choice:
    """One part or another: the ways of those add up that can start with the same character."""
    parts: tuple[Tree, ...]

    @functools.cached_property
    def first(self) -> Chars:
        return NOTHING.union(*(part.first for part in self.parts))

    @functools.cached_property
    def least(self) -> int:
        return min(part.least for part in self.parts)

    def ways(self, after: Chars, length: int) -> int:
        options = [(opening(part, after), part.ways(after, length)) for part in self.parts]
        sums = [sum(ways for chars, ways in options if char in chars) for char in self.first | after]
        return max(*sums, *(ways for _, ways in options))

    def read(self, char: str) -> set[Chain]:
        return {rest for part in self.parts for rest in part.read(char)}


class Repeat(NamedTuple):
    """A part several times: each length is a way, but where the next character tells whether it goes on."""
    part: Tree
    low: int = 0
    high: float = math.inf       # which it also is where it is more than an ID has characters

    @property
    def first(self) -> Chars:
        return self.part.first if self.high else NOTHING

    @property
    def least(self) -> int:
        return self.low * self.part.least

    @functools.lru_cache(maxsize=1000)                       # noqa: B019 - equal ones share it
    def ways(self, after: Chars, length: int) -> int:
        again = self.part.ways(opening(self.part, after) if not self.part.least else self.first, length) if self.high > 1 else 1
        if self.high == math.inf and not self.part.least:
            raise Exponential("it repeats what can be empty")
        if self.high == math.inf and again > 1:
            raise Exponential("it repeats what can itself match a text in several ways")
        if not self.first & after and self.part.ways(self.first | after, length) == 1:
            return 1
        most = int(min(self.high, length // max(1, self.part.least)))
        return not_endless(max(1, most - self.low + 1) * int(again ** max(0, most - 1)) * self.part.ways(after, length))

    def read(self, char: str) -> set[Chain]:
        again = Repeat(self.part, max(0, self.low - 1), self.high - 1 if self.high <= MANY else math.inf)
        return {Chain((*rest.parts, again)) for rest in self.part.read(char)} if self.high else set()


Tree = OneOf | Chain | Choice | Repeat


def not_endless(ways: int) -> int:
    if ways > ENDLESS_WAYS:
        raise Exponential(f"it can match a text in more than {ENDLESS_WAYS:,} ways")
    return ways


def opening(tree: Tree, after: Chars) -> Chars:
    """What can come where it stands, if `after` is what can follow it."""
    return tree.first if tree.least else tree.first | after


def chain(*parts: Tree) -> Chain:
    """One chain, without chains in it."""
    return Chain(tuple(one for part in parts for one in (part.parts if isinstance(part, Chain) else (part,))))


def letters(*trees: Tree) -> list[str]:
    """One letter, the plainest, for all characters that the trees don't tell apart."""
    todo, sets = list[Tree](trees), set[Chars]()
    for tree in todo:
        if isinstance(tree, OneOf):
            sets.add(tree.first)
        else:
            todo += (tree.part,) if isinstance(tree, Repeat) else tree.parts
    groups = dict[tuple[bool, ...], str]()                   # which of the sets a character is in → the plainest such
    for char in sorted(ALPHABET | EDGES, key=lambda char: (not char.islower(), char)):
        groups.setdefault(tuple(char in chars for chars in sets), char)
    return list(groups.values())


@not_too_deep()
def common(*trees: Tree) -> str | None:
    """A shortest text that all of them match as a whole, or None if there is none; NotAnalysable."""
    @functools.cache                                         # the same rests come again beside others
    def read(rests: frozenset[Tree], char: str) -> frozenset[Tree]:
        return frozenset(rest for tree in rests for rest in tree.read(char))

    alphabet, work = letters(*trees), 0
    todo = [tuple(frozenset({tree}) for tree in trees)]      # of each regex what may remain of it
    texts = {todo[0]: ""}                                    # what was read until that remained
    for at in todo:
        if all(any(not tree.least for tree in rests) for rests in at):
            return texts[at]
        shared = frozenset.intersection(*(NOTHING.union(*(tree.first for tree in rests)) for rests in at))
        for char in filter(shared.__contains__, alphabet):
            work += sum(map(len, at))
            if len(todo) > MAX_SEARCH or work > MAX_WORK:
                raise NotAnalysable("too many repeats")
            then = tuple(read(rests, char) for rests in at)
            if then not in texts:
                texts[then] = texts[at] + char * (char not in EDGES)
                todo.append(then)
    return None


# What Python's parser calls it → what it is called here.
OPAQUE = {"ASSERT": "a look-around", "ASSERT_NOT": "a look-around", "FAILURE": "a look-around", "GROUPREF": "a back-reference",
          "GROUPREF_EXISTS": "a condition", "ATOMIC_GROUP": "an atomic group", "POSSESSIVE_REPEAT": "a possessive repeat",
          "AT": "a word boundary", "SUBPATTERN": "flags in its middle"}
NEAR_ASCII = {"\u0130": "i", "\u0131": "i", "\u017f": "s", "\u212a": "k"}     # the same letter where case does not count
CATEGORIES = {"DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S", "WORD": r"\w", "NOT_WORD": r"\W"}


@not_too_deep()
def tree_of(pattern: re.Pattern[str]) -> Tree:
    """The tree of a regex; NotAnalysable. Python's own parser reads it: it is private (re._parser), but has kept its shape for
    twenty years, and whatever it says that is not known here makes the regex not analysable, no more.
    """
    if pattern.flags & (re.ASCII | re.MULTILINE):
        raise NotAnalysable("the flag a or m")
    return _chain(importlib.import_module("re._parser").parse(pattern.pattern), pattern.flags)


def _chain(items: Iterable[Any], flags: int) -> Chain:
    return chain(*(_part(str(name), value, flags) for name, value in items))


def _part(name: str, value: Any, flags: int) -> Tree:
    if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return OneOf(_set(name, value, flags))
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, items = value
        return Repeat(_chain(items, flags), min(int(low), MAX_ID_BYTES + 1), high if high <= MAX_ID_BYTES else math.inf)
    if name == "BRANCH":
        return Choice(tuple(_chain(items, flags) for items in value[1]))
    if name == "SUBPATTERN" and not value[1] and not value[2]:
        return _chain(value[3], flags)
    if name == "AT" and "BOUNDARY" not in str(value):
        return OneOf(frozenset({START if "BEGINNING" in str(value) else END}))
    raise NotAnalysable(OPAQUE.get(name, name))


def _set(name: str, value: Any, flags: int) -> Chars:
    """The characters of the alphabet that one character of a regex can be. One beyond ASCII counts as all of those; to be
    none of it excludes none of them.
    """
    if name == "IN":
        sets = [(str(part), _set(str(part), item, flags)) for part, item in value if str(part) != "NEGATE"]
        if str(value[0][0]) != "NEGATE":
            return NOTHING.union(*(found for _, found in sets))
        return ALPHABET.difference(*(found if part == "CATEGORY" else found & ASCII for part, found in sets))
    if name == "ANY":
        return ALPHABET - ({"\n"} if not flags & re.DOTALL else NOTHING)
    if name == "NOT_LITERAL":
        return ALPHABET - (_set("LITERAL", value, flags) & ASCII)
    if name == "CATEGORY":
        return frozenset(filter(re.compile(CATEGORIES[str(value).removeprefix("CATEGORY_")]).match, ALPHABET))
    low, high = value if name == "RANGE" else (value, value)
    found = frozenset(char for char in ASCII if low <= ord(char) <= high) | (BEYOND if high > 127 else NOTHING)
    if flags & re.I:
        found |= frozenset(ascii for char, ascii in NEAR_ASCII.items() if low <= ord(char) <= high)
    return frozenset(one for char in found for one in (char.lower(), char.upper()) if one in ALPHABET) if flags & re.I else found


# A regex without any of these is harmless, so that a thousand plain registrations are read at once: a group that is repeated, a
# look-around or flag, a back-reference or word boundary, a possessive repeat, three places where there is a choice.
DESERVES_A_LOOK = re.compile(r"\)\s*[*+?{]|\(\?(?!:|P<)|\\[1-9bB]|[*+?}]\+|(?:[*+?{|].*){3}", re.S)


class Cost(NamedTuple):
    """What a match can cost: "harmless", "heavy", "exponential" or "not analysable", and why."""
    verdict: str
    ways: int = 0
    reason: str = ""


@functools.lru_cache(maxsize=1000)
def cost_of(pattern: re.Pattern[str], uri: bool = False) -> Cost:
    """What it costs to match the start of an ID of 255 characters, or a URI as a whole."""
    try:
        with not_too_deep():
            ways = tree_of(pattern).ways(ALPHABET if uri else NOTHING, MAX_URI_BYTES if uri else MAX_ID_BYTES)
    except NotAnalysable as error:
        return Cost("not analysable", 0, str(error))
    except Exponential as error:
        return Cost("exponential", 0, str(error))
    return Cost("harmless" if ways <= HARMLESS_WAYS else "heavy", ways, f"it can match a text in {ways:,} ways")


def glance_at_cost(pattern: re.Pattern[str], uri: bool = False) -> Cost:
    """The cost, worked out only for a regex that does not look harmless."""
    return cost_of(pattern, uri) if uri or DESERVES_A_LOOK.search(pattern.pattern) else Cost("harmless")


# -- The doctor: what can be used, and is not what was meant. To be skipped at first reading.

ID_FORMS = {                                                 # all IDs on a server; those of them that one meets
    "users":   (r"@[!-9;-~]+:(?:%s)", r"@[a-z0-9._=/+-]+:(?:%s)"),
    "aliases": (r"#[^:\0]+:(?:%s)",   r"#[a-z0-9._=/+-]+:(?:%s)"),
    "rooms":   (r"![^\0]+",           r"![A-Za-z0-9]+:(?:%s)"),
}
NOUNS = {"users": "user ID", "aliases": "alias", "rooms": "room ID"}
ANYTHING = Repeat(OneOf(ALPHABET | EDGES))
BEFORE, BEHIND = Repeat(OneOf(frozenset({START}))), Repeat(OneOf(frozenset({END})))
PLAIN_DOT = re.compile(BRACKETS.pattern + r"|(?<!\\.)(?<=[\w-])\.(?=[\w-])", re.S)
EXAMPLE_TOKEN = re.compile(r"example|change.?me|wfghWEGh3wg|ugw8243igya|30c05ae90a24|312df522183e|this value is generated|^<.*>$"
                           r"|^(.)\1*$|^(?:as|hs)?[-_]?(?:token|secret|test|password)[-_]?\d*$", re.I)
SHORT_TOKEN = 16                                             # characters

# name: (level, what there is, why it matters, what would be right)
COMPLAINTS = {
    "never": ("error", "'{regex}' matches no {noun}",
              "it is matched from the start of the whole ID, which begins with '{sigil}' and ends with the server's name",
              "write '{better}'"),
    "elsewhere": ("error", "'{regex}' matches no {noun} of {server}", "that is this homeserver, and IDs of another are not made here",
                  "write '{better}', or give the other name as server_name (--server-name)"),
    "empty": ("error", "is empty", "an empty regex matches every ID", "write '{better}', or leave the entry out"),
    "everybody": ("error", "'{regex}' claims every {noun} exclusively", "nobody else could have one",
                  "write '{better}', or \"exclusive\": false to hear of all of them"),
    "exclusive rooms": ("warning", "'{regex}' is exclusive", "nobody chooses a room's ID, so that there is nothing to reserve, and "
                        "the specification leaves undefined what it would mean", "write \"exclusive\": false"),
    "no sigil": ("warning", "'{regex}' does not begin with '{sigil}'", "it claims what has the rest anywhere in it, such as {example}",
                 "write '{better}'"),
    "dot": ("warning", "'{regex}' has a '.' where a plain one seems to be meant", "it stands for any character", "write '{better}'"),
    "twice": ("warning", "'{regex}' stands here a second time", "an ID has to match once only", "leave one out"),
    "unanchored": ("warning", "'{regex}' is also found within {example}", "Dendrite and Conduit search for it anywhere in an ID, "
                   "Synapse and this program look at the start only", "write '{better}'"),
    "part": ("warning", "'{regex}' matches no {noun} as a whole", "{example} matches because nothing is asked of its rest, and the "
             "specification does not say whether that counts", "write '{better}'"),
    "posix": ("warning", "'{regex}' has a POSIX character class",
              "Synapse gives it to Python, which has none and reads a set of its letters", "write '{better}'"),
    "not analysable": ("warning", "'{regex}' can't be analysed, for it has {reason}", "how long a match takes can't be told; Dendrite "
                       "(Go) and Conduit (Rust) refuse look-arounds, back-references, conditions, atomic groups, possessive repeats",
                       "do without it"),
    "heavy": ("warning", "'{regex}' can be slow: {reason}", "while an ID is matched nothing else runs",
              "write sets that can't match what follows them, such as [^_]*_ for .*_"),
    "open": ("warning", "'{regex}' names no server{more}", "only users of this server count here, but Dendrite and Conduit also take "
             "those of others, such as {example}", "write '{better}' if it is to move there"),
    "token": ("warning", "{looks}", "whoever guesses it can act as every user of this application service, or feed it with events",
              "write a long random text, as `python asbridge.py generate` makes it"),
    "any address": ("warning", "is '{url}'", "that is an address to listen on, not one to call", "write '{better}'"),
    "path": ("error", "is '{url}'", "the homeserver itself puts /_matrix/app/… behind it", "write '{better}'"),
    "own port": ("error", "is '{url}'", "that is the homeserver's own port: it would send to itself",
                 "write where the application service listens"),
    "unknown": ("warning", "nobody here reads this key", "it has no effect", "the nearest one is '{better}'"),
    "uri": ("error", "makes {id} of {uri}", "that is outside of the namespaces of this registration, and so never found",
            "write an ID that matches one of its regexes: {regexes}"),
    "overlap": ("error", "{mine} matches {example}, and so does {theirs}", "both are exclusive: neither may create it",
                "write regexes without a common ID, or \"exclusive\": false in one"),
    "same sender": ("error", "is '{sender}', as in {other}", "two application services would be one user",
                    "write another localpart"),
    "taken sender": ("error", "{id} is in {theirs}", "that one is exclusive and acts as it, too; Synapse would not let it be made",
                     "write another localpart"),
}


def nearest(key: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(key, known, 1, 0.0)[0]


def complaint(name: str, where: str, **words: object) -> Finding:
    level, what, why, right = (text.format(**words) for text in COMPLAINTS[name])
    return Finding(where, what, right, why, level)


def ids_of(kind: str, servers: str, usual: bool = False) -> Tree:
    """The IDs of a kind on the servers whose names match a regex: all, or those that one meets."""
    return chain(BEFORE, tree_of(re.compile(ID_FORMS[kind][usual].replace("%s", servers))), BEHIND)


def shared_id(ids: Tree, *namespaces: Namespace) -> str | None:
    """One of these IDs that all the namespaces claim; None if there is none, or if their regexes can't be analysed."""
    with contextlib.suppress(NotAnalysable):
        id = common(ids, *(chain(BEFORE, tree_of(one.pattern), ANYTHING) for one in namespaces))
        return id if id and all(one.pattern.match(id) for one in namespaces) else None
    return None


Checks = Iterator[tuple[str, JsonObject]]                    # names of complaints, each with the words that go into it


class NamespaceDoctor:
    """Examines one entry of `namespaces`."""

    def __init__(self, namespace: Namespace, server_name: str, where: str = "") -> None:
        self.namespace, self.kind, self.regex, self.pattern = namespace, namespace.kind, namespace.regex, namespace.pattern
        self.where = f"{where}namespaces.{self.kind}[{namespace.index}].regex"
        self.cost = glance_at_cost(self.pattern)
        self.sigil = KINDS[self.kind]
        self.server_name, self.server = server_name, re.sub(r"([.\[\]])", r"\\\1", server_name)      # the second as a regex
        self.usual = f"{self.sigil}irc_.*:{self.server}"     # to be written where nothing better is known
        self.with_sigil = re.sub(r"^\^?(?:\\?[@#!])?", self.sigil, self.regex)
        self.grouped = f"(?:{self.regex})" if "|" in self.regex else self.regex     # so that what is behind it is for all of it
        self.words = {"regex": self.regex, "noun": NOUNS[self.kind], "sigil": self.sigil, "server": server_name,
                      "reason": self.cost.reason, "better": self.usual}

    @functools.cached_property
    def everybody(self) -> bool:
        return all(self.pattern.match(f"{self.sigil}{name}:{self.server_name}") for name in ("alice", "x.7", "_-z", "0"))

    def findings(self, checks: Iterable[tuple[str, JsonObject]]) -> list[Finding]:
        return [complaint(name, self.where, **{**self.words, **words}) for name, words in checks]

    def examine(self) -> Checks:
        if self.kind == "rooms" and self.namespace.exclusive:
            yield "exclusive rooms", {}
        if self.cost.verdict == "exponential":
            return                                           # the reader has said so
        yield from self.at_once()
        if not self.regex:
            yield "empty", {}
        elif not self.everybody:
            yield from list(self.never()) or (*self._spelling(), *self._read_differently())

    def at_once(self) -> Checks:
        """Whether a match can take long, or nobody can tell; whether it leaves nothing to anybody else."""
        if self.cost.verdict in ("heavy", "not analysable"):
            yield self.cost.verdict, {}
        if self.regex and self.everybody and self.namespace.exclusive and self.kind != "rooms":
            yield "everybody", {}

    def match(self, servers: str, regex: re.Pattern[str] | None = None, usual: bool = False) -> str | None:
        """An ID on these servers that it, or another regex, matches from the start."""
        return common(ids_of(self.kind, servers, usual), chain(BEFORE, tree_of(regex or self.pattern), ANYTHING))

    def never(self) -> Checks:
        """Whether it can match no ID at all, or none of this server."""
        with contextlib.suppress(NotAnalysable):
            if not self.match(self.server):
                better = self._that_works(self.with_sigil, self.regex.removesuffix("$"),
                                          re.sub(r":[^:]*?(\$?)$", lambda match: f":{self.server}{match[1]}", self.regex))
                yield "elsewhere" if self.match(r"[\w.:-]+") else "never", {"better": better}

    def _that_works(self, *regexes: str) -> str:
        """The first that claims IDs of this server and is not exponential, or else the usual one."""
        for regex in regexes:
            with contextlib.suppress(re.error, NotAnalysable):
                pattern = compile_regex(regex)
                if cost_of(pattern).verdict != "exponential" and self.match(self.server, pattern) is not None:
                    return regex
        return self.usual

    def _spelling(self) -> Checks:
        plain = PLAIN_DOT.sub(lambda match: r"\." if match[0] == "." else match[0], self.regex)
        if plain != self.regex:
            yield "dot", {"better": plain}
        if self.regex != self.pattern.pattern:
            yield "posix", {"better": self.pattern.pattern}

    def _read_differently(self) -> Checks:
        """Where it matters whether a homeserver looks at the start of an ID, anywhere in it, or at the whole."""
        with contextlib.suppress(NotAnalysable):
            tree, usual = tree_of(self.pattern), ids_of(self.kind, self.server, usual=True)
            example = self.match(self.server, usual=True)
            if self.sigil not in self.regex:
                yield "no sigil", {"example": example, "better": self.with_sigil}
            within = common(usual, chain(BEFORE, Repeat(OneOf(ALPHABET), 1), tree, ANYTHING))
            if within and self.pattern.search(within) and not self.pattern.match(within):
                yield "unanchored", {"example": within, "better": f"^(?:{self.regex})" if tree.first <= {self.sigil, START} else
                                     re.sub(rf"\|(?![{self.sigil}^])", f"|{self.sigil}", self.regex)}
            if example and not common(usual, chain(BEFORE, tree, BEHIND)):
                yield "part", {"example": example, "better": self.grouped + ".*"}

    def with_server(self) -> str:
        return self._that_works(f"{self.grouped.removesuffix('$').removesuffix(':.*')}:{self.server}",
                                re.sub(r":(?:\[\^:\]|\.)[*+]$", f":{self.server}", self.regex))

    def stranger(self) -> str | None:
        """A user or alias of another server that it matches."""
        with contextlib.suppress(NotAnalysable):
            if self.regex and self.kind != "rooms" and self.match(self.server):
                return self.match("elsewhere", usual=True)
        return None


def slow_uri(rule: UriRule, where: str) -> list[Finding]:
    cost = cost_of(rule.pattern, uri=True)
    return [complaint(cost.verdict, where, regex=rule.pattern.pattern, reason=cost.reason)] if cost.verdict != "harmless" else []


class Doctor:
    """Examines registrations that can be used: what is not as it should be, or may not be as it is meant."""

    def __init__(self, server_name: str, port: int | None = None) -> None:
        self.server, self.port = server_name, port           # of the homeserver

    def examine(self, registrations: Sequence[tuple[str, Registration]],
                rests: Iterable[tuple[str, Sequence[Namespace]]] = ()) -> list[Finding]:
        """Each registration is given with where it stands, and so are namespaces of which no more could be read."""
        found: list[Finding] = []
        for where, one in registrations:
            namespaces = [namespace for kind in KINDS for namespace in one.namespaces[kind]]
            found += (*self._keys(where, one), *self._url(f"{where}: url", one.url),
                      *self._namespaces(where, namespaces), *self._uris(where, one))
        for where, rest in rests:
            found += self._namespaces(where, rest)
        for first, second in itertools.combinations(registrations, 2):
            found += (*self._senders(*first, *second), *self._senders(*second, *first), *self._overlaps(*first, *second))
        return found

    def _keys(self, where: str, one: Registration) -> Iterator[Finding]:
        for key in ("as_token", "hs_token"):
            token = getattr(one, key)
            if EXAMPLE_TOKEN.search(token):
                yield complaint("token", f"{where}: {key}", looks="looks like an example")
            elif len(token) < SHORT_TOKEN:
                yield complaint("token", f"{where}: {key}", looks=f"has {len(token)} characters only")
        for key in one.unknown:
            yield complaint("unknown", f"{where}: {key}", better=nearest(key, KNOWN_KEYS))

    def _url(self, where: str, url: str | None) -> Iterator[Finding]:
        parts = urllib.parse.urlsplit(url or "")
        if parts.hostname in ("0.0.0.0", "::"):
            yield complaint("any address", where, url=url, better=parts._replace(netloc=f"127.0.0.1:{parts.port or 80}").geturl())
        if "/_matrix" in parts.path:
            yield complaint("path", where, url=url, better=str(url).partition("/_matrix")[0])
        if self.port and parts.port == self.port and parts.hostname in ("localhost", "127.0.0.1", "0.0.0.0", "::1", "::"):
            yield complaint("own port", where, url=url)

    def _namespaces(self, where: str, namespaces: Sequence[Namespace]) -> Iterator[Finding]:
        strangers = []                                       # one finding for all of them, for most regexes match some
        for at, one in enumerate(namespaces):
            doctor = NamespaceDoctor(one, self.server, f"{where}: ")
            checks = list(doctor.examine())
            yield from doctor.findings(checks)
            if any((one.kind, one.regex) == (other.kind, other.regex) for other in namespaces[:at]):
                yield complaint("twice", doctor.where, regex=one.regex)
            elif "part" not in dict(checks) and (example := doctor.stranger()):
                strangers.append((doctor, example))
        if strangers:
            (doctor, example), *others = strangers
            yield complaint("open", doctor.where, regex=doctor.regex, example=example, better=doctor.with_server(),
                            more="".join([f"; neither does '{other.regex}'" for other, _ in others]))

    def _uris(self, where: str, one: Registration) -> Iterator[Finding]:
        for rule in one.uris:
            path = f"{where}: uris.{rule.kind}: '{rule.pattern.pattern}'"
            yield from slow_uri(rule, path)
            with contextlib.suppress(NotAnalysable):
                uri = common(chain(BEFORE, tree_of(rule.pattern), BEHIND))
                id = uri and rule.apply(uri, self.server)
                if id and not Registrations(self.server, [one]).is_own(one, rule.kind, id):
                    yield complaint("uri", path, id=id, uri=uri, regexes=one.regexes(rule.kind))

    def _senders(self, where: str, one: Registration, other_where: str, other: Registration) -> Iterator[Finding]:
        id = one.sender(self.server)
        owner = next((one for one in other.namespaces["users"] if one.exclusive and one.pattern.match(id)), None)
        if owner and id != other.sender(self.server):
            yield complaint("taken sender", f"{where}: sender_localpart", id=id, theirs=f"{owner} of {other_where}")

    def _overlaps(self, where: str, one: Registration, other_where: str, other: Registration) -> Iterator[Finding]:
        if one.sender_localpart == other.sender_localpart:
            yield complaint("same sender", f"{other_where}: sender_localpart", sender=one.sender_localpart, other=where)
        for kind in ("users", "aliases"):
            ids = ids_of(kind, re.escape(self.server))
            for mine, theirs in itertools.product(one.namespaces[kind], other.namespaces[kind]):
                if mine.exclusive and theirs.exclusive and (id := shared_id(ids, mine, theirs)):
                    yield complaint("overlap", f"{where}: namespaces", mine=mine, example=id, theirs=f"{theirs} of {other_where}")


def said_at_start(registration: Registration, server_name: str, thorough: bool) -> list[Finding]:
    """Of the doctor's findings those that are said at the start: what can be slow, what keeps everybody out and, which takes
    time to find out, what can never match.
    """
    doctors = [NamespaceDoctor(one, server_name) for kind in KINDS for one in registration.namespaces[kind]]
    found = [finding for doctor in doctors
             for finding in doctor.findings((*doctor.at_once(), *(doctor.never() if thorough else ())))]
    return found + [finding for rule in registration.uris for finding in slow_uri(rule, f"uris.{rule.kind}")]


# ============================================================================
# 4. Room rules
# ============================================================================
# What may happen in a room, and who may see it: the shape of events, power
# levels, membership, redaction, history visibility; pure functions over a
# room's state. Spec: room versions 10, 11 and 12 (Authorisation rules,
# Redactions); Client-Server API (Room history visibility).
# Does not know of storage or HTTP. A refusal is a MatrixError that says why.

@dataclass(frozen=True)
class RoomVersion:
    """In what the room versions differ, as far as one server can see it."""
    id: str
    create_has_creator: bool      # m.room.create repeats its sender as content.creator
    create_is_kept: bool          # a redaction leaves m.room.create as it is, and power_levels.invite
    creators_rule: bool           # creators have all power for ever, and the room ID is the hash of m.room.create


ROOM_VERSIONS = {version.id: version for version in (
    #           id    create_has_creator  create_is_kept  creators_rule
    RoomVersion("10", True,               False,          False),
    RoomVersion("11", False,              True,           False),
    RoomVersion("12", False,              True,           True),
)}

# What a redaction leaves of content, by type (room version 11, Redactions).
KEPT_BY_REDACTION = {
    "m.room.member":             ("membership", "join_authorised_via_users_server"),
    "m.room.create":             ("creator",),
    "m.room.join_rules":         ("join_rule", "allow"),
    "m.room.power_levels":       ("ban", "events", "events_default", "kick", "redact", "state_default", "users", "users_default"),
    "m.room.history_visibility": ("history_visibility",),
}

ALL_POWER = 2**53                # of a creator in room version 12: above every level that can be given
JOIN_RULES = ("public", "invite", "knock", "restricted", "knock_restricted")
OPEN_RULES = ("public", "knock", "knock_restricted")         # anybody may know that there is such a room
RESTRICTED_RULES = ("restricted", "knock_restricted")        # whoever is in a room that the rule names may join
LEVELS = ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")
STRIPPED_STATE = ("m.room.create", "m.room.name", "m.room.avatar", "m.room.topic", "m.room.join_rules",
                  "m.room.canonical_alias", "m.room.encryption")     # what an invited user is shown


class StateEvent(NamedTuple):
    """One entry of a room's state."""
    tick: int
    sender: str
    content: JsonObject


class Draft(NamedTuple):
    """An event that somebody wants to send; `state_key` None: not a state event."""
    type: str
    sender: str
    content: JsonObject
    state_key: str | None = None
    redacts: str | None = None


class Event(NamedTuple):
    """A stored event, with what its `unsigned` is made of."""
    tick: int
    type: str
    state_key: str | None
    sender: str
    ts: int
    json: str                     # the whole event but for unsigned
    redacted_because: str | None  # the redaction's json
    prev_content: str | None
    replaces_state: str | None    # ID of the state event before it
    device_id: str | None         # who sent it with which client transaction ID
    txn_id: str | None
    related: int                  # whether anything relates to it

    @property
    def event_id(self) -> str:
        return self.json[13:57]   # {"event_id":"$…43 characters…",

    @property
    def content(self) -> JsonObject:
        return cast(JsonObject, json.loads(self.json)["content"])

    def unsigned(self, now: int) -> str:
        parts = f'"age":{max(0, now - self.ts)}'
        if self.prev_content is not None:
            parts += f',"prev_content":{self.prev_content},"replaces_state":"{self.replaces_state}"'
        if self.redacted_because is not None:
            parts += f',"redacted_because":{self.redacted_because}'
        return parts

    def for_client(self, now: int, sender: str | None = None, device_id: str | None = None, more: str = "") -> Raw:
        """The event as clients get it; the device that sent it finds its transaction ID again. `more`: further parts of unsigned,
        each after a comma.
        """
        if self.txn_id is not None and self.sender == sender and self.device_id == device_id:
            more += f',"transaction_id":{encode_basestring(self.txn_id)}'
        return Raw(f'{self.json[:-1]},"unsigned":{{{self.unsigned(now)}{more}}}}}')

    def for_appservice(self, now: int, more: str = "") -> str:
        """The event as an application service gets it: for old software with what is in `unsigned` at the top, too, and with
        `user_id`. `more`: further parts of unsigned, each after a comma.
        """
        unsigned = self.unsigned(now)
        return f'{self.json[:-1]},"user_id":{json.dumps(self.sender)},{unsigned},"unsigned":{{{unsigned}{more}}}}}'


class RoomState:
    """A room's version and current state, and what the rules read in it."""

    def __init__(self, version: RoomVersion) -> None:
        self.version = version
        self.events: dict[tuple[str, str], StateEvent] = {}
        self.joined: set[str] = set()

    def put(self, type: str, state_key: str, event: StateEvent) -> None:
        self.events[type, state_key] = event
        if type == "m.room.member":
            (self.joined.add if event.content.get("membership") == "join" else self.joined.discard)(state_key)

    def content(self, type: str, state_key: str = "") -> JsonObject:
        event = self.events.get((type, state_key))
        return event.content if event else {}

    def knows(self, user_id: str) -> bool:
        """Whether the user ever had to do with the room, and so may know that there is one."""
        return ("m.room.member", user_id) in self.events

    def membership(self, user_id: str) -> str:
        return str(self.content("m.room.member", user_id).get("membership", "leave"))

    @property
    def levels(self) -> JsonObject | None:
        """Content of m.room.power_levels, if there is such an event."""
        event = self.events.get(("m.room.power_levels", ""))
        return event.content if event else None

    @property
    def join_rule(self) -> str:
        return str(self.content("m.room.join_rules").get("join_rule", "invite"))

    @property
    def creators(self) -> set[str]:
        create = self.events.get(("m.room.create", ""))
        if not create:
            return set()
        more = create.content.get("additional_creators") if self.version.creators_rule else None
        return {create.sender, *(more if isinstance(more, list) else ())}

    def power(self, user_id: str) -> int:
        levels = self.levels
        if self.version.creators_rule and user_id in self.creators:
            return ALL_POWER
        if levels is None:
            return 100 if user_id in self.creators else 0
        level = levels.get("users", {}).get(user_id, levels.get("users_default", 0))
        return int(level)

    def needed(self, action: str) -> int:
        """The power needed to "invite", "kick", "ban" or "redact"."""
        return int((self.levels or {}).get(action, 0 if action == "invite" else 50))

    def needed_to_send(self, type: str, is_state: bool) -> int:
        levels, state_default = self.levels or {}, 0 if self.levels is None else 50
        default = levels.get("state_default", state_default) if is_state else levels.get("events_default", 0)
        return int(levels.get("events", {}).get(type, default))


# -- May this be sent? Authorisation rules, numbered as in room version 12; in 10 and 11 they say the same, but for creators.

def forbidden(error: str) -> MatrixError:
    return MatrixError("M_FORBIDDEN", error)


def authorise(room: RoomState, draft: Draft) -> None:
    """Raises M_FORBIDDEN (M_BAD_STATE for somebody banned) if the room's rules refuse the event."""
    if draft.type == "m.room.create":                                                            # rule 1
        if room.events:
            raise forbidden("the room has been created already")
        return
    if draft.type == "m.room.member":                                                            # rule 5
        return authorise_membership(room, draft)
    if draft.sender not in room.joined:                                                          # rule 6
        raise forbidden(f"{draft.sender} is not in room")
    invites = draft.type == "m.room.third_party_invite"                                          # rule 7, else 8
    needed = room.needed("invite") if invites else room.needed_to_send(draft.type, draft.state_key is not None)
    if room.power(draft.sender) < needed:
        raise forbidden(f"{draft.sender} has power {room.power(draft.sender)}; {draft.type} needs {needed}")
    if draft.state_key and draft.state_key[0] == "@" and draft.state_key != draft.sender:        # rule 9
        raise forbidden(f"a state key that is a user ID may be set by that user only, not by {draft.sender}")
    if draft.type == "m.room.power_levels":                                                      # rule 10
        authorise_power_levels(room, draft)


def check_shape(draft: Draft, server_name: str) -> None:
    """What holds of every event: the sizes of its parts; who is invited is a local user."""
    for key, text in (("type", draft.type), ("state_key", draft.state_key or "")):
        if len(text.encode("utf-8", "replace")) > MAX_ID_BYTES:
            raise MatrixError("M_INVALID_PARAM", f"the {key} of an event may have {MAX_ID_BYTES} bytes at most")
    if draft.type == "m.room.member" and draft.content.get("membership") == "invite":
        check_id("@", draft.state_key, server_name)


def is_allowed(room: RoomState, draft: Draft) -> bool:
    try:
        authorise(room, draft)
        return True
    except MatrixError:
        return False


def authorise_membership(room: RoomState, draft: Draft) -> None:
    target, membership = draft.state_key, draft.content.get("membership")
    rule = MEMBERSHIP_RULES.get(membership) if isinstance(membership, str) else None
    if not rule or not target:
        raise MatrixError("M_BAD_JSON", f"membership must be one of {', '.join(MEMBERSHIP_RULES)}, not "
                          f"{shorten(membership)}")
    rule(room, draft, check_id("@", target))


def _may_join(room: RoomState, draft: Draft, target: str) -> None:
    current = room.membership(target)
    if set(room.events) == {("m.room.create", "")} and target == room.events["m.room.create", ""].sender:
        return
    if draft.sender != target:
        raise forbidden(f"{draft.sender} can't join for {target}")
    if current == "ban":
        raise MatrixError("M_BAD_STATE", f"{target} is banned from the room")
    if room.join_rule == "public" or (current in ("join", "invite") and room.join_rule in JOIN_RULES):
        return
    if room.join_rule in RESTRICTED_RULES:
        voucher = draft.content.get("join_authorised_via_users_server")      # the homeserver's word: a client can't write it
        if isinstance(voucher, str) and voucher in room.joined and room.power(voucher) >= room.needed("invite"):
            return
        raise forbidden(f"{target} is in none of the rooms whose members may join this one, and is not invited")
    raise forbidden(f"{target} is not invited, and the join rule of the room is {room.join_rule!r}")


def _may_invite(room: RoomState, draft: Draft, target: str) -> None:
    _check_joined(room, draft.sender)
    current = room.membership(target)
    if current == "join":
        raise forbidden(f"{target} is already in the room.")     # mautrix-python reads these four words
    if current == "ban":
        raise forbidden(f"{target} is banned from the room; unban first")
    _check_power(room, draft.sender, "invite")


def _may_leave(room: RoomState, draft: Draft, target: str) -> None:
    """Oneself always, if there is anything to leave. Others: who is in the room, has the power to kick (and to unban, that to
    ban), and more power than the target.
    """
    current = room.membership(target)
    if draft.sender == target:
        if current not in ("invite", "join", "knock"):
            raise forbidden(f"{target} is not in room")
        return
    _check_joined(room, draft.sender)
    if current == "ban":
        _check_power(room, draft.sender, "ban")
    _check_power(room, draft.sender, "kick")
    _check_above(room, draft.sender, target)


def _may_ban(room: RoomState, draft: Draft, target: str) -> None:
    _check_joined(room, draft.sender)
    _check_power(room, draft.sender, "ban")
    _check_above(room, draft.sender, target)


def _may_knock(room: RoomState, draft: Draft, target: str) -> None:
    if room.join_rule not in ("knock", "knock_restricted"):
        raise forbidden(f"one can't knock here: the join rule of the room is {room.join_rule!r}")
    if draft.sender != target:
        raise forbidden(f"{draft.sender} can't knock for {target}")
    current = room.membership(target)
    if current in ("ban", "invite", "join"):
        raise forbidden(f"{target} can't knock: the membership is {current!r}")


def _check_joined(room: RoomState, user_id: str) -> None:
    if user_id not in room.joined:
        raise forbidden(f"{user_id} is not in room")


def _check_power(room: RoomState, user_id: str, action: str) -> None:
    if room.power(user_id) < room.needed(action):
        raise forbidden(f"{user_id} has power {room.power(user_id)}; to {action} needs {room.needed(action)}")


def _check_above(room: RoomState, user_id: str, target: str) -> None:
    if room.power(target) >= room.power(user_id):
        raise forbidden(f"{user_id} has power {room.power(user_id)}, which is not above that of {target} "
                        f"({room.power(target)})")


MEMBERSHIP_RULES: dict[str, Callable[[RoomState, Draft, str], None]] = {
    "join":   _may_join,                # rule 5.3
    "invite": _may_invite,              # rule 5.4
    "leave":  _may_leave,               # rule 5.5: to leave, to decline, to kick, to unban
    "ban":    _may_ban,                 # rule 5.6
    "knock":  _may_knock,               # rule 5.7
}


def authorise_power_levels(room: RoomState, draft: Draft) -> None:
    """Rule 10: nobody gives or takes what lies above their own power."""
    new, old, mine = draft.content, room.levels, room.power(draft.sender)
    check_power_levels_shape(new)
    if room.version.creators_rule and (named := room.creators & set(new.get("users", {}))):
        raise forbidden(f"creators have all power in room version {room.version.id}; "
                        f"{', '.join(sorted(named))} can't stand in users")
    if old is None:
        return
    for key in LEVELS:
        _check_change(key, old.get(key), new.get(key), mine, mine)
    for group in ("events", "notifications", "users"):
        before, after = old.get(group, {}), new.get(group, {})
        for key in {**before, **after}:
            limit = mine - 1 if group == "users" and key != draft.sender else mine
            _check_change(f"{group}[{key}]", before.get(key), after.get(key), limit, mine)


def _check_change(what: str, old: int | None, new: int | None, old_limit: int, new_limit: int) -> None:
    if old != new and ((old is not None and old > old_limit) or (new is not None and new > new_limit)):
        raise forbidden(f"{what} can't be changed from {old} to {new} by somebody with power {new_limit}")


def check_power_levels_shape(content: JsonObject) -> None:
    """Rules 10.1 to 10.3: levels are integers; users has user IDs as keys."""
    for key in LEVELS:
        if key in content and not is_a(content[key], int):
            raise MatrixError("M_BAD_JSON", f"{key!r} in m.room.power_levels must be an integer, not "
                              f"{shorten(content[key])}")
    for group in ("events", "notifications", "users"):
        levels = content.get(group, {})
        if not isinstance(levels, dict) or not all(is_a(level, int) for level in levels.values()):
            raise MatrixError("M_BAD_JSON", f"{group!r} in m.room.power_levels must be an object of integers")
    for user_id in content.get("users", {}):
        check_id("@", user_id)


# -- Redaction.

def redacted_content(version: RoomVersion, type: str, content: JsonObject) -> JsonObject:
    """What a redaction leaves (room version 11, Redactions)."""
    if version.create_is_kept and type == "m.room.create":
        return content
    kept = KEPT_BY_REDACTION.get(type, ())
    if version.create_is_kept:
        kept += {"m.room.power_levels": ("invite",), "m.room.redaction": ("redacts",)}.get(type, ())
    left = {key: content[key] for key in kept if key in content}
    third_party = content.get("third_party_invite")
    if version.create_is_kept and type == "m.room.member" and isinstance(third_party, dict) and "signed" in third_party:
        left["third_party_invite"] = {"signed": third_party["signed"]}
    return left


def redacted_json(version: RoomVersion, event_json: str) -> str:
    event = json.loads(event_json)
    event["content"] = redacted_content(version, event["type"], event["content"])
    event.pop("redacts", None)
    return to_json(event)


# -- Who may see it? Room history visibility.

FOREVER = 2**62
VISIBILITIES = ("world_readable",   # everybody sees what was sent then,
                "shared",           # whoever joins later, too (and what has no such state is taken for this),
                "invited",          # who was invited or in the room then,
                "joined")           # who was in the room then
HISTORY_VISIBILITY, MEMBERSHIP = (("m.room.history_visibility", "history_visibility"),    # type and key of the state that decides
                                  ("m.room.member", "membership"))


def left_at(memberships: Sequence[tuple[int, str]]) -> int:
    """The tick at which the user has left for the last time: FOREVER if the user is in the room, -1 if never was."""
    if memberships and memberships[-1][1] == "join":
        return FOREVER
    return max((tick for (tick, _), (_, before) in zip(memberships[1:], memberships, strict=False) if before == "join"), default=-1)


def visible_ranges(visibilities: Sequence[tuple[int, str]],
                   memberships: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """The ticks whose events a user may see, as inclusive ranges from old to new. A ghost sees what its own membership lets it
    see; what is pushed to an application service is another matter (3, Audience).

    `visibilities` and `memberships` are the changes of m.room.history_visibility and of this user's membership, each
    (tick, new value) from old to new. An event that is itself such a change counts as seen if either side of it is.
    """
    ticks = sorted({0} | {tick for tick, _ in visibilities} | {tick for tick, _ in memberships})
    visibility_at, membership_at = dict(visibilities), dict(memberships)
    last_seen = left_at(memberships)
    ranges: list[tuple[int, int]] = []
    visibility, membership, before = "shared", "leave", False
    for tick, after in zip(ticks, [*ticks[1:], FOREVER + 1], strict=True):
        visibility = visibility_at.get(tick, visibility)
        visibility = visibility if visibility in VISIBILITIES else "shared"
        membership = membership_at.get(tick, membership)
        now = (visibility == "world_readable" or membership == "join"
               or (visibility == "invited" and membership == "invite")
               or (visibility == "shared" and tick < last_seen))
        start, end = (tick if before or now else tick + 1), (after - 1 if now else tick)
        if start <= end:
            if ranges and ranges[-1][1] >= start - 1:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        before = now
    return ranges


# ============================================================================
# 5. Store
# ============================================================================
# Everything that is kept: the schema, every SQL statement of the homeserver,
# and the one thread that writes. Every change takes the next number of one
# counter, the tick: a sync token is a tick, and "what is new" is what lies after
# one. Does not know the rules: it stores what it is told.

SCHEMA_VERSION = 4               # tables and indexes that are new in a later one are added to an older database when it is opened
#: What else turns an older database into one of this version, by the first version that has it so: a table that goes, or a column
#: that comes (ALTER TABLE; it is done before new tables are made, so of tables that version 3 has: VERSION_3 in the tests).
UPGRADES = {3: "DROP TABLE IF EXISTS client_txns;"}
SCHEMA = """
-- accounts
CREATE TABLE meta           (key TEXT PRIMARY KEY, value) WITHOUT ROWID;       -- server_name; position: the last tick in this database
CREATE TABLE users          (user_id TEXT PRIMARY KEY,
                             password TEXT,                                    -- scrypt$salt$hash; NULL: can't log in with one
                             appservice TEXT,                                  -- whose ghost it is
                             displayname TEXT, avatar_url TEXT,
                             deactivated INTEGER NOT NULL DEFAULT 0,
                             created_ts INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE profile_fields (user_id TEXT, key TEXT, json TEXT NOT NULL,       -- besides the two above
                             PRIMARY KEY (user_id, key)) WITHOUT ROWID;
CREATE TABLE devices        (user_id TEXT, device_id TEXT, display_name TEXT, last_seen_ts INTEGER, last_seen_ip TEXT,
                             PRIMARY KEY (user_id, device_id)) WITHOUT ROWID;
CREATE TABLE sessions       (token BLOB PRIMARY KEY,                           -- SHA-256 of the access token
                             user_id TEXT NOT NULL, device_id TEXT NOT NULL) WITHOUT ROWID;
-- rooms, and what happens in them
CREATE TABLE rooms          (n INTEGER PRIMARY KEY, room_id TEXT UNIQUE NOT NULL, version TEXT NOT NULL,
                             published INTEGER NOT NULL DEFAULT 0);            -- in the public directory
CREATE TABLE events         (tick INTEGER PRIMARY KEY, room INTEGER NOT NULL, type TEXT NOT NULL, state_key TEXT, sender TEXT NOT NULL,
                             ts INTEGER NOT NULL,                              -- origin_server_ts
                             json TEXT NOT NULL,                               -- as it is sent, but for unsigned
                             replaces INTEGER,                                 -- tick of the state event before it
                             redacted_by INTEGER,                              -- tick of the redaction
                             relates_to INTEGER, rel_type TEXT,                -- tick of the event that m.relates_to names
                             device_id TEXT, txn_id TEXT);                     -- the client's, for unsigned.transaction_id
CREATE INDEX timeline       ON events (room, tick);
CREATE INDEX relations      ON events (relates_to, tick) WHERE relates_to IS NOT NULL;
CREATE INDEX threads        ON events (room, relates_to, tick) WHERE rel_type = 'm.thread';
CREATE INDEX state_events   ON events (room, type, state_key, tick) WHERE state_key IS NOT NULL;
CREATE INDEX sent           ON events (sender, txn_id, room, type) WHERE txn_id IS NOT NULL;
CREATE TABLE state          (room INTEGER, type TEXT, state_key TEXT, tick INTEGER NOT NULL,
                             PRIMARY KEY (room, type, state_key)) WITHOUT ROWID;
CREATE TABLE memberships    (user_id TEXT, room INTEGER, membership TEXT NOT NULL, tick INTEGER NOT NULL,
                             forgotten INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (user_id, room)) WITHOUT ROWID;
CREATE INDEX room_members   ON memberships (room, membership);
CREATE TABLE aliases        (alias TEXT PRIMARY KEY, room INTEGER NOT NULL, creator TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX room_aliases   ON aliases (room);
CREATE TABLE receipts       (room INTEGER, type TEXT, user_id TEXT, thread_id TEXT, tick INTEGER NOT NULL, event_id TEXT NOT NULL,
                             ts INTEGER NOT NULL, PRIMARY KEY (room, type, user_id, thread_id)) WITHOUT ROWID;
-- what application services get
CREATE TABLE outbox         (appservice TEXT, tick INTEGER, reason TEXT NOT NULL, -- why this application service gets this event
                             PRIMARY KEY (appservice, tick)) WITHOUT ROWID;
CREATE TABLE transactions   (appservice TEXT, txn_id INTEGER, last_tick INTEGER NOT NULL, events INTEGER NOT NULL,
                             body BLOB NOT NULL,                               -- the exact bytes, never changed
                             acknowledged_ts INTEGER, PRIMARY KEY (appservice, txn_id));
CREATE TABLE pushed         (appservice TEXT PRIMARY KEY, key_changes INTEGER NOT NULL) WITHOUT ROWID; -- to this tick
CREATE TABLE network_rooms  (appservice TEXT, network TEXT, room INTEGER,      -- the directory of a third-party network
                             PRIMARY KEY (appservice, network, room)) WITHOUT ROWID;
-- what clients keep
CREATE TABLE account_data   (user_id TEXT, room_id TEXT,                       -- room_id '': of the account
                             type TEXT, tick INTEGER NOT NULL, json TEXT NOT NULL, PRIMARY KEY (user_id, room_id, type)) WITHOUT ROWID;
CREATE TABLE filters        (filter_id INTEGER PRIMARY KEY, user_id TEXT NOT NULL, json TEXT NOT NULL, UNIQUE (user_id, json));
CREATE TABLE media          (media_id TEXT PRIMARY KEY, content_type TEXT NOT NULL, filename TEXT, user_id TEXT NOT NULL,
                             created_ts INTEGER NOT NULL, content BLOB);       -- NULL: only the URI was made yet
-- end-to-end encryption
CREATE TABLE device_keys    (user_id TEXT, device_id TEXT, json TEXT NOT NULL, PRIMARY KEY (user_id, device_id)) WITHOUT ROWID;
CREATE TABLE one_time_keys  (user_id TEXT, device_id TEXT, key_id TEXT,        -- 'algorithm:id'
                             json TEXT NOT NULL, PRIMARY KEY (user_id, device_id, key_id));     -- they go out in the order of rowid
CREATE TABLE fallback_keys  (user_id TEXT, device_id TEXT, algorithm TEXT, key_id TEXT NOT NULL, json TEXT NOT NULL,
                             used INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (user_id, device_id, algorithm)) WITHOUT ROWID;
CREATE TABLE cross_signing  (user_id TEXT, usage TEXT,                         -- master, self_signing or user_signing
                             json TEXT NOT NULL, PRIMARY KEY (user_id, usage)) WITHOUT ROWID;
CREATE TABLE signatures     (user_id TEXT, key TEXT,                           -- what is signed: a device, or a key of cross-signing
                             signer TEXT, key_id TEXT, signature TEXT NOT NULL, tick INTEGER NOT NULL,
                             PRIMARY KEY (user_id, key, signer, key_id)) WITHOUT ROWID;
CREATE INDEX own_signs      ON signatures (signer, tick);
CREATE TABLE key_changes    (user_id TEXT PRIMARY KEY, tick INTEGER NOT NULL) WITHOUT ROWID; -- of the user's device list
CREATE INDEX key_news       ON key_changes (tick);
CREATE TABLE to_device      (tick INTEGER PRIMARY KEY, user_id TEXT NOT NULL, device_id TEXT NOT NULL, json TEXT NOT NULL,
                             appservice TEXT);                                 -- who gets it in a transaction; NULL: the device's /sync
CREATE INDEX inbox          ON to_device (user_id, device_id, tick);
CREATE INDEX push_inbox     ON to_device (appservice, tick) WHERE appservice IS NOT NULL;
CREATE TABLE to_device_txns (user_id TEXT, device_id TEXT, type TEXT, txn_id TEXT, ts INTEGER NOT NULL,
                             PRIMARY KEY (user_id, device_id, type, txn_id)) WITHOUT ROWID;
CREATE INDEX old_txns       ON to_device_txns (ts);
CREATE TABLE backups        (version INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, algorithm TEXT NOT NULL,
                             auth_data TEXT NOT NULL, etag INTEGER NOT NULL DEFAULT 0);
CREATE INDEX own_backups    ON backups (user_id, version);
CREATE TABLE backup_keys    (version INTEGER, room_id TEXT, session_id TEXT, json TEXT NOT NULL,
                             PRIMARY KEY (version, room_id, session_id)) WITHOUT ROWID;
"""

MAX_EPHEMERAL = 1000             # pieces that wait for one application service
KEYLESS_TELLINGS = 10            # transactions that say of a new device that it has no keys
REMEMBERED_MS = DAY_MS           # how long a client transaction of messages to devices is remembered
MAX_BATCH = 256                  # jobs in one COMMIT
MAX_ROWS = 64                    # in one INSERT
MAX_LOOKING = 4                  # of those who were woken, how many look at a time
MAX_TRANSACTION_EVENTS = 100
KEPT_TRANSACTIONS = 1000         # acknowledged ones, for each application service, to look at
PRUNED_AT_ONCE = 100             # so many more there may be until they go
MAX_CACHED_ROOMS = 2000          # rooms whose state the writer keeps in memory
READERS = 8
MAX_LOG_BYTES = 8 * 1024 * 1024  # of the write-ahead log, until the writer itself starts it anew
LOG_SECONDS = 0.2                # how long it waits for those who read
#: MSC3202: under which names an application service hears the counts of one-time keys, and of unused fallback keys.
COUNT_KEYS = (("org.matrix.msc3202.device_one_time_keys_count", "org.matrix.msc3202.device_one_time_key_counts"),
              ("org.matrix.msc3202.device_unused_fallback_key_types",))

EVENT_COLUMNS = ("e.tick, e.type, e.state_key, e.sender, e.ts, e.json, r.json, json_extract(p.json, '$.content'), "
                 "substr(p.json, 14, 44), e.device_id, e.txn_id, EXISTS (SELECT 1 FROM events WHERE relates_to = e.tick)")
EVENT_ID = "substr(e.json, 14, 44)"              # as Event.event_id
EVENT_TABLES = "events e LEFT JOIN events r ON r.tick = e.redacted_by LEFT JOIN events p ON p.tick = e.replaces"
# Whether the event e is in one of these ranges of ticks, JSON [[first, last], …].
VISIBLE = "EXISTS (SELECT 1 FROM json_each(?) v WHERE e.tick BETWEEN json_extract(v.value, '$[0]') AND json_extract(v.value, '$[1]'))"
ROOMS = "room IN (SELECT value FROM json_each(?))"
# Those whom the user of this ID ignores.
IGNORED = ("SELECT key FROM account_data, json_each(account_data.json, '$.ignored_users') "
           "WHERE user_id = ? AND room_id = '' AND account_data.type = 'm.ignored_user_list' AND key IS NOT NULL")


def event_id_of(tick: int, canonical: str) -> str:
    """43 characters after the '$': the tick, by which the event is found, and the hash, which binds it to the
    content.
    """
    hashed = hashlib.sha256(canonical.encode()).digest()
    return "$" + base64.urlsafe_b64encode(tick.to_bytes(6, "big") + hashed[:26]).decode().rstrip("=")


def in_powers_of_two(rows: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Pieces of such lengths, the long ones first: so that there are few different ones."""
    start = 0
    while start < len(rows):
        size = min(most, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start:start + size]
        start += size


def tick_of(event_id: str) -> int:
    """The tick in an event ID; -1 if it can't be one of ours."""
    if not re.fullmatch(r"\$[A-Za-z0-9_-]{43}", event_id):
        return -1
    return int.from_bytes(base64.urlsafe_b64decode(event_id[1:9]), "big")


class Room(RoomState):
    """A room as the writer keeps it."""

    def __init__(self, n: int, room_id: str, version: RoomVersion) -> None:
        super().__init__(version)
        self.n, self.room_id = n, room_id
        self.audience: Audience | None = None                # made when first asked for


class Outbox(NamedTuple):
    """Where one application service stands: a summary of its rows in the tables outbox and transactions, kept by the writer."""
    open: Transaction | None     # frozen, not yet acknowledged
    frozen_to: int               # all ticks up to this one are in a transaction
    waiting_to: int              # the last tick that waits, or frozen_to
    kept: int                    # transactions that there are, with those to look at


class Transaction(NamedTuple):
    """What one PUT brings an application service (Pushing events). Never changes once it is frozen."""
    appservice: str              # the ID of its registration
    txn_id: int
    events: int                  # how many of them are in it
    body: bytes                  # the JSON: events and, if it wants such, what passes, messages to devices and news of keys


NOTHING_WAITS = Outbox(None, 0, 0, 0)


class UserRow(NamedTuple):
    password: str | None         # hashed
    appservice: str | None       # the ID of the registration whose user it is
    displayname: str | None
    avatar_url: str | None
    deactivated: int


class DeviceRow(NamedTuple):
    device_id: str
    display_name: str | None
    last_seen_ts: int | None
    last_seen_ip: str | None


class RoomRow(NamedTuple):
    n: int
    room_id: str
    version: str
    published: int


class AliasRow(NamedTuple):
    room_id: str
    creator: str


class MembershipRow(NamedTuple):
    room: int
    room_id: str
    membership: str
    tick: int                    # of the member event
    forgotten: int


class MediaRow(NamedTuple):
    content_type: str
    filename: str | None
    content: bytes | None        # None: not uploaded yet
    user_id: str
    created_ts: int


class BackupRow(NamedTuple):
    version: int
    algorithm: str
    auth_data: str               # JSON
    etag: int
    size: int                    # how many keys are in it


class Filter(NamedTuple):
    """A client's event filter, as far as SQL can do it (Client-Server API, EventFilter)."""
    types: Sequence[str] | None = None
    not_types: Sequence[str] = ()
    senders: Sequence[str] | None = None
    not_senders: Sequence[str] = ()
    contains_url: bool | None = None
    ignored: Sequence[str] = ()          # whose events are left out, unless they are state (Ignoring Users)
    rooms: Sequence[str] | None = None
    not_rooms: Sequence[str] = ()

    def wants(self, room_id: str) -> bool:
        return (self.rooms is None or room_id in self.rooms) and room_id not in self.not_rooms

    def in_room(self, room_id: str) -> Filter:
        return self if self.wants(room_id) else Filter(types=[])

    def passes(self, event: Event) -> bool:
        """What sql() asks, of one event; but not whether its sender is ignored."""
        def any_type(types: Sequence[str]) -> bool:
            return any(one == event.type or ("*" in one and type_matcher(one)(event.type)) for one in types)
        if self.contains_url is not None and isinstance(event.content.get("url"), str) != self.contains_url:
            return False
        return ((self.types is None or any_type(self.types)) and not any_type(self.not_types)
                and (self.senders is None or event.sender in self.senders) and event.sender not in self.not_senders)

    def sql(self) -> tuple[str, list[str]]:
        """Conditions on the events e, and their values."""
        clauses, values = "", list[str]()
        for wanted, op, one in ((self.types,               "",     "e.type GLOB value"),
                                (self.not_types or None,   "NOT ", "e.type GLOB value"),
                                (self.senders,             "",     "e.sender = value"),
                                (self.not_senders or None, "NOT ", "e.sender = value")):
            if wanted is not None:
                clauses += f" AND {op}EXISTS (SELECT 1 FROM json_each(?) WHERE {one})"
                values.append(to_json([glob_of(item) for item in wanted] if "GLOB" in one else wanted))
        if self.ignored:
            clauses += " AND (e.state_key IS NOT NULL OR e.sender NOT IN (SELECT value FROM json_each(?)))"
            values.append(to_json(self.ignored))
        if self.contains_url is not None:
            clauses += f" AND json_type(e.json, '$.content.url') IS {'' if self.contains_url else 'NOT '}'text'"
        return clauses, values


EVERYTHING = Filter()


def glob_of(pattern: str) -> str:
    """A type in which only '*' is special, as SQLite's GLOB."""
    return re.sub(r"[\[?]", lambda m: f"[{m[0]}]", pattern)


@functools.lru_cache(maxsize=4096)
def type_matcher(pattern: str) -> Callable[[str], object]:
    """The same test of a type in Python. What stands before a '*' is found once and never looked for again: no pattern takes long."""
    return re.compile(fnmatch.translate(glob_of(pattern))).match


R = TypeVar("R", bound=NamedTuple)


class Reader:
    """Every question to the database. One sees a single moment of it, from the first statement on."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def one(self, sql: str, *values: Any) -> Any:
        return self.db.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[Any]:
        return self.db.execute(sql, values).fetchall()

    def text(self, sql: str, *values: Any) -> str | None:
        """The only column of the one row, or None if there is none."""
        row = self.one(sql, *values)
        return row[0] if row else None

    def number(self, sql: str, *values: Any) -> int:
        """The only column of the one row that there always is."""
        return int(self.one(sql, *values)[0])

    def column(self, sql: str, *values: Any) -> list[Any]:
        return [row[0] for row in self.all(sql, *values)]

    def rows(self, kind: type[R], rest: str, *values: Any) -> list[R]:
        """What is found; the columns are called as the fields of `kind`."""
        return [*map(kind._make, self.all(f"SELECT {', '.join(kind._fields)} FROM {rest}", *values))]

    def row(self, kind: type[R], rest: str, *values: Any) -> R | None:
        return next(iter(self.rows(kind, rest, *values)), None)

    def found(self, where: str, *values: Any) -> list[Event]:
        """The events e of which this is true, in the order that it asks for."""
        return [*map(Event._make, self.all(f"SELECT {EVENT_COLUMNS} FROM {EVENT_TABLES} WHERE {where}", *values))]

    def by_room(self, sql: str, rooms: Sequence[int], *values: Any) -> dict[int, list[Any]]:
        """What is found in each of the rooms, with one statement for all; `sql` begins its rows with the room."""
        found: dict[int, list[Any]] = {room: [] for room in rooms}
        for row in self.all(sql, to_json(rooms), *values) if rooms else ():
            found[row[0]].append(row[1:])
        return found

    def position(self) -> int:
        """The tick of this moment."""
        return self.number("SELECT value FROM meta WHERE key = 'position'")

    # -- accounts

    def user(self, user_id: str) -> UserRow | None:
        return self.row(UserRow, "users WHERE user_id = ?", user_id)

    def profile(self, user_id: str) -> JsonObject | None:
        """displayname, avatar_url and fields of the user's own, as far as they are set. None: there is no such user."""
        user, fields = self.user(user_id), self.all("SELECT key, json FROM profile_fields WHERE user_id = ?", user_id)
        return user and {**without_none({"displayname": user.displayname, "avatar_url": user.avatar_url}),
                         **{key: Raw(text) for key, text in fields}}

    def users_like(self, user_id: str, term: str, limit: int) -> list[Any]:
        """(user_id, displayname, avatar_url) of those who are in a room with the user, or in a public one."""
        return self.all(
            "SELECT user_id, displayname, avatar_url FROM users u WHERE NOT deactivated "
            "AND (instr(lower(user_id), lower(?)) OR instr(lower(coalesce(displayname, '')), lower(?))) "
            "AND EXISTS (SELECT 1 FROM memberships m JOIN rooms ON n = room WHERE m.user_id = u.user_id "
            "AND membership = 'join' AND (published OR room IN "
            "(SELECT room FROM memberships WHERE user_id = ? AND membership = 'join'))) ORDER BY user_id LIMIT ?",
            term, term, user_id, limit)

    def devices(self, user_id: str) -> list[DeviceRow]:
        return self.rows(DeviceRow, "devices WHERE user_id = ?", user_id)

    def device(self, user_id: str, device_id: str) -> DeviceRow | None:
        return self.row(DeviceRow, "devices WHERE user_id = ? AND device_id = ?", user_id, device_id)

    def account_data(self, user_id: str, room_id: str, type: str) -> Raw | None:
        text = self.text("SELECT json FROM account_data WHERE user_id = ? AND room_id = ? AND type = ?", user_id, room_id, type)
        return None if text is None else Raw(text)

    def account_data_since(self, user_id: str, since: int) -> list[Any]:
        """(room_id, type, json) of what changed."""
        return self.all("SELECT room_id, type, json FROM account_data "
                        "WHERE user_id = ? AND tick > ? ORDER BY tick", user_id, since)

    def ignored(self, user_id: str) -> list[str]:
        """Those whom the user ignores."""
        return self.column(IGNORED, user_id)

    def filter(self, user_id: str, filter_id: int) -> Any:
        return self.one("SELECT json FROM filters WHERE user_id = ? AND filter_id = ?", user_id, filter_id)

    def media(self, media_id: str) -> MediaRow | None:
        return self.row(MediaRow, "media WHERE media_id = ?", media_id)

    # -- rooms

    def room_row(self, room_id: str) -> RoomRow | None:
        return self.row(RoomRow, "rooms WHERE room_id = ?", room_id)

    def room_id(self, room: int) -> str:
        return self.text("SELECT room_id FROM rooms WHERE n = ?", room) or ""

    def room_of(self, tick: int) -> RoomRow | None:
        """The room of an event."""
        return self.row(RoomRow, "rooms JOIN events ON n = room WHERE tick = ?", tick)

    def all_rooms(self, limit: int) -> list[RoomRow]:
        """The last ones that were made."""
        return self.rows(RoomRow, "rooms ORDER BY n DESC LIMIT ?", limit)

    def published_rooms(self, own: bool, instance_id: str | None, appservices: Iterable[str]) -> list[RoomRow]:
        """Rooms of the homeserver's own directory, and of a third-party network (None: all) of these application services."""
        return self.rows(RoomRow, "rooms WHERE (published AND ?) OR n IN "
                         "(SELECT room FROM network_rooms WHERE (? IS NULL OR appservice || '|' || network = ?) "
                         "AND appservice IN (SELECT value FROM json_each(?))) ORDER BY n",
                         own, instance_id, instance_id, to_json(list(appservices)))

    def people(self) -> list[str]:
        """Users who are no application service's."""
        return self.column("SELECT user_id FROM users WHERE appservice IS NULL AND NOT deactivated ORDER BY user_id")

    def alias(self, alias: str) -> AliasRow | None:
        return self.row(AliasRow, "aliases JOIN rooms ON n = room WHERE alias = ?", alias)

    def may_join_by_another(self, user_id: str, room: int) -> bool:
        """Whether the user is in one of the rooms that a restricted room names."""
        return self.one("SELECT 1 FROM state s JOIN events e ON e.tick = s.tick, json_each(e.json, '$.content.allow') a "
                        "JOIN rooms r ON r.room_id = json_extract(e.json, a.fullkey || '.room_id') JOIN memberships m ON m.room = r.n "
                        "WHERE s.room = ? AND s.type = 'm.room.join_rules' AND s.state_key = '' AND m.user_id = ? "
                        "AND json_extract(e.json, '$.content.join_rule') IN ('restricted', 'knock_restricted') "
                        "AND json_extract(e.json, a.fullkey || '.type') = 'm.room_membership' "
                        "AND m.membership = 'join' LIMIT 1", room, user_id) is not None

    def aliases_of(self, room: int) -> list[str]:
        return self.column("SELECT alias FROM aliases WHERE room = ? ORDER BY alias", room)

    def memberships_of(self, user_id: str, since: int = -1, rooms: Iterable[int] = (),
                       room_ids: Iterable[str] = ()) -> list[MembershipRow]:
        """Every room that the user has to do with; or those where that changed after this tick, and these."""
        return self.rows(MembershipRow, "memberships JOIN rooms ON n = room WHERE user_id = ? AND (tick > ? OR room IN "
                         "(SELECT value FROM json_each(?) UNION ALL "
                         "SELECT n FROM rooms WHERE room_id IN (SELECT value FROM json_each(?))))",
                         user_id, since, to_json([*rooms]), to_json([*room_ids]))

    def membership(self, user_id: str, room: int) -> MembershipRow | None:
        return self.row(MembershipRow, "memberships JOIN rooms ON n = room WHERE user_id = ? AND room = ?", user_id, room)

    def members(self, room: int, membership: str = "join") -> list[str]:
        return self.column("SELECT user_id FROM memberships WHERE room = ? AND membership = ?", room, membership)

    def heroes(self, rooms: Sequence[int], user_id: str) -> dict[int, list[str]]:
        """The first members by whom the user knows a room that has no name: who is there, else who was there."""
        first = ("(SELECT json_group_array(user_id) FROM (SELECT user_id FROM memberships WHERE room = r.value AND user_id != ? "
                 "AND membership IN {} ORDER BY tick LIMIT 5))")
        there, gone = first.format("('join', 'invite')"), first.format("('leave', 'ban')")
        found = self.all(f"SELECT value, coalesce(nullif({there}, '[]'), {gone}) FROM json_each(?) r", user_id, user_id, to_json(rooms))
        return {room: json.loads(users) for room, users in found}

    def member_counts(self, rooms: Sequence[int]) -> dict[int, dict[str, int]]:
        """How many members there are, by membership."""
        counts = self.by_room(f"SELECT room, membership, count(*) FROM memberships WHERE {ROOMS} GROUP BY room, membership", rooms)
        return {room: dict(rows) for room, rows in counts.items()}

    def count_members(self, room: int, membership: str, upto: int = -1) -> int:
        """How many there are; `upto`: it need not count further."""
        return self.number("SELECT count(*) FROM (SELECT 1 FROM memberships WHERE room = ? AND membership = ? LIMIT ?)",
                           room, membership, upto)

    # -- events

    def event(self, room: int, event_id: str) -> Event | None:
        found = self.found("e.tick = ? AND e.room = ?", tick_of(event_id), room)
        return next((event for event in found if event.event_id == event_id), None)

    def event_at(self, tick: int) -> Event:
        [event] = self.found("e.tick = ?", tick)
        return event

    def event_near(self, room: int, ts: int, later: bool, visible: str) -> Event | None:
        """The nearest one that was not sent before this time, or not after it."""
        at, order = (">=", "ASC") if later else ("<=", "DESC")
        found = self.found(f"e.room = ? AND e.ts {at} ? AND {VISIBLE} ORDER BY e.ts {order}, e.tick {order} LIMIT 1", room, ts, visible)
        return next(iter(found), None)

    def all_events(self, after: int, limit: int) -> list[Event]:
        """Events of all rooms after a tick, old to new."""
        return self.found("e.tick > ? ORDER BY e.tick LIMIT ?", after, limit)

    def events(self, room: int, after: int, upto: int, limit: int, newest: bool,
               filter: Filter = EVERYTHING) -> list[Event]:
        """Events with after < tick <= upto, the newest or oldest `limit` of them, in that order."""
        if filter.types == []:
            return []                                        # as many clients ask: no reason to look at each event
        clause, values = filter.sql()
        return self.found(f"e.room = ? AND e.tick > ? AND e.tick <= ?{clause} ORDER BY e.tick {'DESC' if newest else 'ASC'} LIMIT ?",
                          room, after, upto, *values, limit)

    def state_event(self, room: int, type: str, state_key: str, upto: int = FOREVER) -> Event | None:
        """The one that there is, or was at `upto`."""
        found = self.found("e.tick = (SELECT tick FROM state WHERE room = ? AND type = ? AND state_key = ?)", room, type, state_key)
        if found and found[0].tick > upto:
            found = self.found("e.room = ? AND e.type = ? AND e.state_key = ? AND e.state_key IS NOT NULL AND e.tick <= ? "
                               "ORDER BY e.tick DESC LIMIT 1", room, type, state_key, upto)
        return next(iter(found), None)

    def state_events(self, room: int, keys: Iterable[tuple[str, str]], upto: int = FOREVER) -> list[Event]:
        """Those with these types and state keys that there are, or were at `upto`."""
        found = [self.state_event(room, type, state_key, upto) for type, state_key in keys]
        return [event for event in found if event]

    def stripped(self, room: int, members: Sequence[str], upto: int = FOREVER) -> list[JsonObject]:
        """What somebody invited may know of a room: its face, and these members (Stripped state)."""
        keys = [*((type, "") for type in STRIPPED_STATE), *(("m.room.member", user_id) for user_id in members)]
        return [{"type": event.type, "state_key": event.state_key, "sender": event.sender, "content": event.content}
                for event in self.state_events(room, keys, upto)]

    def state_at(self, room: int, upto: int = FOREVER, after: int = 0, type: str = "*") -> list[Event]:
        """The state as it was at `upto`, of that only what changed since `after`, old to new."""
        return self.found("e.tick IN (SELECT max(tick) FROM events WHERE room = ? AND state_key IS NOT NULL AND tick > ? AND tick <= ? "
                          "AND (? = '*' OR type = ?) GROUP BY type, state_key) ORDER BY e.tick", room, after, upto, type, type)

    def state_changes(self, room: int, after: int, upto: int) -> list[Event]:
        """The same as state_at, for a short time: it looks at what is new, however many state events there are."""
        found = self.found("e.tick IN (SELECT tick FROM events INDEXED BY timeline WHERE room = ? AND tick > ? AND tick <= ? "
                           "AND state_key IS NOT NULL) ORDER BY e.tick", room, after, upto)
        return list({(event.type, event.state_key): event for event in found}.values())

    def related(self, parent: int, depth: int, rel_type: str | None, type: str | None, after: int, upto: int, limit: int,
                newest: bool) -> list[Event]:
        """Events that relate to the one at the tick `parent`, or to those that do, up to this depth."""
        chosen = ("WITH RECURSIVE found (tick, depth) AS (SELECT tick, 1 FROM events WHERE relates_to = ? "
                  "UNION SELECT e.tick, depth + 1 FROM found f JOIN events e ON e.relates_to = f.tick WHERE depth < ?) "
                  "SELECT tick FROM found")
        return self.found(f"e.tick IN ({chosen}) AND e.tick > ? AND e.tick <= ? AND (? IS NULL OR e.rel_type = ?) "
                          f"AND (? IS NULL OR e.type = ?) ORDER BY e.tick {'DESC' if newest else 'ASC'} LIMIT ?",
                          parent, depth, after, upto, rel_type, rel_type, type, type, limit)

    def threads(self, room: int, user_id: str, visible: str, upto: int) -> list[Any]:
        """(tick of the root, of the last reply, how many of these events are the user's), the latest first."""
        return self.all("SELECT e.relates_to, max(e.tick) AS last, sum(e.sender = ?) + (p.sender = ?) FROM events e "
                        f"JOIN events p ON p.tick = e.relates_to WHERE e.room = ? AND e.rel_type = 'm.thread' AND {VISIBLE} "
                        f"AND e.sender NOT IN ({IGNORED}) GROUP BY e.relates_to HAVING last <= ? ORDER BY last DESC",
                        user_id, user_id, room, visible, user_id, upto)

    def ancestors(self, tick: int, depth: int) -> list[Any]:
        """(tick, rel_type): what an event relates to and how, then what that one relates to, and so on."""
        return self.all("WITH RECURSIVE up (parent, rel_type, depth) AS (SELECT relates_to, rel_type, 1 FROM events WHERE tick = ? "
                        "UNION ALL SELECT relates_to, e.rel_type, depth + 1 FROM up JOIN events e ON tick = parent WHERE depth < ?) "
                        "SELECT parent, rel_type FROM up WHERE parent IS NOT NULL ORDER BY depth", tick, depth)

    def aggregations(self, parents: Sequence[int], user_id: str, visible: str) -> list[Any]:
        """(tick of the parent, rel_type, number of children, the last one's tick, how many by the user, event IDs if they are
        references) of these parents, as far as relations are bundled. Without children of those whom the user ignores.
        """
        return self.all("SELECT e.relates_to, e.rel_type, count(*), max(e.tick), sum(e.sender = ?), "
                        f"json_group_array({EVENT_ID}) FILTER (WHERE e.rel_type = 'm.reference') "
                        "FROM events e JOIN events p ON p.tick = e.relates_to "
                        f"WHERE e.relates_to IN (SELECT value FROM json_each(?)) AND {VISIBLE} AND p.state_key IS NULL "
                        "AND (e.rel_type = 'm.thread' AND p.rel_type IS NULL OR e.rel_type IN ('m.replace', 'm.reference') "
                        "AND coalesce(p.rel_type, '') NOT IN ('m.annotation', 'm.replace')) "
                        f"AND e.sender NOT IN ({IGNORED}) GROUP BY e.relates_to, e.rel_type",
                        user_id, to_json(parents), visible, user_id)

    def has_annotated(self, parent: int, sender: str, type: str, key: Any) -> bool:
        # Of several paths json_extract makes a list of JSON; of a single one a text, which may end at a NUL in it.
        return self.one("SELECT 1 FROM events WHERE relates_to = ? AND rel_type = 'm.annotation' AND sender = ? AND type = ? "
                        "AND json_extract(json, '$.content.\"m.relates_to\".key', '$.type') = ?",
                        parent, sender, type, to_json([key, type]) if isinstance(key, str) else None) is not None

    def latest_edit(self, event: Event, visible: str) -> Event | None:
        """The most recent valid replacement of an event that is not redacted (Event replacements, Validity)."""
        found = self.found("e.relates_to = ? AND e.rel_type = 'm.replace' AND e.sender = ? AND e.type = ? "
                           f"AND e.state_key IS NULL AND {VISIBLE} "
                           "AND (e.type = 'm.room.encrypted' OR json_type(e.json, '$.content.\"m.new_content\"') = 'object') "
                           f"ORDER BY e.ts DESC, {EVENT_ID} DESC LIMIT 1", event.tick, event.sender, event.type, visible)
        return found[0] if found and event.redacted_because is None else None

    def contents(self, room: int, types: Sequence[str]) -> dict[str, JsonObject]:
        """Content of the present state with an empty state key, by type."""
        marks = ",".join("?" * len(types))
        rows = self.all("SELECT e.type, json_extract(e.json, '$.content') "
                        "FROM state s JOIN events e ON e.tick = s.tick "
                        f"WHERE s.room = ? AND s.state_key = '' AND s.type IN ({marks})", room, *types)
        return {type: json.loads(content) for type, content in rows}

    def changes(self, rooms: Sequence[int], type: str, key: str, state_key: str = "") -> dict[int, list[tuple[int, Any]]]:
        """(tick, content[key]) of each event that set this state, old to new."""
        return self.by_room(f"SELECT room, tick, json_extract(json, '$.content.{key}') FROM events INDEXED BY state_events "
                            f"WHERE {ROOMS} AND type = ? AND state_key = ? AND state_key IS NOT NULL ORDER BY room, tick",
                            rooms, type, state_key)

    def receipts_since(self, rooms: Sequence[int], since: int) -> dict[int, list[Any]]:
        """(type, user_id, thread_id, event_id, ts) of each that is new."""
        return self.by_room("SELECT room, type, user_id, thread_id, event_id, ts FROM receipts "
                            f"WHERE {ROOMS} AND tick > ? ORDER BY tick", rooms, since)

    def receipt(self, room: int, type: str, user_id: str, thread_id: str) -> str | None:
        """The event up to which the user has read by this receipt."""
        return self.text("SELECT event_id FROM receipts WHERE room = ? AND type = ? AND user_id = ? AND thread_id = ?",
                         room, type, user_id, thread_id)

    def own_receipts(self, rooms: Sequence[int], user_id: str) -> dict[int, list[Any]]:
        """(thread_id, event_id, tick) of each receipt that says what the user has read."""
        return self.by_room("SELECT room, thread_id, event_id, tick FROM receipts "
                            f"WHERE {ROOMS} AND type IN ('m.read', 'm.read.private') AND user_id = ?", rooms, user_id)

    def notable(self, room: int, user_id: str, after: int, upto: int, limit: int, members: bool) -> list[Any]:
        """(tick, type, state_key, sender, json, relates_to, rel_type) of what may notify the user, the newest `limit` of them,
        from new to old. `members`: with the members' comings and goings.
        """
        return self.all("SELECT tick, type, state_key, sender, json, relates_to, rel_type FROM events INDEXED BY timeline "
                        "WHERE room = ? AND tick > ? AND tick <= ? AND (redacted_by IS NULL OR sender = ?) "
                        "AND (? OR type != 'm.room.member') "
                        f"AND (type = 'm.room.redaction' OR sender NOT IN ({IGNORED})) ORDER BY tick DESC LIMIT ?",
                        room, after, upto, user_id, members, user_id, limit)

    def own_memberships(self, room: int, user_id: str) -> list[Any]:
        """(tick, membership, displayname) of each change, old to new."""
        rows = self.all("SELECT tick, json_extract(json, '$.content.membership', '$.content.displayname') "
                        "FROM events WHERE room = ? AND type = 'm.room.member' AND state_key = ? AND state_key IS NOT NULL "
                        "ORDER BY tick", room, user_id)
        return [(tick, *json.loads(both)) for tick, both in rows]

    # -- keys and messages to devices (end-to-end encryption)

    def keys_of(self, user_id: str) -> list[Any]:
        """(device_id, display_name, json) of each device with keys."""
        return self.all("SELECT device_id, display_name, json FROM device_keys JOIN devices USING (user_id, device_id) "
                        "WHERE user_id = ?", user_id)

    def device_keys(self, user_id: str, device_id: str) -> str | None:
        return self.text("SELECT json FROM device_keys WHERE user_id = ? AND device_id = ?", user_id, device_id)

    def cross_signing(self, user_id: str) -> dict[str, JsonObject]:
        """The user's cross-signing keys by usage: master, self_signing, user_signing."""
        return {usage: json.loads(text) for usage, text in self.all("SELECT usage, json FROM cross_signing WHERE user_id = ?", user_id)}

    def signatures(self, user_id: str, asker: str) -> list[Any]:
        """(key, signer, key_id, signature) on the user's keys, as far as the asker may see them: the user's and its own."""
        return self.all("SELECT key, signer, key_id, signature FROM signatures WHERE user_id = ? AND signer IN (?, ?)",
                        user_id, user_id, asker)

    def one_time_counts(self, user_id: str, device_id: str) -> dict[str, int]:
        """One-time keys that are left, by algorithm; signed_curve25519 is always named."""
        rows = self.all("SELECT substr(key_id, 1, instr(key_id, ':') - 1) AS algorithm, count(*) FROM one_time_keys "
                        "WHERE user_id = ? AND device_id = ? GROUP BY algorithm", user_id, device_id)
        return {"signed_curve25519": 0, **dict(rows)}

    def one_time_key(self, user_id: str, device_id: str, key_id: str) -> str | None:
        return self.text("SELECT json FROM one_time_keys WHERE user_id = ? AND device_id = ? AND key_id = ?",
                         user_id, device_id, key_id)

    def unused_fallbacks(self, user_id: str, device_id: str) -> list[str]:
        """Algorithms of the fallback keys that nobody has got yet."""
        return self.column("SELECT algorithm FROM fallback_keys WHERE user_id = ? AND device_id = ? AND NOT used", user_id, device_id)

    def devices_with_keys(self, users: Iterable[str]) -> list[Any]:
        """(user_id, device_id) of each."""
        return self.all("SELECT user_id, device_id FROM device_keys WHERE user_id IN (SELECT value FROM json_each(?))",
                        to_json([*users]))

    def key_news(self, user_id: str, since: int, others: Iterable[str] = ()) -> dict[str, bool]:
        """Users whose device lists changed after `since` or who are among the others and ever had keys, and whether
        they are in a room with this user. Signatures of the user's own count as changes.
        """
        found = self.column("SELECT user_id FROM key_changes WHERE tick > ? OR user_id IN (SELECT value FROM json_each(?)) "
                            "OR user_id IN (SELECT user_id FROM signatures WHERE signer = ? AND tick > ?)",
                            since, to_json(list(others)), user_id, since)
        met = self.met_by(user_id, found) if found else ()
        return {other: other in met for other in found}

    def met_by(self, user_id: str, others: Iterable[str]) -> set[str]:
        """The user, and those of the others who are in a room with the user."""
        return {user_id, *self.column(
            "SELECT value FROM json_each(?) WHERE EXISTS (SELECT 1 FROM memberships a JOIN memberships b USING (room) "
            "WHERE a.user_id = ? AND a.membership = 'join' AND b.user_id = value AND b.membership = 'join')",
            to_json(list(others)), user_id)}

    def met_in(self, room: int, user_id: str, since: int) -> set[str]:
        """Whom the user has met or lost sight of in a room after this tick; for when the user came or went."""
        joined, found = set[str](), set[str]()
        for tick, member, membership in self.all(
                "SELECT tick, state_key, json_extract(json, '$.content.membership') FROM events WHERE room = ? "
                "AND type = 'm.room.member' AND state_key IS NOT NULL ORDER BY tick", room):
            if (member in joined) != (membership == "join"):
                joined ^= {member}
                if tick > since:
                    found |= joined if member == user_id else {member} if user_id in joined else set()
        return found

    def changed_members(self, room: int, since: int) -> dict[str, int]:
        """Whose membership changed after this tick, and whether they came or went. Looks at what is new, however many there are."""
        is_in = "coalesce(json_extract({}.json, '$.content.membership'), '') = 'join'"
        return dict(self.all(f"SELECT e.state_key, max(({is_in.format('e')}) != ({is_in.format('p')})) "
                             "FROM events e INDEXED BY timeline LEFT JOIN events p ON p.tick = e.replaces "
                             "WHERE e.room = ? AND e.tick > ? AND e.type = 'm.room.member' AND e.state_key IS NOT NULL "
                             "GROUP BY e.state_key", room, since))

    def to_device(self, user_id: str, device_id: str) -> list[Any]:
        """(tick, json) of each message that is kept for the device's /sync."""
        return self.all("SELECT tick, json FROM to_device WHERE user_id = ? AND device_id = ? AND appservice IS NULL ORDER BY tick",
                        user_id, device_id)

    def backup(self, user_id: str, version: int | None) -> BackupRow | None:
        """That of this version, or the last one."""
        counted = "(SELECT *, (SELECT count(*) FROM backup_keys k WHERE k.version = b.version) AS size FROM backups b)"
        return self.row(BackupRow, f"{counted} WHERE user_id = ? AND (? IS NULL OR version = ?) ORDER BY version DESC LIMIT 1",
                        user_id, version, version)

    def backup_keys(self, version: int, room_id: str | None = None, session_id: str | None = None) -> list[Any]:
        """(room_id, session_id, json) of a backup, of one room, or of one session."""
        return self.all("SELECT room_id, session_id, json FROM backup_keys WHERE version = ? AND (? IS NULL OR room_id = ?) "
                        "AND (? IS NULL OR session_id = ?)", version, room_id, room_id, session_id, session_id)

    # -- what waits for application services

    def ghosts_with_keys(self, id: str) -> list[str]:
        """Users of an application service that have uploaded device keys."""
        return self.column("SELECT DISTINCT user_id FROM device_keys JOIN users USING (user_id) WHERE appservice = ?", id)

    def outboxes(self) -> dict[str, Outbox]:
        return {id: self._outbox(id) for id in self.column("SELECT appservice FROM outbox UNION SELECT appservice FROM transactions")}

    def _outbox(self, id: str) -> Outbox:
        frozen_to, kept = self.one("SELECT coalesce(max(last_tick), 0), count(*) FROM transactions WHERE appservice = ?", id)
        waiting_to = self.number("SELECT coalesce(max(tick), 0) FROM outbox WHERE appservice = ?", id)
        open = self.row(Transaction, "transactions WHERE appservice = ? AND acknowledged_ts IS NULL", id)
        return Outbox(open, frozen_to, max(frozen_to, waiting_to), kept)

    def count_waiting(self, id: str) -> int:
        """Events for this application service that it has not acknowledged."""
        frozen = self.number("SELECT coalesce(sum(max(events, 1)), 0) FROM transactions "
                             "WHERE appservice = ? AND acknowledged_ts IS NULL", id)
        return frozen + self.number("SELECT count(*) FROM outbox WHERE appservice = ? AND tick > "
                                    "(SELECT coalesce(max(last_tick), 0) FROM transactions WHERE appservice = ?)", id, id)

    def transactions(self, id: str, limit: int = -1) -> list[Any]:
        """(txn_id, body, acknowledged_ts) of those that are kept, or of the last ones, old to new."""
        return self.all("SELECT txn_id, body, acknowledged_ts FROM transactions "
                        "WHERE appservice = ? ORDER BY txn_id DESC LIMIT ?", id, limit)[::-1]

    def transaction_of(self, id: str, tick: int) -> Any:
        """(txn_id, acknowledged_ts) of the transaction in which the event of this tick went, or None."""
        return self.one("SELECT txn_id, acknowledged_ts FROM transactions WHERE appservice = ? AND last_tick >= ? AND events > 0 "
                        "ORDER BY txn_id LIMIT 1", id, tick)

    def last_acknowledged(self, id: str) -> Any:
        """(txn_id, acknowledged_ts) or None."""
        return self.one("SELECT txn_id, acknowledged_ts FROM transactions WHERE appservice = ? AND acknowledged_ts IS NOT NULL "
                        "ORDER BY txn_id DESC LIMIT 1", id)

    def remembers(self, id: str, tick: int) -> bool:
        """Whether it is still known to which events from this tick on an application service was interested."""
        first, kept = self.one("SELECT min(tick), (SELECT count(*) FROM transactions WHERE appservice = ?) FROM outbox "
                               "WHERE appservice = ?", id, id)
        return kept <= KEPT_TRANSACTIONS or first is None or first <= tick

    def reason(self, id: str, tick: int) -> str | None:
        return self.text("SELECT reason FROM outbox WHERE appservice = ? AND tick = ?", id, tick)


class Tx(Reader):
    """What a job on the writer thread may do. Nothing that it does is seen before COMMIT."""

    def __init__(self, store: Store, db: sqlite3.Connection) -> None:
        super().__init__(db)
        self.store = store
        self.tick_now = 0                                    # the last tick drawn
        # the writer's cache of room states
        self.rooms: collections.OrderedDict[str, Room] = collections.OrderedDict()
        self.boxes: dict[str, Outbox] = {}                   # the same for the outboxes
        self.ready: set[str] = set()                         # application services that freeze() is to look at
        # Ephemeral data that waits, by application service: what it replaces → data. In memory only.
        self.ephemeral: dict[str, dict[Any, JsonObject]] = {}
        # Application services that may have messages to devices or news of keys waiting, and the users among their own
        # whose key counts they should hear.
        self.news: dict[str, set[str]] = {}
        # Ghosts' new devices, (user_id, device_id), that have no keys yet → in how many transactions it still hears of that.
        self.keyless: dict[str, dict[tuple[str, str], int]] = {}
        self.new_batch()
        self.forget()

    def new_batch(self) -> None:
        """Nothing has been done yet; what there is to do after COMMIT is gathered here."""
        self.on_commit: list[Callable[[], object]] = []      # to be done then, in this order
        self.typing: dict[int, dict[str, float]] = {}        # who types in a room where this batch has changed that (6, Typing)
        self.woken: set[str] = set()                         # users to wake,
        self.woken_rooms: set[Room] = set()                  # rooms whose members to wake,
        self.woken_around: set[str] = set()                  # and users: who is in a room with them is to be woken
        self.moved: dict[int, int] = {}                      # room → its last tick
        self._rows: dict[str, list[tuple[Any, ...]]] = {}    # table → rows that are still to be inserted
        self._unseen: set[tuple[str, str]] = set()           # sender and client transaction ID of such events
        self._replaced: list[tuple[str, Any, Any]] = []      # application service, key of ephemeral data, what was there before
        self.new_job()

    def new_job(self) -> None:
        """The same for one job, which may be refused when half of it is done."""
        self._own_rows: dict[str, list[tuple[Any, ...]]] = {}        # table → rows of this job that are still to be inserted
        self._has_savepoint = False                          # whether what it has done in the database can be undone alone
        self._touched: set[str] = set()                      # rooms whose cached state it changed
        self._mark = len(self.on_commit)                     # what it adds stands behind this
        self._on_kept: list[Callable[[], object]] = []       # changes of what is cached, to be made if it is not refused
        self._typing_before = self.typing.copy()

    def job_done(self) -> None:
        if self._has_savepoint:
            self.db.execute("RELEASE job")
        for table, rows in self._own_rows.items():
            self._rows.setdefault(table, []).extend(rows)
        self._own_rows.clear()
        for change in self._on_kept:
            change()

    def job_failed(self) -> None:
        """Undoes one job, in the database and in the caches."""
        if self._has_savepoint:
            self.db.execute("ROLLBACK TO job")
            self.db.execute("RELEASE job")
        self._own_rows.clear()
        for room_id in self._touched:
            self.rooms.pop(room_id, None)
        del self.on_commit[self._mark:]
        self.typing = self._typing_before

    def undo(self) -> None:
        """After a rollback: what is cached may be wrong, and is read anew before the next job."""
        for id, key, before in reversed(self._replaced):
            self.ephemeral[id].pop(key, None)
            if before:
                self.ephemeral[id][key] = before
        self.new_batch()
        self.stale = True

    def forget(self) -> None:
        """Reads anew what is cached. Before the first job of a batch only."""
        self.rooms.clear()
        self.boxes = self.outboxes()
        self.ready = set(self.boxes)
        self.news.clear()
        self.hear_anew()
        self.tick_now = self.position()
        self.stale = False

    def tick(self) -> int:
        self.tick_now += 1
        return self.tick_now

    def add_row(self, table: str, *row: Any) -> None:
        """Stores a row, together with others of the same batch, before anything but `sent` is read.

        Each statement lets go of the interpreter's lock, and with many requests at work it takes many times as long to
        get it back as to store a row.
        """
        self._own_rows.setdefault(table, []).append(row)

    def _store_rows(self, tables: dict[str, list[tuple[Any, ...]]]) -> None:
        for table, rows in tables.items():
            for some in in_powers_of_two(rows, MAX_ROWS):
                marks = ",".join([f"({','.join('?' * len(rows[0]))})"] * len(some))
                self.db.execute(f"INSERT INTO {table} VALUES {marks}", [value for row in some for value in row])
        tables.clear()

    def flush(self, changes: bool = False) -> None:
        """Before a statement: inserts what was to be inserted. A job that `changes` anything else can be undone alone."""
        if self._rows:
            self._store_rows(self._rows)
            self._unseen.clear()
        if (changes or self._own_rows) and not self._has_savepoint:
            self.db.execute("SAVEPOINT job")
            self._has_savepoint = True
        self._store_rows(self._own_rows)

    def one(self, sql: str, *values: Any) -> Any:
        self.flush()
        return super().one(sql, *values)

    def all(self, sql: str, *values: Any) -> list[Any]:
        self.flush()
        return super().all(sql, *values)

    def run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self.flush(changes=True)
        return self.db.execute(sql, values)

    def wake(self, *user_ids: str) -> None:
        self.woken.update(user_ids)

    def wake_room(self, room: Room) -> None:
        self.woken_rooms.add(room)

    # -- accounts

    def add_user(self, user_id: str, password: str | None, appservice: str | None, now: int) -> None:
        self.run("INSERT INTO users (user_id, password, appservice, displayname, created_ts) "
                 "VALUES (?, ?, ?, ?, ?)",
                 user_id, password, appservice, localpart_of(user_id), now)
        self.on_commit.append(lambda: self.store.users.add(user_id))

    def set_profile(self, user_id: str, key: str, value: str | None) -> None:
        column = {"displayname": "displayname", "avatar_url": "avatar_url"}[key]
        self.run(f"UPDATE users SET {column} = ? WHERE user_id = ?", value, user_id)

    def set_profile_field(self, user_id: str, key: str, text: str | None) -> None:
        """The value in JSON; None takes the field away."""
        self.run("DELETE FROM profile_fields WHERE user_id = ? AND key = ?", user_id, key)
        if text is not None:
            self.run("INSERT INTO profile_fields VALUES (?, ?, ?)", user_id, key, text)

    def add_session(self, user_id: str, device_id: str, display_name: str | None, token: bytes, now: int,
                    ip: str | None) -> None:
        """A new token for the device; one that the device had before ends."""
        self.end_sessions(user_id, device_id)
        self.run("INSERT INTO devices VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                 "display_name = coalesce(excluded.display_name, display_name), "
                 "last_seen_ts = excluded.last_seen_ts, last_seen_ip = excluded.last_seen_ip",
                 user_id, device_id, display_name, now, ip)
        self.run("INSERT INTO sessions VALUES (?, ?, ?)", token, user_id, device_id)
        self.on_commit.append(lambda: self.store.sessions.__setitem__(token, (user_id, device_id)))

    def end_sessions(self, user_id: str, device_id: str | None = None) -> None:
        """Ends the tokens of a device, or of all."""
        where, values = "user_id = ? AND (? IS NULL OR device_id = ?)", (user_id, device_id, device_id)
        for token in self.column(f"SELECT token FROM sessions WHERE {where}", *values):
            self.on_commit.append(functools.partial(self.store.sessions.pop, token, None))
            self.wake(user_id)                               # who waits in /sync is to be told
        self.run(f"DELETE FROM sessions WHERE {where}", *values)

    def add_device(self, user_id: str, device_id: str, display_name: str | None, now: int) -> None:
        self.run("INSERT INTO devices VALUES (?, ?, ?, ?, NULL)", user_id, device_id, display_name, now)

    def delete_device(self, user_id: str, device_id: str | None = None) -> None:
        """A device, or all, with the sessions, the keys and what waits for it."""
        self.end_sessions(user_id, device_id)
        where, values = "user_id = ? AND (? IS NULL OR device_id = ?)", (user_id, device_id, device_id)
        self.run("DELETE FROM signatures WHERE user_id = ? "
                 f"AND key IN (SELECT device_id FROM device_keys WHERE {where})", user_id, *values)
        had_keys = self.run(f"DELETE FROM device_keys WHERE {where}", *values).rowcount
        for table in ("devices", "one_time_keys", "fallback_keys", "to_device"):
            self.run(f"DELETE FROM {table} WHERE {where}", *values)
        if had_keys:
            self.keys_changed(user_id)

    def set_password(self, user_id: str, password: str) -> None:
        self.run("UPDATE users SET password = ? WHERE user_id = ?", password, user_id)

    def deactivate(self, user_id: str) -> None:
        """Leaves of an account its name, and what it has done in rooms."""
        self.delete_device(user_id)
        self.run("DELETE FROM backup_keys WHERE version IN (SELECT version FROM backups WHERE user_id = ?)", user_id)
        for table in ("profile_fields", "account_data", "cross_signing", "signatures", "backups"):
            self.run(f"DELETE FROM {table} WHERE user_id = ?", user_id)
        self.run("UPDATE users SET password = NULL, displayname = NULL, avatar_url = NULL, deactivated = 1 "
                 "WHERE user_id = ?", user_id)
        self.on_commit.append(lambda: self.store.users.discard(user_id))

    def rename_device(self, user_id: str, device_id: str, display_name: str | None) -> None:
        self.run("UPDATE devices SET display_name = ? WHERE user_id = ? AND device_id = ?", display_name,
                 user_id, device_id)
        if self.device_keys(user_id, device_id):
            self.keys_changed(user_id)                       # others are shown the name with the keys

    def set_account_data(self, user_id: str, room_id: str, type: str, content: str) -> None:
        self.run("INSERT OR REPLACE INTO account_data VALUES (?, ?, ?, ?, ?)", user_id, room_id, type,
                 self.tick(), content)
        self.wake(user_id)

    def add_filter(self, user_id: str, content: str) -> int:
        self.run("INSERT OR IGNORE INTO filters (user_id, json) VALUES (?, ?)", user_id, content)
        return self.number("SELECT filter_id FROM filters WHERE user_id = ? AND json = ?", user_id, content)

    def put_media(self, media_id: str, content_type: str, filename: str | None, user_id: str, now: int,
                  content: bytes | None) -> None:
        self.run("INSERT OR REPLACE INTO media VALUES (?, ?, ?, ?, ?, ?)", media_id, content_type, filename, user_id, now,
                 content)
        self.wake(media_id)                                  # who waits for a content waits under its ID

    # -- keys and messages to devices (end-to-end encryption)

    def put_device_keys(self, user_id: str, device_id: str, text: str) -> None:
        self.run("INSERT OR REPLACE INTO device_keys VALUES (?, ?, ?)", user_id, device_id, text)
        self.keys_changed(user_id)

    def put_cross_signing(self, user_id: str, usage: str, text: str) -> None:
        self.run("INSERT OR REPLACE INTO cross_signing VALUES (?, ?, ?)", user_id, usage, text)

    def delete_cross_signing(self, user_id: str) -> None:
        self.run("DELETE FROM cross_signing WHERE user_id = ?", user_id)

    def put_signature(self, user_id: str, key: str, signer: str, key_id: str, signature: str) -> None:
        self.run("INSERT OR REPLACE INTO signatures VALUES (?, ?, ?, ?, ?, ?)", user_id, key, signer, key_id, signature, self.tick())
        self.wake(signer)

    def keys_changed(self, user_id: str) -> None:
        """The user's device list is new to all who share a room, and to the application services there."""
        self.run("INSERT OR REPLACE INTO key_changes VALUES (?, ?)", user_id, self.tick())
        self.woken_around.add(user_id)
        for id in self._concerned(user_id, {one.id for one in self.store.registrations if one.hears_keys}):
            self._tell_news(id)

    def put_one_time_key(self, user_id: str, device_id: str, key_id: str, text: str) -> None:
        self.run("INSERT INTO one_time_keys VALUES (?, ?, ?, ?)", user_id, device_id, key_id, text)

    def put_fallback_key(self, user_id: str, device_id: str, key_id: str, text: str) -> None:
        """Replaces the device's fallback key of this algorithm; used or not, the same one stays as it is."""
        algorithm = key_id.partition(":")[0]
        self.run("INSERT INTO fallback_keys VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET key_id = excluded.key_id, "
                 "json = excluded.json, used = 0 WHERE json <> excluded.json OR key_id <> excluded.key_id",
                 user_id, device_id, algorithm, key_id, text)

    def claim_key(self, user_id: str, device_id: str, algorithm: str) -> tuple[str, str] | None:
        """Takes a one-time key away, or lends the fallback key: its ID and JSON."""
        row = self.one("SELECT key_id, json FROM one_time_keys WHERE user_id = ? AND device_id = ? AND instr(key_id, ? || ':') = 1 "
                       "ORDER BY rowid LIMIT 1", user_id, device_id, algorithm)
        if row:
            self.run("DELETE FROM one_time_keys WHERE user_id = ? AND device_id = ? AND key_id = ?", user_id, device_id, row[0])
        else:
            of = (user_id, device_id, algorithm)
            row = self.one("SELECT key_id, json FROM fallback_keys WHERE user_id = ? AND device_id = ? AND algorithm = ?", *of)
            self.run("UPDATE fallback_keys SET used = 1 WHERE user_id = ? AND device_id = ? AND algorithm = ?", *of)
        self._tell_counts(user_id)
        return cast("tuple[str, str] | None", row)

    def add_to_device(self, user_id: str, device_id: str, message: JsonObject) -> None:
        """Leaves a message for a device. One for a ghost goes into the next transaction of the application service that registered
        it, if that takes such.
        """
        owner, pushed_to = self._owner(user_id), None
        if owner and owner.url is not None and owner.takes_to_device:
            message, pushed_to = {**message, "to_user_id": user_id, "to_device_id": device_id}, owner.id
            self._tell_news(owner.id)
            self._tell_counts(user_id)
        self.run("INSERT INTO to_device VALUES (?, ?, ?, ?, ?)", self.tick(), user_id, device_id, to_json(message), pushed_to)
        self.wake(user_id)

    def first_to_device(self, user_id: str, device_id: str, type: str, txn_id: str, now: int) -> bool:
        """Whether this client transaction, of a device and a type, is new. It is remembered for a day: events keep theirs, these
        messages go.
        """
        self.run("DELETE FROM to_device_txns WHERE ts < ?", now - REMEMBERED_MS)
        done = self.run("INSERT OR IGNORE INTO to_device_txns VALUES (?, ?, ?, ?, ?)", user_id, device_id, type, txn_id, now)
        return done.rowcount == 1

    def return_to_device(self, but: Sequence[str]) -> None:
        """What waits for other application services than these is for the /sync of the devices now."""
        self.run("UPDATE to_device SET appservice = NULL WHERE appservice NOT IN (SELECT value FROM json_each(?))", to_json(but))

    def drop_to_device(self, user_id: str, device_id: str, upto: int) -> None:
        """The device has these."""
        self.run("DELETE FROM to_device WHERE user_id = ? AND device_id = ? AND appservice IS NULL AND tick <= ?",
                 user_id, device_id, upto)

    def add_backup(self, user_id: str, algorithm: str, auth_data: str) -> int:
        return int(self.run("INSERT INTO backups (user_id, algorithm, auth_data) VALUES (?, ?, ?)",
                            user_id, algorithm, auth_data).lastrowid or 0)

    def set_backup_auth(self, version: int, auth_data: str) -> None:
        self.run("UPDATE backups SET auth_data = ? WHERE version = ?", auth_data, version)

    def put_backup_key(self, version: int, room_id: str, session_id: str, text: str) -> None:
        self.run("INSERT OR REPLACE INTO backup_keys VALUES (?, ?, ?, ?)", version, room_id, session_id, text)

    def delete_backup_keys(self, version: int, room_id: str | None = None, session_id: str | None = None) -> int:
        """How many there were."""
        return self.run("DELETE FROM backup_keys WHERE version = ? AND (? IS NULL OR room_id = ?) AND (? IS NULL OR session_id = ?)",
                        version, room_id, room_id, session_id, session_id).rowcount

    def delete_backup(self, version: int) -> None:
        self.delete_backup_keys(version)
        self.run("DELETE FROM backups WHERE version = ?", version)

    def backup_changed(self, version: int) -> None:
        """Its keys are others now: so is its etag."""
        self.run("UPDATE backups SET etag = etag + 1 WHERE version = ?", version)

    # -- rooms

    def add_room(self, room_id: str, version: RoomVersion) -> Room:
        n = self.run("INSERT INTO rooms (room_id, version) VALUES (?, ?)", room_id, version.id).lastrowid
        self._touched.add(room_id)
        return self._cache(Room(int(n or 0), room_id, version))

    def _cache(self, room: Room) -> Room:
        self.rooms[room.room_id] = room
        if len(self.rooms) > MAX_CACHED_ROOMS:
            self.rooms.popitem(last=False)
        return room

    def room(self, room_id: str) -> Room | None:
        """A room with its state, from the cache if it is there."""
        if room_id in self.rooms:
            self.rooms.move_to_end(room_id)
            return self.rooms[room_id]
        row = self.room_row(room_id)
        if not row:
            return None
        room = Room(row.n, room_id, ROOM_VERSIONS[row.version])
        for tick, type, state_key, sender, content in self.all(
                "SELECT e.tick, e.type, e.state_key, e.sender, json_extract(e.json, '$.content') "
                "FROM state s JOIN events e ON e.tick = s.tick WHERE s.room = ?", row.n):
            room.put(type, state_key, StateEvent(tick, sender, json.loads(content)))
        return self._cache(room)

    def joined_rooms(self, user_id: str) -> Iterator[Room]:
        """The rooms that a user is in, each read when it is its turn."""
        rooms = (self.room(one.room_id) for one in self.memberships_of(user_id) if one.membership == "join")
        return (room for room in rooms if room)

    def audience(self, room: Room) -> Audience:
        if room.audience is None or room.audience.registrations is not self.store.registrations:
            room.audience = Audience(self.store.registrations, room.room_id, room.joined,
                                     self.aliases_of(room.n))
        return room.audience

    def publish_room(self, room: Room, published: bool) -> None:
        self.run("UPDATE rooms SET published = ? WHERE n = ?", int(published), room.n)

    def publish_in_network(self, appservice: str, network: str, room: Room, published: bool) -> None:
        self.run("INSERT OR IGNORE INTO network_rooms VALUES (?, ?, ?)" if published else
                 "DELETE FROM network_rooms WHERE appservice = ? AND network = ? AND room = ?", appservice, network, room.n)

    def add_alias(self, alias: str, room: Room, creator: str) -> None:
        self.run("INSERT INTO aliases VALUES (?, ?, ?)", alias, room.n, creator)
        self._touched.add(room.room_id)
        self.audience(room).add("aliases", alias)

    def delete_alias(self, alias: str, room: Room) -> None:
        self.run("DELETE FROM aliases WHERE alias = ?", alias)
        self._touched.add(room.room_id)
        self.audience(room).remove("aliases", alias)

    def forget_room(self, user_id: str, room: int) -> None:
        self.run("UPDATE memberships SET forgotten = 1 WHERE user_id = ? AND room = ?", user_id, room)

    def add_receipt(self, room: Room, type: str, user_id: str, thread_id: str, event_id: str, now: int) -> None:
        tick = self.tick()
        self.run("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)", room.n, type, user_id,
                 thread_id, tick, event_id, now)
        self.moved[room.n] = tick
        receipt = without_none({"ts": now, "thread_id": thread_id or None})
        self.push_ephemeral(room, user_id, "m.receipt", {"content": {event_id: {type: {user_id: receipt}}}},
                            type == "m.read.private", thread_id)

    # -- events

    def append(self, room: Room, draft: Draft, ts: int, device_id: str | None = None, txn_id: str | None = None,
               max_bytes: int = 65_536) -> str:
        """Stores an event that the rules have passed and everything that follows from it; its event ID."""
        tick = self.tick()
        parts = {"type": draft.type, "sender": draft.sender, "content": draft.content, "origin_server_ts": ts,
                 "room_id": room.room_id}
        if draft.state_key is not None:
            parts["state_key"] = draft.state_key
        if draft.redacts is not None:
            parts["redacts"] = draft.redacts
        text = canonical_json(parts)
        event_id = event_id_of(tick, text)
        if draft.type == "m.room.create" and room.version.creators_rule:
            self._name_by_hash(room, "!" + event_id[1:])
            text = canonical_json({**parts, "room_id": room.room_id})
        text = f'{{"event_id":"{event_id}",{text[1:]}'
        if len(text) > max_bytes or len(text.encode()) > max_bytes:
            raise MatrixError("M_TOO_LARGE", f"an event may have {max_bytes} bytes at most, this one has "
                              f"{len(text.encode())}")
        self._insert(room, tick, draft, ts, text, device_id, txn_id)
        return event_id

    def _name_by_hash(self, room: Room, room_id: str) -> None:
        """In room version 12 the room ID is the hash of m.room.create."""
        self.run("UPDATE rooms SET room_id = ? WHERE n = ?", room_id, room.n)
        self.rooms[room_id] = self.rooms.pop(room.room_id)
        room.room_id, room.audience = room_id, None
        self._touched.add(room_id)

    def _insert(self, room: Room, tick: int, draft: Draft, ts: int, text: str, device_id: str | None,
                txn_id: str | None) -> None:
        """Stores the event and, in the same transaction of the database, a row in the outbox of each application service that is
        interested in it, with the reason; and what follows from it for the room's state.
        """
        self._touched.add(room.room_id)
        audience = self.audience(room)
        target = draft.state_key if draft.type == "m.room.member" else None
        reasons = audience.interested(draft.sender, target)
        before = room.events.get((draft.type, draft.state_key)) if draft.state_key is not None else None
        relates_to, rel_type = self._relation(room, draft.content.get("m.relates_to"))
        self.add_row("events", tick, room.n, draft.type, draft.state_key, draft.sender, ts, text, before.tick if before else None,
                     None, relates_to, rel_type, device_id, txn_id)
        if txn_id is not None:
            self._unseen.add((draft.sender, txn_id))
        self.wake_room(room)
        if draft.state_key is not None:
            self._set_state(room, tick, draft, audience)
        for id, reason in reasons.items():
            if self.store.registrations.by_id[id].url is not None:
                self.add_row("outbox", id, tick, reason)
                self._on_kept.append(functools.partial(self._change_box, id, waiting_to=tick))
        self.moved[room.n] = tick

    def _relation(self, room: Room, relation: Any) -> tuple[int | None, str | None]:
        """Tick and type of what an event says that it relates to, if that is an event of the same room."""
        if not isinstance(relation, dict) or not all(isinstance(relation.get(key), str) for key in ("event_id", "rel_type")):
            return None, None
        parent = self.event(room.n, relation["event_id"])
        return (parent.tick, relation["rel_type"]) if parent else (None, None)

    def _set_state(self, room: Room, tick: int, draft: Draft, audience: Audience) -> None:
        key = draft.state_key or ""
        was_in = key in room.joined
        room.put(draft.type, key, StateEvent(tick, draft.sender, draft.content))
        self.run("INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", room.n, draft.type, key, tick)
        if draft.type == "m.room.member":
            self.run("INSERT OR REPLACE INTO memberships VALUES (?, ?, ?, ?, 0)", key, room.n,
                     draft.content["membership"], tick)
            if was_in != (key in room.joined):
                (audience.remove if was_in else audience.add)("users", key)
                self.store.on_membership(self, room, key)
            self.wake(key)

    def sent(self, room: int, draft: Draft, device_id: str | None, txn_id: str) -> str | None:
        """The event that this client transaction has made: one of the same sender and device, room and type, and if it is
        a redaction, of the same event; whatever its content (Transaction identifiers). Rows of the batch are stored for it only
        if it may be among them.
        """
        if (draft.sender, txn_id) in self._unseen:
            self.flush()
        row = super().one(f"SELECT {EVENT_ID} FROM events AS e INDEXED BY sent WHERE sender = ? AND txn_id = ? AND room = ? "
                          "AND type = ? AND device_id IS ? AND json_extract(json, '$.redacts') IS ?",
                          draft.sender, txn_id, room, draft.type, device_id, draft.redacts)
        return row[0] if row else None

    def redact(self, room: Room, event: Event, redaction_tick: int) -> None:
        text = redacted_json(room.version, event.json)
        self.run("UPDATE events SET json = ?, redacted_by = ?, relates_to = NULL, rel_type = NULL WHERE tick = ?",
                 text, redaction_tick, event.tick)
        key = (event.type, event.state_key or "")
        if event.state_key is not None and key in room.events and room.events[key].tick == event.tick:
            self._touched.add(room.room_id)
            room.put(*key, StateEvent(event.tick, event.sender, json.loads(text)["content"]))

    # -- the outbox. A row says that an application service is to get an event, and why; it is stored with the event. At the end of
    # a batch freeze() makes a transaction of what waits for each that has none open. From then on it never changes; when it is
    # acknowledged, the same batch freezes the next.

    def _change_box(self, id: str, **changes: Any) -> None:
        """When the job is done; freeze() then looks at this outbox."""
        self.boxes[id] = self.boxes.get(id, NOTHING_WAITS)._replace(**changes)
        self.ready.add(id)

    def freeze(self) -> None:
        """Makes a transaction of what waits, for every AS that has none open. At the end of a batch: undone with all of it."""
        self._has_savepoint = True                           # none is wanted any more: from here on the batch is undone as a whole
        for id in self.ready:
            box = self.boxes.get(id, NOTHING_WAITS)
            if box.open is None and (box.waiting_to > box.frozen_to or self.ephemeral.get(id) or id in self.news):
                self._freeze(id, box)
        self.ready.clear()

    def _freeze(self, id: str, box: Outbox) -> None:
        """Writes the transaction: the oldest events that wait, in their order, and whatever else does.

            {"events": [{"event_id": …, "type": …, "room_id": …, "sender": …, "content": …, "state_key": … if it is state}, …],
             "ephemeral": [{"type": "m.typing", "room_id": …, "content": …}, {"type": "m.presence", "sender": …, "content": …}]}

        `events` is always there, `ephemeral` only if there is any.
        """
        rows = self.all(f"SELECT {EVENT_COLUMNS} FROM outbox o JOIN {EVENT_TABLES} "
                        "WHERE o.appservice = ? AND o.tick > ? AND e.tick = o.tick "
                        "ORDER BY o.tick LIMIT ?", id, box.frozen_to, MAX_TRANSACTION_EVENTS)
        now = self.store.clock.now()
        more = self._frozen_ephemeral(id) + self._frozen_news(id)
        if not rows and not more:
            return
        events = [Event(*row) for row in rows]
        body = '{"events":[' + ",".join([event.for_appservice(now, self._face(event)) for event in events]) + f"]{more}}}"
        transaction = Transaction(id, self._next_txn_id(id), len(rows), body.encode("utf-8", "replace"))
        self._add_transaction(box, transaction, int(rows[-1][0]) if rows else box.frozen_to)

    def _face(self, event: Event) -> str:
        """For an invitation or a knock: what the invited may know of the room, as a part of `unsigned` (m.room.member)."""
        membership = event.content.get("membership") if event.type == "m.room.member" else None
        row = self.room_of(event.tick) if membership in ("invite", "knock") else None
        return f',"{membership}_room_state":{to_json(self.stripped(row.n, [event.sender], event.tick))}' if row else ""

    def _add_transaction(self, box: Outbox, new: Transaction, last_tick: int) -> None:
        self.run("INSERT INTO transactions VALUES (?, ?, ?, ?, ?, NULL)", new.appservice, new.txn_id, last_tick, new.events, new.body)
        self._open(box._replace(frozen_to=last_tick, kept=self._prune(new.appservice, box.kept + 1)), new)

    def _open(self, box: Outbox, transaction: Transaction) -> None:
        """It is to be sent. After COMMIT its worker is told."""
        self.boxes[transaction.appservice] = box._replace(open=transaction)
        self.on_commit.append(lambda: self.store.on_frozen(transaction))

    def _next_txn_id(self, id: str) -> int:
        """Rises, and is never used again: not after a restart, not with a new database (the real clock, in
        microseconds).
        """
        last = self.number("SELECT coalesce(max(txn_id), 0) FROM transactions WHERE appservice = ?", id)
        return max(last + 1, time.time_ns() // 1000)

    def acknowledge(self, id: str, txn_id: int) -> None:
        """The answer was 200. Only the open one counts: it may have been skipped by hand meanwhile."""
        box = self.boxes.get(id)
        if box and box.open and box.open.txn_id == txn_id:
            self.run("UPDATE transactions SET acknowledged_ts = ? WHERE appservice = ? AND txn_id = ?",
                     self.store.clock.now(), id, txn_id)
            self._on_kept.append(functools.partial(self._change_box, id, open=None))

    def reopen(self, id: str, txn_id: int | None, new_id: bool) -> int:
        """An acknowledged transaction (None: the last) is to be sent again, its bytes as they are, if need be under a new ID; its ID.
        Its events do not wait in the outbox again.
        """
        box = self.boxes.get(id, NOTHING_WAITS)
        if box.open:
            raise MatrixError("M_UNKNOWN", f"transaction {box.open.txn_id} is open: retry or skip it first", 409)
        transaction = self.row(Transaction, "transactions WHERE appservice = ? AND (? IS NULL OR txn_id = ?) "
                               "ORDER BY txn_id DESC LIMIT 1", id, txn_id, txn_id)
        if not transaction:
            raise MatrixError("M_NOT_FOUND", f"{id!r} has no such transaction; the last {KEPT_TRANSACTIONS} are kept")
        if new_id:
            transaction = transaction._replace(txn_id=self._next_txn_id(id))
            self._add_transaction(box, transaction, box.frozen_to)
        else:
            self.run("UPDATE transactions SET acknowledged_ts = NULL WHERE appservice = ? AND txn_id = ?", id, transaction.txn_id)
            self._open(box, transaction)
        return transaction.txn_id

    def _prune(self, id: str, kept: int) -> int:
        """Deletes the transactions that are not kept, many at once, for finding the first means to count; how many there are then."""
        if kept <= KEPT_TRANSACTIONS + PRUNED_AT_ONCE:
            return kept
        txn_id, tick = self.one("SELECT txn_id, last_tick FROM transactions "
                                "WHERE appservice = ? ORDER BY txn_id DESC LIMIT 1 OFFSET ?", id, KEPT_TRANSACTIONS + 1)
        self.run("DELETE FROM transactions WHERE appservice = ? AND txn_id <= ?", id, txn_id)
        self.run("DELETE FROM outbox WHERE appservice = ? AND tick <= ?", id, tick)
        return KEPT_TRANSACTIONS + 1                         # and the open one

    # -- what else goes into a transaction: ephemeral data, and news for encrypting application services

    def push_ephemeral(self, room: Room, user_id: str, kind: str, data: JsonObject, private: bool = False,
                       thread_id: str = "") -> None:
        """Ephemeral data for the application services that are interested in the room, and want such (Pushing ephemeral data).

        Private: only for those that have to do with the user. While it waits, the next of its kind, user and thread replaces it.
        """
        ids = self._claimants(user_id) if private else set(self.audience(room).interested(user_id, None))
        key = (kind, private, room.room_id, None if kind == "m.typing" else user_id, thread_id)
        self._queue_ephemeral(ids, key, {"type": kind, "room_id": room.room_id, **data})

    def push_presence(self, user_id: str, data: JsonObject) -> None:
        """Queues presence for the application services that claim the user, or are interested in a room that the user is in."""
        wanting = {id for id, registration in self.store.registrations.by_id.items() if registration.hears_ephemeral}
        self._queue_ephemeral(self._concerned(user_id, wanting), ("m.presence", user_id), data)

    def _concerned(self, user_id: str, wanting: set[str]) -> set[str]:
        """Those of these application services that have to do with a user, or with a room that the user is in."""
        ids = self._claimants(user_id) & wanting
        for room in self.joined_rooms(user_id) if ids != wanting else ():
            ids |= self.audience(room).interested(user_id, None).keys() & wanting
            if ids == wanting:
                break
        return ids

    def _claimants(self, user_id: str) -> set[str]:
        return {claim.registration.id for claim in self.store.registrations.claims("users", user_id)}

    def _queue_ephemeral(self, ids: set[str], key: Any, data: JsonObject) -> None:
        def change(id: str) -> None:
            waiting = self.ephemeral.setdefault(id, {})
            self._replaced.append((id, key, waiting.pop(key, None)))     # the latest of each
            waiting[key] = data
            if len(waiting) > MAX_EPHEMERAL:
                del waiting[next(iter(waiting))]
            self.ready.add(id)
        self._on_kept += [functools.partial(change, id) for id in sorted(ids) if self.store.registrations.by_id[id].hears_ephemeral]

    def _owner(self, user_id: str) -> Registration | None:
        """The application service that registered a ghost."""
        user = self.user(user_id)
        return self.store.registrations.by_id.get(user.appservice or "") if user else None

    def _tell_counts(self, user_id: str) -> None:
        owner = self._owner(user_id)
        if owner and owner.hears_keys:
            self._tell_news(owner.id, user_id)

    def expect_keys(self, user_id: str, device_id: str) -> None:
        """A ghost's device may be new. A bridge that encrypts uploads keys when it hears that there are none; and not if it hears of
        that before it knows that it has the device.
        """
        owner = self._owner(user_id)
        if owner and owner.hears_keys:
            devices = self.keyless.setdefault(owner.id, {})
            self._on_kept.append(lambda: devices.update({(user_id, device_id): KEYLESS_TELLINGS}))

    def _tell_news(self, id: str, *users: str) -> None:
        """An application service is to hear of messages to devices or of keys, and of these users' key counts."""
        def change() -> None:
            self.news.setdefault(id, set()).update(users)
            self.ready.add(id)
        self._on_kept.append(change)

    def hear_anew(self) -> None:
        """Whoever hears of keys and messages to devices is told what there is, with the next transaction."""
        for id, registration in self.store.registrations.by_id.items():
            if registration.url is not None:
                self.news.setdefault(id, set()).update(self.ghosts_with_keys(id) if registration.hears_keys else ())
                self.ready.add(id)

    def _frozen_ephemeral(self, id: str) -> str:
        """The part of a transaction for what waits."""
        data, registration = [*self.ephemeral.get(id, {}).values()], self.store.registrations.by_id.get(id)
        self.on_commit.append(functools.partial(self.ephemeral.pop, id, None))       # not if the COMMIT fails
        keys = registration.ephemeral_keys if registration and data else ()
        return "".join([f',"{key}":{to_json(data)}' for key in keys])

    def _frozen_news(self, id: str) -> str:
        """The part of a transaction for encrypting bridges (MSC2409, MSC3202): messages to devices, which leave the
        inbox with it, whose device lists changed, and how many keys its users' devices have left.
        """
        users, registration = self.news.pop(id, set()), self.store.registrations.by_id.get(id)
        new = {device: left for device, left in self.keyless.pop(id, {}).items() if self.device(*device)}
        parts: dict[str, Any] = {}
        if registration and registration.takes_to_device:
            parts["de.sorunome.msc2409.to_device"] = self._take_to_device(id)
        if registration and registration.msc3202:
            self.keyless[id] = {device: left - 1 for device, left in new.items() if left > 1 and not self.device_keys(*device)}
            counts: dict[str, JsonObject] = {user_id: {} for user_id in sorted(users)}
            for user_id, device_id in sorted({*new, *self.devices_with_keys(users)}):
                counts.setdefault(user_id, {})[device_id] = (self.one_time_counts(user_id, device_id),
                                                             self.unused_fallbacks(user_id, device_id))
            parts["org.matrix.msc3202.device_lists"] = self._take_key_changes(id)
            for at, names in enumerate(COUNT_KEYS):
                for name in names:
                    parts[name] = {user: {device: both[at] for device, both in devices.items()} for user, devices in counts.items()}
        return "".join([f',"{key}":{to_json(value)}' for key, value in parts.items() if value])

    def _take_to_device(self, id: str) -> list[Raw]:
        rows = self.all("SELECT tick, json FROM to_device WHERE appservice = ? ORDER BY tick LIMIT ?", id, MAX_TRANSACTION_EVENTS)
        if rows:
            self.run("DELETE FROM to_device WHERE appservice = ? AND tick <= ?", id, rows[-1][0])
            self.news.setdefault(id, set())                  # there may be more
        return [Raw(text) for _, text in rows]

    def _take_key_changes(self, id: str) -> JsonObject:
        """device_lists: its own users, and those in rooms that it is interested in. `left` stays empty: whom it sees no more is no
        news that it needs.
        """
        row = self.one("SELECT key_changes FROM pushed WHERE appservice = ?", id)
        since = row[0] if row else self.position()           # the first time: of this batch
        self.run("INSERT OR REPLACE INTO pushed VALUES (?, ?)", id, self.tick_now)
        news = self.column("SELECT user_id FROM key_changes WHERE tick > ? ORDER BY tick", since)
        changed = [user_id for user_id in news if self._concerned(user_id, {id})]
        return {"changed": changed, "left": []} if changed else {}


class Waiters:
    """Who waits for news, by user: each long poll on a bell of its own, so that a batch wakes exactly whom it
    concerns. Of many who are woken only a few look at a time, for a thousand threads that all want the interpreter's lock
    would spend their time on that.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._bells: dict[str, list[Any]] = {}
        self._to_ring: collections.OrderedDict[Any, None] = collections.OrderedDict()    # when it is their turn
        self._asleep: set[Any] = set()                       # those who wait
        self._looking: set[Any] = set()                      # have been rung, and look
        self._guard = threading.Lock()                       # guards these four

    def enter(self, user_id: str) -> Any:
        waiting = bell()
        with self._guard:
            self._bells.setdefault(user_id, []).append(waiting)
        return waiting

    def wait(self, waiting: Any, until: float) -> None:
        """Waits as Clock.wait does. Who comes back to it has looked."""
        with self._guard:
            self._asleep.add(waiting)
        self._next(waiting)
        self.clock.wait(waiting, until)
        with self._guard:
            self._asleep.discard(waiting)

    def leave(self, user_id: str, waiting: Any) -> None:
        with self._guard:
            self._bells[user_id].remove(waiting)
            if not self._bells[user_id]:
                del self._bells[user_id]
            self._to_ring.pop(waiting, None)
        self._next(waiting)

    def _next(self, done: Any = None) -> None:
        """Rings the next ones, as far as there may be."""
        with self._guard:
            self._looking.discard(done)
            while self._to_ring and len(self._looking) < MAX_LOOKING:
                waiting, _ = self._to_ring.popitem(last=False)
                self._looking.add(waiting)
                release(waiting)

    def users(self) -> list[str]:
        with self._guard:
            return list(self._bells)

    def among(self, user_ids: set[str]) -> set[str]:
        with self._guard:
            return self._bells.keys() & user_ids             # looks at the smaller of the two

    def wake(self, user_ids: Iterable[str] | None = None) -> None:
        """Wakes these users' polls, or all."""
        with self._guard:
            for waiting in [one for user_id in (self._bells if user_ids is None else user_ids) for one in self._bells.get(user_id, ())]:
                if waiting in self._asleep:
                    self._to_ring[waiting] = None
                else:
                    release(waiting)                         # looks already, and will again
        self._next()


class _Job:
    """One change, waiting for its COMMIT."""

    __slots__ = ("fn", "token", "done", "result", "error")

    def __init__(self, fn: Callable[[Tx], Any], token: bytes | None = None) -> None:
        self.fn, self.token, self.done = fn, token, bell()
        self.result: Any = None
        self.error: BaseException | None = None


class Store:
    """The database: read() lends a connection to look, write() runs a job on the one writer thread."""

    def __init__(self, path: str, server_name: str, registrations: Registrations, clock: Clock) -> None:
        self.clock, self.registrations = clock, registrations
        self._temporary = tempfile.mkdtemp(prefix="asbridge-") if path == ":memory:" else None
        self.path = os.path.join(self._temporary, "memory.db") if self._temporary else path
        self._readers: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(READERS):
            self._readers.put(None)                          # opened when first needed
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._moved: dict[int, int] = {}                     # room → its last tick, if it moved since the start
        self.waiters = Waiters(clock)
        # Called on the writer thread: after COMMIT with each frozen transaction; within the job with room and user of a join or leave.
        self.on_frozen: Callable[[Transaction], object] = lambda transaction: None
        self.on_membership: Callable[[Tx, Room, str], object] = lambda tx, room, user_id: None
        self.late: list[Callable[[], object]] = []           # what there was no thread for: tried again after the next COMMIT
        self._log, self._log_limit = os.path.realpath(self.path) + "-wal", MAX_LOG_BYTES
        self._closed = False
        self._seldom = Seldom()
        self._door = threading.Lock()                        # guards taking from _readers: who holds it lets nobody in
        self._gate = threading.Lock()                        # guards _closed against a job that comes too late
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        with contextlib.ExitStack() as undo:
            db = self._open(undo, server_name)
            # What is published after each COMMIT, for all threads to read:
            sessions = db.execute("SELECT token, user_id, device_id FROM sessions")
            self.sessions = {token: (user_id, device_id) for token, user_id, device_id in sessions}
            self.users = {user_id for (user_id,) in db.execute("SELECT user_id FROM users WHERE NOT deactivated")}
            self._tx = Tx(self, db)
            self.started_at = self.position = self._tx.tick_now          # the last tick that readers may see
            self._files = self._look_at_files()
            self._thread.start()
            self._opened = undo.pop_all()                  # what close() undoes

    def _open(self, undo: contextlib.ExitStack, server_name: str) -> sqlite3.Connection:
        """The writer's connection; what is to be undone when it is done with goes onto the stack."""
        if self._temporary:
            undo.callback(shutil.rmtree, self._temporary, ignore_errors=True)
        else:
            look_first(self.path, server_name)
            undo.callback(hold_database(self.path).close)
        db = open_database(self.path, server_name, durable=self._temporary is None)
        undo.callback(db.close)
        return db

    def began(self) -> int:
        """A tick for the start of this process, after which every room counts as moved once."""
        self.started_at = self.write(lambda tx: tx.tick())
        return self.started_at

    def check_session(self, token: bytes | None) -> None:
        if token is not None and token not in self.sessions:
            raise MatrixError("M_UNKNOWN_TOKEN", "this session has been logged out", soft_logout=False)

    def wait_published(self, tick: int) -> None:
        """Until what was committed up to this tick is published as well: some microseconds."""
        while self.position < tick:
            time.sleep(0.0001)

    def moved_since(self, tick: int) -> set[int] | None:
        """The rooms in which anything happened after this tick; None: before the start, where that is not known."""
        return None if tick < self.started_at else {room for room, last in self._moved.copy().items() if last > tick}

    @contextlib.contextmanager
    def read(self) -> Iterator[Reader]:
        """A moment of the database. Not to be held while waiting, sending or asking."""
        with self._door:
            db = self._readers.get()
        try:
            if self._closed:
                raise MatrixError("M_UNKNOWN", "the homeserver has stopped", 503)
            db = db or self._open_reader()
            db.execute("BEGIN")
            try:
                yield Reader(db)
            finally:
                db.execute("COMMIT")
        except (DatabaseError, sqlite3.Error) as error:
            if db:
                db.close()                                   # nobody knows what has become of its transaction
                db = None
            log.error("a question to the database failed: %s", error)
            raise MatrixError("M_UNKNOWN", "the homeserver could not read its database; its log says why") from error
        finally:
            self._readers.put(db)

    def _open_reader(self) -> sqlite3.Connection:
        self._check_files()
        return open_sqlite(self.path, read_only=True)

    def _look_at_files(self) -> tuple[os.stat_result, os.stat_result]:
        return os.stat(self.path), os.stat(self._log)

    def _check_files(self) -> int:
        """How long the write-ahead log is. DatabaseError if it or the database is not the one that was opened: what is written
        into a deleted file is gone with the process.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._look_at_files()
            if all(map(os.path.samestat, found, self._files)):
                return found[1].st_size
        raise DatabaseError(f"{self.path} was deleted, moved or replaced while it was in use; stop asbridge before you touch it, and "
                            "put it back now to go on")

    def write(self, fn: Callable[[Tx], T], token: bytes | None = None) -> T:
        """Runs fn on the writer thread and returns its result when it is durable, or raises what it raised.

        fn must have no effect outside of `tx`, for it may be run twice, and do no I/O. `token`: the digest of a
        session's token, which must still be good then.
        """
        job = _Job(fn, token)
        with self._gate:
            if self._closed:
                raise MatrixError("M_UNKNOWN", "the homeserver has stopped", 503)
            self._jobs.put(job)
        job.done.acquire()
        if job.error:
            raise job.error
        return cast(T, job.result)

    def close(self) -> None:
        """Does what is queued, and takes nothing more."""
        with self._gate:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        connections = [self._readers.get() for _ in range(READERS)]
        for db in connections:
            if db:
                db.close()
            self._readers.put(None)
        self._opened.close()

    # -- the writer thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            with contextlib.suppress(queue.Empty):
                while len(batch) < MAX_BATCH and (more := self._jobs.get_nowait()) is not None:
                    batch.append(more)
                if len(batch) < MAX_BATCH:
                    self._jobs.put(None)                     # it was None: stop after this batch
            self._do(batch)
            with contextlib.suppress(OSError, sqlite3.Error, queue.Empty, DatabaseError):
                self._shorten_log()

    def _shorten_log(self) -> None:
        """Starts the write-ahead log anew when it has become long. SQLite does it by itself when nobody reads, a moment that
        never comes where readers overlap: so here nobody is let in until the last of them is done, or for LOG_SECONDS.
        """
        size = self._check_files()
        if size < self._log_limit:
            return
        self._log_limit = 2 * size                           # if somebody reads for longer: not again at once
        held: list[sqlite3.Connection | None] = []
        deadline = time.monotonic() + LOG_SECONDS
        if not self._door.acquire(timeout=LOG_SECONDS):
            return
        try:
            while len(held) < READERS:
                held.append(self._readers.get(timeout=max(0.0, deadline - time.monotonic())))
            self._tx.db.execute("PRAGMA busy_timeout = 0")   # who reads in another process is not waited for
            if not self._tx.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                self._log_limit = MAX_LOG_BYTES
        finally:
            self._tx.db.execute(f"PRAGMA busy_timeout = {LOCKED_MS}")
            for db in sorted(held, key=bool):                # what is open on top: no more are opened than read at a time
                self._readers.put(db)
            self._door.release()

    def _do(self, batch: list[_Job]) -> None:
        """One batch, one COMMIT. If it fails as a whole, but not for a lock, each job gets another chance alone."""
        try:
            self._commit(batch)
        except Exception as error:
            self._roll_back()
            locked = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY    # each job would wait as long again
            if len(batch) > 1 and not locked:
                for job in batch:
                    self._do([job])
                return
            log.error("a change could not be stored: %s", error, exc_info=not isinstance(error, (sqlite3.Error, DatabaseError)))
            for job in batch:
                job.error = MatrixError("M_UNKNOWN", "the homeserver could not store this; its log says why")
        else:
            self._publish(self._tx)
        for job in batch:
            release(job.done)
        self._wake(self._tx)

    def _commit(self, batch: list[_Job]) -> None:
        tx = self._tx
        self._check_files()
        tx.db.execute("BEGIN IMMEDIATE")
        if tx.stale:
            tx.forget()
        for job in batch:
            self._try(tx, job)
        tx.freeze()
        tx.run("UPDATE meta SET value = ? WHERE key = 'position'", tx.tick_now)
        tx.db.execute("COMMIT")

    def _try(self, tx: Tx, job: _Job) -> None:
        tx.new_job()
        try:
            self.check_session(job.token)
            job.result, job.error = job.fn(tx), None
            tx.job_done()
        except MatrixError as error:                         # a refusal: this job alone is undone
            job.error = error
            tx.job_failed()

    def _publish(self, tx: Tx) -> None:
        """What is durable becomes visible. Nothing here can undo it any more, so an error is logged and no more."""
        late, self.late = self.late, []
        for change in (*late, *tx.on_commit):
            try:
                change()
            except Exception:
                log.exception("after a COMMIT")
        self._moved.update(tx.moved)
        self.position = tx.tick_now

    def _wake(self, tx: Tx) -> None:
        """After the answers, for clients take an echo of their own before its answer for another's event."""
        for room in tx.woken_rooms:
            tx.woken |= self.waiters.among(room.joined)
        waiting = self.waiters.users() if tx.woken_around else []
        for user_id in tx.woken_around:
            try:
                tx.woken |= tx.met_by(user_id, waiting)
            except sqlite3.Error:                            # then everybody looks
                tx.woken.update(waiting)
        if tx.woken:
            self.waiters.wake(tx.woken)
        tx.new_batch()

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):             # then the next BEGIN fails, and it is tried again
            if self._tx.db.in_transaction:
                self._tx.db.execute("ROLLBACK")
        self._tx.undo()


def hold_database(path: str) -> sqlite3.Connection:
    """Keeps a second process off the database: by a lock on a small file beside it, which ends with this process."""
    where = os.path.realpath(path) + "-lock"
    try:
        with contextlib.ExitStack() as undo:
            lock = sqlite3.connect(where, isolation_level=None, check_same_thread=False, timeout=0)
            undo.callback(lock.close)
            lock.execute("PRAGMA journal_mode=MEMORY")
            lock.execute("BEGIN EXCLUSIVE")
            undo.pop_all()
    except sqlite3.Error as error:
        why = f"can't be locked with {where}: {error}"
        if "locked" in str(error):
            why = "is in use by another asbridge; stop that one or name another --database"
        raise DatabaseError(f"the database {path} {why}") from None
    return lock


def open_database(path: str, server_name: str, durable: bool) -> sqlite3.Connection:
    """The database for the writer, with its tables; DatabaseError if it is not ours."""
    with unusable(path), contextlib.ExitStack() as undo:
        db = open_sqlite(path, durable)
        undo.callback(db.close)
        create_schema(db, path, server_name)
        db.execute("UPDATE meta SET value = value WHERE key = 'position'")   # it may be locked, or the disk full
        undo.pop_all()
    return db


def look_first(path: str, server_name: str) -> None:
    """Refuses a database that can't be ours before it is changed, or a file made beside it. One that was not closed only a
    writer can read.
    """
    if trouble := trouble_with(path):
        raise DatabaseError(f"{path} can't be used as a database: {trouble}")
    if os.path.exists(path):
        closed = not any(os.path.exists(os.path.realpath(path) + end) for end in ("-wal", "-journal"))
        with unusable(path), contextlib.closing(open_sqlite(path, read_only=True, closed=closed)) as db:
            try:
                check_ours(db, path, server_name)
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_READONLY:      # none: text that is no UTF-8
                    raise


def check_ours(db: sqlite3.Connection, path: str, server_name: str) -> tuple[int, bool]:
    """Which version of the tables there is, and whether there is none; DatabaseError if they are not ours."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version > SCHEMA_VERSION or (version == 0 and not empty):
        raise DatabaseError(f"{path} is not a database of this asbridge (its user_version is {version}, "
                            f"not {SCHEMA_VERSION}); name another --database")
    made_for = None if empty else db.execute("SELECT value FROM meta WHERE key = 'server_name'").fetchone()[0]
    if made_for not in (None, server_name):
        raise DatabaseError(f"{path} was made for the server name {made_for!r}, not {server_name!r}; "
                            "name another --database or that server_name")
    return version, empty


def create_schema(db: sqlite3.Connection, path: str, server_name: str) -> None:
    """Makes the tables that a new or an older database lacks, all at once; refuses one that is not ours."""
    version, empty = check_ours(db, path, server_name)
    if version < SCHEMA_VERSION:
        first = f"INSERT INTO meta VALUES ('server_name', '{server_name}'), ('position', 0);" if empty else ""
        upgrades = "".join([sql for since, sql in UPGRADES.items() if version < since and not empty])
        lacking = re.sub("^CREATE (TABLE|INDEX)", r"CREATE \1 IF NOT EXISTS", SCHEMA, flags=re.MULTILINE)
        db.executescript(f"BEGIN; {upgrades} {lacking} {first} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


# ============================================================================
# 6. The homeserver
# ============================================================================
# What users do, as verbs with plain values in and out: register, log in, create
# a room, join, send, read, sync. A verb checks within its job on the writer
# thread (marked @on_writer if all of it is that job), so that what it saw is
# still true when it is stored. Spec: Client-Server API. Does not know HTTP;
# asks an application service only through the function that it is given.
#
# In front stands what every application service meets: accounts, rooms, their
# history, sync. What follows from "Clients' data" on may be skipped at first
# reading: it is for clients, and for the few application services that list
# rooms, hear of receipts and typing, or encrypt.

# -- Limits. Seconds, unless the name says MS or BYTES, or the line says what is counted.

# Accounts
SCRYPT = {"n": 16_384, "r": 8, "p": 1}   # 16 MiB and 50 ms for a password:
PASSWORDS = threading.Semaphore(2)       # two at a time
MAX_PROFILE_BYTES = 65_535
MAX_PROFILE = {"displayname": 256, "avatar_url": 1000}       # characters; shown to others whether they like it or not,
MAX_STATUS = 1000                # the same of a status message
OPENID_SECONDS = 3600            # how long an OpenID token is good
MAX_TAGS_BYTES = 65_536          # of all tags of a room
# Rooms, and what is read in them
MAX_ASKED = 50                   # unknown users in one request for whom application services are asked
MAX_FIRST_EVENTS = 1000          # that a createRoom asks for: everybody waits while they are made
MAX_PAGE = 1000                  # events, or rooms, in one answer
MAX_PAGE_BYTES = 4_194_304       # of events, after which a page of /messages ends
MAX_RELATION_DEPTH = 3           # steps: of /relations with recurse, and from an event up to its thread
NO_THIRD_PARTY_IDS = "this server knows people by their user IDs only, not by mail addresses or telephone numbers"
MAX_SPACE_DEPTH = 10             # levels of rooms below a space in one answer
# Sync
MAX_SYNC_SECONDS = 600.0         # that a long poll may ask to wait
LOOK_SECONDS = 30.0              # how often a long poll looks whether its client is still there
TIMELINE = 10                    # events in a timeline, unless a filter says otherwise
MAX_NAMES, MAX_GLOBS = 5000, 50  # types, senders or rooms in one list of a filter; those of them with a '*'
ROOMS_AT_ONCE = 50               # that a look asks about together
SLICE_SECONDS = 0.001            # how long a look works until it lets others in
ECHO_SECONDS = 0.005             # how long one's own relation waits for the answer to its PUT to be read before it
# Presence
OFFLINE_SECONDS = 30.0           # after the last /sync has ended
UNAVAILABLE_SECONDS = 300.0      # without doing anything: from online to unavailable
# Media and keys
MAX_UPLOADS = 4                  # of one user at the same time, for they are in memory meanwhile;
SMALL_UPLOAD = 1_048_576         # of which those of so many bytes or fewer don't count
UNUSED_MEDIA_MS = DAY_MS         # how long a URI waits for its content
MAX_SIGNATURES = 50              # of one user on one key
# Push rules, and what is unread
MAX_RULES_BYTES = 65_536         # of all push rules of a user
MAX_PATTERN = 255                # characters that a push rule looks for
MAX_UNREAD = 500                 # the newest events of a room that are looked at, to count what is unread
MAX_LOOKS = 5 * 10**9            # bytes of a user's own rules times bytes of events that are held against them in one go
MAX_TALLIES = 5000               # counts that are kept in memory, each of one user and room


# -- The world: what all verbs work on, and who is asking.

@dataclass
class Settings:
    """The keys of the configuration that the homeserver reads (README, Configuration). Each has a row in CONFIG_KEYS (12)."""
    server_name: str = "localhost"
    public_url: str = ""
    open_registration: bool = True
    room_version: str = "11"
    max_event_bytes: int = 65_536
    max_request_bytes: int = 1_048_576
    max_upload_bytes: int = 52_428_800
    retry_first_ms: int = 500
    retry_max_ms: int = 60_000
    push_timeout_ms: int = 60_000
    query_timeout_ms: int = 10_000
    rate_limit: Mapping[str, float] | None = None            # per_second, burst
    bind: str = "127.0.0.1"
    admin_token: str | None = dataclasses.field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Who:
    """Who is asking: a person's session, or an application service acting as one of its users."""
    user_id: str
    device_id: str | None = None
    token: bytes | None = None                   # digest of the session's token; None with an as_token
    appservice: Registration | None = None


class World:
    """What all verbs work on."""

    def __init__(self, settings: Settings, clock: Clock, registrations: Registrations, database: str,
                 seed: str | None = None) -> None:
        self.settings, self.clock, self.chance = settings, clock, Chance(seed)
        self.name = settings.server_name                     # what stands after the colon of every ID
        self.store = Store(database, self.name, registrations, clock)
        self.stopping = False                                # who waits is to answer
        # Asks for "users" or "aliases" that don't exist yet; True if an application service says that it has created
        # it. `by` is the one that is asking itself. Patient: tries again, and raises 408 in the end. Set by section 7.
        self.ask: Callable[[str, str, Registration | None, bool], bool] = lambda kind, id, by, patient: False

    @property
    def registrations(self) -> Registrations:
        return self.store.registrations

    def find(self, kind: str, id: str, by: Registration | None, look: Callable[[Reader], T | None]) -> tuple[T | None, bool]:
        """What `look` finds. If that is nothing, an application service is asked (Querying) and it looks again, whatever the
        answer was, for it may have come meanwhile. And whether the answer was yes.
        """
        with self.store.read() as reader:
            found = look(reader)
        if found is not None or server_of(id) != self.name:
            return found, False
        created = self.ask(kind, id, by, True)
        with self.store.read() as reader:
            return look(reader), created

    def ask_for_users(self, user_ids: Iterable[str], by: Registration | None) -> None:
        """Asks for those that don't exist yet, once and at the same time."""
        unknown = [user_id for user_id in user_ids if user_id not in self.store.users and server_of(user_id) == self.name]
        at_once(lambda user_id: self.ask("users", user_id, by, False), unknown[:MAX_ASKED])

    def has_user_among(self, registration: Registration | None, user_ids: Iterable[str]) -> bool:
        claim_of = self.registrations.claim_of
        return registration is not None and any(claim_of(registration, "users", user_id) for user_id in user_ids)

    def use(self, registrations: Registrations) -> None:
        """From here on these. Queues are kept; the tokens of what is gone are no tokens any more."""
        self.store.write(lambda tx: tx.on_commit.append(lambda: setattr(self.store, "registrations", registrations)))
        self.add_senders()

    def add_senders(self) -> None:
        """Every application service's own user exists from the start. Messages to devices that wait for one that takes none
        any more are left for the devices.
        """
        def job(tx: Tx) -> None:
            tx.return_to_device([one.id for one in self.registrations if one.takes_to_device])
            for registration in self.registrations:
                user_id = registration.sender(self.name)
                if not tx.user(user_id):
                    tx.add_user(user_id, None, registration.id, self.clock.now())
        self.store.write(job)


class Verbs:
    """Each class of verbs has the same world. Any number of threads use them at a time."""

    def __init__(self, world: World) -> None:
        self.world, self.store, self.clock = world, world.store, world.clock


V = TypeVar("V", bound=Verbs)
P = ParamSpec("P")                       # what a verb takes besides who is asking


def on_writer(verb: Callable[Concatenate[V, Tx, Who, P], T]) -> Callable[Concatenate[V, Who, P], T]:
    """A verb that is a job from beginning to end: called without `tx`, it runs on the writer thread, and returns when what it has
    done is durable. Refused, it has done nothing, but everybody who writes has waited for it: what takes long to check is checked
    before. Never called within a job, which would wait for itself.
    """
    @functools.wraps(verb)
    def call(self: V, who: Who, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.store.write(lambda tx: verb(self, tx, who, *args, **kwargs), who.token)
    return call


def existing(found: T | None, error: str) -> T:
    """What was looked for; M_NOT_FOUND if there is none."""
    if found is None:
        raise MatrixError("M_NOT_FOUND", error)
    return found


def as_far(items: list[T], costs: Iterable[int], most: int) -> list[T]:
    """The first one, and as many more as follow what costs less than `most` together."""
    return items[:1 + sum(cost < most for cost in itertools.accumulate(costs))]


def check_length(what: str, text: str | None, most: int) -> None:
    """M_INVALID_PARAM if it is longer."""
    if text and len(text) > most:
        raise MatrixError("M_INVALID_PARAM", f"{what} may have {most} characters at most, not {len(text)}")


# -- Accounts: who there is, people and ghosts (Account registration, Login, Device Management, Profiles; AS: Permissions).

def hash_password(password: str, salt: bytes | None = None) -> str:
    salt = salt or secrets.token_bytes(16)
    with PASSWORDS:
        key = hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, **SCRYPT)
    return f"scrypt${salt.hex()}${key.hex()}"


def password_fits(password: str, stored: str) -> bool:
    return hmac.compare_digest(hash_password(password, bytes.fromhex(stored.split("$")[1])), stored)


class Accounts(Verbs):
    """Users, their sessions, devices and profiles."""

    # -- registering

    def register(self, username: str | None, password: str | None, **device: Any) -> JsonObject:
        """A new person. `device`: device_id, display_name, ip, inhibit_login."""
        self.check_open()
        return self.add_person(username if username is not None else self.world.chance.text("", 10).lower(), password, **device)

    def add_person(self, name: str, password: str | None = None, **device: Any) -> JsonObject:
        """A new person, whatever open_registration says; without a password nobody can log in as them again."""
        return self._add(self.check_available(name, None), password, None, **device)

    def register_ghost(self, registration: Registration, username: str | None, **device: Any) -> JsonObject:
        """A new user of an application service (Server admin style permissions). With `inhibit_login`, as a bridge had better ask, for
        it acts by its as_token: no access token and no device. A homeserver whose people log in elsewhere (OAuth 2.0, which is
        not in here) takes only that, and no m.login.application_service.
        """
        return self._add(self.check_available(username or "", registration), None, registration, **device)

    def check_open(self) -> None:
        if not self.world.settings.open_registration:
            raise forbidden("people can't register here: open_registration is false in the configuration")

    def check_available(self, username: str, by: Registration | None) -> str:
        """The user ID, if it may be registered; M_INVALID_USERNAME, M_EXCLUSIVE or M_USER_IN_USE."""
        grammar = HISTORICAL_LOCALPART if by else STRICT_LOCALPART
        user_id = f"@{username}:{self.world.name}"
        if not grammar.fullmatch(username) or len(user_id) > MAX_ID_BYTES:
            allowed = "printable ASCII without ':'" if by else "a-z, 0-9 and ._=/+-"
            raise MatrixError("M_INVALID_USERNAME", f"{shorten(username)!r} is no user name: write the localpart alone; "
                              f"it may have {allowed}, and the whole ID {MAX_ID_BYTES} bytes at most")
        self.world.registrations.check_may_create("users", user_id, by)
        with self.store.read() as reader:
            self._check_free(reader, user_id)
        return user_id

    @staticmethod
    def _check_free(reader: Reader, user_id: str) -> None:
        if reader.user(user_id):
            raise MatrixError("M_USER_IN_USE", f"{user_id} exists already")

    def _add(self, user_id: str, password: str | None, by: Registration | None, inhibit_login: bool = False,
             **device: Any) -> JsonObject:
        hashed = hash_password(password) if password else None

        def job(tx: Tx) -> JsonObject:
            self._check_free(tx, user_id)
            tx.add_user(user_id, hashed, by.id if by else None, self.clock.now())
            if inhibit_login:
                return {"user_id": user_id, "home_server": self.world.name}
            return self._new_session(tx, user_id, **device)
        return self.store.write(job)

    # -- logging in

    def full_id(self, user: str) -> str:
        """A localpart or a whole user ID as the latter."""
        return user if user.startswith("@") else f"@{user}:{self.world.name}"

    def login(self, user: str, password: str, **device: Any) -> JsonObject:
        user_id = self.full_id(user)
        self.check_password(user_id, password)
        return self.store.write(lambda tx: self._new_session(tx, user_id, **device))

    def login_ghost(self, registration: Registration, user: str, **device: Any) -> JsonObject:
        """A session of its own for a user of an application service (m.login.application_service). M_EXCLUSIVE outside of its
        namespaces, M_FORBIDDEN if there is no such user.
        """
        user_id = self.full_id(user)
        self.world.registrations.check_claims(registration, "users", user_id, "M_EXCLUSIVE")

        def job(tx: Tx) -> JsonObject:
            session = self._new_session(tx, user_id, **device)
            tx.expect_keys(user_id, session["device_id"])
            return session
        return self.store.write(job)

    def _new_session(self, tx: Tx, user_id: str, device_id: str | None = None, display_name: str | None = None,
                     ip: str | None = None) -> JsonObject:
        if not self._active(tx, user_id):
            raise forbidden(f"{user_id} is not registered; register it first")
        token, device_id = self.world.chance.text(user_id, 43), device_id or self.world.chance.text(user_id, 10).upper()
        tx.add_session(user_id, device_id, display_name, digest(token), self.clock.now(), ip)
        return {"user_id": user_id, "access_token": token, "device_id": device_id, "home_server": self.world.name}

    @staticmethod
    def _active(reader: Reader, user_id: str) -> UserRow | None:
        """The user, if there is such a one; M_USER_DEACTIVATED."""
        user = reader.user(user_id)
        if user and user.deactivated:
            raise MatrixError("M_USER_DEACTIVATED", f"{user_id} has been deactivated, for good")
        return user

    def check_active(self, user_id: str) -> None:
        with self.store.read() as reader:
            self._active(reader, user_id)

    def check_password(self, user_id: str, password: str) -> None:
        with self.store.read() as reader:
            user = self._active(reader, user_id)
        stored = user.password if user else None
        if not password_fits(password, stored or "scrypt$00$") or not stored:    # as long for an unknown name
            raise forbidden("wrong user name or password")

    def change_password(self, who: Who, password: str, logout_devices: bool) -> None:
        """A new password, and the end of the user's other sessions, if wished."""
        if who.appservice:
            raise forbidden("an application service can't change passwords")
        if not password:
            raise MatrixError("M_INVALID_PARAM", "new_password is empty")
        hashed = hash_password(password)

        def job(tx: Tx) -> None:
            tx.set_password(who.user_id, hashed)
            for device in tx.devices(who.user_id) if logout_devices else ():
                if device.device_id != who.device_id:
                    tx.delete_device(who.user_id, device.device_id)
        self.store.write(job, who.token)

    @on_writer
    def deactivate(self, tx: Tx, who: Who) -> None:
        """Ends an account for good: it leaves its rooms, and what belongs to it alone goes. Its name stays taken."""
        if who.appservice and who.user_id == who.appservice.sender(self.world.name):
            raise forbidden(f"{who.user_id} is the application service's own user, without which it could do nothing; "
                            "to deactivate one of its ghosts, name it in user_id=")
        for one in tx.memberships_of(who.user_id):
            room = tx.room(one.room_id)
            if room and one.membership in ("join", "invite", "knock"):
                draft = Draft("m.room.member", who.user_id, {"membership": "leave"}, who.user_id)
                tx.append(room, draft, self.clock.now())
        tx.deactivate(who.user_id)

    def logout(self, who: Who) -> None:
        if who.device_id:
            self.store.write(lambda tx: tx.delete_device(who.user_id, who.device_id))

    def logout_all(self, who: Who) -> None:
        self.store.write(lambda tx: tx.delete_device(who.user_id))

    # -- devices

    def devices(self, who: Who) -> list[JsonObject]:
        with self.store.read() as reader:
            return [self._shown(who, device) for device in reader.devices(who.user_id)]

    def device(self, who: Who, device_id: str) -> JsonObject:
        with self.store.read() as reader:
            return self._shown(who, self._device(reader, who, device_id))

    @staticmethod
    def _device(reader: Reader, who: Who, device_id: str) -> DeviceRow:
        return existing(reader.device(who.user_id, device_id), f"{who.user_id} has no device {shorten(device_id)}")

    @staticmethod
    def _shown(who: Who, device: DeviceRow) -> JsonObject:
        return {**device._asdict(), "display_name": device.display_name or "", "user_id": who.user_id}

    @on_writer
    def set_device(self, tx: Tx, who: Who, device_id: str, display_name: str | None) -> bool:
        """Names a device. An application service creates one so, if there is none (Device management); whether it did."""
        if who.appservice and not tx.device_keys(who.user_id, device_id):
            tx.expect_keys(who.user_id, device_id)
        if who.appservice and not tx.device(who.user_id, device_id):
            tx.add_device(who.user_id, device_id, display_name, self.clock.now())
            return True
        self._device(tx, who, device_id)
        if display_name is not None:
            tx.rename_device(who.user_id, device_id, display_name)
        return False

    @on_writer
    def delete_devices(self, tx: Tx, who: Who, device_ids: Sequence[str]) -> None:
        for device_id in {*device_ids} & {device.device_id for device in tx.devices(who.user_id)}:
            tx.delete_device(who.user_id, device_id)

    # -- profiles

    def profile(self, user_id: str, by: Registration | None) -> JsonObject:
        """displayname, avatar_url and other fields, as far as they are set. An unknown ghost's application service is asked."""
        found, _ = self.world.find("users", user_id, by, lambda reader: reader.profile(user_id))
        return existing(found, f"there is no user {shorten(user_id)}")

    @staticmethod
    def _check_profile(tx: Tx, who: Who, user_id: str, change: JsonObject) -> None:
        if who.user_id != user_id:
            raise forbidden(f"{who.user_id} can't change the profile of {shorten(user_id)}")
        if len(to_json({**(tx.profile(user_id) or {}), **change}).encode()) > MAX_PROFILE_BYTES:
            raise MatrixError("M_PROFILE_TOO_LARGE", f"a profile may have {MAX_PROFILE_BYTES} bytes at most, with all its fields")

    @on_writer
    def set_profile_field(self, tx: Tx, who: Who, user_id: str, key: str, text: str | None) -> None:
        """A field of the user's own, its value in JSON; None takes it away."""
        self._check_profile(tx, who, user_id, {key: Raw(text or "")})
        tx.set_profile_field(user_id, key, text)

    @on_writer
    def set_profile(self, tx: Tx, who: Who, user_id: str, key: str, value: str | None) -> None:
        """Changes displayname or avatar_url, and with it the member events of the rooms that the user is in."""
        check_length(key, value, MAX_PROFILE[key])
        self._check_profile(tx, who, user_id, {key: value})
        tx.set_profile(user_id, key, value)
        for room in tx.joined_rooms(user_id):
            before = room.content("m.room.member", user_id)
            content = without_none({**before, key: value, "reason": None})       # that was of the join
            draft = Draft("m.room.member", user_id, content, user_id)
            if content != before and is_allowed(room, draft):   # where the rules let nobody join any more, the old name stays
                tx.append(room, draft, self.clock.now())


# -- What may be seen of a room (Room history visibility; Leaving rooms). Who reads or answers in a room does so through these.

ReadEvents = Callable[[int, int, int, bool], list[Event]]    # those with after < tick <= upto, the newest or oldest `limit` of them


class View(NamedTuple):
    """What one user may see of one room."""
    room: int
    room_id: str
    membership: str
    ranges: list[tuple[int, int]]        # of ticks whose events may be seen
    state_upto: int                      # the state may be seen as it was then; -1: not at all
    memberships: Sequence[tuple[int, str]]       # the user's changes, (tick, membership) from old to new

    def sees(self, tick: int) -> bool:
        return any(first <= tick <= last for first, last in self.ranges)

    @property
    def visible(self) -> str:
        """The ranges as the store takes them."""
        return to_json(self.ranges)

    def last_state(self) -> int:
        """The tick up to which the state may be seen; M_FORBIDDEN if it may not at all."""
        if self.state_upto < 0:
            raise forbidden(f"the state of the room {self.room_id} can't be seen before joining it")
        return self.state_upto

    def find(self, reader: Reader, event_id: str) -> Event:
        """M_NOT_FOUND also for what may not be seen."""
        event = reader.event(self.room, event_id)
        if not event or not self.sees(event.tick):
            raise MatrixError("M_NOT_FOUND", f"there is no event {shorten(event_id)} here that may be seen")
        return event

    def collect(self, read: ReadEvents, after: int, upto: int, limit: int, newest: bool) -> list[Event]:
        """What `read` finds in the visible parts of after < tick <= upto."""
        found: list[Event] = []
        for first, last in reversed(self.ranges) if newest else self.ranges:
            start, end = max(after, first - 1), min(upto, last)
            if start < end and len(found) < limit:
                found += read(start, end, limit - len(found), newest)
        return found

    def page(self, reader: Reader, read: ReadEvents, start: int | None, stop: int | None, backwards: bool,
             limit: int) -> tuple[int, list[Event]]:
        """A page from the tick `start` on (None: from now backwards, or from the beginning) as far as `stop`; with its start."""
        if start is None:
            start = reader.position() if backwards else 0
        after, upto = (stop or 0, start) if backwards else (start, FOREVER if stop is None else stop)
        return start, self.collect(read, after, upto, limit, backwards)

    def then(self, tick: int) -> str:
        """The user's membership at the time of an event, with that event, as a part of its `unsigned`."""
        for at, membership in reversed(self.memberships):    # mostly the last one, in a loop that is run for each event
            if at <= tick:
                return f',"membership":"{membership}"'
        return ',"membership":"leave"'


def view_by(room: int, room_id: str, memberships: Sequence[tuple[int, str]], visibilities: Sequence[tuple[int, str]]) -> View | None:
    """By the changes of the user's membership and of the room's history visibility. None: there is nothing to see."""
    ranges = visible_ranges(visibilities, memberships)
    membership = memberships[-1][1] if memberships else "leave"
    if membership == "join" or (visibilities and visibilities[-1][1] == "world_readable"):
        return View(room, room_id, membership, ranges, FOREVER, memberships)
    return View(room, room_id, membership, ranges, left_at(memberships), memberships) if ranges else None


def not_in(user_id: str, room_id: str) -> MatrixError:
    """The refusal for who is not in a room: the same whether there is one or not, so that nobody finds out by asking."""
    hint = "; that is an alias: GET /directory/room/{alias} says which room ID to write here" if room_id[:1] == "#" else ""
    return forbidden(f"{user_id} is not in room {shorten(room_id)}{hint}")      # SDKs look for "not in room"


def view_of(reader: Reader, user_id: str, room_id: str, errcode: str = "M_FORBIDDEN") -> View:
    """Refused with the errcode if there is nothing to see, or no such room: that makes no difference."""
    row = reader.room_row(room_id)
    if row:
        own = reader.membership(user_id, row.n)
        memberships = [] if not own or own.forgotten else reader.changes([row.n], *MEMBERSHIP, user_id)[row.n]
        if view := view_by(row.n, room_id, memberships, reader.changes([row.n], *HISTORY_VISIBILITY)[row.n]):
            return view
    raise MatrixError(errcode, not_in(user_id, room_id).error)


@contextlib.contextmanager
def viewing(store: Store, who: Who, room_id: str, errcode: str = "M_FORBIDDEN") -> Iterator[tuple[Reader, View]]:
    """A moment of the database, and what may be seen of the room in it."""
    with store.read() as reader:
        yield reader, view_of(reader, who.user_id, room_id, errcode)


def sees(tx: Tx, room: Room, user_id: str, tick: int) -> bool:
    """Whether a member may see an event of the room. What came after the own join is not looked up."""
    member = room.events["m.room.member", user_id]
    return tick >= member.tick or view_of(tx, user_id, room.room_id).sees(tick)


def room_for(tx: Tx, who: Who, room_id: str, joined: bool = False) -> Room:
    """The room, for a job of `who`: who has or had to do with it, or is in it. For anybody else there is none."""
    room = tx.room(room_id)
    if not room or not room.knows(who.user_id) or (joined and who.user_id not in room.joined):
        raise not_in(who.user_id, room_id)
    return room


# -- Aliases: names for rooms (Room Aliases; AS: Querying).

def may_set_canonical_alias(room: Room, user_id: str) -> bool:
    """Whether the user may change the canonical alias. The same power is wanted to list the room, and to delete others' aliases."""
    return is_allowed(room, Draft("m.room.canonical_alias", user_id, {}, ""))


class Aliases(Verbs):
    """Which room each alias points to. Those in an application service's namespace are its own affair."""

    def resolve(self, alias: str, by: Registration | None) -> str:
        """The room ID that an alias points to; an unknown one's application service is asked."""
        check_id("#", alias)
        row, created = self.world.find("aliases", alias, by, lambda reader: reader.alias(alias))
        why = "; its application service was asked and said yes, but has not created it" if created else ""
        elsewhere = "" if server_of(alias) == self.world.name else f"; this server, {self.world.name}, knows no other one"
        return str(existing(row, f"there is no room alias {shorten(alias)}{why}{elsewhere}")[0])

    def of_room(self, who: Who, room_id: str) -> list[str]:
        with viewing(self.store, who, room_id) as (reader, view):
            if view.state_upto < FOREVER:                    # those that there are now
                raise not_in(who.user_id, room_id)
            return reader.aliases_of(view.room)

    @on_writer
    def add(self, tx: Tx, who: Who, alias: str, room_id: str) -> None:
        found = tx.room(room_id) if who.appservice else None     # to any room
        self.put(tx, who, alias, found or room_for(tx, who, room_id, joined=True), "M_UNKNOWN")

    def put(self, tx: Tx, who: Who, alias: str, room: Room, taken: str) -> None:
        """Adds an alias within a job. `taken`: the errcode for one that exists already."""
        check_id("#", alias, self.world.name)
        self.world.registrations.check_may_create("aliases", alias, who.appservice)
        if tx.alias(alias):
            raise MatrixError(taken, f"the alias {alias} exists already", 409 if taken == "M_UNKNOWN" else None)
        tx.add_alias(alias, room, who.user_id)

    @on_writer
    def delete(self, tx: Tx, who: Who, alias: str) -> None:
        """By who made it, by who may change the canonical alias, or by the application service that claims it."""
        check_id("#", alias)
        self.world.registrations.check_may_create("aliases", alias, who.appservice)
        row = existing(tx.alias(alias), f"there is no room alias {shorten(alias)}")
        room = cast(Room, tx.room(row.room_id))
        if not (who.appservice or row.creator == who.user_id or may_set_canonical_alias(room, who.user_id)):
            raise forbidden(f"{alias} may be deleted by who made it, or by who may change the canonical alias of its room")
        tx.delete_alias(alias, room)

    @staticmethod
    def check_content(tx: Tx, room: Room, content: JsonObject) -> None:
        """M_BAD_ALIAS if what is new in an m.room.canonical_alias does not point to the room."""
        old = room.content("m.room.canonical_alias")
        known = [old.get("alias"), *field(old, "alt_aliases", list, [])]
        for alias in [content.get("alias"), *field(content, "alt_aliases", list, [])]:
            if alias and alias not in known:
                row = tx.alias(check_id("#", alias))
                if not row or row.room_id != room.room_id:
                    raise MatrixError("M_BAD_ALIAS", f"{shorten(alias)} does not point to this room; create the alias first")


# -- How a room begins (Creation).

PRESETS = {  # preset: join_rule, history_visibility, guest_access
    "private_chat":         ("invite", "shared", "can_join"),
    "trusted_private_chat": ("invite", "shared", "can_join"),
    "public_chat":          ("public", "shared", "forbidden"),
}


class RoomPlan:
    """A createRoom request, checked: what the room begins with."""

    def __init__(self, world: World, who: Who, options: JsonObject) -> None:
        self.who, self.options = who, options
        version = field(options, "room_version", str, world.settings.room_version)
        if version not in ROOM_VERSIONS:
            raise MatrixError("M_UNSUPPORTED_ROOM_VERSION", f"room version {shorten(version)} is not offered; "
                              f"these are: {', '.join(ROOM_VERSIONS)}")
        self.version = ROOM_VERSIONS[version]
        visibility = field(options, "visibility", str, "private")
        self.published = visibility == "public"              # in the directory
        self.preset = field(options, "preset", str, "public_chat" if self.published else "private_chat")
        if visibility not in ("public", "private") or self.preset not in PRESETS:
            raise MatrixError("M_INVALID_PARAM", f"visibility must be public or private, not {quoted(visibility)}; preset one of "
                              f"{', '.join(PRESETS)}, not {quoted(self.preset)}")
        if field(options, "invite_3pid", list, []):
            raise forbidden(NO_THIRD_PARTY_IDS)
        self.invite = [check_id("@", user_id, world.name) for user_id in field(options, "invite", list, [])]
        self.trusted = self.invite if self.preset == "trusted_private_chat" else []      # with the power of the creator
        self.initial_state = field(options, "initial_state", list, [])
        if len(self.invite) + len(self.initial_state) > MAX_FIRST_EVENTS:
            raise MatrixError("M_TOO_LARGE", f"invite and initial_state may have {MAX_FIRST_EVENTS} entries together; send "
                              "the others when the room is there")
        self.is_direct = field(options, "is_direct", bool, False)
        localpart = field(options, "room_alias_name", str, "")
        if ":" in localpart or localpart[:1] == "#":
            raise MatrixError("M_INVALID_PARAM", f"room_alias_name is what stands between '#' and ':' alone, not {quoted(localpart)}")
        self.alias = check_id("#", f"#{localpart}:{world.name}") if localpart else ""
        if self.alias:
            world.registrations.check_may_create("aliases", self.alias, who.appservice)
        check_canonical(options)

    def drafts(self, join: Draft) -> Iterator[Draft]:
        """The first events in the order of the spec, but for the invitations. `join`: the creator's."""
        sender, (join_rule, visibility, guests) = self.who.user_id, PRESETS[self.preset]
        yield Draft("m.room.create", sender, self._create(), "")
        yield join
        yield Draft("m.room.power_levels", sender, self._power_levels(), "")
        if self.alias:
            yield Draft("m.room.canonical_alias", sender, {"alias": self.alias}, "")
        yield Draft("m.room.join_rules", sender, {"join_rule": join_rule}, "")
        yield Draft("m.room.history_visibility", sender, {"history_visibility": visibility}, "")
        yield Draft("m.room.guest_access", sender, {"guest_access": guests}, "")
        for event in self.initial_state:
            if not isinstance(event, dict):
                raise MatrixError("M_BAD_JSON", "initial_state must be a list of objects with type, state_key and content")
            yield Draft(field(event, "type", str), sender, field(event, "content", dict), field(event, "state_key", str, ""))
        if self.options.get("name") is not None:
            yield Draft("m.room.name", sender, {"name": field(self.options, "name", str)}, "")
        if self.options.get("topic") is not None:
            topic = field(self.options, "topic", str)
            plain = {"m.text": [{"body": topic, "mimetype": "text/plain"}]}
            yield Draft("m.room.topic", sender, {"topic": topic, "m.topic": plain}, "")

    def _create(self) -> JsonObject:
        content = {**field(self.options, "creation_content", dict, {}), "room_version": self.version.id}
        if self.version.create_has_creator:
            content["creator"] = self.who.user_id
        if self.version.creators_rule and (self.trusted or "additional_creators" in content):
            creators = [*field(content, "additional_creators", list, []), *self.trusted]
            content["additional_creators"] = sorted({check_id("@", user_id) for user_id in creators} - {self.who.user_id})
        return content

    def _power_levels(self) -> JsonObject:
        by_creation = self.version.creators_rule             # has the creator all power
        levels: JsonObject = {
            "users": {} if by_creation else dict.fromkeys([self.who.user_id, *self.trusted], 100),
            "users_default": 0, "events_default": 0, "state_default": 50,
            "ban": 50, "kick": 50, "redact": 50, "invite": 0, "historical": 100,
            "events": {"m.room.name": 50, "m.room.avatar": 50, "m.room.canonical_alias": 50, "m.room.power_levels": 100,
                       "m.room.history_visibility": 100, "m.room.encryption": 100, "m.room.server_acl": 100,
                       "m.room.tombstone": 150 if by_creation else 100},
            **field(self.options, "power_level_content_override", dict, {})}
        users = levels.get("users")
        if not by_creation and not (isinstance(users, dict) and is_a(users.get(self.who.user_id), int)):
            raise MatrixError("M_BAD_JSON", "power_level_content_override.users must give the room's creator a level, too; "
                              "without it nobody could change the room")
        return levels


# -- What happens in rooms: who comes and goes, what is sent (Room membership, Sending events to a room, Redactions). The rules
# of section 4 say what may happen.

class Rooms(Verbs):
    """Creating, membership, sending."""

    def __init__(self, world: World, aliases: Aliases) -> None:
        super().__init__(world)
        self.aliases = aliases

    # -- what most verbs come to

    def _append(self, tx: Tx, room: Room, draft: Draft, ts: int | None = None, device_id: str | None = None,
                txn_id: str | None = None) -> str:
        """Stores an event if the rules of the room pass it."""
        if draft.type == "m.room.canonical_alias" and draft.state_key is not None:
            self.aliases.check_content(tx, room, draft.content)
        check_shape(draft, self.world.name)
        authorise(room, draft)
        check_relation(tx, room, draft)
        return tx.append(room, draft, self.clock.now() if ts is None else ts, device_id, txn_id,
                         self.world.settings.max_event_bytes)

    def _change_state(self, tx: Tx, room: Room, draft: Draft, ts: int | None = None) -> str:
        """Stores a state event; where nothing would change, it is the event that says so already."""
        now = room.events.get((draft.type, draft.state_key or ""))
        if not now or now.sender != draft.sender or canonical_json(now.content) != canonical_json(draft.content):      # true is not 1
            return self._append(tx, room, draft, ts)
        authorise(room, draft)
        event = tx.state_event(room.n, draft.type, draft.state_key or "")
        return event.event_id if event else ""

    # -- creating

    def create(self, who: Who, options: JsonObject) -> str:
        """A new room (createRoom): its first events in the order of the spec, all or none; the room ID."""
        plan = RoomPlan(self.world, who, options)
        self.world.ask_for_users(plan.invite, who.appservice)

        def job(tx: Tx) -> str:
            room = tx.add_room(f"!{self.world.chance.text(who.user_id)}:{self.world.name}", plan.version)
            if plan.published:
                tx.publish_room(room, True)
            if plan.alias:                                   # now: who claims it gets all events
                self.aliases.put(tx, who, plan.alias, room, "M_ROOM_IN_USE")
            for draft in plan.drafts(self._member(tx, who, who.user_id, "join")):
                self._append_first(tx, room, draft)
            for user_id in plan.invite:
                direct = {"is_direct": True} if plan.is_direct else {}
                self._append_first(tx, room, self._member(tx, who, user_id, "invite", direct))
            return room.room_id
        return self.store.write(job, who.token)

    def _append_first(self, tx: Tx, room: Room, draft: Draft) -> None:
        try:
            self._append(tx, room, draft)
        except MatrixError as error:
            if error.errcode == "M_FORBIDDEN":
                raise MatrixError("M_INVALID_ROOM_STATE", f"the room can't begin with this {draft.type}: {error.error}") from None
            raise

    # -- coming and going

    def join(self, who: Who, room_id_or_alias: str, extra: JsonObject | None = None) -> str:
        """Joins a room; the room ID. An unknown alias's application service is asked. `extra` goes into the event."""
        def enter(tx: Tx, room: Room) -> None:
            if who.user_id not in room.joined:
                vouched = {**(extra or {}), **self._voucher(tx, room, who.user_id)}
                self._append(tx, room, self._member(tx, who, who.user_id, "join", vouched))
        return self._approach(who, room_id_or_alias, enter)

    def knock(self, who: Who, room_id_or_alias: str, extra: JsonObject | None = None) -> str:
        def enter(tx: Tx, room: Room) -> None:
            self._append(tx, room, self._member(tx, who, who.user_id, "knock", extra))
        return self._approach(who, room_id_or_alias, enter)

    def _approach(self, who: Who, room_id_or_alias: str, enter: Callable[[Tx, Room], object]) -> str:
        is_alias = room_id_or_alias[:1] == "#"
        room_id = self.aliases.resolve(room_id_or_alias, who.appservice) if is_alias else check_id("!", room_id_or_alias)
        self.store.write(lambda tx: self._from_outside(tx, who, room_id, enter), who.token)
        return room_id

    @staticmethod
    def _from_outside(tx: Tx, who: Who, room_id: str, enter: Callable[[Tx, Room], T]) -> T:
        """Lets somebody in, or knock. Who is refused and never had to do with the room is not told whether there is one."""
        room = tx.room(room_id)
        try:
            if not room:
                raise forbidden("")
            return enter(tx, room)
        except MatrixError as error:
            known = room and (room.knows(who.user_id) or room.join_rule in OPEN_RULES)
            if error.errcode in ("M_FORBIDDEN", "M_BAD_JSON") and not known:
                raise forbidden(f"there is no room {shorten(room_id)} that {who.user_id} may join or knock at uninvited") from None
            raise

    @staticmethod
    def _member(tx: Tx, who: Who, user_id: str, membership: str, extra: JsonObject | None = None) -> Draft:
        """A member event, with the profile of the user that it is about."""
        user = tx.user(user_id) if membership in ("join", "invite", "knock") else None
        profile = {"displayname": user.displayname, "avatar_url": user.avatar_url} if user else {}
        return Draft("m.room.member", who.user_id, without_none({"membership": membership, **profile, **(extra or {})}), user_id)

    @staticmethod
    def _voucher(tx: Tx, room: Room, user_id: str) -> JsonObject:
        """For a restricted room: a member with the power to invite, if the user is in a room that it names."""
        if (room.join_rule not in RESTRICTED_RULES or room.membership(user_id) in ("invite", "join")
                or not tx.may_join_by_another(user_id, room.n)):
            return {}
        needed = room.needed("invite")
        member = min((one for one in room.joined if room.power(one) >= needed), default=None)
        return {"join_authorised_via_users_server": member} if member else {}

    def invite(self, who: Who, room_id: str, user_id: str, extra: JsonObject | None = None) -> None:
        """Invites; a ghost that does not exist yet is asked for first, and invited whatever the answer was."""
        self.world.ask("users", user_id, who.appservice, False)
        self.set_membership(who, room_id, user_id, "invite", extra)

    def kick(self, who: Who, room_id: str, user_id: str, extra: JsonObject | None = None) -> None:
        """Puts somebody out, or takes an invitation back."""
        refusal = forbidden(f"{shorten(user_id)} is not in room")
        self.set_membership(who, room_id, user_id, "leave", extra, ("join", "invite", "knock"), refusal)

    def unban(self, who: Who, room_id: str, user_id: str, extra: JsonObject | None = None) -> None:
        refusal = MatrixError("M_BAD_STATE", f"{shorten(user_id)} is not banned")
        self.set_membership(who, room_id, user_id, "leave", extra, ("ban",), refusal)

    @on_writer
    def set_membership(self, tx: Tx, who: Who, room_id: str, user_id: str, membership: str, extra: JsonObject | None = None,
                       only: Sequence[str] = (), refusal: MatrixError | None = None) -> None:
        """invite, leave (oneself or another), ban. `only`: what the membership must be now, else `refusal`."""
        room = room_for(tx, who, room_id, joined=user_id != who.user_id)
        if refusal and room.membership(user_id) not in only:
            raise refusal
        self._change_state(tx, room, self._member(tx, who, user_id, membership, extra))

    @on_writer
    def forget(self, tx: Tx, who: Who, room_id: str) -> None:
        room = tx.room(room_id)                              # of a room that there is not, there is nothing to forget
        if room and room.membership(who.user_id) not in ("leave", "ban"):
            raise MatrixError("M_UNKNOWN", f"{who.user_id} is still in the room; leave it first", 400)
        if room:
            tx.forget_room(who.user_id, room.n)

    def joined(self, who: Who) -> list[str]:
        with self.store.read() as reader:
            return [one.room_id for one in reader.memberships_of(who.user_id) if one.membership == "join"]

    # -- sending

    def send(self, who: Who, room_id: str, type: str, content: JsonObject, txn_id: str, ts: int | None = None) -> str:
        """A message event. For the same client transaction, of this device, room and type, it is the one that there is already,
        whatever `content` is now. `ts`: an application service's origin_server_ts.
        """
        if type == "m.room.redaction" and isinstance(content.get("redacts"), str):
            return self.redact(who, room_id, content["redacts"], content, txn_id, ts)
        check_canonical(content)
        return self._once(who, room_id, Draft(type, who.user_id, content), txn_id, ts)

    def redact(self, who: Who, room_id: str, event_id: str, content: JsonObject, txn_id: str, ts: int | None = None) -> str:
        """Takes an event's content away: one's own, or with the power to redact."""
        check_canonical(content)

        def find(tx: Tx, room: Room) -> Event:
            if who.user_id not in room.joined:
                raise not_in(who.user_id, room_id)
            event, power, needed = tx.event(room.n, event_id), room.power(who.user_id), room.needed("redact")
            may = event and (event.sender == who.user_id or power >= needed)
            if not event or not (may or sees(tx, room, who.user_id, event.tick)):
                raise MatrixError("M_NOT_FOUND", f"there is no event {shorten(event_id)} in this room")
            if event.type == "m.room.create":
                raise forbidden("the creation of a room can't be redacted")
            if not may:
                raise forbidden(f"{who.user_id} has power {power}; to redact others' events needs {needed}")
            return event
        draft = Draft("m.room.redaction", who.user_id, {**content, "redacts": event_id}, redacts=event_id)
        return self._once(who, room_id, draft, txn_id, ts, find)

    def _once(self, who: Who, room_id: str, draft: Draft, txn_id: str, ts: int | None,
              find_redacted: Callable[[Tx, Room], Event | None] = lambda tx, room: None) -> str:
        """Sends an event, once for each client transaction ID. `find_redacted`: the event that it redacts, if it may."""
        def job(tx: Tx) -> str:
            room = room_for(tx, who, room_id)
            event_id = tx.sent(room.n, draft, who.device_id, txn_id)
            if event_id is None:
                redacted = find_redacted(tx, room)
                event_id = self._append(tx, room, draft, ts, who.device_id, txn_id)
                if redacted:
                    tx.redact(room, redacted, tick_of(event_id))
            return event_id
        return self.store.write(job, who.token)

    def set_state(self, who: Who, room_id: str, type: str, state_key: str, content: JsonObject, ts: int | None = None) -> str:
        check_canonical(content)
        if type == "m.room.member" and content.get("membership") == "invite":
            self.world.ask("users", state_key, who.appservice, False)

        def put(tx: Tx, room: Room) -> str:
            chosen, membership = content, content.get("membership")
            if type == "m.room.member":                      # who vouches for a join is for the homeserver to say
                chosen = {key: value for key, value in content.items() if key != "join_authorised_via_users_server"}
                chosen = {**self._member(tx, who, state_key, membership or "").content, **chosen}
                chosen |= self._voucher(tx, room, state_key) if membership == "join" else {}
            return self._change_state(tx, room, Draft(type, who.user_id, chosen, state_key), ts)

        def job(tx: Tx) -> str:
            if (type, state_key) == ("m.room.member", who.user_id):
                return self._from_outside(tx, who, room_id, put)
            return put(tx, room_for(tx, who, room_id, joined=True))
        return self.store.write(job, who.token)


# -- Reading: what there is in a room, and what there was (Getting events for a room, Event Context). Nothing is told of what
# the user may not see.

def bundled(reader: Reader, who: Who, view: View, events: Sequence[Event], now: int) -> list[Raw]:
    """Events as clients get them, with the user's membership at the time and what others relate to them."""
    more = aggregations(reader, who, events, view.visible, now)
    return [event.for_client(now, who.user_id, who.device_id, view.then(event.tick) + more.get(event.tick, "")) for event in events]


class History(Verbs):
    """What there is and was in rooms."""

    def render(self, who: Who, events: Iterable[Event]) -> list[Raw]:
        now = self.clock.now()
        return [event.for_client(now, who.user_id, who.device_id) for event in events]

    def event(self, who: Who, room_id: str, event_id: str) -> Raw:
        with viewing(self.store, who, room_id, "M_NOT_FOUND") as (reader, view):
            return bundled(reader, who, view, [view.find(reader, event_id)], self.clock.now())[0]

    def near(self, who: Who, room_id: str, ts: int, later: bool) -> JsonObject:
        """Which event is the nearest to a time (Jump to event by timestamp)."""
        with viewing(self.store, who, room_id) as (reader, view):
            event = existing(reader.event_near(view.room, ts, later, view.visible),
                             f"there is no event {'at or after' if later else 'at or before'} {ts} that may be seen")
        return {"event_id": event.event_id, "origin_server_ts": event.ts}

    def state(self, who: Who, room_id: str) -> list[Raw]:
        with viewing(self.store, who, room_id) as (reader, view):
            return self.render(who, reader.state_at(view.room, view.last_state()))

    def state_event(self, who: Who, room_id: str, type: str, state_key: str) -> Event:
        with viewing(self.store, who, room_id) as (reader, view):
            return existing(reader.state_event(view.room, type, state_key, view.last_state()),
                            f"the room has no state {shorten(type)} with the key {shorten(state_key)!r}")

    def members(self, who: Who, room_id: str, upto: int | None = None, membership: str | None = None,
                not_membership: str | None = None) -> list[Raw]:
        """Member events, as they are or were at the tick `upto`."""
        with viewing(self.store, who, room_id) as (reader, view):
            last = view.last_state()
            upto = last if upto is None else min(last, upto)
            if not (view.sees(upto) or view.sees(upto + 1)):         # or right before what may be seen: prev_batch of /sync
                raise forbidden(f"{who.user_id} may not see what there was in the room {view.room_id} at {upto}")
            events = reader.state_at(view.room, upto, 0, "m.room.member")
        wanted = [event for event in events if membership in (None, event.content.get("membership"))
                  and (not_membership is None or not_membership != event.content.get("membership"))]
        return self.render(who, wanted)

    def joined_members(self, who: Who, room_id: str) -> dict[str, JsonObject]:
        """For members, and for an application service with any of its users among them."""
        with self.store.read() as reader:
            row = reader.room_row(room_id)
            users = reader.members(row.n) if row else []
            if not row or (who.user_id not in users and not self.world.has_user_among(who.appservice, users)):
                raise not_in(who.user_id, room_id)
            events = reader.state_events(row.n, [("m.room.member", user_id) for user_id in users])
        contents = {event.state_key or "": event.content for event in events}
        return {user_id: {"display_name": content.get("displayname"), "avatar_url": content.get("avatar_url")}
                for user_id, content in contents.items()}

    def messages(self, who: Who, room_id: str, start: int | None, backwards: bool, limit: int, filter: Filter,
                 stop: int | None = None, lazy: bool = False) -> JsonObject:
        """A page of history: from the tick `start` (the end, if None) backwards, or forwards. `lazy`: with who speaks."""
        with viewing(self.store, who, room_id) as (reader, view):
            filter = filter.in_room(room_id)._replace(ignored=reader.ignored(who.user_id))
            read = functools.partial(reader.events, view.room, filter=filter)
            start, events = view.page(reader, read, start, stop, backwards, min(limit, MAX_PAGE))
            events = as_far(events, (len(event.json) for event in events), MAX_PAGE_BYTES)
            speakers = sorted({event.sender for event in events} if lazy else ())
            members = reader.state_events(view.room, [("m.room.member", sender) for sender in speakers], view.state_upto)
            chunk = bundled(reader, who, view, events, self.clock.now())
        end = str(events[-1].tick - backwards) if events else None       # also with the last ones: clients ask on until no `end` comes
        return without_none({"start": str(start), "chunk": chunk, "end": end, "state": self.render(who, members) or None})

    def context(self, who: Who, room_id: str, event_id: str, limit: int, filter: Filter, lazy: bool = False) -> JsonObject:
        """An event with what stood before and after it; `limit` events of these at most. `lazy`: of members, who speaks."""
        with viewing(self.store, who, room_id) as (reader, view):
            event = view.find(reader, event_id)
            filter = filter.in_room(room_id)._replace(ignored=reader.ignored(who.user_id))
            read = functools.partial(reader.events, view.room, filter=filter)
            before = view.collect(read, 0, event.tick - 1, limit // 2, True)
            after = view.collect(read, event.tick, FOREVER, limit - limit // 2, False)
            last = after[-1].tick if after else event.tick
            speakers = {one.sender for one in (event, *before, *after)}
            state = [one for one in reader.state_at(view.room, min(last, view.state_upto))
                     if not lazy or one.type != "m.room.member" or one.state_key in speakers]
            around = bundled(reader, who, view, [event, *before, *after], self.clock.now())
        first = before[-1].tick if before else event.tick
        return {"event": around[0], "events_before": around[1:len(before) + 1], "events_after": around[len(before) + 1:],
                "state": self.render(who, state), "start": str(first - 1), "end": str(last)}

    def initial_sync(self, who: Who, room_id: str, limit: int, presence: Callable[[Sequence[str]], list[JsonObject]]) -> JsonObject:
        """One room as it is, with its last messages (deprecated; old software begins so). `presence`: tells that of members."""
        page = self.messages(who, room_id, None, True, limit, EVERYTHING)
        with viewing(self.store, who, room_id) as (reader, view):
            inside = view.membership == "join"               # who has left is not told how it went on
            data, members = reader.account_data_since(who.user_id, 0), reader.members(view.room) if inside else []
            receipts = receipts_events(reader.receipts_since([view.room], 0)[view.room] if inside else [], who.user_id)
            published = cast(RoomRow, reader.room_row(room_id)).published
        return {"room_id": room_id, "membership": view.membership, "visibility": "public" if published else "private",
                "messages": {"chunk": page["chunk"][::-1], "start": page.get("end", "0"), "end": page["start"]},
                "state": self.state(who, room_id), "presence": presence(members), "receipts": receipts,
                "account_data": [{"type": type, "content": Raw(text)} for where, type, text in data if where == room_id]}


# -- Sync: what is new for a user (Syncing, Filtering). The token `since` is a tick, and everything that lies after it is new: Sync
# waits until there is something, and a Window reads it in one moment of the database. Typing, presence, receipts and what is
# unread each add their part; they stand further down.

class SyncFilter:
    """A client's filter (Client-Server API, Filtering), as far as /sync reads it.

    `event_fields` is left out: a server may include more fields than were asked for. A `limit` counts for the timeline only:
    what it cut off elsewhere the client would never get.
    """

    def __init__(self, source: JsonObject) -> None:
        if field(source, "event_format", str, "client") != "client":
            raise MatrixError("M_INVALID_PARAM", "events come in the format \"client\" only: this server does not federate")
        room = field(source, "room", dict, {})
        timeline, state = field(room, "timeline", dict, {}), field(room, "state", dict, {})
        names_in(source, "event_fields")                     # not read, but checked
        self.rooms, self.include_leave = event_filter(room), field(room, "include_leave", bool, False)
        self.timeline, self.state = event_filter(timeline), event_filter(state)
        self.ephemeral, self.room_data = (event_filter(field(room, key, dict, {})) for key in ("ephemeral", "account_data"))
        self.account_data, self.presence = (event_filter(field(source, key, dict, {})) for key in ("account_data", "presence"))
        self.threads = field(timeline, "unread_thread_notifications", bool, False)   # whether what is unread is counted by thread
        lazy_state, lazy_timeline = (field(part, "lazy_load_members", bool, False) for part in (state, timeline))
        self.lazy = lazy_state or lazy_timeline
        self.limit = min(max(field(timeline, "limit", int, TIMELINE), 0), MAX_PAGE)      # events in a timeline


@functools.lru_cache(128)
def inline_filter(text: str) -> SyncFilter:
    """One that a client sends with each request."""
    return SyncFilter(parse_object(text, "filter"))


def event_filter(source: JsonObject) -> Filter:
    """EventFilter or RoomEventFilter."""
    return EVERYTHING if not source else Filter(
        names_in(source, "types"), names_in(source, "not_types") or (), names_in(source, "senders"),
        names_in(source, "not_senders") or (), field(source, "contains_url", bool, None),
        rooms=names_in(source, "rooms"), not_rooms=names_in(source, "not_rooms") or ())


def names_in(source: JsonObject, key: str) -> list[str] | None:
    names = source.get(key)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise MatrixError("M_BAD_JSON", f"{key!r} in a filter must be a list of texts, not {shorten(names)}")
    if names and (len(names) > MAX_NAMES or len(max(names, key=len)) > MAX_ID_BYTES or sum("*" in name for name in names) > MAX_GLOBS):
        raise MatrixError("M_INVALID_PARAM", f"{key!r} in a filter may have {MAX_NAMES:,} texts of {MAX_ID_BYTES} characters at most, "
                          f"and of those with a '*' {MAX_GLOBS}")
    return names


class Sync(Verbs):
    """What is new for one user: everything that lies after a tick."""

    def __init__(self, world: World, typing: Typing, presence: Presence, unread: Unread) -> None:
        super().__init__(world)
        self.typing, self.presence, self.unread = typing, presence, unread
        self.handed: set[tuple[str, str]] = set()            # user and device that have been given messages, to be dropped next time

    def sync(self, who: Who, since: int | None, filter: SyncFilter, timeout: float = 0.0, full_state: bool = False,
             state_after: str = "", set_presence: str = "online", check_client: Callable[[], None] = lambda: None) -> JsonObject:
        """Waits up to `timeout` seconds until there is something new after the tick `since`.

        `state_after`: the key for the state at the end of each timeline, in place of `state` at its start. `check_client`:
        raises if nobody waits any more; asked now and then.
        """
        clock, timeout = self.clock, min(timeout, MAX_SYNC_SECONDS)
        with contextlib.suppress(MatrixError):               # the disk is full, say: that is no reason not to read
            self.presence.polling(who, set_presence, timeout)
        if since is not None and since > self.store.position:
            since = None                                     # from the future: of another database, say
        deadline = clock.monotonic() + timeout
        waiting = self.store.waiters.enter(who.user_id)
        try:
            while True:
                over = full_state or since is None or clock.monotonic() >= deadline or self.world.stopping
                if over or (since or 0) < self.store.position or (who.user_id, who.device_id or "") in self.handed:
                    window = self._read(who, since, filter, full_state, state_after)
                    if over or window.news:
                        break
                    del window                               # and hold nothing while it waits: many may
                self.store.check_session(who.token)
                look = clock.monotonic() + LOOK_SECONDS
                self.store.waiters.wait(waiting, min(deadline, look))
                if look <= clock.monotonic():
                    check_client()
        finally:
            self.store.waiters.leave(who.user_id, waiting)
        self.store.check_session(who.token)
        if window.echo:
            time.sleep(ECHO_SECONDS)
        return window.answer

    def key_changes(self, who: Who, since: int) -> JsonObject:
        """The device lists that changed after the tick `since` (Tracking the device list for a user)."""
        with self.store.read() as reader:
            return {"changed": [], "left": [], **Window(self, reader, who, since, SyncFilter({}), False, "").device_lists()}

    def _read(self, who: Who, since: int | None, filter: SyncFilter, full_state: bool, state_after: str) -> Window:
        """Reads the answer, and drops the messages to the device that it has got: those up to `since`."""
        device = (who.user_id, who.device_id or "")
        with self.store.read() as reader:
            window = Window(self, reader, who, since, filter, full_state, state_after)
            window.read()
        ticks = [tick for tick, _ in window.messages]
        if ticks and ticks[0] <= window.since:
            with contextlib.suppress(MatrixError):           # who reads did not ask for it; next time, then
                self.store.write(lambda tx: tx.drop_to_device(*device, window.since))
        (self.handed.add if ticks and ticks[-1] > window.since else self.handed.discard)(device)
        return window


class Window:
    """One look: what lies between `since` and now, for one user and filter. Rooms are named by their numbers in the store."""

    def __init__(self, sync: Sync, reader: Reader, who: Who, since: int | None, filter: SyncFilter, full_state: bool,
                 state_after: str) -> None:
        self.sync, self.store, self.reader = sync, sync.store, reader
        self.who, self.filter, self.full_state, self.state_after = who, filter, full_state, state_after
        self.initial, self.since = since is None, since or 0
        self.now, self.ts = reader.position(), sync.clock.now()      # the last tick in it, and the time for `age`
        self.store.wait_published(self.now)
        self.answer: JsonObject = {}                         # of /sync
        self.news = False                                    # whether there is any in it
        # Whether a relation that this device has just sent is in it. matrix-js-sdk never sends again if it sees an event of
        # a thread in /sync before it has the answer to its PUT.
        self.echo = False
        self.moved = self.store.moved_since(self.since)      # rooms; None: any
        # What the user has to do with:
        self.data = self.account_data(self.since)            # room ID, or "" for the account's → what has changed
        self.memberships = reader.memberships_of(who.user_id) if full_state or self.moved is None else (
            reader.memberships_of(who.user_id, self.since, self.moved, self.data))       # those that may be told of
        self.ignored = reader.ignored(who.user_id)           # users
        self.messages = reader.to_device(who.user_id, who.device_id or "")   # (tick, json), with those that the device has got
        self.changed: set[int] = set()                       # rooms in which somebody's membership changed
        self.met = self._met()                               # whom the user may have met or lost sight of
        # By room, of some rooms at a time (_read_rooms):
        self.own: dict[int, list[tuple[int, str]]] = {}      # the user's membership and
        self.visibilities: dict[int, list[tuple[int, str]]] = {}     # the room's visibility, each change, where the user may be new
        self.counts: dict[int, dict[str, int]] = {}          # members by membership, where that has changed,
        self.heroes: dict[int, list[str]] = {}               # and by whom the room is known
        self.receipts: dict[int, list[Any]] = {}             # the new ones, and all
        self.own_receipts: dict[int, list[Any]] = {}         # of the user

    def account_data(self, since: int) -> dict[str, list[JsonObject]]:
        """By room ID; '' has the account's."""
        found: dict[str, list[JsonObject]] = {"": []}
        for room_id, type, content in self.reader.account_data_since(self.who.user_id, since):
            found.setdefault(room_id, []).append({"type": type, "content": Raw(content)})
        if self.initial and not any(event["type"] == "m.push_rules" for event in found[""]):
            found[""].append({"type": "m.push_rules", "content": push_rules(self.reader, self.who.user_id)})
        return found

    def _met(self) -> set[str]:
        met: set[str] = set()
        for room, _, membership, tick, _ in self.memberships if not self.initial else ():
            if tick > self.since:
                self.changed.add(room)
                met |= self.reader.met_in(room, self.who.user_id, self.since)
            elif membership == "join" and self._has_moved(room):
                if changed := self.reader.changed_members(room, self.since):
                    self.changed.add(room)
                    met.update(user_id for user_id, came_or_went in changed.items() if came_or_went)
        return met - {self.who.user_id}

    def read(self) -> None:
        presence = self.sync.presence.since(self.reader, self.who.user_id, self.since, self.now, self.met)
        fresh = [Raw(text) for tick, text in self.messages if tick > self.since]
        parts = {"account_data": self.events(self.filter.account_data, self.data.pop("")),
                 "presence": self.events(self.filter.presence, presence), "rooms": self._rooms(),
                 "to_device": {"events": fresh} if fresh else {}, "device_lists": self.device_lists()}
        self.news = any(parts.values())
        self.answer = {"next_batch": str(self.now), **{key: part for key, part in parts.items() if part}, **self._key_counts()}

    def events(self, filter: Filter, found: Sequence[JsonObject | None]) -> JsonObject:
        """The events that the filter wants, as a part of the answer."""
        events = [event for event in found if event and filter.passes(
            Event(0, event["type"], None, event.get("sender", ""), 0, '{"content":{}}', None, None, None, None, None, 0))]
        return {"events": events} if events else {}

    # -- rooms

    def _rooms(self) -> JsonObject:
        rooms: dict[str, dict[str, Raw]] = {}
        pause = time.monotonic() + SLICE_SECONDS
        shown = [one for one in self.memberships if self._concerns(one)]
        for start in range(0, len(shown), ROOMS_AT_ONCE):
            self._read_rooms(shown[start:start + ROOMS_AT_ONCE])
            for one in shown[start:start + ROOMS_AT_ONCE]:
                if time.monotonic() > pause:                 # a thousand rooms: let others to the interpreter's lock
                    time.sleep(0.000001)
                    pause = time.monotonic() + SLICE_SECONDS
                section, entry = RoomWindow(self, one).read()
                if entry:
                    rooms.setdefault(section, {})[one.room_id] = Raw(to_json(entry))     # written piece by piece, too
        return rooms

    def _concerns(self, one: MembershipRow) -> bool:
        """Whether there may be something to say of this room."""
        is_new = one.tick > self.since
        if not self.filter.rooms.wants(one.room_id):
            return False
        if one.membership in ("leave", "ban"):
            return is_new if not self.initial else self.filter.include_leave and not one.forgotten
        return is_new or (one.membership == "join" and (
            self.full_state or one.room_id in self.data or self._has_moved(one.room)))

    def _has_moved(self, room: int) -> bool:
        return self.moved is None or room in self.moved

    def _read_rooms(self, shown: Sequence[MembershipRow]) -> None:
        """Reads what is asked of each of these rooms, with one statement for all."""
        me, rooms, new = self.who.user_id, [one.room for one in shown], [one.room for one in shown if one.tick > self.since]
        self.own = self.reader.changes(new, *MEMBERSHIP, me)
        self.visibilities = self.reader.changes(new, *HISTORY_VISIBILITY)
        counted = [one.room for one in shown if one.membership == "join" and (
            self.initial or self.full_state or one.room in self.changed)]
        self.counts, self.heroes = self.reader.member_counts(counted), self.reader.heroes(counted, me)
        self.receipts, self.own_receipts = self.reader.receipts_since(rooms, self.since), self.reader.own_receipts(rooms, me)

    @functools.cached_property
    def push_rules(self) -> PushRules:
        return self.sync.unread.rules(self.reader, self.who.user_id)

    # -- for clients: keys for end-to-end encryption

    def device_lists(self) -> JsonObject:
        """Whose keys to ask for again, and who is met in no room any more."""
        if self.initial:
            return {}
        users = self.reader.key_news(self.who.user_id, self.since, self.met)
        changed = sorted(user_id for user_id, shared in users.items() if shared)
        left = sorted(user_id for user_id in users.keys() & self.met if not users[user_id])
        return {"changed": changed, "left": left} if changed or left else {}

    def _key_counts(self) -> JsonObject:
        if not self.who.device_id:
            return {}
        device = (self.who.user_id, self.who.device_id)
        return {"device_one_time_keys_count": self.reader.one_time_counts(*device),
                "device_unused_fallback_key_types": self.reader.unused_fallbacks(*device)}


class RoomWindow:
    """The same for one room: what the answer has of it."""

    def __init__(self, window: Window, one: MembershipRow) -> None:
        self.window, self.reader, self.who, self.filter = window, window.reader, window.who, window.filter
        self.room, self.room_id, self.membership, self.tick, self.forgotten = one
        self.after, self.upto = window.since, window.now     # what is told lies after the one tick, up to the other
        self.fresh = window.initial                          # the client gets the room anew: its user was not in it at `since`
        self.own = window.own.get(self.room, [])             # each change of the user's membership, if the last one is new
        self.view = self._view()
        self.summary = self._summary()

    def _view(self) -> View:
        """What the user may see."""
        if not self.own:                                     # who is not new sees all that comes
            return View(self.room, self.room_id, "join", [(0, FOREVER)], FOREVER, [(0, "join")])
        view = None if self.forgotten else view_by(self.room, self.room_id, self.own, self.window.visibilities[self.room])
        return view or View(self.room, self.room_id, "leave", [], -1, self.own)

    def _summary(self) -> JsonObject:
        """Counts and heroes, when a membership has changed."""
        window, counts = self.window, self.window.counts.get(self.room)
        return {} if counts is None else {"m.heroes": window.heroes[self.room], "m.joined_member_count": counts.get("join", 0),
                                          "m.invited_member_count": counts.get("invite", 0)}

    def read(self) -> tuple[str, JsonObject]:
        """The section of the answer that the room belongs to, and what is new in it."""
        if self.membership == "join":
            return "join", self._joined()
        if self.membership in ("invite", "knock"):
            events = self._stripped()
            ignored = events[-1]["sender"] in self.window.ignored
            return self.membership, {} if ignored else {f"{self.membership}_state": {"events": events}}
        return "leave", self._left()

    def _joined(self) -> JsonObject:
        if self.own and not self.fresh and (came_back := self._came_back()) is not None:
            self.after, self.fresh = came_back, True
        entry = self._timeline()
        if self.summary:
            entry["summary"] = self.summary
        for key, filter, events in (("ephemeral", self.filter.ephemeral, self._passing()),
                                    ("account_data", self.filter.room_data, self._account_data())):
            if told := self.window.events(filter.in_room(self.room_id), events):
                entry[key] = told
        entry.update(self._unread(bool(entry)))
        if entry and self.window.state_after:
            entry.setdefault(self.window.state_after, {"events": []})
        return entry

    def _left(self) -> JsonObject:
        """The room up to the leave, which is told in any case: also if it was of an invitation, or if the room has been
        forgotten since, of which other devices do not know.
        """
        self.fresh, self.upto = not self._was_in(), self.tick
        if not self.view.sees(self.tick):
            ranges = [one for one in self.view.ranges if one[1] < self.tick]
            self.view = self.view._replace(ranges=[*ranges, (self.tick, self.tick)])
        if entry := self._timeline():
            return entry
        own = self.reader.event_at(self.tick)                # the filter wants nothing of it
        return {"timeline": {"events": self._render([own]), "limited": False, "prev_batch": str(self.tick)},
                self.window.state_after or "state": {"events": []}}

    def _was_in(self) -> bool:
        """Whether the user was in the room at `after`."""
        return [value for tick, value in self.own if tick <= self.after][-1:] == ["join"]

    def _came_back(self) -> int | None:
        """If the user was out of the room at `since` or after it: the tick of the last leave, or 0. Else None."""
        if self._was_in() and all(value == "join" for tick, value in self.own if tick > self.after):
            return None
        return max((tick for tick, value in self.own if value in ("leave", "ban")), default=0)

    def _stripped(self) -> list[JsonObject]:
        """What somebody invited may know: the room's face, who sent the invitation, and last the invitation itself."""
        me = self.who.user_id
        own = self.reader.state_event(self.room, "m.room.member", me)
        speakers = [own.sender, me] if own and own.sender != me else [me]
        return self.reader.stripped(self.room, speakers)

    def _passing(self) -> list[JsonObject | None]:
        """Who types, and the new receipts."""
        since = 0 if self.fresh else self.window.since
        receipts = self.window.receipts if since == self.window.since else self.reader.receipts_since([self.room], since)
        return [self.window.sync.typing.since(self.room, since, self.window.now),
                *receipts_events(receipts[self.room], self.who.user_id)]

    def _account_data(self) -> list[JsonObject]:
        """With what was set before the user came in."""
        window = self.window
        return (window.account_data(0) if self.fresh and not window.initial else window.data).get(self.room_id, [])

    # -- its timeline, and its state

    def _timeline(self) -> JsonObject:
        """timeline, and the state that leads to it or follows from it (Syncing). A timeline that is `limited` does not reach back
        to `after`: what stands between is read with /messages, backwards from its prev_batch. It has no gaps itself: what changed
        unseen between two of its events would be in no state.
        """
        window, most = self.window, self.filter.limit
        seen = [max(self.after + 1, first) for first, last in self.view.ranges if last > self.after and first <= self.upto]
        filter = self.filter.timeline.in_room(self.room_id)._replace(ignored=window.ignored)
        found = self.reader.events(self.room, seen[-1] - 1, self.upto, most + 1, True, filter)
        events = found[:most][::-1]
        away = self.fresh and self.after > window.since      # the client may not know that the user was out of the room meanwhile
        limited = len(found) > most or len(seen) > 1 or away
        whole = window.full_state or self.fresh or not self.after
        unknown = 0 if not whole else window.since if away else FOREVER
        state = self._chosen(self._state(0 if whole else self.after, events, whole or limited), events, unknown)
        if not found and not state:
            return {}
        # An unlimited timeline has what relates to its events.
        more = aggregations(self.reader, self.who, events, self.view.visible, window.ts) if limited else {}
        shown = self._render(events, lambda tick: self.view.then(tick) + more.get(tick, ""))
        prev_batch = events[0].tick - 1 if events else self.upto
        return {"timeline": {"events": shown, "limited": limited, "prev_batch": str(prev_batch)},
                window.state_after or "state": {"events": self._render(state)}}

    def _state(self, after: int, timeline: list[Event], gap: bool) -> list[Event]:
        """The state that changed after `after`: up to the start of the timeline, whose own events go on from there, or with
        `state_after` up to its end. `gap`: it may be much.
        """
        at_end = self.window.state_after
        start = min(timeline[0].tick - 1, self._last) if timeline and not at_end else self._last
        state = self.reader.state_at(self.room, start, after) if gap else []
        if at_end or self.filter.timeline != EVERYTHING:     # what the filter keeps out of the timeline comes here
            shown = set() if at_end else {event.tick for event in timeline}
            more = self.reader.state_changes(self.room, start if gap else after, self._last)
            state += [event for event in more if event.tick not in shown]
        return state

    @property
    def _last(self) -> int:
        """The tick up to which the state may be told."""
        return min(self.upto, self.view.state_upto)

    def _chosen(self, state: list[Event], timeline: list[Event], unknown: int) -> list[Event]:
        """What the filter wants of the state. With lazy loading, of the members: who speaks, and by whom a room without
        a name is known; but all changes after the tick `unknown`, for the client keeps a list. 0: these are changes only.
        """
        if self.filter.lazy:
            heroes = self.summary.get("m.heroes", ())
            named = any(self.reader.contents(self.room, ("m.room.name", "m.room.canonical_alias")).values()) if heroes else True
            speakers = {*(event.sender for event in timeline), *(() if named else heroes), *([self.who.user_id] if unknown else ())}
            state = [event for event in state if event.tick > unknown or event.type != "m.room.member" or event.state_key in speakers]
            shown = state if self.window.state_after else [*state, *timeline]
            known = {event.state_key for event in shown if event.type == "m.room.member"}
            missing = [("m.room.member", user_id) for user_id in sorted(speakers - known)]
            state += self.reader.state_events(self.room, missing, self._last)
        filter = self.filter.state.in_room(self.room_id)
        return state if filter == EVERYTHING else [event for event in state if filter.passes(event)]

    def _render(self, events: list[Event], more: Callable[[int], str] = lambda tick: "") -> Raw:
        """The list of them in JSON. `more`: from an event's tick to further parts of its `unsigned`."""
        user, device, now = self.who.user_id, self.who.device_id, self.window.ts
        self.window.echo |= any(event.device_id == device and 0 <= now - event.ts < 100 and "m.relates_to" in event.json
                                for event in events if event.txn_id)
        return Raw("[" + ",".join([event.for_client(now, user, device, more(event.tick)) for event in events]) + "]")

    # -- what is unread in it

    def _unread(self, moved: bool) -> JsonObject:
        """How much is unread in a room that moved, or in which the user has read on; by thread, if the filter wants that."""
        window, receipts = self.window, self.window.own_receipts[self.room]
        if not moved and all(read_at <= window.since for _, _, read_at in receipts):
            return {}
        counts = window.sync.unread.count(self.reader, self.who.user_id, window.push_rules, window.ignored, self.room, self.tick,
                                          receipts, window.now)
        if not self.filter.threads:
            counts = {0: [sum(column) for column in zip([0, 0], *counts.values(), strict=True)]}
        shown = {root: {"notification_count": count[0], "highlight_count": count[1]} for root, count in {0: [0, 0], **counts}.items()}
        entry: JsonObject = {"unread_notifications": shown.pop(0)}
        if shown:
            entry["unread_thread_notifications"] = {self.reader.event_at(root).event_id: count for root, count in shown.items()}
        return entry


# -- Clients' data: account data, tags and filters that the server only keeps; OpenID tokens (Client Config, Room Tagging,
# Filtering, OpenID). From here to the end of the section: to be skipped at first reading.

class ClientData(Verbs):
    """What clients keep on the server for their user. `room_id` "": for no room."""

    def account_data(self, who: Who, room_id: str, type: str) -> Raw:
        with self.store.read() as reader:
            return existing(reader.account_data(who.user_id, room_id, type), f"there is no account data of type {shorten(type)}")

    def set_account_data(self, who: Who, room_id: str, type: str, content: JsonObject) -> None:
        self.store.write(lambda tx: tx.set_account_data(who.user_id, room_id, type, to_json(content)), who.token)

    def tags(self, who: Who, room_id: str) -> JsonObject:
        with self.store.read() as reader:
            return self._tags(reader, who, room_id)

    @staticmethod
    def _tags(reader: Reader, who: Who, room_id: str) -> JsonObject:
        """Content of m.tag, whatever a client may have put there."""
        content = json.loads(reader.account_data(who.user_id, room_id, "m.tag") or "{}")
        return content if isinstance(content.get("tags"), dict) else {**content, "tags": {}}

    @on_writer
    def set_tag(self, tx: Tx, who: Who, room_id: str, tag: str, content: JsonObject | None) -> None:
        """Sets a tag on a room, or takes it off with content None."""
        tags = self._tags(tx, who, room_id)
        tags["tags"].pop(tag, None)
        if content is not None:
            tags["tags"][tag] = content
        text = to_json(tags)
        if content is not None and len(text) > MAX_TAGS_BYTES:
            raise MatrixError("M_TOO_LARGE", f"all tags of a room may have {MAX_TAGS_BYTES} bytes at most")
        tx.set_account_data(who.user_id, room_id, "m.tag", text)

    def add_filter(self, who: Who, content: JsonObject) -> str:
        return str(self.store.write(lambda tx: tx.add_filter(who.user_id, to_json(content)), who.token))

    def filter(self, who: Who, filter_id: str) -> JsonObject:
        number = number_in(filter_id)
        with self.store.read() as reader:
            row = None if number is None else reader.filter(who.user_id, number)
        return cast(JsonObject, json.loads(existing(row, f"{who.user_id} has no filter {shorten(filter_id)}")[0]))


class OpenId(Verbs):
    """Tokens with which users prove to a third party who they are; for an hour, and in memory only."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._tokens: dict[bytes, tuple[str, float]] = {}    # digest of a token → user, until when (monotonic)
        self._guard = threading.Lock()                       # guards changes of _tokens

    def token(self, who: Who) -> JsonObject:
        token, now = self.world.chance.text(who.user_id, 43), self.clock.monotonic()
        with self._guard:
            self._tokens = {key: value for key, value in self._tokens.items() if value[1] > now}
            self._tokens[digest(token)] = (who.user_id, now + OPENID_SECONDS)
        return {"access_token": token, "token_type": "Bearer", "matrix_server_name": self.world.name, "expires_in": OPENID_SECONDS}

    def user(self, token: str) -> str:
        user_id, until = self._tokens.get(digest(token), ("", 0.0))
        if until < self.clock.monotonic() or user_id not in self.store.users:
            raise MatrixError("M_UNKNOWN_TOKEN", "this OpenID token was not given here, or its hour is over")
        return user_id


# -- The directory: which rooms and people may be found by who does not know them yet (Published room directory, Spaces, User
# Directory; AS: Room directories). For clients.

def public_entry(reader: Reader, row: RoomRow) -> JsonObject:
    """One room of the directory (PublishedRoomsChunk)."""
    state = reader.contents(row.n, ("m.room.create", "m.room.name", "m.room.topic", "m.room.avatar", "m.room.canonical_alias",
                                    "m.room.join_rules", "m.room.guest_access", "m.room.history_visibility"))

    def get(type: str, key: str) -> Any:
        return state.get(f"m.room.{type}", {}).get(key)

    return without_none({
        "room_id": row.room_id, "num_joined_members": reader.count_members(row.n, "join"),
        "world_readable": get("history_visibility", "history_visibility") == "world_readable",
        "guest_can_join": get("guest_access", "guest_access") == "can_join",
        "join_rule": get("join_rules", "join_rule") or "invite",
        "name": get("name", "name"), "topic": get("topic", "topic"), "avatar_url": get("avatar", "url"),
        "canonical_alias": get("canonical_alias", "alias"), "room_type": get("create", "type")})


def open_to_all(entry: JsonObject) -> bool:
    """Whether anybody may know of the room with this entry, listed or not: to join it, to knock at it, or to read in it."""
    return entry["join_rule"] in OPEN_RULES or bool(entry["world_readable"])


class Directory(Verbs):
    """Rooms that are listed, spaces, and people."""

    def is_published(self, who: Who, room_id: str) -> bool:
        """M_NOT_FOUND also for a room that is neither listed nor open, if the asker has nothing to do with it."""
        with self.store.read() as reader:
            row = reader.room_row(room_id)
            known = row and (row.published or open_to_all(public_entry(reader, row)) or reader.membership(who.user_id, row.n)
                             or self.world.has_user_among(who.appservice, reader.members(row.n)))
        if not row or not known:
            raise MatrixError("M_NOT_FOUND", f"there is no room {shorten(room_id)} in the directory")
        return bool(row.published)

    @on_writer
    def publish(self, tx: Tx, who: Who, room_id: str, published: bool) -> None:
        room = tx.room(room_id)
        if not room or not room.knows(who.user_id):
            raise MatrixError("M_NOT_FOUND", f"there is no room {shorten(room_id)} that {who.user_id} is in")
        if not may_set_canonical_alias(room, who.user_id):
            needed = room.needed_to_send("m.room.canonical_alias", True)
            raise forbidden(f"to list the room in the directory, {who.user_id} must be in it with power {needed}")
        tx.publish_room(room, published)

    @on_writer
    def publish_in_network(self, tx: Tx, who: Who, network: str, room_id: str, published: bool) -> None:
        """Lists the room in the directory of a third-party network of the application service, or takes it off."""
        room = tx.room(room_id)
        if not room or not who.appservice:
            raise MatrixError("M_NOT_FOUND", f"there is no room {shorten(room_id)}")
        tx.publish_in_network(who.appservice.id, network, room, published)

    def public(self, offset: int, limit: int, search: str = "", room_types: Sequence[str | None] = (),
               network: str | None = "") -> JsonObject:
        """The public directory: published rooms that one may join or knock at, the largest first.

        `network`: the instance_id of a third-party one; "": the homeserver's own; None: all. `limit` 0: no limit.
        """
        appservices, limit = self.world.registrations.by_id if network != "" else (), min(limit or MAX_PAGE, MAX_PAGE)
        with self.store.read() as reader:
            rooms = [public_entry(reader, row) for row in reader.published_rooms(not network, network, appservices)]
        wanted = [room for room in rooms if room["join_rule"] not in ("invite", "private") and room["num_joined_members"]
                  and (not room_types or room.get("room_type") in room_types)
                  and search.lower() in " ".join(str(room.get(key, "")) for key in ("name", "topic", "canonical_alias")).lower()]
        wanted.sort(key=lambda room: -int(room["num_joined_members"]))
        return without_none({"chunk": wanted[offset:offset + limit], "total_room_count_estimate": len(wanted),
                             "next_batch": str(offset + limit) if offset + limit < len(wanted) else None,
                             "prev_batch": str(max(0, offset - limit)) if offset else None})

    def hierarchy(self, who: Who, room_id: str, suggested_only: bool, max_depth: int, offset: int, limit: int) -> JsonObject:
        """A space and the rooms below it, as far as the user may see them, each before what is below it (Spaces)."""
        found, below, depths = list[JsonObject](), dict[str, list[str]](), dict[str, int]()
        ahead = [(room_id, 0)]                               # rooms to look at, the next one last, and how far below the space they are
        with self.store.read() as reader:
            while ahead and len(found) <= offset + limit:    # one more than is shown
                id, depth = ahead.pop()
                if id not in below:
                    entry = self._space_entry(reader, who, id, suggested_only)
                    found += [entry] if entry else []
                    below[id] = [event["state_key"] for event in entry["children_state"]] if entry else []
                if depth < min(max_depth, depths.get(id, max_depth)):        # or again, when a shorter way leads there
                    depths[id] = depth
                    ahead += [(child, depth + 1) for child in below[id][::-1]]
        if not found:
            raise forbidden(f"{who.user_id} can't see the room {shorten(room_id)}")
        more = str(offset + limit) if offset + limit < len(found) else None
        return without_none({"rooms": found[offset:offset + limit], "next_batch": more})

    def summary(self, who: Who, room_id: str) -> JsonObject:
        """What who asks may know of one room, and that user's membership (Room summaries)."""
        with self.store.read() as reader:
            row = reader.room_row(room_id)
            entry, own = (self._entry(reader, who, row), reader.membership(who.user_id, row.n)) if row else (None, None)
        return {**existing(entry, f"there is no room {shorten(room_id)} that may be seen"),
                **({"membership": own.membership} if own else {})}

    @staticmethod
    def _entry(reader: Reader, who: Who, row: RoomRow) -> JsonObject | None:
        """A room that is listed or not, for who may join it or is in it; None for others."""
        entry, own = public_entry(reader, row), reader.membership(who.user_id, row.n)
        if not (open_to_all(entry) or (own and own.membership in ("join", "invite")) or reader.may_join_by_another(who.user_id, row.n)):
            return None
        state = reader.contents(row.n, ("m.room.encryption", "m.room.join_rules"))
        allow = state.get("m.room.join_rules", {}).get("allow")
        rules = [rule for rule in allow if isinstance(rule, dict) and "room_id" in rule] if isinstance(allow, list) else []
        restricted = entry["join_rule"] in RESTRICTED_RULES
        return {**entry, "room_version": row.version, **without_none({
            "encryption": state.get("m.room.encryption", {}).get("algorithm"),
            "allowed_room_ids": [rule["room_id"] for rule in rules] if restricted else None})}

    def _space_entry(self, reader: Reader, who: Who, room_id: str, suggested_only: bool) -> JsonObject | None:
        """A room with the m.space.child events, in the order of the space, if it is one; None if it may not be seen."""
        row = reader.room_row(room_id)
        entry = self._entry(reader, who, row) if row else None
        if not row or not entry:
            return None

        def place(event: Event) -> tuple[bool, str, int, str]:
            found = event.content.get("order")
            order = found if isinstance(found, str) and re.fullmatch("[ -~]{1,50}", found) else ""
            return not order, order, event.ts, event.state_key or ""
        found = reader.state_at(row.n, type="m.space.child") if entry.get("room_type") == "m.space" else []
        children = [event for event in found if isinstance(event.content.get("via"), list)
                    and (event.content.get("suggested") is True or not suggested_only)]
        entry["children_state"] = [{"type": event.type, "state_key": event.state_key, "content": event.content,
                                    "sender": event.sender, "origin_server_ts": event.ts} for event in sorted(children, key=place)]
        return entry

    def search_users(self, who: Who, term: str, limit: int) -> JsonObject:
        """The user directory: people whose ID or name has the term in it and who are met in a common or a public room."""
        with self.store.read() as reader:
            rows = reader.users_like(who.user_id, term, limit + 1)
        results = [without_none({"user_id": user_id, "display_name": name or None, "avatar_url": url or None})
                   for user_id, name, url in rows[:limit]]
        return {"results": results, "limited": len(rows) > limit}


# -- Relations: threads, edits, reactions (Forming relationships between events). What may be said of an event, and what is told
# with it. For clients.

def check_relation(tx: Tx, room: Room, draft: Draft) -> None:
    """A thread can't start from an event that itself relates to another (Threading, Validation), and nobody says the
    same of an event twice (Event annotations, Avoiding duplicate annotations).
    """
    found = draft.content.get("m.relates_to")
    relation = found if isinstance(found, dict) else {}
    kind, event_id = relation.get("rel_type"), relation.get("event_id")
    parent = tx.event(room.n, event_id) if kind in ("m.thread", "m.annotation") and isinstance(event_id, str) else None
    if not parent or draft.sender not in room.joined or not sees(tx, room, draft.sender, parent.tick):
        return
    if kind == "m.thread" and tx.ancestors(parent.tick, 1):
        raise MatrixError("M_UNKNOWN", f"a thread can't start from {parent.event_id}, which itself relates to "
                          "another event; name the root of that one", 400)
    if kind == "m.annotation" and tx.has_annotated(parent.tick, draft.sender, draft.type, relation.get("key")):
        raise MatrixError("M_DUPLICATE_ANNOTATION", f"{draft.sender} has annotated {parent.event_id} with this key already")


def thread_of(reader: Reader, tick: int) -> int:
    """The tick of the root of the thread that an event is in; 0: it is in the main timeline (Threaded read receipts)."""
    return next((parent for parent, rel_type in reader.ancestors(tick, MAX_RELATION_DEPTH) if rel_type == "m.thread"), 0)


def aggregations(reader: Reader, who: Who, events: Sequence[Event], visible: str, now: int) -> dict[int, str]:
    """By tick, for those of the events that have such: what others that may be seen relate to them, as a part of
    `unsigned` (Aggregations of child events). State events get none.
    """
    parents = {event.tick: event for event in events if event.related and event.state_key is None}
    found: dict[int, JsonObject] = {}
    for tick, rel_type, count, last, own, ids in reader.aggregations([*parents], who.user_id, visible) if parents else ():
        children = found.setdefault(tick, {})
        if rel_type == "m.thread":
            latest = reader.event_at(last)
            more = aggregations(reader, who, [latest], visible, now)     # no thread: one starts from what relates to nothing
            children[rel_type] = {"latest_event": latest.for_client(now, who.user_id, who.device_id, more.get(last, "")),
                                  "count": count,
                                  "current_user_participated": bool(own) or parents[tick].sender == who.user_id}
        elif rel_type == "m.reference":
            children[rel_type] = {"chunk": [{"event_id": id} for id in sorted(json.loads(ids), key=tick_of)]}
        elif edit := reader.latest_edit(parents[tick], visible):
            children[rel_type] = edit.for_client(now, who.user_id, who.device_id)
    return {tick: f',"m.relations":{to_json(children)}' for tick, children in found.items() if children}


class Relations(Verbs):
    """The events that relate to others."""

    def related(self, who: Who, room_id: str, event_id: str, rel_type: str | None, type: str | None, start: int | None,
                stop: int | None, backwards: bool, limit: int, recurse: bool) -> JsonObject:
        """A page of the events that relate to one."""
        depth = MAX_RELATION_DEPTH if recurse else 1
        with viewing(self.store, who, room_id, "M_NOT_FOUND") as (reader, view):
            read = functools.partial(reader.related, view.find(reader, event_id).tick, depth, rel_type, type)
            _, events = view.page(reader, read, start, stop, backwards, limit)
            ignored = reader.ignored(who.user_id)
            shown = [event for event in events if event.sender not in ignored]
            chunk = bundled(reader, who, view, shown, self.clock.now())
        end = str(events[-1].tick - backwards) if events and len(events) == limit else None
        return without_none({"chunk": chunk, "next_batch": end, "recursion_depth": depth if recurse else None})

    def threads(self, who: Who, room_id: str, participated: bool, start: int | None, limit: int) -> JsonObject:
        """The roots of a room's threads, the one with the latest reply first, each with its summary."""
        with viewing(self.store, who, room_id) as (reader, view):
            threads = reader.threads(view.room, who.user_id, view.visible, FOREVER if start is None else start)
            lasts = {root: last for root, last, own in threads if view.sees(root) and view.sees(last) and (own or not participated)}
            roots = [reader.event_at(root) for root in [*lasts][:limit]]
            chunk = bundled(reader, who, view, roots, self.clock.now())
        return without_none({"chunk": chunk, "next_batch": str(lasts[roots[-1].tick] - 1) if len(lasts) > limit else None})


# -- Receipts: up to where each user has read (Receipts, Fully read markers). For clients, and for application services that want
# ephemeral data.

def in_thread(reader: Reader, tick: int, thread_id: str) -> bool:
    """Whether a receipt of this thread may name the event. The root and what relates to it are in both: main and thread."""
    if thread_id == "main":
        return not thread_of(reader, tick)
    return tick_of(thread_id) in (tick, *(parent for parent, _ in reader.ancestors(tick, MAX_RELATION_DEPTH)))


def receipts_events(receipts: Sequence[Any], user_id: str) -> list[JsonObject]:
    """The m.receipt events of these receipts, one for each thread; others' private ones are not in them."""
    contents: dict[str, JsonObject] = {}
    for type, reader_id, thread_id, event_id, ts in receipts:
        if type == "m.read" or reader_id == user_id:
            receipt = without_none({"ts": ts, "thread_id": thread_id or None})
            contents.setdefault(thread_id, {}).setdefault(event_id, {}).setdefault(type, {})[reader_id] = receipt
    return [{"type": "m.receipt", "content": content} for content in contents.values()]


class Receipts(Verbs):
    """Up to where each user has read."""

    @on_writer
    def add(self, tx: Tx, who: Who, room_id: str, types: Mapping[str, str], thread_id: str = "") -> None:
        """`types`: m.read or m.read.private → the event that was read; m.fully_read becomes account data.

        `thread_id`: "main", the event ID of a thread's root, or "": the receipt is for all threads.
        """
        for type, event_id in types.items():
            if type not in ("m.read", "m.read.private", "m.fully_read"):
                raise MatrixError("M_INVALID_PARAM", f"a receipt is m.read, m.read.private or m.fully_read, not {shorten(type)}")
            if type == "m.fully_read" and thread_id:
                raise MatrixError("M_INVALID_PARAM", "m.fully_read is for the whole room and takes no thread_id")
            if event_id[:1] != "$" or len(event_id.encode()) > MAX_ID_BYTES:
                raise MatrixError("M_INVALID_PARAM", f"{shorten(event_id)!r} is no event ID")
        room = room_for(tx, who, room_id, joined=True)
        for type, event_id in types.items():
            if type == "m.fully_read":
                tx.set_account_data(who.user_id, room_id, type, to_json({"event_id": event_id}))
            else:
                self._add(tx, room, who.user_id, type, event_id, thread_id)

    def _add(self, tx: Tx, room: Room, user_id: str, type: str, event_id: str, thread_id: str) -> None:
        """Moves forward only, so that a device that lags behind does not make unread again what another has read. What is
        no event of the room says nothing, and is no error either.
        """
        event = tx.event(room.n, event_id)
        if not event or not sees(tx, room, user_id, event.tick):
            return
        if thread_id and not in_thread(tx, event.tick, thread_id):
            raise MatrixError("M_INVALID_PARAM", f"{event_id} is not in the thread {shorten(thread_id)}")
        if event.tick > tick_of(tx.receipt(room.n, type, user_id, thread_id) or ""):
            tx.add_receipt(room, type, user_id, thread_id, event_id, self.clock.now())
            (tx.wake_room(room) if type == "m.read" else tx.wake(user_id))


# -- Typing and presence, kept in memory only (Typing Notifications, Presence). For clients, and for application services that
# want ephemeral data.

class Timer:
    """Does something when the next of some points of time has come, on a thread that is started when first needed."""

    def __init__(self, clock: Clock, name: str, next: Callable[[], float], do: Callable[[], object]) -> None:
        self.clock, self._name = clock, name
        self._next, self._do = next, do                      # tells the next point of time (monotonic), and what is done then
        self._due = math.inf                                 # what the thread waits for; inf while it looks
        self._bell, self._stopped = bell(), False
        self._guard = threading.Lock()                       # guards _thread
        self._thread: threading.Thread | None = None

    def set(self, at: float) -> None:
        """There is something to do at this monotonic time."""
        if at < self._due:
            with self._guard:
                if self._thread is None and not self._stopped:
                    thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    with contextlib.suppress(RuntimeError):  # no more threads: the next one may have one
                        thread.start()
                        self._thread = thread
            release(self._bell)

    def _run(self) -> None:
        while not self._stopped:
            self._due = math.inf
            self._due = self._next()
            if self._due > self.clock.monotonic():
                self.clock.wait(self._bell, self._due)
                continue
            try:
                self._do()
            except Exception as error:                       # a full disk, say
                log.warning("%s: %s; next attempt in 1 s", self._name, error)
                self.clock.wait(self._bell, self.clock.monotonic() + 1.0)

    def stop(self) -> None:
        self._stopped = True
        release(self._bell)
        if self._thread:
            self._thread.join()


class Typing(Verbs):
    """Who is typing where. A timer takes out who has stopped."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._rooms: dict[int, tuple[int, dict[str, float]]] = {}    # room → tick of the last change, user → until when
        self._guard = threading.Lock()                       # guards _rooms
        self._began = self.store.began()                     # whoever typed before this tick has stopped
        self.timer = Timer(self.clock, "typing", self._ends, lambda: self.store.write(self._drop_expired))
        self.store.on_membership = lambda tx, room, user_id: self._change(tx, room, {user_id: None})

    def set(self, who: Who, room_id: str, until: float | None) -> None:
        """`until`: the clock's monotonic time; None: stopped typing."""
        def job(tx: Tx) -> None:
            self._change(tx, room_for(tx, who, room_id, joined=True), {who.user_id: until})
        self.store.write(job, who.token)
        self.timer.set(math.inf if until is None else until)

    def since(self, room: int, since: int, now: int) -> JsonObject | None:
        """The m.typing event of a room, if it changed after `since` and not after `now`; from the beginning: if anybody types."""
        with self._guard:
            tick, users = self._rooms.get(room, (self._began, {}))
        changed = since < tick <= now and (users or since)
        return {"type": "m.typing", "content": {"user_ids": sorted(users)}} if changed else None

    def _now(self, tx: Tx, room: int) -> dict[str, float]:
        """Who types, with what this batch has changed."""
        with self._guard:
            return tx.typing[room] if room in tx.typing else self._rooms.get(room, (0, {}))[1]

    def _change(self, tx: Tx, room: Room, users: Mapping[str, float | None]) -> None:
        before = self._now(tx, room.n)
        if not (before.keys() & users.keys() or any(users.values())):        # who stops had not started
            return
        tick = tx.moved[room.n] = tx.tick()
        now = tx.typing[room.n] = without_none({**before, **users})
        tx.wake_room(room)
        tx.on_commit.append(lambda: self._publish(room.n, tick, now))
        for user_id in users:
            tx.push_ephemeral(room, user_id, "m.typing", {"content": {"user_ids": sorted(now)}})

    def _publish(self, room: int, tick: int, users: dict[str, float]) -> None:
        with self._guard:
            self._rooms[room] = (tick, users)

    def _ends(self) -> float:
        with self._guard:
            return min((until for _, users in self._rooms.values() for until in users.values()), default=math.inf)

    def _drop_expired(self, tx: Tx) -> None:
        now = self.clock.monotonic()
        with self._guard:
            rooms = list(self._rooms)
        for n in rooms:
            ended = [user for user, until in self._now(tx, n).items() if until <= now]
            if ended and (room := tx.room(tx.room_id(n))):
                self._change(tx, room, dict.fromkeys(ended))


PRESENCES = ("online", "unavailable", "offline")


class Status(NamedTuple):
    """What is known of one user's presence. Times are the clock's monotonic ones."""
    presence: str = "offline"            # online, unavailable or offline
    message: str | None = None           # status_msg
    active_at: float = 0.0               # the last time that the user did something,
    active_ts: int = 0                   # and the same by the clock that stamps
    until: float = math.inf              # offline from then on
    wishes: Mapping[str | None, tuple[str, float]] = {}      # device → set_presence of its last /sync, until when that counts
    tick: int = 0                        # of the last change that others see

    def at(self, now: float) -> Status:
        """What it has become by itself."""
        if self.until <= now:
            return self._replace(presence="offline", until=math.inf, wishes={})
        return self._replace(presence="unavailable") if self.idle_at <= now else self

    @property
    def idle_at(self) -> float:
        """When it is too long without doing anything. A ghost, which stays, is as its application service says."""
        return self.active_at + UNAVAILABLE_SECONDS if self.presence == "online" and self.until < math.inf else math.inf

    @property
    def next_at(self) -> float:
        """When it becomes another by itself."""
        return min(self.until, self.idle_at)

    def lasting(self, until: float) -> Status:
        """There until then, if offline before; for anybody else it only gets later."""
        return self._replace(until=until if self.presence == "offline" else max(until, self.until))

    def content(self, now: int) -> JsonObject:
        """The content of m.presence."""
        return without_none({"presence": self.presence, "currently_active": self.presence == "online",
                             "last_active_ago": max(0, now - self.active_ts) if self.active_ts else None, "status_msg": self.message})


class Presence(Verbs):
    """Who is there. After a start everybody is offline until they come back."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._users: dict[str, Status] = {}                  # who has been there since the start
        self._guard = threading.Lock()                       # guards _users
        self._last = 0                                       # tick of the last change of all
        self.timer = Timer(self.clock, "presence", self._next, self._expire)

    def set(self, who: Who, presence: str, message: str | None) -> None:
        """Sets what the user says. A ghost is so until its application service says otherwise."""
        def change(status: Status, now: float) -> Status:
            until = math.inf if who.appservice or presence == "offline" else now + OFFLINE_SECONDS
            spent = {device: (wish, 0.0) for device, (wish, _) in status.wishes.items()}
            return status.lasting(until)._replace(presence=presence, message=message, active_at=now, wishes=spent)
        self._change(who.user_id, change)

    def polling(self, who: Who, wish: str, seconds: float) -> None:
        """The user's /sync takes up to so many seconds. It brings back who was offline, and may have another wish than
        the device's last one: of several devices that sync, the one that is most there counts.
        """
        def change(status: Status, now: float) -> Status:
            until = now + seconds + OFFLINE_SECONDS
            gone = {device for device, (_, counts) in status.wishes.items() if 0 < counts <= now and device != who.device_id}
            last, wishes = status.wishes.get(who.device_id), {**status.wishes, who.device_id: (wish, until)}
            after = status.lasting(until)._replace(wishes={device: one for device, one in wishes.items() if device not in gone})
            if status.presence != "offline" and not gone and last and last[0] == wish:
                return after
            counted = [one for one, counts in after.wishes.values() if counts > now]
            return after._replace(presence=min(counted, key=PRESENCES.index), active_at=now)
        if wish != "offline":
            self._change(who.user_id, change)

    def active(self, user_id: str) -> None:
        """The user has done something, and is online for that, unless gone (Idle timeout)."""
        if user_id in self._users:
            self._change(user_id, lambda status, now: status._replace(
                active_at=now, presence="offline" if status.presence == "offline" else "online"))

    def get(self, who: Who, user_id: str) -> JsonObject:
        with self.store.read() as reader:
            own = who.appservice and self.world.registrations.claim_of(who.appservice, "users", user_id)
            if not own and user_id not in reader.met_by(who.user_id, [user_id]):
                raise forbidden(f"{who.user_id} is in no room with {shorten(user_id)}")
        return self._users.get(user_id, Status()).content(self.clock.now())

    def since(self, reader: Reader, user_id: str, since: int, now: int, new: Iterable[str] = ()) -> list[JsonObject]:
        """An m.presence event for each whom the user meets and who changed after `since` and not after `now`; `new`: whom
        the user has not met before.
        """
        if since and since < self.store.started_at:          # whoever was online then may have been told of
            new = self.store.users
        if self._last <= since and not new:
            return []
        with self._guard:
            changed = {other: status for other, status in self._users.items() if since < status.tick <= now}
        told = {**{other: self._users.get(other, Status()) for other in new}, **changed}
        met = reader.met_by(user_id, told) if told else set()
        return self.events([other for other, status in told.items() if other in met and (since or status.presence != "offline")])

    def events(self, user_ids: Iterable[str]) -> list[JsonObject]:
        now = self.clock.now()
        return [{"type": "m.presence", "sender": user_id, "content": self._users.get(user_id, Status()).content(now)}
                for user_id in user_ids]

    def _change(self, user_id: str, change: Callable[[Status, float], Status]) -> None:
        """Changes a status. Only what others see takes a tick."""
        now = self.clock.monotonic()
        with self._guard:
            old = self._users.get(user_id, Status())
            new = change(old, now)
            if new.active_at == now:
                new = new._replace(active_ts=self.clock.now())
            self._users[user_id] = new
        try:
            if (old.presence, old.message) != (new.presence, new.message):
                self._tell(user_id)
        except Exception:                                    # nobody was told, so it has not happened
            with self._guard:
                if self._users[user_id] is new:
                    self._users[user_id] = old
            raise
        self.timer.set(new.next_at)

    def _tell(self, user_id: str) -> None:
        def job(tx: Tx) -> None:
            tick = tx.tick()
            tx.push_presence(user_id, *self.events([user_id]))
            tx.on_commit.append(lambda: self._publish(user_id, tick))
            tx.woken_around.add(user_id)
        self.store.write(job)

    def _publish(self, user_id: str, tick: int) -> None:
        with self._guard:
            self._users[user_id] = self._users[user_id]._replace(tick=tick)
            self._last = tick

    def _next(self) -> float:
        with self._guard:
            return min((status.next_at for status in self._users.values()), default=math.inf)

    def _expire(self) -> None:
        now = self.clock.monotonic()
        with self._guard:
            over = [user_id for user_id, status in self._users.items() if status.next_at <= now]
        for user_id in over:
            self._change(user_id, Status.at)


# -- Media: what was uploaded, kept in the database as it came (Content repository). For clients.

class Media(Verbs):
    """Uploads and downloads."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._under_way = collections.Counter[str]()         # large uploads, by user
        self._guard = threading.Lock()                       # guards it

    @contextlib.contextmanager
    def uploading(self, who: Who) -> Iterator[None]:
        """Around an upload, which is in memory meanwhile; M_LIMIT_EXCEEDED for one too many."""
        with self._guard:
            if self._under_way[who.user_id] >= MAX_UPLOADS:
                raise MatrixError("M_LIMIT_EXCEEDED", f"{who.user_id} uploads {MAX_UPLOADS} large files already; send the next one "
                                  "when one of them is there", retry_after_ms=1000)
            self._under_way[who.user_id] += 1
        try:
            yield
        finally:
            with self._guard:
                self._under_way -= collections.Counter([who.user_id])        # which forgets who has none

    def upload(self, who: Who, content: bytes | None, content_type: str, filename: str | None) -> str:
        """The mxc: URI of the new content; None: it comes later."""
        media_id, now = self.world.chance.text(who.user_id, 24), self.clock.now()
        self.store.write(lambda tx: tx.put_media(media_id, content_type, filename, who.user_id, now, content), who.token)
        return f"mxc://{self.world.name}/{media_id}"

    def create(self, who: Who) -> JsonObject:
        """A URI whose content comes later (asynchronous upload), by the same user and within a day."""
        return {"content_uri": self.upload(who, None, "", None), "unused_expires_at": self.clock.now() + UNUSED_MEDIA_MS}

    @on_writer
    def fill(self, tx: Tx, who: Who, server_name: str, media_id: str, content: bytes, content_type: str, filename: str | None) -> None:
        media = self._find(tx, server_name, media_id)
        if media.user_id != who.user_id:
            raise forbidden(f"the URI was made by somebody else than {who.user_id}")
        if media.content is not None:
            raise MatrixError("M_CANNOT_OVERWRITE_MEDIA", "this has its content already; make another URI")
        tx.put_media(media_id, content_type, filename, who.user_id, media.created_ts, content)

    def _find(self, reader: Reader, server_name: str, media_id: str) -> MediaRow:
        """M_NOT_FOUND also for what has been empty for too long."""
        media = reader.media(media_id) if server_name == self.world.name else None
        if not media or (media.content is None and media.created_ts < self.clock.now() - UNUSED_MEDIA_MS):
            raise MatrixError("M_NOT_FOUND", f"there is no media mxc://{shorten(server_name)}/{shorten(media_id)} on this server")
        return media

    def download(self, server_name: str, media_id: str, timeout: float = 0.0) -> tuple[str, str | None, bytes]:
        """Type, file name and content, for which it waits up to `timeout` seconds if only its URI was made yet."""
        clock, waiting = self.clock, self.store.waiters.enter(media_id)
        deadline = clock.monotonic() + timeout
        try:
            while True:
                with self.store.read() as reader:
                    media = self._find(reader, server_name, media_id)
                if media.content is not None:
                    return media.content_type, media.filename, media.content
                if clock.monotonic() >= deadline or self.world.stopping:
                    raise MatrixError("M_NOT_YET_UPLOADED", "the content of this URI has not been uploaded yet; try again later")
                self.store.waiters.wait(waiting, deadline)
        finally:
            self.store.waiters.leave(media_id, waiting)


# -- Keys for end-to-end encryption, and messages from device to device (End-to-End Encryption, Send-to-Device messaging). The
# homeserver only serves them and does not understand them. For clients.

USAGES = ("master", "self_signing", "user_signing")


def public_part(key: JsonObject) -> str:
    """The public key of a cross-signing key, by which it is named; '' if it has not exactly one."""
    keys = list(field(key, "keys", dict, {}).items())
    return str(keys[0][1]) if len(keys) == 1 and keys[0][0] == f"ed25519:{keys[0][1]}" else ""


def bare(key: JsonObject) -> JsonObject:
    """What of a key is signed."""
    return {name: value for name, value in key.items() if name not in ("signatures", "unsigned")}


def signatures_by(user_id: str, key: JsonObject) -> JsonObject:
    """On an uploaded key: {key ID: signature}."""
    return field(field(key, "signatures", dict, {}), user_id, dict, {})


class Keys(Verbs):
    """Device keys, one-time keys and cross-signing keys, and messages from device to device."""

    # -- of one device

    def upload(self, who: Who, device_keys: JsonObject, one_time: JsonObject, fallback: JsonObject) -> dict[str, int]:
        """Publishes keys of the asking device; the number of its one-time keys by algorithm."""
        return self._keep(who, self._check_upload(who, device_keys, {**one_time, **fallback}), device_keys, one_time, fallback)

    @on_writer
    def _keep(self, tx: Tx, who: Who, device_id: str, device_keys: JsonObject, one_time: JsonObject,
              fallback: JsonObject) -> dict[str, int]:
        user_id = who.user_id
        if not tx.device(user_id, device_id):
            raise MatrixError("M_UNKNOWN_DEVICE", f"{user_id} has no device {shorten(device_id)} any more")
        known = tx.device_keys(user_id, device_id)
        if device_keys and (known is None or json.loads(known) != device_keys):
            tx.put_device_keys(user_id, device_id, to_json(device_keys))
        for key_id, key in one_time.items():
            known = tx.one_time_key(user_id, device_id, key_id)
            if known is None:
                tx.put_one_time_key(user_id, device_id, key_id, to_json(key))
            elif json.loads(known) != key:
                raise MatrixError("M_INVALID_PARAM", f"One time key {shorten(key_id)} already exists, and is another")
        for key_id, key in fallback.items():
            tx.put_fallback_key(user_id, device_id, key_id, to_json(key))
        return tx.one_time_counts(user_id, device_id)

    @staticmethod
    def _check_upload(who: Who, device_keys: JsonObject, others: JsonObject) -> str:
        """The asking device, if these may be its keys."""
        if not who.device_id:
            raise MatrixError("M_MISSING_PARAM", "this is for a device: log in, or name one of the user's with device_id in the query")
        if device_keys and (device_keys.get("user_id"), device_keys.get("device_id")) != (who.user_id, who.device_id):
            raise MatrixError("M_INVALID_PARAM", f"device_keys must be those of {who.user_id} and of the device {who.device_id}")
        for name, type_ in (("algorithms", list), ("keys", dict), ("signatures", dict)) if device_keys else ():
            if not isinstance(device_keys.get(name), type_):
                raise MatrixError("M_BAD_JSON", f"device_keys must have {name!r}: {TYPE_NAMES[type_]}")
        for key_id, key in others.items():
            if not re.fullmatch(r"[^:]+:.+", key_id) or not isinstance(key, (str, dict)):
                raise MatrixError("M_INVALID_PARAM", f"{quoted({key_id: key})} is not of the form {{\"algorithm:id\": key}}")
        return who.device_id

    # -- of everybody

    def query(self, who: Who, wanted: Mapping[str, Sequence[str]]) -> JsonObject:
        """The keys of these users' devices (all, if none is named) and their cross-signing keys."""
        answer: JsonObject = {"device_keys": {}, "failures": {}, **{f"{usage}_keys": {} for usage in USAGES}}
        with self.store.read() as reader:
            for user_id, device_ids in wanted.items():
                if server_of(user_id) != self.world.name:
                    answer["failures"][server_of(user_id)] = {"errcode": "M_UNRECOGNIZED", "error": "this server does not federate"}
                    continue
                rows = reader.signatures(user_id, who.user_id)
                answer["device_keys"][user_id] = {
                    device_id: {**self._signed(json.loads(text), device_id, rows),
                                "unsigned": {"device_display_name": name} if name else {}}
                    for device_id, name, text in reader.keys_of(user_id) if not device_ids or device_id in device_ids}
                for usage, key in reader.cross_signing(user_id).items():
                    if usage != "user_signing" or user_id == who.user_id:
                        answer[f"{usage}_keys"][user_id] = self._signed(key, public_part(key), rows)
        return answer

    @staticmethod
    def _signed(key: JsonObject, name: str, rows: list[Any]) -> JsonObject:
        """The key of this name with the signatures on it that are among the rows."""
        claimed = key.get("signatures")                      # whatever a client may have put there
        by_signer = claimed if isinstance(claimed, dict) else {}
        signatures = {signer: dict(by) for signer, by in by_signer.items() if isinstance(by, dict)}
        for signed, signer, key_id, signature in rows:
            if signed == name:
                signatures.setdefault(signer, {})[key_id] = signature
        return {**key, "signatures": signatures}

    @on_writer
    def claim(self, tx: Tx, who: Who, wanted: Mapping[str, JsonObject]) -> JsonObject:
        """One key of each device, {user: {device: algorithm}}; each one-time key goes out once, then the fallback key."""
        found: dict[str, dict[str, JsonObject]] = {}
        for user_id, devices in wanted.items():
            for device_id in devices:
                if key := tx.claim_key(user_id, device_id, field(devices, device_id, str)):
                    found.setdefault(user_id, {})[device_id] = {key[0]: Raw(key[1])}
        return {"one_time_keys": found, "failures": {}}

    # -- cross-signing

    def check_cross_signing(self, who: Who, keys: Mapping[str, JsonObject]) -> bool:
        """Checks new cross-signing keys, by usage; whether they replace others, which has to be confirmed."""
        with self.store.read() as reader:
            known = reader.cross_signing(who.user_id)
        for usage, key in keys.items():
            if key.get("user_id") != who.user_id or usage not in field(key, "usage", list) or not public_part(key):
                raise MatrixError("M_INVALID_PARAM", f"the {usage} key must be of {who.user_id}, have {usage!r} in its usage, and "
                                  "exactly one key {\"ed25519:KEY\": \"KEY\"}")
        master = keys.get("master") or known.get("master")
        if not master:
            raise MatrixError("M_MISSING_PARAM", "there is no master key yet; upload it with or before the others")
        for usage in keys.keys() - {"master"}:
            if f"ed25519:{public_part(master)}" not in signatures_by(who.user_id, keys[usage]):
                raise MatrixError("M_INVALID_SIGNATURE", f"the {usage} key must be signed by the master key")
        return self._replaces(keys, known)

    @staticmethod
    def _replaces(keys: Mapping[str, JsonObject], known: Mapping[str, JsonObject]) -> bool:
        return "master" in known and any(bare(known.get(usage, {})) != bare(key) for usage, key in keys.items())

    @on_writer
    def upload_cross_signing(self, tx: Tx, who: Who, keys: Mapping[str, JsonObject], confirmed: bool) -> None:
        known = tx.cross_signing(who.user_id)
        if self._replaces(keys, known) and not confirmed:
            raise forbidden("other cross-signing keys have been uploaded meanwhile; try again, and confirm that these replace them")
        if "master" in keys and bare(keys["master"]) != bare(known.get("master", {})):
            tx.delete_cross_signing(who.user_id)             # what the old one has signed is worth nothing now
        for usage, key in keys.items():
            tx.put_cross_signing(who.user_id, usage, to_json(key))
        tx.keys_changed(who.user_id)

    @on_writer
    def upload_signatures(self, tx: Tx, who: Who, signed: Mapping[str, JsonObject]) -> JsonObject:
        """Adds the asking user's signatures, {user: {device or public key: signed object}}; the failures."""
        failures: JsonObject = {}
        for user_id, keys in signed.items():
            for name in keys:
                try:
                    self._add_signatures(tx, who, user_id, name, field(keys, name, dict))
                except MatrixError as error:
                    failures.setdefault(user_id, {})[name] = error.body()
        if signed.get(who.user_id, {}).keys() - failures.get(who.user_id, {}).keys():
            tx.keys_changed(who.user_id)
        return {"failures": failures}

    @staticmethod
    def _add_signatures(tx: Tx, who: Who, user_id: str, name: str, key: JsonObject) -> None:
        """Adds signatures of a device or master key of one's own, or of another's master key."""
        master = tx.cross_signing(user_id).get("master", {})
        text = tx.device_keys(user_id, name) if user_id == who.user_id else None
        known = master if public_part(master) == name else json.loads(text or "{}")
        if not known:
            raise MatrixError("M_NOT_FOUND", f"{shorten(user_id)} has no key {shorten(name)} that {who.user_id} may sign")
        signatures = signatures_by(who.user_id, key)
        if bare(known) != bare(key) or not signatures:
            raise MatrixError("M_INVALID_SIGNATURE", f"what is signed must be the key {shorten(name)} as it was uploaded, "
                              f"with a signature of {who.user_id}")
        others = {key_id for key, signer, key_id, _ in tx.signatures(user_id, who.user_id) if (key, signer) == (name, who.user_id)}
        if len(others | signatures.keys()) > MAX_SIGNATURES:
            raise MatrixError("M_TOO_LARGE", f"a user may put {MAX_SIGNATURES} signatures at most on a key")
        for key_id in signatures:
            tx.put_signature(user_id, name, who.user_id, key_id, field(signatures, key_id, str))

    # -- messages

    def send_to_device(self, who: Who, type: str, txn_id: str, messages: Mapping[str, JsonObject]) -> None:
        """Leaves messages for devices, {user: {device or '*': content}}; once for each client transaction ID. For a
        device that does not exist: nothing.
        """
        for contents in messages.values():
            for device_id in contents:
                field(contents, device_id, dict)
        self._leave(who, type, txn_id, messages)

    @on_writer
    def _leave(self, tx: Tx, who: Who, type: str, txn_id: str, messages: Mapping[str, JsonObject]) -> None:
        if not tx.first_to_device(who.user_id, who.device_id or "", type, txn_id, self.clock.now()):
            return
        for user_id, contents in messages.items():
            for device_id in [device.device_id for device in tx.devices(user_id)]:
                content = contents.get(device_id, contents.get("*"))
                if content is not None:
                    tx.add_to_device(user_id, device_id, {"type": type, "sender": who.user_id, "content": content})


# -- Key backups (Server-side key backups). For clients.

class Backups(Verbs):
    """Encrypted copies of room keys, for new devices of the same user. Each version has an etag, which changes with its keys."""

    def create(self, who: Who, algorithm: str, auth_data: JsonObject) -> str:
        return str(self.store.write(lambda tx: tx.add_backup(who.user_id, algorithm, to_json(auth_data)), who.token))

    @staticmethod
    def _find(reader: Reader, who: Who, version: str | None) -> BackupRow:
        """That of this version, or the last one; M_NOT_FOUND."""
        number = None if version is None else number_in(version)
        backup = None if number is None and version is not None else reader.backup(who.user_id, number)
        which = f"key backup of version {shorten(version)}" if version else "key backup"
        return existing(backup, f"{who.user_id} has no {which}")

    def get(self, who: Who, version: str | None = None) -> JsonObject:
        with self.store.read() as reader:
            backup = self._find(reader, who, version)
        return {"version": str(backup.version), "algorithm": backup.algorithm, "auth_data": Raw(backup.auth_data), **self._size(backup)}

    @staticmethod
    def _size(backup: BackupRow) -> JsonObject:
        return {"etag": str(backup.etag), "count": backup.size}

    @on_writer
    def update(self, tx: Tx, who: Who, version: str, algorithm: str, auth_data: JsonObject) -> None:
        backup = self._find(tx, who, version)
        if backup.algorithm != algorithm:
            raise MatrixError("M_INVALID_PARAM", f"the algorithm of this backup is {backup.algorithm} and can't be changed")
        tx.set_backup_auth(backup.version, to_json(auth_data))

    def delete(self, who: Who, version: str) -> None:
        self.store.write(lambda tx: tx.delete_backup(self._find(tx, who, version).version), who.token)

    def put_keys(self, who: Who, version: str, rooms: Mapping[str, Mapping[str, JsonObject]]) -> JsonObject:
        """Adds keys, {room: {session: key}}, to the last backup. One that is there stays, unless the new one is better."""
        keys = [(room_id, session_id, key) for room_id, sessions in rooms.items() for session_id, key in sessions.items()]
        for _, _, key in keys:
            self._quality(key)
            field(key, "session_data", dict)
        return self._put_keys(who, version, keys)

    @on_writer
    def _put_keys(self, tx: Tx, who: Who, version: str, keys: Sequence[tuple[str, str, JsonObject]]) -> JsonObject:
        last = self._find(tx, who, None)
        if self._find(tx, who, version) != last:
            raise MatrixError("M_WRONG_ROOM_KEYS_VERSION", f"the backup to write to is version {last.version}, not "
                              f"{shorten(version)}", current_version=str(last.version))
        changed = False
        for room_id, session_id, key in keys:
            known = tx.backup_keys(last.version, room_id, session_id)
            if not known or self._quality(key) < self._quality(json.loads(known[0][2])):
                tx.put_backup_key(last.version, room_id, session_id, to_json(key))
                changed = True
        if changed:
            tx.backup_changed(last.version)
        return self._size(self._find(tx, who, version))

    @staticmethod
    def _quality(key: JsonObject) -> tuple[bool, int, int]:
        """The less, the better."""
        return not field(key, "is_verified", bool), field(key, "first_message_index", int), field(key, "forwarded_count", int)

    def keys(self, who: Who, version: str, room_id: str | None, session_id: str | None) -> dict[str, JsonObject]:
        """{room: {session: key}} of a backup, of one room, or of one session."""
        found: dict[str, JsonObject] = {}
        with self.store.read() as reader:
            for room, session, text in reader.backup_keys(self._find(reader, who, version).version, room_id, session_id):
                found.setdefault(room, {})[session] = Raw(text)
        return found

    @on_writer
    def delete_keys(self, tx: Tx, who: Who, version: str, room_id: str | None, session_id: str | None) -> JsonObject:
        n = self._find(tx, who, version)[0]
        if tx.delete_backup_keys(n, room_id, session_id):
            tx.backup_changed(n)
        return self._size(self._find(tx, who, version))


# -- Push rules: which events notify whom (Push Notifications). For clients.

RULE_KINDS = ("override", "content", "room", "sender", "underride")      # in the order in which they are asked
DEFAULT_CONDITIONS: dict[str, JsonObject] = {        # the words of the table below; what has a '=' in it is key=pattern
    "names-me":      {"kind": "contains_display_name"},
    "mentions-me":   {"kind": "event_property_contains", "key": r"content.m\.mentions.user_ids", "value": "{user_id}"},
    "mentions-room": {"kind": "event_property_is", "key": r"content.m\.mentions.room", "value": True},
    "for-me":        {"kind": "event_match", "key": "state_key", "pattern": "{user_id}"},
    "is-edit":       {"kind": "event_property_is", "key": r"content.m\.relates_to.rel_type", "value": "m.replace"},
    "in-a-pair":     {"kind": "room_member_count", "is": "2"},
    "may-notify":    {"kind": "sender_notification_permission", "key": "room"},
}
ACTIONS = {"notify": "notify", "highlight": {"set_tweak": "highlight"}, "sound": {"set_tweak": "sound", "value": "default"},
           "ring": {"set_tweak": "sound", "value": "ring"}}
DEFAULT_RULES = (  # Predefined Rules of v1.15, each with the prefix .m.rule.
    # kind        rule_id                      conditions, or the pattern                             actions
    ("override",  "master",                    "",                                                    ""),
    ("override",  "suppress_notices",          "content.msgtype=m.notice",                            ""),
    ("override",  "invite_for_me",             "type=m.room.member content.membership=invite for-me", "notify sound"),
    ("override",  "member_event",              "type=m.room.member",                                  ""),
    ("override",  "is_user_mention",           "mentions-me",                                         "notify sound highlight"),
    ("override",  "contains_display_name",     "names-me",                                            "notify sound highlight"),
    ("override",  "is_room_mention",           "mentions-room may-notify",                            "notify highlight"),
    ("override",  "roomnotif",                 "content.body=@room may-notify",                       "notify highlight"),
    ("override",  "tombstone",                 "type=m.room.tombstone state_key=",                    "notify highlight"),
    ("override",  "reaction",                  "type=m.reaction",                                     ""),
    ("override",  "room.server_acl",           "type=m.room.server_acl state_key=",                   ""),
    ("override",  "suppress_edits",            "is-edit",                                             ""),
    ("content",   "contains_user_name",        "{localpart}",                                         "notify sound highlight"),
    ("underride", "call",                      "type=m.call.invite",                                  "notify ring"),
    ("underride", "encrypted_room_one_to_one", "in-a-pair type=m.room.encrypted",                     "notify sound"),
    ("underride", "room_one_to_one",           "in-a-pair type=m.room.message",                       "notify sound"),
    ("underride", "message",                   "type=m.room.message",                                 "notify"),
    ("underride", "encrypted",                 "type=m.room.encrypted",                               "notify"),
)
# Older than m.mentions, and not asked where an event has that.
LEGACY_RULES = (".m.rule.contains_display_name", ".m.rule.roomnotif", ".m.rule.contains_user_name")
JSON_TYPES = (str, int, bool, type(None))        # what event_property_is and event_property_contains compare


@functools.lru_cache(maxsize=1000)
def default_rules(user_id: str) -> Raw:
    """Content of m.push_rules for a user who has changed nothing."""
    rules: dict[str, list[JsonObject]] = {kind: [] for kind in RULE_KINDS}
    for kind, id, conditions, actions in DEFAULT_RULES:
        words = [DEFAULT_CONDITIONS.get(key) or {"kind": "event_match", "key": key, "pattern": pattern}
                 for key, _, pattern in (word.partition("=") for word in conditions.split())]
        rules[kind].append({"rule_id": f".m.rule.{id}", "default": True, "enabled": id != "master",
                            "actions": [ACTIONS[name] for name in actions.split()],
                            **({"pattern": conditions} if kind == "content" else {"conditions": words})})
    names = {"user_id": user_id, "localpart": localpart_of(user_id)}
    return Raw(re.sub(r"{(user_id|localpart)}", lambda m: _encode(names[m[1]])[1:-1], _encode({"global": rules})))


DEFAULT_RULES_BYTES = len(default_rules("@alice:localhost"))


def push_rules(reader: Reader, user_id: str) -> Raw:
    return reader.account_data(user_id, "", "m.push_rules") or default_rules(user_id)


class Notifications(Verbs):
    """The push rules of users: kept as the account data m.push_rules, so that /sync tells when they change."""

    def rules(self, who: Who) -> JsonObject:
        with self.store.read() as reader:
            return cast(JsonObject, json.loads(push_rules(reader, who.user_id)))

    def rule(self, who: Who, kind: str, id: str) -> JsonObject:
        return self._rule(self.rules(who), kind, id)

    @staticmethod
    def _rule(content: JsonObject, kind: str, id: str) -> JsonObject:
        found = [rule for rule in content["global"][kind] if rule["rule_id"] == id]
        return cast(JsonObject, existing(found[0] if found else None, f"there is no {kind} rule {shorten(id)}"))

    def set_rule(self, who: Who, kind: str, id: str, parts: JsonObject, before: str | None, after: str | None) -> None:
        """Adds a rule above the user's others of its kind, or changes one; next to another if `before` or `after` names one."""
        if id[:1] == "." or "/" in id or "\\" in id:
            raise MatrixError("M_INVALID_PARAM", f"{shorten(id)!r} is no rule ID for a user: it may not begin with '.', which is for "
                              "the server's rules, and may have no '/' and no '\\'")
        for condition in conditions_of(kind, {"rule_id": id, **parts}):
            if len(str(condition.get("pattern", ""))) > MAX_PATTERN:
                raise MatrixError("M_INVALID_PARAM", f"a pattern may have {MAX_PATTERN} characters at most")

        def change(content: JsonObject) -> None:
            rules = content["global"][kind]
            at = next((n for n, rule in enumerate(rules) if rule["rule_id"] == id), None)
            old = {} if at is None else rules.pop(at)
            at = int(kind == "override") if at is None else at           # below .m.rule.master only
            if neighbour := before or after:
                place = next((n for n, rule in enumerate(rules) if rule["rule_id"] == neighbour and not rule["default"]), None)
                if place is None:
                    raise MatrixError("M_UNKNOWN", f"before or after: the user has no other {kind} rule {shorten(neighbour)}", 400)
                at = place + (not before)
            rules.insert(at, {"rule_id": id, "default": False, "enabled": old.get("enabled", True), **parts})
        self._change(who, change)

    def delete_rule(self, who: Who, kind: str, id: str) -> None:
        def change(content: JsonObject) -> None:
            rule = self._rule(content, kind, id)
            if rule["default"]:
                raise MatrixError("M_INVALID_PARAM", f"{id} is a rule of the server; it can be disabled, not deleted")
            content["global"][kind].remove(rule)
        self._change(who, change)

    def update_rule(self, who: Who, kind: str, id: str, part: JsonObject) -> None:
        """`part`: the rule's new `enabled` or `actions`."""
        self._change(who, lambda content: self._rule(content, kind, id).update(part))

    @on_writer
    def _change(self, tx: Tx, who: Who, change: Callable[[JsonObject], object]) -> None:
        content = json.loads(push_rules(tx, who.user_id))
        change(content)
        text = to_json(content)
        if len(text.encode()) > MAX_RULES_BYTES:
            raise MatrixError("M_TOO_LARGE", f"all push rules together may have {MAX_RULES_BYTES} bytes at most")
        tx.set_account_data(who.user_id, "", "m.push_rules", text)


# -- What is unread, by these rules (Receiving notifications). A user's rules are made ready once and held against every event
# that is new to the user, when the user asks. For clients.

@functools.lru_cache(maxsize=4096)
def glob_matcher(pattern: str, words: bool) -> Callable[[str], object]:
    """Whether a text in lower case matches: as a whole, or a part of it that begins and ends at a word boundary.

    What stands before a '*' is found as early as can be and never looked for again, so that no pattern takes long. One that is too
    long itself, as a display name may be, or a rule that is older than the limit, matches nothing.
    """
    if len(pattern) > MAX_PATTERN:
        return lambda text: False
    first, *rest = [re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", pattern.lower())]
    begin, end = (r".*?(?<![a-z0-9_])", r"(?![a-z0-9_])") if words else ("", r"\Z")
    *settled, last = [begin + first, *(f".*?{part}" for part in rest)]
    return re.compile("".join([f"(?>{part})" for part in settled]) + last + end, re.DOTALL).match


def _in_text(value: Any) -> str:
    """A value as it stands in the text of an event."""
    return _encode(value).lower()


class RoomFacts:
    """What conditions ask about a room, read when they do, and as it is now."""

    def __init__(self, reader: Reader, room: int, displayname: str) -> None:
        self.reader, self.room = reader, room
        self.displayname, self.name_in_text = displayname, _in_text(displayname)[1:-1]   # of the user whose rules are asked
        self._members: dict[int, int] = {}                   # how far it was counted → how many there are

    def members(self, upto: int) -> int:
        """How many are in the room; those past `upto` need not be counted."""
        if upto not in self._members:
            self._members[upto] = self.reader.count_members(self.room, "join", upto)
        return self._members[upto]

    @functools.cached_property
    def state(self) -> RoomState:
        """As much of the room's state as power needs."""
        events = self.reader.state_events(self.room, [("m.room.create", ""), ("m.room.power_levels", "")])
        state = RoomState(ROOM_VERSIONS[events[0].content["room_version"]])
        for event in events:
            state.put(event.type, "", StateEvent(event.tick, event.sender, event.content))
        return state


class Notable:
    """An event that rules are asked about. Most are settled by a look at its text, so that its JSON is seldom read."""

    __slots__ = ("room", "type", "json", "text", "_event")

    def __init__(self, room: RoomFacts, type: str, json: str) -> None:
        self.room, self.type, self.json, self.text = room, type, json, json.lower()
        self._event: Any = None

    def at(self, path: Sequence[str]) -> Any:
        """The property at a path; `...` if there is none."""
        self._event = self._event or json.loads(self.json)
        value = self._event
        for key in path:
            value = value.get(key, ...) if isinstance(value, dict) else ...
        return value


# What a condition has become: a text that must stand in the event for it to hold ("": none), and the test proper.
Test = tuple[str, Callable[[Notable], object]]


@functools.lru_cache(maxsize=1000)
def property_path(key: str) -> list[str]:
    r"""'content.m\.mentions' as ['content', 'm.mentions'] (Appendices, Dot-separated property paths)."""
    return [re.sub(r"\\([.\\])", r"\1", part) for part in re.findall(r"(?:^|\.)((?:\\.|[^.\\])*)", key)]


def event_match(condition: JsonObject) -> Test:
    key, pattern = field(condition, "key", str), field(condition, "pattern", str)
    path, words = property_path(key), key == "content.body"
    return (_in_text(max(re.split("[*?]", pattern), key=len))[1:-1],     # the regex is made when it is needed: seldom
            lambda event: isinstance(value := event.at(path), str) and glob_matcher(pattern, words)(value.lower()))


def event_property_is(condition: JsonObject) -> Test:
    path, value = property_path(field(condition, "key", str)), condition["value"]
    return f"{_in_text(path[-1])}:{_in_text(value)}", lambda event: _same(event.at(path), value)


def event_property_contains(condition: JsonObject) -> Test:
    path, value = property_path(field(condition, "key", str)), condition["value"]
    return _in_text(value), lambda event: isinstance(items := event.at(path), list) and any(_same(item, value) for item in items)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, JSON_TYPES) and one == other


def contains_display_name(condition: JsonObject) -> Test:
    def test(event: Notable) -> object:
        room = event.room
        if not room.displayname or room.name_in_text not in event.text:
            return False
        pattern, body = room.displayname.replace("*", "?"), event.at(("content", "body"))      # as good as: a name is no pattern
        return isinstance(body, str) and glob_matcher(pattern, True)(body.lower())
    return "", test


def room_member_count(condition: JsonObject) -> Test:
    asked = re.fullmatch(r"(==|<=|>=|<|>)?([0-9]{1,9})", field(condition, "is", str))
    if not asked:
        raise MatrixError("M_BAD_JSON", "the number of members is such as '2' or '>=10'")
    compare = {"<": int.__lt__, ">": int.__gt__, "<=": int.__le__, ">=": int.__ge__}.get(asked[1], int.__eq__)
    number = int(asked[2])
    return "", lambda event: compare(event.room.members(number + 1), number)


def sender_notification_permission(condition: JsonObject) -> Test:
    key = field(condition, "key", str)

    def test(event: Notable) -> object:
        levels = event.room.state.content("m.room.power_levels").get("notifications", {})
        return event.room.state.power(event.at(("sender",))) >= levels.get(key, 50)
    return "", test


# By the name that the spec has for a kind, which is that of the function.
CONDITION_KINDS: dict[object, Callable[[JsonObject], Test]] = {
    make.__name__: make for make in (event_match, event_property_is, event_property_contains, contains_display_name,
                                     room_member_count, sender_notification_permission)}


def condition_test(condition: JsonObject) -> Test:
    """An unknown condition matches nothing, and so does a broken one."""
    try:
        return CONDITION_KINDS[condition.get("kind")](condition)
    except (KeyError, TypeError, MatrixError):
        return "", lambda event: False


class ReadyRule(NamedTuple):
    """A rule that is enabled, made ready to be asked."""
    id: str
    notify: bool
    highlight: bool
    types: list[Callable[[str], object]]         # tests of the event's type
    hint: str                                    # stands in every event that the rule matches
    tests: list[Callable[[Notable], object]]     # all have to hold


def conditions_of(kind: str, rule: JsonObject) -> list[JsonObject]:
    if kind == "content":
        return [{"kind": "event_match", "key": "content.body", "pattern": rule["pattern"]}]
    if kind in ("room", "sender"):
        return [{"kind": "event_property_is", "key": {"room": "room_id"}.get(kind, kind), "value": rule["rule_id"]}]
    return cast(list[JsonObject], rule["conditions"])


def ready_rule(kind: str, rule: JsonObject) -> ReadyRule:
    types, tests, actions = [], [], rule["actions"]
    for condition in conditions_of(kind, rule):
        pattern = condition.get("pattern")
        if condition.get("kind") == "event_match" and condition.get("key") == "type" and isinstance(pattern, str):
            types.append(glob_matcher(pattern, False))
        else:
            tests.append(condition_test(condition))
    if rule["rule_id"] in LEGACY_RULES:
        tests.append(("", lambda event: event.at(("content", "m.mentions")) is ...))
    tweaks = [action.get("value", True) for action in actions if isinstance(action, dict) and action.get("set_tweak") == "highlight"]
    hint = max([hint for hint, _ in tests], key=len, default="")
    return ReadyRule(rule["rule_id"], "notify" in actions, any(tweaks), types, hint, [test for _, test in tests])


class PushRules:
    """A user's rules, made ready to be asked about many events."""

    def __init__(self, content: str) -> None:
        ruleset = json.loads(content)["global"]
        self.content = content                               # of m.push_rules
        self.weight = 100 + max(0, len(content) - DEFAULT_RULES_BYTES)       # bytes of rules, against which an event is held
        self._rules = [ready_rule(kind, rule) for kind in RULE_KINDS for rule in ruleset[kind] if rule["enabled"]]
        self._by_type: dict[str, list[ReadyRule]] = {}       # see of_type
        # Whether comings and goings may notify. Who has joined is not invited.
        self.members = any(rule.notify and rule.id != ".m.rule.invite_for_me" for rule in self.of_type("m.room.member"))

    def of_type(self, type: str) -> list[ReadyRule]:
        """The rules that events of this type have to be held against, down to the first that matches all of them."""
        rules = self._by_type.get(type)
        if rules is None:
            rules = []
            for rule in self._rules:
                if all(matches(type.lower()) for matches in rule.types):
                    rules.append(rule)
                    if not rule.tests:
                        break
            if len(self._by_type) < 100:
                self._by_type[type] = rules
        return rules

    def first(self, event: Notable) -> ReadyRule | None:
        """The rule that decides."""
        text = event.text
        for rule in self.of_type(event.type):
            if rule.hint in text and all(test(event) for test in rule.tests):
                return rule
        return None


class Tally(NamedTuple):
    """What one user has not read in one room. Good as long as the first three are the same."""
    rules: PushRules
    member_tick: int                     # of the user's member event
    ignored: list[str]                   # users
    displayname: str
    upto: int                            # looked at up to this tick
    notes: dict[int, tuple[int, bool]]   # tick of an event that notifies → root of its thread or 0, highlight; old to new


class Unread:
    """Counts what users have not read when they ask, and keeps it in memory, so that next time only what is new is looked at."""

    def __init__(self) -> None:
        self._rules: dict[str, PushRules] = {}               # by user; of each the latest last
        self._tallies: dict[tuple[str, int], Tally] = {}     # by user and room, likewise
        self._guard = threading.Lock()                       # guards both

    def rules(self, reader: Reader, user_id: str) -> PushRules:
        """The user's rules; the same object as long as they have not changed."""
        content, rules = push_rules(reader, user_id), self._rules.get(user_id)
        if rules is None or rules.content != content:
            self._keep(self._rules, user_id, rules := PushRules(content))
        return rules

    def _keep(self, kept: dict[Any, Any], key: Any, value: Any) -> None:
        with self._guard:
            kept.pop(key, None)
            kept[key] = value
            if len(kept) > MAX_TALLIES:
                del kept[next(iter(kept))]

    def count(self, reader: Reader, user_id: str, rules: PushRules, ignored: list[str], room: int, member_tick: int,
              receipts: Iterable[Sequence[Any]], now: int) -> dict[int, list[int]]:
        """Root of a thread, or 0 for the main timeline → [notifications, highlights] that are unread up to `now`."""
        tally = self._tally(reader, user_id, rules, ignored, room, member_tick)
        read = {-1: 0}                                       # thread → up to where; -1: all of them
        for thread_id, event_id, _ in receipts:
            thread = -1 if not thread_id else 0 if thread_id == "main" else tick_of(thread_id)
            read[thread] = max(read.get(thread, 0), tick_of(event_id))
        notes = self._look(reader, user_id, room, tally, now, read)
        if max(read.values()) >= next(iter(notes), FOREVER):
            notes = {tick: note for tick, note in notes.items() if tick > read[-1] and tick > read.get(note[0], 0)}
        for tick in [*notes][:-MAX_UNREAD]:
            del notes[tick]
        self._keep(self._tallies, (user_id, room), tally._replace(upto=max(tally.upto, now), notes=notes))
        counts: dict[int, list[int]] = {}
        for (thread, highlight), number in collections.Counter(notes.values()).items():
            count = counts.setdefault(thread, [0, 0])
            count[0] += number
            count[1] += highlight * number
        return counts

    def _tally(self, reader: Reader, user_id: str, rules: PushRules, ignored: list[str], room: int, member_tick: int) -> Tally:
        """What is known, or nothing, from the user's join on."""
        tally = self._tallies.get((user_id, room))
        if tally and (tally.rules, tally.member_tick, tally.ignored) == (rules, member_tick, ignored):
            return tally
        joined, name = 0, None
        for tick, membership, displayname in reader.own_memberships(room, user_id):
            joined, name = (joined or tick) if membership == "join" else 0, displayname
        return Tally(rules, member_tick, ignored, name if isinstance(name, str) else "", joined, {})

    @staticmethod
    def _look(reader: Reader, user_id: str, room: int, tally: Tally, now: int, read: dict[int, int]) -> dict[int, tuple[int, bool]]:
        """What notifies, with what is new. Who sends something has `read` what stands before it in its thread."""
        notes, facts = dict(tally.notes), RoomFacts(reader, room, tally.displayname)
        rows = reader.notable(room, user_id, max(tally.upto, read[-1]), now, MAX_UNREAD, tally.rules.members)
        rows = as_far(rows, (len(text) * tally.rules.weight for _, _, _, _, text, _, _ in rows), MAX_LOOKS)   # the newest ones
        for tick, type, state_key, sender, text, relates_to, rel_type in reversed(rows):
            own, rule = sender == user_id, None
            if type == "m.room.redaction":
                notes.pop(tick_of(str(json.loads(text).get("redacts"))), None)
            elif not own:
                rule = tally.rules.first(Notable(facts, type, text))
            if (own and state_key is None) or (rule and rule.notify):
                thread = relates_to or 0
                if relates_to and rel_type != "m.thread":
                    thread = thread_of(reader, tick)
                if rule:
                    notes[tick] = (thread, rule.highlight)
                else:
                    read[thread] = max(tick, read.get(thread, 0))
        return notes


# ============================================================================
# 7. Delivery
# ============================================================================
# The homeserver's calls to application services: transactions, until they are
# acknowledged; pings; the questions for users and aliases that don't exist yet,
# and for third-party networks. Spec: Application Service API, Pushing events,
# Pinging, Querying, Third-party networks, Legacy routes. Knows of clients only
# where it notes what passes.
#
# The way of an event: it was stored together with a row in the outbox of each
# application service that is interested (5, Tx._insert); at the end of the batch
# the rows became a transaction (Tx.freeze), which after COMMIT is offered to the
# worker (Worker.offer). That PUTs it until the answer is 200 (Worker._push), and
# has that stored (Tx.acknowledge), which freezes what has come meanwhile.

QUERY_SECONDS = 30.0             # for all attempts of one question
QUERY_ATTEMPTS = 3
PROTOCOL_SECONDS = 60.0          # how long an application service's word about a protocol counts
SILENCE_SECONDS = 3.0            # until one that did not tell is asked again
FALL_BACK_ON = (404, 405, 500, 501)
# What an application service serves, besides pings: today's path, and the older one, which is tried after these answers.
LEGACY_PATHS = {"/_matrix/app/v1/transactions/": "/transactions/", "/_matrix/app/v1/users/": "/users/",
                "/_matrix/app/v1/rooms/": "/rooms/", "/_matrix/app/v1/thirdparty/": "/_matrix/app/unstable/thirdparty/"}


# -- Pushing. One thread for each application service, so that none waits for another; it is started when there is something to send.

class Worker:
    """Pushes to one application service: the open transaction, until it answers 200; then the next (Pushing events).

        idle --offered--> sending --200--> acknowledged: idle
                             ^  |
                             |  +--anything else--> backing off --time, a ping or retry()--+
                             +-------------------------------------------------------------+
    """

    def __init__(self, world: World, line: Line) -> None:
        self.world, self.line, self.registration = world, line, line.registration
        self.transaction: Transaction | None = None          # what is to be sent; set by offer()
        self.failures = 0                                    # attempts since the last success
        self.next_attempt = 0.0                              # the clock's monotonic time
        self.paused = False                                  # by hand
        self.down_since: int | None = None                   # when the first of the failures was
        self.attempts: collections.deque[Exchange] = collections.deque(maxlen=KEPT_EXCHANGES)    # of transactions, since the start
        self._thread: threading.Thread | None = None         # started by the first transaction
        self._hurry = False                                  # somebody wants no backoff after the attempt that is under way
        self._guard = threading.Lock()                       # guards changes of transaction
        self._bell = bell()                                  # rung when there may be something to do
        self._stopped = False
        self._seldom = Seldom()                              # whether to complain again that there is no thread

    def offer(self, transaction: Transaction) -> None:
        """A transaction was frozen. Called by the writer thread, so it only takes note."""
        with self._guard:
            self.transaction = transaction
        self._start()
        release(self._bell)

    def _start(self) -> None:
        """If it has no thread yet, and there is one to be had."""
        if self._thread is None and not self._stopped:
            thread = threading.Thread(target=self._run, name=f"push {self.registration.id}", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:
                self.world.store.late.append(self._start)
                if self._seldom():
                    log.error("application service %s: nothing can be pushed: %s", self.registration.id, error)

    @property
    def fresh(self) -> bool:
        """Whether nothing has been offered yet."""
        return self._thread is None

    def _run(self) -> None:
        while not self._stopped:
            transaction = self.transaction
            left = self.next_attempt - self.world.clock.monotonic()
            if transaction is None or self.paused or left > 0:
                self.world.clock.wait(self._bell, self.next_attempt if transaction and not self.paused else math.inf)
            else:
                try:
                    self._push(transaction)
                except Exception:                            # a bug; the transaction is not to wait for ever because of it
                    log.exception("application service %s: the push failed", self.registration.id)
                    self._back_off()
        self.line.close()

    def _push(self, transaction: Transaction) -> None:
        """One attempt. Any 200 is an acknowledgement, whatever its body (on the older path: if it is JSON); anything else is tried
        again, after a time that doubles.
        """
        self._hurry = False
        outcome, one = self.line.attempt(
            "transaction", "PUT", f"/_matrix/app/v1/transactions/{transaction.txn_id}", transaction.body,
            self.world.settings.push_timeout_ms / 1000, txn_id=transaction.txn_id, events=transaction.events,
            attempt=self.failures + 1)
        self.attempts.append(one)
        if isinstance(outcome, Answer) and outcome.status == 200:
            self.line.wire.end(one, "" if outcome.json is not None else "an acknowledgement, though it is not JSON")
            self._acknowledge(transaction)
        elif not self.transaction or self.transaction.txn_id != one.txn_id:
            self.line.wire.end(one, "it was skipped")
        else:
            delay = self._back_off()
            self.line.wire.end(one, f"attempt {self.failures + 1} in {delay:.1f} s")
            self._warn(transaction, outcome)

    def _acknowledge(self, transaction: Transaction) -> None:
        with self._guard:
            if self.transaction is transaction:              # the next one comes with the COMMIT of this acknowledgement
                self.transaction = None
        try:
            self.world.store.write(lambda tx: tx.acknowledge(transaction.appservice, transaction.txn_id))
        except MatrixError as error:                         # not stored: it will be sent again, with the same ID
            with self._guard:
                self.transaction = self.transaction or transaction
            self._back_off()
            return self._warn(transaction, error)
        if self.failures:
            log.info("application service %s is back; transaction %d went through", transaction.appservice, transaction.txn_id)
        self._forgive()

    def _forgive(self) -> None:
        """The next attempt is the first one again."""
        self.failures, self.next_attempt, self.down_since = 0, 0.0, None

    def _back_off(self) -> float:
        """Seconds until the next attempt."""
        settings = self.world.settings
        delay = 0.0 if self._hurry else next_delay(self.failures, settings.retry_first_ms, settings.retry_max_ms)
        self.down_since = self.down_since or self.world.clock.now()
        self.failures += 1
        self.next_attempt = self.world.clock.monotonic() + delay
        return delay

    def _warn(self, transaction: Transaction, failure: Answer | BaseException) -> None:
        if not (self._stopped or self.world.stopping) and self.transaction is transaction:
            log.warning("application service %s: transaction %d (%s, attempt %d) did not go through: %s; next "
                        "attempt in %.1f s",
                        transaction.appservice, transaction.txn_id, counted(transaction.events, "event"), self.failures,
                        advice(self.registration, failure), max(0.0, self.next_attempt - self.world.clock.monotonic()))

    def stop(self, deadline: float) -> None:
        """Lets the attempt that is under way end, until this real monotonic time."""
        self._stopped = True
        release(self._bell)
        if self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self.line.abort()
            self._thread.join(max(0.0, deadline + 0.2 - time.monotonic()))

    # -- by hand, and for who looks

    @property
    def state(self) -> str:
        if self.paused:
            return "paused"
        if self.transaction is None:
            return "idle"
        return "backing off" if self.next_attempt > self.world.clock.monotonic() else "sending"

    def retry(self) -> None:
        """Ends the backoff."""
        self.next_attempt, self._hurry = 0.0, True
        release(self._bell)

    def pause(self, paused: bool = True) -> None:
        """No further attempt until it goes on."""
        self.paused = paused
        release(self._bell)

    def drop(self, txn_id: int) -> None:
        """This one is not to be sent any more. Called by the writer thread."""
        with self._guard:
            if not self.transaction or self.transaction.txn_id != txn_id:
                return
            self.transaction = None
            self._forgive()
        self.line.abort()


def next_delay(failures: int, first_ms: int, max_ms: int) -> float:
    """Seconds until the next attempt: doubled each time, up to a limit, a tenth more or less."""
    return min(first_ms * 2.0 ** min(failures, 60), max_ms) / 1000 * random.uniform(0.9, 1.1)


# -- Calling: the one place that speaks to an application service.

class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def errcode(self) -> Any:
        return self.json.get("errcode") if isinstance(self.json, dict) else None

    @property
    def unknown_path(self) -> bool:
        """Whether it may be that there is no such path, for it says nothing better."""
        return self.status in FALL_BACK_ON and self.errcode in (None, "M_UNRECOGNIZED")


class Outgoing(NamedTuple):
    """What an application service is asked."""
    kind: str                            # "transaction", "query", "thirdparty" or "ping"
    method: str
    path: str
    body: bytes | None
    deadline: float                      # real monotonic time, for all that it takes
    about: Mapping[str, Any]             # what more is known: further fields of its Exchange


class Line:
    """Calls one application service, over one connection. For one thread at a time."""

    def __init__(self, registration: Registration, wire: Wire, faults: Faults) -> None:
        self.registration, self.wire, self.faults = registration, wire, faults
        self._client = HttpClient(registration.url or "", cut=True)
        self._bell, self._aborted = bell(), False            # for a fault that delays

    def exchange(self, kind: str, method: str, path: str, body: bytes | None, seconds: float) -> Answer:
        """The answer to a question; raises what CALL_FAILED has."""
        outcome, one = self.attempt(kind, method, path, body, seconds)
        self.wire.end(one)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def attempt(self, kind: str, method: str, path: str, body: bytes | None, seconds: float,
                **about: Any) -> tuple[Answer | BaseException, Exchange]:
        """Calls the application service, with the faults that are to act. The outcome, and its Exchange, which is still to be ended.
        `about` is what more is known of it.
        """
        faults, self._aborted = self.faults.take(kind), False
        ask = Outgoing(kind, method, path, body, time.monotonic() + seconds, about)
        outcome, one = self._with_older_path(ask, faults)
        if "duplicate" in faults:
            self.wire.end(one, "the same once more")
            outcome, one = self._with_older_path(ask, {"duplicate": faults["duplicate"]})
        return self._spoil(one, outcome, faults), one

    def _with_older_path(self, ask: Outgoing, faults: Mapping[str, Fault]) -> tuple[Answer | BaseException, Exchange]:
        """Calls the path of today's specification and, if that is not known there, at once the older one, with the same body (Legacy
        routes).
        """
        outcome, one = self._call_once(ask, faults)
        older = next((old + ask.path[len(new):] for new, old in LEGACY_PATHS.items() if ask.path.startswith(new)), None)
        if older and "status" not in faults and isinstance(outcome, Answer) and outcome.unknown_path:
            self.wire.end(one, "the older path is tried")
            after = {name: fault for name, fault in faults.items() if name != "delay"}
            second, one = self._call_once(ask._replace(path=older), after)
            if not isinstance(second, Answer) or (
                    second.json is not None if second.status == 200 else second.errcode not in (None, "M_UNRECOGNIZED")):
                outcome = second
        return outcome, one

    def _call_once(self, ask: Outgoing, faults: Mapping[str, Fault]) -> tuple[Answer | BaseException, Exchange]:
        """The hs_token goes into the header and, for software older than v1.4, into the query."""
        token = self.registration.hs_token
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json",
                   "User-Agent": f"asbridge/{__version__}"}
        target = f"{ask.path}{'&' if '?' in ask.path else '?'}access_token={urllib.parse.quote(token, safe='')}"
        one = self.wire.begin(Exchange(self.wire.number(), self.wire.clock.now(), HS, self.registration.id, ask.kind, ask.method,
                                       ask.path.partition("?")[0], headers, (ask.body or b"")[:KEPT_BYTES],
                                       fault=", ".join(faults), **ask.about))
        began = time.monotonic()
        try:
            outcome: Answer | BaseException | None = self._instead(faults, ask.deadline)
            left = max(0.001, ask.deadline - time.monotonic())
            outcome = outcome or Answer(*self._client.request(ask.method, target, ask.body, headers, left))
        except CALL_FAILED as error:
            outcome, one.error = error, advice(self.registration, error)
        one.ms = round((time.monotonic() - began) * 1000, 2)
        if isinstance(outcome, Answer):
            one.status, one.answer = outcome.status, outcome.body[:KEPT_BYTES]
            if any(each.encode() in outcome.body for each in (token, self.registration.as_token, "access_token")):
                one.answer = without_tokens(self.registration, outcome.body.decode("utf-8", "replace")).encode()[:KEPT_BYTES]
        return outcome, one

    def _instead(self, faults: Mapping[str, Fault], deadline: float) -> Answer | None:
        """What faults do before anything is sent, or in place of it."""
        if "refuse" in faults:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        if "delay" in faults:
            most, wanted = deadline - time.monotonic(), faults["delay"].delay_ms / 1000
            self._pass(min(wanted, most))
            if self._aborted:
                raise ConnectionAbortedError(errno.ECONNABORTED, "given up while it was delayed")
            if wanted >= most:
                raise TimeoutError("delayed for longer than an answer is waited for")
        if "status" in faults:
            return Answer(faults["status"].status, b'{"errcode":"M_UNKNOWN","error":"a fault answers for the application service"}')
        return None

    @staticmethod
    def _spoil(one: Exchange, outcome: Answer | BaseException, faults: Mapping[str, Fault]) -> Answer | BaseException:
        """What faults make of an answer."""
        if "lose_ack" in faults and isinstance(outcome, Answer):
            one.lost, one.error = True, "it answered, but the answer was lost on the way"
            return ConnectionResetError(errno.ECONNRESET, one.error)
        if "garbage" in faults and isinstance(outcome, Answer) and outcome.status == 200:
            one.answer = b"<html>this is not JSON</html>"
            return Answer(200, one.answer)
        return outcome

    def _pass(self, seconds: float) -> None:
        """Lets time pass, by the clock that can be wound on."""
        until = self.wire.clock.monotonic() + seconds
        while self.wire.clock.monotonic() < until and not self._aborted:
            self.wire.clock.wait(self._bell, until)

    def close(self) -> None:
        self._client.close()

    def abort(self) -> None:
        self._aborted = True
        release(self._bell)
        self._client.abort()


CALL_FAILED = (OSError, http.client.HTTPException, ValueError)   # what Line.exchange can raise


def advice(registration: Registration, failure: Answer | BaseException) -> str:
    """Why a call failed, and what to do about it."""
    if isinstance(failure, MatrixError):
        return failure.error
    if isinstance(failure, Answer) and failure.status in (401, 403):
        return (f"{failure.status}: it rejects the hs_token; is the application service running with the registration "
                "that the homeserver has?")
    if isinstance(failure, Answer):
        text = without_tokens(registration, failure.body.decode("utf-8", "replace"))
        return printable(f"it answered {failure.status} {shorten(text, 200)}")
    if isinstance(failure, ConnectionRefusedError):
        return (f"nothing listens at {registration.url}; is the application service running? "
                "(inside a container, localhost is the container)")
    if isinstance(failure, TimeoutError):
        return "it did not answer in time"
    if isinstance(failure, (ConnectionResetError, BrokenPipeError)):
        return failure.strerror or "it closed the connection without an answer; does its log say why?"
    if isinstance(failure, http.client.IncompleteRead):
        return "it closed the connection, or said a wrong length, in the middle of its answer; does its log say why?"
    text = printable(shorten(without_tokens(registration, f"{type(failure).__name__}: {failure}"), 200))
    return f"what it answered is not HTTP/1.1 ({text})" if isinstance(failure, (http.client.HTTPException, ValueError)) else text


def without_tokens(registration: Registration, text: str, shown: str = "") -> str:
    """Some answer with what they were asked. In place of a token stands its name, or what is `shown` for both."""
    forms = {form: name for name in ("hs_token", "as_token") for token in (getattr(registration, name),)
             for form in (token, urllib.parse.quote(token, safe=""), urllib.parse.quote(token), json.dumps(token)[1:-1])}
    longest_first = sorted(forms, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: f"({shown or forms[match[0]]})", text)


# -- Asking for users and aliases that don't exist yet (Querying).

class Query:
    """A question in flight, and who waits for its answer."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.created = False
        self.error: MatrixError | None = None

    def result(self) -> bool:
        self.done.wait()
        if self.error:
            raise self.error
        return self.created


Calling = Callable[[Registration], contextlib.AbstractContextManager[Line]]


class Questions:
    """Whether an application service creates what is looked for. `calling`: lends a line to it."""

    def __init__(self, world: World, calling: Calling) -> None:
        self.world, self._calling = world, calling
        # In flight: who is asked, kind, ID, patient, which application service asks (or '').
        self._queries: dict[tuple[str, str, str, bool, str], Query] = {}
        self._guard = threading.Lock()                       # guards _queries

    def ask(self, kind: str, id: str, by: Registration | None, patient: bool) -> bool:
        """Whether an application service, asked for a user or alias in its namespace, has created it (Querying).

        Not asked: what exists already, and an application service about itself (`by`). Patient, for who wants to know an alias or
        a profile: three attempts, then 408. For who invites, one, and the invitation goes out whatever the answer was.
        """
        if self._exists(kind, id):
            return False
        unanswered: MatrixError | None = None
        for claim in self.world.registrations.claims(kind, id):
            if claim.namespace and claim.registration is not by and claim.registration.url is not None:
                try:
                    if self._ask_shared(claim.registration, kind, id, by, patient):
                        if not self._exists(kind, id):
                            log.warning("application service %s was asked for %s: it answered 200, as if it had created it, but it "
                                        "has not", claim.registration.id, printable(id))
                        return True
                except MatrixError as error:                 # another may know
                    unanswered = error
        if unanswered:
            raise unanswered
        return False

    def _exists(self, kind: str, id: str) -> bool:
        with self.world.store.read() as reader:
            return bool(reader.user(id) if kind == "users" else reader.alias(id))

    def _ask_shared(self, registration: Registration, kind: str, id: str, by: Registration | None,
                 patient: bool) -> bool:
        """Equal questions of people are asked once. One that an AS's request leads to is never shared, for the first
        may wait for that AS; and asked in a circle, it is answered with no.
        """
        key = (registration.id, kind, id, patient, by.id if by else "")
        with self._guard:
            query = self._queries.get(key)
            mine = query is None
            if query is None:
                query = self._queries[key] = Query()
        if by and not mine:
            return False                                     # what it waits for may wait for it
        if mine:
            try:
                query.created = self._ask_patiently(registration, kind, id, patient)
            except MatrixError as error:
                query.error = error
            finally:
                with self._guard:
                    del self._queries[key]
                query.done.set()
        return query.result()

    def _ask_patiently(self, registration: Registration, kind: str, id: str, patient: bool) -> bool:
        """Asks until there is an answer below 500: 200 means yes, any other no."""
        clock, why, path = self.world.clock, "", query_path(kind, id)
        deadline = clock.monotonic() + QUERY_SECONDS
        with self._calling(registration) as line:
            for attempt in range(QUERY_ATTEMPTS if patient else 1):
                if attempt:
                    clock.wait(bell(), min(deadline, clock.monotonic() + 0.25 * 2**attempt))
                outcome = self._attempt(line, path, deadline)
                if isinstance(outcome, Answer) and outcome.status in (200, 404):
                    return outcome.status == 200
                why = advice(registration, outcome)
                patient = patient and not (isinstance(outcome, Answer) and outcome.status < 500)
                if not patient or self.world.stopping:
                    break
        log.log(logging.DEBUG if self.world.stopping else logging.WARNING,
                "application service %s was asked for %s: %s", registration.id, printable(id), why)
        if patient:
            raise MatrixError("M_UNKNOWN", f"the application service {registration.id!r} was asked for {id}, but: {why}", 408)
        return False

    def _attempt(self, line: Line, path: str, deadline: float) -> Answer | BaseException:
        left = deadline - self.world.clock.monotonic()
        try:
            return line.exchange("query", "GET", path, None, max(0.001, min(self.world.settings.query_timeout_ms / 1000, left)))
        except CALL_FAILED as error:
            return error


# -- Third-party networks: what application services tell of them (Third-party networks).

PROTOCOL_KEYS = {"user_fields": list, "location_fields": list, "icon": str, "field_types": dict}
THIRD_PARTY_IDS = {"user": "userid", "location": "alias"}    # what a look-up finds, and the key of its Matrix ID


def has_keys(value: Any, keys: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(is_a(value.get(key), type_) for key, type_ in keys.items())


def is_protocol(value: Any) -> bool:
    """Whether this is a protocol's metadata. Bridges leave out what they don't have, but for `instances`."""
    if not has_keys(value, {"instances": list}):
        return False
    told = {key: type_ for key, type_ in PROTOCOL_KEYS.items() if value.get(key) is not None}
    return has_keys(value, told) and all(has_keys(one, {"network_id": str}) for one in value["instances"])


def batch_in(value: Any, kind: str) -> list[JsonObject] | None:
    """The third-party users or locations in a list; None if it is no list."""
    keys = {THIRD_PARTY_IDS[kind]: str, "protocol": str, "fields": dict}
    return [one for one in value if has_keys(one, keys)] if isinstance(value, list) else None


class Networks:
    """The protocols that application services speak, and who and where is found in them. Nobody is asked about itself (`by`): while it
    waits, it may not be able to answer. `calling`: as for Questions.
    """

    def __init__(self, world: World, calling: Calling) -> None:
        self.world, self._calling = world, calling
        # What was said about a protocol, and until when it counts.
        self._known: dict[tuple[Registration, str], tuple[JsonObject | None, float]] = {}

    def protocols(self, by: Registration | None, only: str | None = None) -> dict[str, JsonObject]:
        """Metadata of each protocol: the instances of all who have it, all else as the first of them says."""
        asked = [(registration, protocol) for registration in self.world.registrations if registration.url is not None
                 for protocol in dict.fromkeys(registration.protocols) if only in (None, protocol)]
        found: dict[str, JsonObject] = {}
        for (_, protocol), said in zip(asked, at_once(lambda one: self._protocol(*one, by), asked), strict=True):
            if said:
                known = found.setdefault(protocol, {**said, "instances": []})
                known["instances"] = known["instances"] + said["instances"]
        return found

    def _protocol(self, registration: Registration, protocol: str, by: Registration | None) -> JsonObject | None:
        """What one says about a protocol. Each instance, a network, gets the instance_id with which a client asks for the rooms of
        that network (POST /publicRooms: third_party_instance_id; 6, Directory), which the application service lists there.
        """
        now = self.world.clock.monotonic()
        said, until = self._known.get((registration, protocol), (None, 0.0))
        if until <= now and registration is not by:
            said = self._look_up(registration, f"protocol/{urllib.parse.quote(protocol, safe='')}",
                                 lambda value: value if is_protocol(value) else None)
            for instance in said["instances"] if said else ():
                instance["instance_id"] = f"{registration.id}|{instance['network_id']}"
            self._known[registration, protocol] = said, now + (PROTOCOL_SECONDS if said else SILENCE_SECONDS)
        return said

    def look_up(self, kind: str, protocol: str, fields: Mapping[str, str], by: Registration | None) -> list[JsonObject]:
        """Third-party users or locations with these fields, as all who have the protocol ('': any) know them."""
        asked = [one for one in self.world.registrations if one.url is not None and one is not by
                 and (protocol in one.protocols if protocol else one.protocols)]
        path = kind + (f"/{urllib.parse.quote(protocol, safe='')}" if protocol else "")
        path += "?" + urllib.parse.urlencode(fields) if fields else ""
        answers = at_once(lambda one: self._look_up(one, path, lambda value: batch_in(value, kind)), asked)
        found = [one for answer in answers for one in answer or ()]
        if not found:
            raise MatrixError("M_NOT_FOUND", f"no application service knows of this {kind}; asked: "
                              f"{', '.join([one.id for one in asked]) or 'none, for none declares the protocol'}")
        return found

    def _look_up(self, registration: Registration, path: str, read: Callable[[Any], Any]) -> Any:
        """What can be used of its answer; None, with a line in the log, if nothing can. 404 is an answer."""
        try:
            with self._calling(registration) as line:
                answer = line.exchange("thirdparty", "GET", "/_matrix/app/v1/thirdparty/" + path, None,
                                       self.world.settings.query_timeout_ms / 1000)
            if answer.status == 404:
                return None
            value = parse_json(answer.body) if answer.status == 200 else None
            found, why = read(value), advice(registration, answer)
            if found == value and found is not None:
                return found
        except (*CALL_FAILED, MatrixError) as error:
            found, why = None, advice(registration, error)
        left = ", of which only a part can be used" * bool(found)
        log.warning("application service %s was asked for third-party %s: %s%s", registration.id, path.partition("?")[0], why, left)
        return found


# -- All workers together, and pings.

class Delivery:
    """All calls to application services."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wire = Wire(world.clock)
        self.questions, self.networks = Questions(world, self._calling), Networks(world, self._calling)
        self._workers: dict[str, Worker] = {}                # made when first needed
        self._faults: dict[str, Faults] = {}                 # made when first needed
        self._lines: set[Line] = set()                       # over which somebody asks at the moment
        self._former: dict[str, Worker] = {}                 # whose registration has changed, until there is another
        self._guard = threading.Lock()                       # guards these four
        self._stopped = False

    # -- pushing

    def start(self) -> None:
        """Takes up what was open when the homeserver stopped."""
        self.world.store.on_frozen = self._offer
        self.world.ask = self.questions.ask
        self._take_up()

    def _take_up(self) -> None:
        """Offers what is open to workers that have had nothing yet, and lets freeze() look at what waits.

        On the writer thread, as every offer: anybody else might offer what has been acknowledged meanwhile.
        """
        def job(tx: Tx) -> None:
            tx.ready.update(tx.boxes)
            tx.hear_anew()
            for box in tx.boxes.values():
                if box.open:
                    tx.on_commit.append(functools.partial(self._resume, box.open))
        self.world.store.write(job)

    def _resume(self, transaction: Transaction) -> None:
        worker = self.worker(transaction.appservice)
        if worker and worker.fresh:
            self._offer(transaction)

    def stop(self, seconds: float = 1.0) -> None:
        """Attempts that are under way may take this long to end."""
        self._stopped = True
        self.wire.stop()
        deadline = time.monotonic() + seconds
        with self._guard:
            workers, lines = list(self._workers.values()), list(self._lines)
        for line in lines:
            line.abort()
        for worker in workers:
            worker.stop(deadline)

    def _offer(self, transaction: Transaction) -> None:
        worker = self.worker(transaction.appservice)
        if worker and not self._stopped:
            worker.offer(transaction)

    def worker(self, id: str) -> Worker | None:
        registration = self.world.registrations.by_id.get(id)
        if not registration or registration.url is None:
            return None
        faults = self.faults(id)
        with self._guard:
            worker = self._workers.get(id)
            if worker is None:
                worker = self._workers[id] = Worker(self.world, Line(registration, self.wire, faults))
                if former := self._former.pop(id, None):
                    worker.paused, worker.attempts = former.paused, former.attempts
            return worker

    @contextlib.contextmanager
    def _calling(self, registration: Registration) -> Iterator[Line]:
        """A line for a call that somebody waits for; stop() ends it."""
        line = Line(registration, self.wire, self.faults(registration.id))
        with self._guard:
            self._lines.add(line)
        try:
            yield line
        finally:
            with self._guard:
                self._lines.discard(line)
            line.close()

    def faults(self, id: str) -> Faults:
        self.registration(id)
        with self._guard:
            return self._faults.setdefault(id, Faults())

    def registration(self, id: str) -> Registration:
        """M_NOT_FOUND if there is no such application service."""
        registration = self.world.registrations.by_id.get(id)
        if not registration:
            raise MatrixError("M_NOT_FOUND", f"there is no application service {shorten(id)!r}, only "
                              f"{', '.join(self.world.registrations.by_id) or 'none at all'}")
        return registration

    # -- by hand

    def hand(self, id: str) -> Worker:
        """The worker to pause, retry …; M_URL_NOT_SET if nothing is ever sent there."""
        worker = self.worker(self.registration(id).id)
        if not worker:
            raise MatrixError("M_URL_NOT_SET", f"the registration of {id!r} has url: null, so nothing is sent to it")
        return worker

    def skip(self, id: str) -> int:
        """Gives up the open transaction, as if it were acknowledged; its ID."""
        worker = self.hand(id)

        def job(tx: Tx) -> int:
            box = tx.boxes.get(id, NOTHING_WAITS)
            if not box.open:
                raise MatrixError("M_NOT_FOUND", f"no transaction is open for {id!r}")
            tx.acknowledge(id, box.open.txn_id)
            tx.on_commit.append(functools.partial(worker.drop, box.open.txn_id))
            return box.open.txn_id
        txn_id = self.world.store.write(job)
        log.warning("application service %s: transaction %d is skipped by hand", id, txn_id)
        return txn_id

    def replay(self, id: str, txn_id: int | None = None, new_id: bool = False) -> int:
        """Sends a transaction that was acknowledged (the last one, if none is named) once more: the same bytes with the same ID,
        or with a new one, which deduplication does not know. The ID.
        """
        self.hand(id)
        return self.world.store.write(lambda tx: tx.reopen(id, txn_id, new_id))

    def reload(self) -> None:
        """After a change of the registrations: what is gone or different gets no more from its old worker."""
        with self._guard:
            changed = [worker for id, worker in self._workers.items()
                       if self.world.registrations.by_id.get(id) is not worker.registration]
            for worker in changed:
                del self._workers[worker.registration.id]
                self._former[worker.registration.id] = worker
        self.networks = Networks(self.world, self._calling)
        for worker in changed:
            worker.stop(time.monotonic())
        self._take_up()

    # -- pinging

    def ping(self, registration: Registration, transaction_id: str | None) -> int:
        """Calls the application service as it asked; milliseconds (Pinging). A success ends its backoff. M_BAD_STATUS tells
        `status` and `body` of an answer that was not 200.
        """
        if registration.url is None:
            raise MatrixError("M_URL_NOT_SET", f"the registration of {registration.id!r} has url: null, so "
                              "there is nobody to ping")
        body = to_json({} if transaction_id is None else {"transaction_id": transaction_id}).encode()
        began = time.monotonic()
        try:
            with self._calling(registration) as line:
                answer = line.exchange("ping", "POST", "/_matrix/app/v1/ping", body, self.world.settings.query_timeout_ms / 1000)
        except TimeoutError as error:
            raise MatrixError("M_CONNECTION_TIMEOUT", advice(registration, error)) from None
        except CALL_FAILED as error:
            raise MatrixError("M_CONNECTION_FAILED", advice(registration, error)) from None
        if answer.status != 200:
            raise MatrixError("M_BAD_STATUS", advice(registration, answer), status=answer.status,
                              body=without_tokens(registration, answer.body.decode("utf-8", "replace")))
        worker = self.worker(registration.id)
        if worker:
            worker.retry()
        return int((time.monotonic() - began) * 1000)

# -- What passes, kept for a while to be looked at: for the trace and the inspector. To be skipped at first reading, as are the faults.

HS = "hs"                        # the homeserver, where application services stand by ID and clients by user ID
KEPT_EXCHANGES = 1000
SHOWN_HEADERS = ("accept", "content-length", "content-type", "host", "origin", "user-agent")     # of others there is the name only


@dataclass(slots=True)
class Exchange:
    """A request between the homeserver and an application service or a client, and what became of it."""
    n: int
    ts: int                              # milliseconds since 1970
    source: str
    target: str
    kind: str                            # "transaction", "query", "thirdparty", "ping"; what the homeserver is asked: "request"
    method: str
    path: str                            # without its query
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(default=b"", repr=False)     # the first KEPT_BYTES of it; the same for `answer`
    client: bool = False                 # whether the other one is a client
    acts_as: str | None = None           # the user as whom an application service asks
    txn_id: int | None = None
    events: int | None = None
    attempt: int | None = None
    fault: str = ""                      # the faults that acted
    status: int | None = None
    ms: float | None = None
    answer: bytes = dataclasses.field(default=b"", repr=False)
    error: str = ""                      # why there is no answer
    lost: bool = False                   # there was one, but a fault made the homeserver forget it
    then: str = ""                       # what comes of it
    done: bool = False
    seq: int = 0                         # of its last change

    @property
    def first(self) -> JsonObject | None:
        """Type and sender of a transaction's first event."""
        with contextlib.suppress(ValueError):
            event, _ = json.JSONDecoder().raw_decode(self.body.decode("utf-8", "replace"), len('{"events":['))
            return {"type": event["type"], "sender": event["sender"]}
        return None

    @property
    def failure(self) -> str:
        """Why it was no success; '' if it was one."""
        why = self.error or ("" if self.status == 200 else f"it answered {self.status}")
        return why + (f" (fault: {self.fault})" if why and self.fault else "")

    def told(self) -> JsonObject:
        """The exchange as the inspector's API has it."""
        return {"n": self.n, "seq": self.seq, "ts": self.ts, "from": self.source, "to": self.target, "kind": self.kind,
                "lane": "client" if self.client else "appservice", "method": self.method, "path": self.path, "as": self.acts_as,
                "txn_id": None if self.txn_id is None else str(self.txn_id), "events": self.events,
                "first": self.first if self.events else None, "attempt": self.attempt, "status": self.status, "ms": self.ms,
                "error": self.error or None, "lost": self.lost, "fault": self.fault or None, "then": self.then or None,
                "done": self.done}

    def asked(self) -> str:
        """What is asked, in a few words."""
        path = printable(urllib.parse.unquote(self.path))
        if self.kind == "request":
            return f"{self.method} {path}" + (f" as {printable(self.acts_as)}" if self.acts_as else "")
        first = self.first if self.events else None
        words = [f"{self.method} {path.removeprefix('/_matrix/app/v1/')}"]
        words += [counted(self.events, "event")] if self.events is not None else []
        words += [printable(f"{first['type']} of {first['sender']}")] if first else []
        return ", ".join(words + ([f"attempt {self.attempt}"] if self.attempt else []))

    def answered(self) -> str:
        words = [f"{self.status} in {self.ms:.1f} ms"] if self.status and self.ms is not None else []
        words += [self.error] if self.error else []
        words += [f"fault: {self.fault}"] if self.fault else []
        return "; ".join(words + ([self.then] if self.then else []))


def shown_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers as they can be kept: not too many, without what must not be seen."""
    names = itertools.islice(headers, 30)
    return {shorten(name, 60): shorten(headers[name], 200) if name.lower() in SHOWN_HEADERS else "…" for name in names}


class Wire:
    """The last exchanges. Each is numbered when it begins; when it changes, it comes again to whoever looks."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._count = itertools.count(1)                     # numbers beginnings and changes alike, so that they have one order
        # By number, in the order of their last change: its number, and what changed or what makes it when somebody looks.
        self._kept: collections.OrderedDict[int, tuple[int, Exchange | Callable[[], Exchange]]] = collections.OrderedDict()
        self._seq = 0                                        # the last change
        self._bells: set[Any] = set()                        # of those who look
        self._stopped = False
        self._guard = threading.Lock()                       # guards all of it

    def number(self) -> int:
        return next(self._count)

    def note(self, n: int, one: Exchange | Callable[[], Exchange]) -> None:
        """Something about this exchange has changed."""
        with self._guard:
            self._seq = next(self._count)
            self._kept.pop(n, None)
            self._kept[n] = self._seq, one
            if len(self._kept) > KEPT_EXCHANGES:
                self._kept.popitem(last=False)
            bells = list(self._bells) if self._bells else ()
        for each in bells:
            release(each)

    @staticmethod
    def _made(seq: int, one: Exchange | Callable[[], Exchange]) -> Exchange:
        made = one if isinstance(one, Exchange) else one()
        made.seq = seq
        return made

    def begin(self, one: Exchange) -> Exchange:
        self.note(one.n, one)
        self._draw(one, back=False)
        return one

    def end(self, one: Exchange, then: str = "") -> None:
        one.then, one.done = then, True
        self.note(one.n, one)
        self._draw(one, back=True)

    def whole(self, n: int, make: Callable[[], Exchange]) -> None:
        """One that has begun and ended; made when somebody looks, for there are many of these."""
        self.note(n, make)
        if trace.isEnabledFor(logging.DEBUG):
            one = make()
            self._draw(one, back=False)
            self._draw(one, back=True)

    @staticmethod
    def _draw(one: Exchange, back: bool) -> None:
        """An arrow in the trace, as the specification draws them."""
        if not one.client and trace.isEnabledFor(logging.DEBUG):
            arrow = "--->" if (one.source == HS) != back else "<-/-" if back and (one.lost or one.status is None) else "<---"
            other = one.target if one.source == HS else one.source
            trace.debug("HS %s %-10s #%-3d %s", arrow, other, one.n, one.answered() if back else one.asked(),
                        extra={"exchange": {"arrow": arrow, "back": back, "appservice": other, **one.told()}})

    def since(self, seq: int, seconds: float) -> tuple[int, list[Exchange]]:
        """What changed after `seq`, waited for as long; and the number to go on from."""
        ring, deadline = bell(), time.monotonic() + seconds
        try:
            while True:
                with self._guard:
                    self._bells.add(ring)
                    now = self._seq
                    news = self._after(0 if seq > now else seq)      # from the future: of another run
                left = deadline - time.monotonic()
                if news or left <= 0 or seq > now or self._stopped:
                    return now, [self._made(*one) for one in news]
                ring.acquire(timeout=left)
        finally:
            with self._guard:
                self._bells.discard(ring)

    def _after(self, seq: int) -> list[tuple[int, Exchange | Callable[[], Exchange]]]:
        """Under the guard. The kept ones stand in the order of their last change."""
        return list(itertools.takewhile(lambda one: one[0] > seq, reversed(self._kept.values())))[::-1]

    def stop(self) -> None:
        """Who looks is to go."""
        with self._guard:
            self._stopped = True
            for each in self._bells:
                release(each)

    def find(self, n: int) -> Exchange | None:
        with self._guard:
            one = self._kept.get(n)
        return self._made(*one) if one else None


# -- Faults: what goes wrong on demand. Line does it; the inspector has a form for them (9).

FAULTS = {
    "lose_ack":  "the application service gets it and answers, but the answer is lost",
    "refuse":    "nothing is sent, as if nothing listened there",
    "delay":     "it is sent `delay_ms` later",
    "status":    "nothing is sent; it is as if the answer were `status`",
    "duplicate": "it is sent twice, one right after the other",
    "garbage":   "the application service gets it, but the answer that the homeserver sees is 200 and not JSON",
}
MAX_DELAY_MS = DAY_MS
FAULTS_ON = {"transactions": ("transaction",), "queries": ("query", "thirdparty"), "ping": ("ping",)}


@dataclass(slots=True)
class Fault:
    """One that is to happen: `times` more, or with a probability."""
    fault: str
    on: str
    times: int | None
    probability: float | None
    delay_ms: int
    status: int
    dice: random.Random

    def told(self) -> JsonObject:
        more = {"delay": {"delay_ms": self.delay_ms}, "status": {"status": self.status}}.get(self.fault, {})
        return {"fault": self.fault, "on": self.on, "times": self.times, "probability": self.probability, **more}


class Faults:
    """The faults of one application service. Each verb takes `on` (transactions, queries or ping), and `times` (1 if nothing is
    said) or `probability`, which a `seed` makes repeat.
    """

    def __init__(self) -> None:
        self._active: list[Fault] = []
        self._guard = threading.Lock()                       # guards it, and the numbers in it

    def add(self, fault: str, *, on: str = "transactions", times: int | None = None, probability: float | None = None,
            seed: int | None = None, delay_ms: int = 1000, status: int = 500) -> None:
        """M_INVALID_PARAM if there is no such fault."""
        for name, value, choice in (("fault", fault, FAULTS), ("on", on, FAULTS_ON)):
            if value not in choice:
                raise MatrixError("M_INVALID_PARAM", f"{name} must be one of {', '.join(choice)}, not {shorten(value)!r}")
        if not ((times is None or times >= 1) and (probability is None or 0 < probability <= 1) and 0 <= delay_ms <= MAX_DELAY_MS):
            raise MatrixError("M_INVALID_PARAM", "times is a number from 1 on, probability one above 0 and up to 1, delay_ms one "
                              f"from 0 to {MAX_DELAY_MS}")
        if not 100 <= status <= 599:
            raise MatrixError("M_INVALID_PARAM", "status must be one of HTTP, from 100 to 599")
        if times is None and probability is None:
            times = 1
        with self._guard:
            self._active.append(Fault(fault, on, times, probability, delay_ms, status, random.Random(seed)))

    lose_ack = functools.partialmethod(add, "lose_ack")
    refuse = functools.partialmethod(add, "refuse")
    delay = functools.partialmethod(add, "delay")
    status = functools.partialmethod(add, "status")
    duplicate = functools.partialmethod(add, "duplicate")
    garbage = functools.partialmethod(add, "garbage")

    def clear(self) -> None:
        with self._guard:
            self._active.clear()

    def told(self) -> list[JsonObject]:
        with self._guard:
            return [one.told() for one in self._active]

    def take(self, kind: str) -> dict[str, Fault]:
        """Which act on this exchange, of each sort one; that counts as once."""
        acting: dict[str, Fault] = {}
        if self._active:
            with self._guard:
                for one in self._active:
                    if one.fault not in acting and kind in FAULTS_ON[one.on] and (
                            one.probability is None or one.dice.random() < one.probability):
                        acting[one.fault] = one
                        one.times = None if one.times is None else one.times - 1
                self._active = [one for one in self._active if one.times != 0]
        return acting


# ============================================================================
# 8. Routes
# ============================================================================
# Who is asking, and which verb it is: tokens and masquerading, thin handlers,
# and the table of endpoints as data. Spec: Client-Server API; Application
# Service API, Client-Server API Extensions. Knows neither SQL nor sockets.

CORS = (b"Access-Control-Allow-Origin: *\r\n"
        b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, DELETE, OPTIONS\r\n"
        b"Access-Control-Allow-Headers: X-Requested-With, Content-Type, Authorization, Date\r\n")
INSPECTOR = "/_asbridge/"        # where its API is, which no web client may use
ANONYMOUS_BODY = 65_536          # bytes of body that are read without a token
UNSTABLE_FEATURES = ("fi.mau.msc2659.stable", "uk.tcpip.msc4133", "uk.tcpip.msc4133.stable")    # so SDKs look for pings, profile fields
VERSIONS = Raw(to_json({"versions": ["r0.5.0", "r0.6.0", "r0.6.1", *(f"v1.{n}" for n in range(1, 17))],
                        "unstable_features": dict.fromkeys(UNSTABLE_FEATURES, True)}))
LOGIN_APPSERVICE = "m.login.application_service"
IDENTITY = ("user_id", "device_id", "org.matrix.msc3202.device_id")      # in the query of an application service


class Call:
    """One request, as a handler sees it."""

    def __init__(self, api: Api, request: Request) -> None:
        self.api, self.request = api, request
        self.who = NOBODY

    @property
    def asker(self) -> Registration | None:
        """The application service that is asking: with its as_token, or with a session of one of its ghosts. It is not asked about
        what it asks for itself: while it waits it may not be able to answer.
        """
        owner = self.api.world.registrations.owner("users", self.who.user_id) if self.who.user_id else None
        return self.who.appservice or (owner.registration if owner else None)

    @property
    def cors(self) -> bytes:
        """Headers that let a web client of any site in; to the inspector none."""
        return b"" if self.request.path == "/" or self.request.path.startswith(INSPECTOR) else CORS

    @functools.cached_property
    def body(self) -> JsonObject:
        return parse_object(self.bytes(self.api.world.settings.max_request_bytes))

    def field(self, key: str, type_: type[T], default: Any = ...) -> T:
        """One key of the body."""
        return field(self.body, key, type_, default)

    @property
    def reason(self) -> JsonObject:
        """Why a membership changes, as a part of the event."""
        reason = self.field("reason", str, None)
        return {} if reason is None else {"reason": reason}

    def bytes(self, limit: int) -> bytes:
        return self.request.body(limit if self.who is not NOBODY else min(limit, ANONYMOUS_BODY))

    def query(self, name: str) -> str | None:
        return self.request.query.get(name)

    def required(self, name: str, what: str = "") -> str:
        """A text in the query that must be there. `what` it is, in words after a comma."""
        value = self.request.query.get(name)
        if not value:
            raise MatrixError("M_MISSING_PARAM", f"the query must have {name}{what}")
        return value

    def integer(self, name: str, default: T, least: int = 0, most: int = MAX_INT) -> int | T:
        text = self.request.query.get(name)
        if text is None or text == "":
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise MatrixError("M_INVALID_PARAM", f"{name} must be a number from {least} to {most}, not "
                              f"{shorten(text)!r}")
        return int(text)

    def limit(self, default: int, least: int = 0) -> int:
        """How many are asked for: MAX_PAGE if it is more, however much."""
        if re.fullmatch("[0-9]{10,}", self.request.query.get("limit", "")):
            return MAX_PAGE
        return min(self.integer("limit", default, least), MAX_PAGE)

    @property
    def ts(self) -> int | None:
        """The origin_server_ts that an application service wishes (Timestamp massaging). Nothing else changes: the event comes after
        those before it. The endpoints for sending an event or a state event take it, no others: to join or kick with a time of
        one's own, put the m.room.member event.
        """
        return self.integer("ts", None) if self.who.appservice else None

    def flag(self, name: str) -> bool:
        return self.choice(name, ("true", "false"), "false") == "true"

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        """One of these; the default also for an empty text."""
        value = self.request.query.get(name) or default
        if value not in options:
            raise MatrixError("M_INVALID_PARAM", f"{name} must be one of {', '.join(options)}, not "
                              f"{shorten(value)!r}")
        return value


NOBODY = Who("")


# -- Which handler is it?

class Route(NamedTuple):
    """One endpoint. The handler gets the call and the variables of the path. It returns what a 200 says in JSON (None: {}), or a
    Response, and refuses by raising a MatrixError.

    `auth`, who may call: "nobody" (no token is asked for; register and login look for an as_token themselves), "maybe", "user" (a
    person, or an AS as one of its users), "self" (the user in the path, which the handler does not get then), "appservice",
    "admin" (whoever runs the homeserver).
    """
    method: str
    path: str
    auth: str
    spec: str                                                # the section of the specification
    handler: Callable[..., Any]


# How paths began before, as old software still writes them.
OLDER_PREFIXES = {
    "/_matrix/client/v3/": ("/_matrix/client/r0/", "/_matrix/client/unstable/"),
    "/_matrix/client/v1/": ("/_matrix/client/unstable/",),
    "/_matrix/media/v3/":  ("/_matrix/media/r0/", "/_matrix/media/v1/"),
    "/_matrix/app/v1/":    ("/_matrix/app/r0/", "/_matrix/app/unstable/"),
}


def spellings(path: str) -> list[str]:
    """A route's path, and how else it may be written."""
    return [path, *(path.replace(prefix, older, 1) for prefix, others in OLDER_PREFIXES.items() if path.startswith(prefix)
                    for older in others)]


class Router:
    """Finds routes by walking the path's segments."""

    VARIABLE = "/{}"                     # no segment has a slash in it

    def __init__(self, routes: Sequence[Route]) -> None:
        self._root: dict[str, Any] = {}  # segment, or VARIABLE → the like; None → {method: route}
        for route, path in [(one, path) for one in routes for path in spellings(one.path)]:
            node = self._root
            for segment in path.split("/")[1:]:
                node = node.setdefault(self.VARIABLE if segment[:1] == "{" else segment, {})
            names = re.findall(r"{(\w+)}", path)
            node.setdefault(None, {})[route.method] = route, names       # type: ignore[call-overload]

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """The route and the variables of its path, decoded; M_UNRECOGNIZED, 404 or 405."""
        node, values = self._root, []
        for segment in path.split("/")[1:]:
            literal = node.get(segment)
            if literal is None:
                values.append(segment)
            node = literal or node.get(self.VARIABLE) or {}
        routes = node.get(None)                              # type: ignore[call-overload]
        if not routes:
            raise MatrixError("M_UNRECOGNIZED", f"there is no endpoint {shorten(path)}; 'asbridge.py routes' lists them")
        if method not in routes:
            raise MatrixError("M_UNRECOGNIZED", f"{shorten(path)} takes {', '.join(sorted(routes))}, not "
                              f"{shorten(method)}", 405)
        route, names = routes[method]
        return route, {name: decode_segment(value) for name, value in zip(names, values, strict=True)}


@functools.lru_cache(4)
def router_of(routes: tuple[Route, ...]) -> Router:
    """Many homeservers in one process, as in tests, have the same one."""
    return Router(routes)


# -- Who is asking?

def token_of(request: Request) -> str | None:
    return token_in(request.headers, request.query)


def token_in(headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
    """The access token, from the header or the query; 401 if they differ. Empty is absent."""
    in_header, in_query = bearer(headers), query.get("access_token", "")
    if in_header and in_query and not hmac.compare_digest(in_header.encode(), in_query.encode()):
        raise MatrixError("M_UNKNOWN_TOKEN", "the tokens in the Authorization header and in access_token "
                          "differ; send one of them")
    return in_header or in_query or None


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


class Limiter:
    """The configured rate limit: so many changes a second for each user, and a burst."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._spent: dict[str, tuple[float, float]] = {}     # user → changes not yet forgiven, as of when
        self._guard = threading.Lock()                       # guards _spent

    def count(self, who: Who) -> None:
        """M_LIMIT_EXCEEDED past the limit. An AS's own user is exempt, and its ghosts if `rate_limited` is false."""
        limit = self.world.settings.rate_limit
        if not limit or who is NOBODY or (who.appservice and (
                not who.appservice.rate_limited or who.user_id == who.appservice.sender(self.world.name))):
            return
        now, per_second, burst = self.world.clock.monotonic(), limit["per_second"], limit["burst"]
        with self._guard:
            spent, then = self._spent.get(who.user_id, (0.0, now))
            spent = max(0.0, spent - (now - then) * per_second) + 1
            over = spent > burst
            self._spent[who.user_id] = (spent - over, now)
        if over:
            wait_ms = int((spent - burst) / per_second * 1000) + 1
            raise MatrixError("M_LIMIT_EXCEEDED", f"{who.user_id} may make {per_second} changes a second, "
                              f"{burst} at once; "
                              f"try again in {wait_ms} ms", retry_after_ms=wait_ms)


class Api:
    """The homeserver as a function from Request to Response."""

    def __init__(self, world: World, delivery: Delivery, routes: Sequence[Route]) -> None:
        self.world, self.delivery = world, delivery
        self.accounts, self.aliases, self.history = Accounts(world), Aliases(world), History(world)
        self.rooms, self.relations, self.directory = Rooms(world, self.aliases), Relations(world), Directory(world)
        self.data, self.openid, self.media = ClientData(world), OpenId(world), Media(world)
        self.typing, self.presence, self.receipts = Typing(world), Presence(world), Receipts(world)
        self.keys, self.backups, self.notifications = Keys(world), Backups(world), Notifications(world)
        self.sync = Sync(world, self.typing, self.presence, Unread())
        self.by_class = {type(part).__name__: part for part in vars(self).values()}      # the same, for just()
        self.router, self.limiter = router_of(tuple(routes)), Limiter(world)

    def __call__(self, request: Request) -> Response:
        """Answers; raises nothing but ClientGone."""
        began, call, n = time.monotonic(), Call(self, request), self.delivery.wire.number()
        try:
            response = self._answer(call)
        except MatrixError as error:
            error.error = cut_path(error.error)
            response = error_response(error, call.cors)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s %s: %s", request.method, request.shown, printable(str(error)))
        except ClientGone:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.shown)
            failed = MatrixError("M_UNKNOWN", "the homeserver failed; its log says why")
            response = json_response(failed.status, failed.body(), call.cors)
        ms = (time.monotonic() - began) * 1000
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %d in %.1f ms", request.method, request.shown, response.status, ms)
        if request.path.startswith("/_matrix/"):
            kept = (request.path, request.query, request.headers) if request.small else (
                request.path[:2000], {}, shown_headers(request.headers))
            self.delivery.wire.whole(n, functools.partial(
                self._exchange, n, self.world.clock.now() - int(ms), call.who, request.method, *kept, request.seen,
                response.status, response.body[:KEPT_BYTES], ms))
        return response

    def _answer(self, call: Call) -> Response:
        request = call.request
        if request.method == "OPTIONS":
            return Response(204, b"", headers=call.cors)
        route, params = self.router.find("GET" if request.method == "HEAD" else request.method, request.path)
        if route.auth == "admin":
            self.check_admin(request)
        elif route.auth != "nobody":
            call.who = self.identify(request, route.auth)
        if route.method != "GET":
            self.limiter.count(call.who)
            if "roomId" in params and not call.who.appservice:
                self.presence.active(call.who.user_id)
        if route.auth == "self" and (user_id := params.pop("userId")) != call.who.user_id:
            raise forbidden(f"{call.who.user_id} can't do this for {shorten(user_id)}")
        answer = route.handler(call, *params.values())
        return answer if isinstance(answer, Response) else json_response(200, {} if answer is None else answer, call.cors)

    def _exchange(self, n: int, ts: int, who: Who, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str],
                  body: bytes, status: int, answer: bytes, ms: float) -> Exchange:
        """A request and its answer, for the trace and the inspector."""
        appservice = who.appservice
        if who is NOBODY:                                    # it registers a ghost, or was refused as one
            with contextlib.suppress(MatrixError):
                appservice = self.world.registrations.of_as_token(digest(token_in(headers, query) or ""))
        user_id = who.user_id or (query.get("user_id") if appservice else "somebody")
        return Exchange(n, ts, appservice.id if appservice else user_id or "somebody", HS, "request", method, cut_path(path), headers,
                        body, client=not appservice, acts_as=user_id if appservice else None, status=status, ms=round(ms, 2),
                        answer=answer, done=True)

    def check_admin(self, request: Request) -> None:
        """Whether the inspector's API may be used: from this machine, by no other site's page, and with the admin_token if
        there is one. Bound to more than this machine, it needs one.
        """
        settings, host = self.world.settings, request.headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise forbidden(f"the page of another site ({shorten(origin)}) may not use the inspector")
        if site not in ("same-origin", "none"):              # a link, an image or a script, which have no Origin
            raise forbidden(f"the page of another site may not use the inspector (Sec-Fetch-Site: {shorten(site)})")
        if settings.admin_token is None and not is_loopback(settings.bind):
            raise forbidden(f"bound to {settings.bind}, the inspector needs an admin_token in the configuration")
        if is_loopback(settings.bind) and not is_loopback(name):
            raise forbidden(f"the inspector is at localhost or 127.0.0.1 only, not at {shorten(name)!r}")
        if settings.admin_token is not None:
            token = token_of(request)
            if not token:
                raise MatrixError("M_MISSING_TOKEN", "this needs the admin_token of the configuration: 'Authorization: Bearer TOKEN'")
            if not hmac.compare_digest(token.encode(), settings.admin_token.encode()):
                raise MatrixError("M_UNKNOWN_TOKEN", "this is not the admin_token of the configuration")

    def identify(self, request: Request, auth: str) -> Who:
        """The session's user, or whom an application service acts as (Identity assertion)."""
        token = token_of(request)
        if token is None:
            if auth == "maybe":
                return NOBODY
            raise MatrixError("M_MISSING_TOKEN", "this needs an access token: 'Authorization: Bearer TOKEN'")
        hashed = digest(token)
        session = self.world.store.sessions.get(hashed)
        registration = None if session else self.world.registrations.of_as_token(hashed)
        if auth == "appservice" and session:
            raise forbidden("only an application service may do this, with its as_token")
        if session:
            return Who(session[0], session[1], hashed)
        if not registration:
            raise self.unknown_token(hashed)
        if auth == "maybe":                                  # open to all: whom it names makes no difference
            return self.act_as(registration, None)
        who = self.act_as(registration, request.query.get("user_id"))
        device_id = request.query.get("device_id") or request.query.get("org.matrix.msc3202.device_id")
        return dataclasses.replace(who, device_id=self.check_device(who, device_id)) if device_id else who

    def unknown_token(self, hashed: bytes) -> MatrixError:
        swapped = self.world.registrations.of_hs_token(hashed)
        if swapped:
            log.warning("somebody uses the hs_token of the application service %s as access token: are they swapped?", swapped.id)
            return MatrixError("M_UNKNOWN_TOKEN", f"this is the hs_token of the application service "
                               f"{swapped.id!r}; it must send its as_token", soft_logout=False)
        return MatrixError("M_UNKNOWN_TOKEN", "no session and no application service has this access token; registrations "
                           f"that are loaded, since the start or the last SIGHUP: {len(self.world.registrations.by_id)}",
                           soft_logout=False)

    def act_as(self, registration: Registration, user_id: str | None) -> Who:
        """Whoever `user_id` in the query names, if the user is in a namespace and registered; without it the sender_localpart user."""
        user_id = user_id or registration.sender(self.world.name)
        self.world.registrations.check_claims(registration, "users", user_id, "M_FORBIDDEN")
        if user_id not in self.world.store.users:
            self.accounts.check_active(user_id)
            raise forbidden(f"{shorten(user_id)} is in the namespaces of the application service "
                            f"{registration.id!r} but not registered; "
                            f"register it first: POST /_matrix/client/v3/register with type {LOGIN_APPSERVICE}")
        return Who(user_id, None, None, registration)

    def check_device(self, who: Who, device_id: str) -> str:
        """The device that an application service acts as; M_UNKNOWN_DEVICE if the user has no such."""
        with self.world.store.read() as reader:
            if not reader.device(who.user_id, device_id):
                raise MatrixError("M_UNKNOWN_DEVICE", f"{who.user_id} has no device {shorten(device_id)}; create it with "
                                  "PUT /_matrix/client/v3/devices/{deviceId}")
        return device_id

    def appservice(self, request: Request) -> Registration:
        """The application service whose as_token this is, whomever it may act as."""
        token = token_of(request)
        if token is None:
            raise MatrixError("M_MISSING_TOKEN", f"{LOGIN_APPSERVICE} needs the as_token: 'Authorization: "
                              "Bearer AS_TOKEN'")
        registration = self.world.registrations.of_as_token(digest(token))
        if not registration and digest(token) in self.world.store.sessions:
            raise forbidden(f"{LOGIN_APPSERVICE} needs an as_token; this is somebody's access token")
        if not registration:
            raise self.unknown_token(digest(token))
        return registration


# -- Handlers. Each takes a request apart, has a verb of section 6 or 7 do it, and gives the answer its shape.

def just(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The handler for a verb that takes no more than who is asking and the variables of the path, and whose result is the answer."""
    owner = verb.__qualname__.partition(".")[0]
    return lambda call, *variables: verb(call.api.by_class[owner], call.who, *variables)


# -- Handlers: accounts.

def versions(call: Call) -> Any:
    return VERSIONS


def well_known(call: Call) -> Any:
    return {"m.homeserver": {"base_url": call.api.world.settings.public_url}}


def capabilities(call: Call) -> Any:
    versions = dict.fromkeys(ROOM_VERSIONS, "stable")
    return {"capabilities": {"m.room_versions": {"default": call.api.world.settings.room_version,
                                                 "available": versions},
                             "m.change_password": {"enabled": not call.who.appservice},
                             "m.3pid_changes": {"enabled": False}, "m.profile_fields": {"enabled": True},
                             "m.set_displayname": {"enabled": True}, "m.set_avatar_url": {"enabled": True}}}


class Challenge(MatrixError):
    """What user-interactive authentication still wants to see. Before an attempt has failed it has no errcode."""

    def __init__(self, stage: str, auth: JsonObject, failure: MatrixError | None = None) -> None:
        super().__init__("M_FORBIDDEN", f"this needs auth with type {stage}", 401)
        session = auth.get("session")
        self.extra = {"session": session if isinstance(session, str) else secrets.token_hex(9),
                      "flows": [{"stages": [stage]}], "params": {}}
        self.failure = failure

    def body(self) -> JsonObject:
        return {**(self.failure.body() if self.failure else {}), **self.extra}


def register_available(call: Call) -> Any:
    username = call.query("username")
    if username is None:
        raise MatrixError("M_MISSING_PARAM", "the query must have username")
    call.api.accounts.check_available(username, None)
    return {"available": True}


def new_device_id(device_id: str) -> str:
    """One that can be named later: in a query, where the empty one is none; in a message to devices, where * is all."""
    if device_id in ("", "*") or not device_id.isprintable() or len(device_id.encode()) > MAX_ID_BYTES:
        raise MatrixError("M_INVALID_PARAM", f"{quoted(device_id)} can't be the ID of a device: it may be any printable text of "
                          f"{MAX_ID_BYTES} bytes at most, but * alone")
    return device_id


def device_of(call: Call) -> JsonObject:
    device_id = call.field("device_id", str, None)
    return {"device_id": new_device_id(device_id) if device_id else None, "ip": call.request.client_ip,
            "display_name": call.field("initial_device_display_name", str, None)}


def register(call: Call) -> Any:
    """A person by the dummy stage of user-interactive authentication, or a ghost by the as_token."""
    accounts = call.api.accounts
    username = call.field("username", str, None) or call.field("user", str, None)     # `user`: the 2016 text
    options = {**device_of(call), "inhibit_login": call.field("inhibit_login", bool, False)}
    if call.body.get("type") == LOGIN_APPSERVICE:
        return accounts.register_ghost(call.api.appservice(call.request), username, **options)
    if call.choice("kind", ("user", "guest"), "user") == "guest":
        raise forbidden("there are no guests here; register as a user")
    token = token_of(call.request)
    if token and call.api.world.registrations.of_as_token(digest(token)):
        raise MatrixError("M_MISSING_PARAM", f"an application service registers users with \"type\": "
                          f"\"{LOGIN_APPSERVICE}\" in the body")
    password = call.field("password", str, None)
    accounts.check_open()
    if username is not None:
        accounts.check_available(username, None)
    if field(call.field("auth", dict, {}), "type", str, "") != "m.login.dummy":
        raise Challenge("m.login.dummy", call.field("auth", dict, {}))
    return accounts.register(username, password, **options)


def login_flows(call: Call) -> Any:
    return {"flows": [{"type": "m.login.password"}, {"type": LOGIN_APPSERVICE}]}


def login(call: Call) -> Any:
    identifier = call.field("identifier", dict, {})
    if identifier and identifier.get("type", "m.id.user") != "m.id.user":
        raise MatrixError("M_UNKNOWN", f"identifier.type must be m.id.user; {NO_THIRD_PARTY_IDS}", 400)
    user = field(identifier, "user", str, None) or call.field("user", str)       # at the top: the 2016 text
    kind = call.field("type", str)
    if kind == LOGIN_APPSERVICE:
        return call.api.accounts.login_ghost(call.api.appservice(call.request), user, **device_of(call))
    if kind != "m.login.password":
        raise MatrixError("M_UNKNOWN", f"type must be m.login.password or {LOGIN_APPSERVICE}, not "
                          f"{shorten(kind)}", 400)
    return call.api.accounts.login(user, call.field("password", str), **device_of(call))


def whoami(call: Call) -> Any:
    """Without device_id for an application service that names none: an as_token has no device."""
    device = {"device_id": call.who.device_id} if call.who.device_id else {}
    return {"user_id": call.who.user_id, "is_guest": False, **device}


def change_password(call: Call) -> Any:
    password, logout_devices = call.field("new_password", str), call.field("logout_devices", bool, True)
    confirm_password(call)
    call.api.accounts.change_password(call.who, password, logout_devices)


def deactivate(call: Call) -> Any:
    """With or without `erase`: what there is besides the events in rooms goes anyway."""
    call.field("erase", bool, False)
    confirm_password(call)
    call.api.accounts.deactivate(call.who)
    return {"id_server_unbind_result": "success"}            # there are no third-party identifiers to unbind


def get_devices(call: Call) -> Any:
    return {"devices": call.api.accounts.devices(call.who)}


def put_device(call: Call, device_id: str) -> Any:
    device_id = new_device_id(device_id) if call.who.appservice else device_id
    created = call.api.accounts.set_device(call.who, device_id, call.field("display_name", str, None))
    return json_response(201 if created else 200, {}, CORS)


def delete_device(call: Call, device_id: str | None = None) -> Any:
    device_ids = call.field("devices", list) if device_id is None else [device_id]
    if not all(isinstance(one, str) for one in device_ids):
        raise MatrixError("M_BAD_JSON", f"'devices' is a list of texts, not {quoted(device_ids)}")
    confirm_password(call)
    call.api.accounts.delete_devices(call.who, device_ids)


def confirm_password(call: Call) -> None:
    """User-interactive authentication by the password; an application service needs none for its users."""
    auth, accounts = call.field("auth", dict, {}), call.api.accounts
    if call.who.appservice:
        return
    if auth.get("type") != "m.login.password":
        raise Challenge("m.login.password", auth)
    try:
        user = field(field(auth, "identifier", dict, auth), "user", str, call.who.user_id)
        if accounts.full_id(user) != call.who.user_id:
            raise forbidden(f"this needs the password of {call.who.user_id}, not of {shorten(user)}")
        accounts.check_password(call.who.user_id, field(auth, "password", str))
    except MatrixError as error:
        raise Challenge("m.login.password", auth, error) from None


def get_profile(call: Call, user_id: str) -> Any:
    return call.api.accounts.profile(user_id, call.asker)


def get_profile_key(call: Call, user_id: str, key: str) -> Any:
    """One field. displayname or avatar_url unset: {} and not 404, on which bridges rely."""
    profile = get_profile(call, user_id)
    if key not in profile and key not in MAX_PROFILE:
        raise MatrixError("M_NOT_FOUND", f"the profile of {user_id} has no field {shorten(key)}")
    return {key: profile[key]} if key in profile else {}


def put_profile_key(call: Call, user_id: str, key: str) -> Any:
    check_profile_key(key)
    if key not in call.body:
        raise MatrixError("M_MISSING_PARAM", f"the body must have {key!r}, the value of this field")
    if key in MAX_PROFILE:                                   # an empty text takes it away
        return call.api.accounts.set_profile(call.who, user_id, key, call.field(key, str, None) or None)
    return call.api.accounts.set_profile_field(call.who, user_id, key, to_json(call.body[key]))


def delete_profile_key(call: Call, user_id: str, key: str) -> Any:
    change = call.api.accounts.set_profile if key in MAX_PROFILE else call.api.accounts.set_profile_field
    change(call.who, user_id, key, None)


def check_profile_key(key: str) -> None:
    if len(key.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise MatrixError("M_KEY_TOO_LARGE", f"the name of a profile field may have {MAX_ID_BYTES} bytes at most")
    if not PROFILE_KEY.fullmatch(key):
        raise MatrixError("M_INVALID_PARAM", f"{shorten(key)!r} can't be the name of a profile field, which is a letter and "
                          "then a-z, 0-9 and '._-', such as com.example.pronouns")


def get_account_data(call: Call, type: str) -> Any:
    return call.api.notifications.rules(call.who) if type == "m.push_rules" else call.api.data.account_data(call.who, "", type)


def get_room_account_data(call: Call, room_id: str, type: str) -> Any:
    return call.api.data.account_data(call.who, check_id("!", room_id), type)


def put_account_data(call: Call, type: str) -> Any:
    call.api.data.set_account_data(call.who, "", settable(type), call.body)


def put_room_account_data(call: Call, room_id: str, type: str) -> Any:
    settable(type)
    call.api.data.set_account_data(call.who, check_id("!", room_id), type, call.body)


def settable(type: str) -> str:
    if type in ("m.fully_read", "m.push_rules"):
        raise MatrixError("M_BAD_JSON", f"{type} is set by its own endpoint", 405)
    return type


def get_tags(call: Call, room_id: str) -> Any:
    return call.api.data.tags(call.who, check_id("!", room_id))


def put_tag(call: Call, room_id: str, tag: str) -> Any:
    call.api.data.set_tag(call.who, check_id("!", room_id), tag, call.body)


def delete_tag(call: Call, room_id: str, tag: str) -> Any:
    call.api.data.set_tag(call.who, check_id("!", room_id), tag, None)


def post_filter(call: Call) -> Any:
    SyncFilter(call.body)                                    # refuses what it can't read
    return {"filter_id": call.api.data.add_filter(call.who, call.body)}


def get_push_rules(call: Call) -> Any:
    """All, or those of the scope "global", which is the only one."""
    rules = call.api.notifications.rules(call.who)
    return rules["global"] if "global" in call.request.path.split("/") else rules


def rule_kind(kind: str) -> str:
    if kind not in RULE_KINDS:
        raise MatrixError("M_INVALID_PARAM", f"the kind of a rule is one of {', '.join(RULE_KINDS)}, not {shorten(kind)}")
    return kind


def get_push_rule(call: Call, kind: str, id: str) -> Any:
    """The rule, or one part of it that the path names."""
    rule, part = call.api.notifications.rule(call.who, rule_kind(kind), id), call.request.path.split("/")[8:]
    return {part[0]: rule[part[0]]} if part else rule


def put_push_rule(call: Call, kind: str, id: str) -> Any:
    rule_kind(kind)
    parts: JsonObject = {"actions": objects(call.body, "actions", str)}
    if kind == "content":
        parts["pattern"] = call.field("pattern", str)
    elif kind in ("override", "underride"):
        parts["conditions"] = objects({"conditions": [], **call.body}, "conditions")
    call.api.notifications.set_rule(call.who, kind, id, parts, call.query("before"), call.query("after"))


def objects(body: JsonObject, key: str, *also: type) -> list[Any]:
    """A list of objects, or of what else it may be."""
    items = field(body, key, list)
    if not all(isinstance(item, (dict, *also)) for item in items):
        raise MatrixError("M_BAD_JSON", f"{key!r} is a list of objects{' or texts' if also else ''}, not {quoted(items)}")
    return items


def delete_push_rule(call: Call, kind: str, id: str) -> Any:
    call.api.notifications.delete_rule(call.who, rule_kind(kind), id)


def put_push_enabled(call: Call, kind: str, id: str) -> Any:
    call.api.notifications.update_rule(call.who, rule_kind(kind), id, {"enabled": call.field("enabled", bool)})


def put_push_actions(call: Call, kind: str, id: str) -> Any:
    call.api.notifications.update_rule(call.who, rule_kind(kind), id, {"actions": objects(call.body, "actions", str)})


def openid_userinfo(call: Call) -> Any:
    token = call.query("access_token")
    if not token:
        raise MatrixError("M_MISSING_TOKEN", "the query must have access_token, an OpenID token")
    return {"sub": call.api.openid.user(token)}


# -- Handlers: end-to-end encryption.

def upload_keys(call: Call) -> Any:
    fallback = call.field("fallback_keys", dict, {}) or call.field("org.matrix.msc2732.fallback_keys", dict, {})
    return {"one_time_key_counts": call.api.keys.upload(call.who, call.field("device_keys", dict, {}),
                                                        call.field("one_time_keys", dict, {}), fallback)}


def by_user(call: Call, key: str, kind: type[T]) -> dict[str, T]:
    """{user ID: what is wanted of it} in the body."""
    wanted = call.field(key, dict)
    return {check_id("@", user_id): field(wanted, user_id, kind) for user_id in wanted}


def key_changes(call: Call) -> Any:
    """`to` is not read: what has happened since is told as well, and again by the next /sync."""
    call.required("from", ", the next_batch of a /sync")
    return call.api.sync.key_changes(call.who, call.integer("from", 0))


def query_keys(call: Call) -> Any:
    wanted = by_user(call, "device_keys", list)
    call.api.world.ask_for_users(wanted, call.asker)
    return call.api.keys.query(call.who, wanted)


def claim_keys(call: Call) -> Any:
    return call.api.keys.claim(call.who, by_user(call, "one_time_keys", dict))


def upload_cross_signing(call: Call) -> Any:
    keys = {usage: call.field(f"{usage}_key", dict) for usage in USAGES if f"{usage}_key" in call.body}
    replaces = call.api.keys.check_cross_signing(call.who, keys)
    if replaces:
        confirm_password(call)
    call.api.keys.upload_cross_signing(call.who, keys, replaces or call.who.appservice is not None)


def upload_signatures(call: Call) -> Any:
    return call.api.keys.upload_signatures(call.who, {check_id("@", user_id): call.field(user_id, dict) for user_id in call.body})


def send_to_device(call: Call, type: str, txn_id: str) -> Any:
    call.api.keys.send_to_device(call.who, type, txn_id, by_user(call, "messages", dict))


def post_backup(call: Call) -> Any:
    return {"version": call.api.backups.create(call.who, call.field("algorithm", str), call.field("auth_data", dict))}


def put_backup(call: Call, version: str) -> Any:
    call.api.backups.update(call.who, version, call.field("algorithm", str), call.field("auth_data", dict))


def put_backup_keys(call: Call, room_id: str | None = None, session_id: str | None = None) -> Any:
    """Keys of a session, of a room, or of many rooms."""
    version, sessions = call.required("version"), {"sessions": {session_id: call.body}} if session_id is not None else call.body
    rooms = call.field("rooms", dict) if room_id is None else {room_id: sessions}
    keys = {room: field(field(rooms, room, dict), "sessions", dict) for room in rooms}
    return call.api.backups.put_keys(call.who, version, {
        room: {session: field(sessions, session, dict) for session in sessions} for room, sessions in keys.items()})


def get_backup_keys(call: Call, room_id: str | None = None, session_id: str | None = None) -> Any:
    found = call.api.backups.keys(call.who, call.required("version"), room_id, session_id)
    if room_id is None:
        return {"rooms": {room: {"sessions": sessions} for room, sessions in found.items()}}
    if session_id is None:
        return {"sessions": found.get(room_id, {})}
    if not found:
        raise MatrixError("M_NOT_FOUND", f"the backup has no key for the session {shorten(session_id)}")
    return found[room_id][session_id]


def delete_backup_keys(call: Call, room_id: str | None = None, session_id: str | None = None) -> Any:
    return call.api.backups.delete_keys(call.who, call.required("version"), room_id, session_id)


# -- Handlers: rooms.

def create_room(call: Call) -> Any:
    return {"room_id": call.api.rooms.create(call.who, call.body)}


def join_room(call: Call, room_id: str) -> Any:
    return {"room_id": call.api.rooms.join(call.who, room_id, call.reason)}


def knock_room(call: Call, room_id: str) -> Any:
    return {"room_id": call.api.rooms.knock(call.who, room_id, call.reason)}


def invite(call: Call, room_id: str) -> Any:
    if "medium" in call.body:
        raise forbidden(NO_THIRD_PARTY_IDS)
    call.api.rooms.invite(call.who, room_id, call.field("user_id", str), call.reason)


def leave(call: Call, room_id: str) -> Any:
    call.api.rooms.set_membership(call.who, room_id, call.who.user_id, "leave", call.reason)


def kick(call: Call, room_id: str) -> Any:
    call.api.rooms.kick(call.who, room_id, call.field("user_id", str), call.reason)


def ban(call: Call, room_id: str) -> Any:
    call.api.rooms.set_membership(call.who, room_id, call.field("user_id", str), "ban", call.reason)


def unban(call: Call, room_id: str) -> Any:
    call.api.rooms.unban(call.who, room_id, call.field("user_id", str), call.reason)


def joined_rooms(call: Call) -> Any:
    return {"joined_rooms": call.api.rooms.joined(call.who)}


def send(call: Call, room_id: str, type: str, txn_id: str) -> Any:
    return {"event_id": call.api.rooms.send(call.who, room_id, type, call.body, txn_id, call.ts)}


def redact(call: Call, room_id: str, event_id: str, txn_id: str) -> Any:
    return {"event_id": call.api.rooms.redact(call.who, room_id, event_id, call.body, txn_id)}


def put_state(call: Call, room_id: str, type: str, state_key: str = "") -> Any:
    return {"event_id": call.api.rooms.set_state(call.who, room_id, type, state_key, call.body, call.ts)}


def get_state_event(call: Call, room_id: str, type: str, state_key: str = "") -> Any:
    event = call.api.history.state_event(call.who, room_id, type, state_key)
    whole = call.choice("format", ("content", "event"), "content") == "event"
    return call.api.history.render(call.who, [event])[0] if whole else event.content


def get_event_near(call: Call, room_id: str) -> Any:
    call.required("ts", ", in milliseconds since 1970"), call.required("dir", ", 'f' or 'b'")
    return call.api.history.near(call.who, room_id, call.integer("ts", 0), call.choice("dir", ("f", "b"), "") == "f")


def get_members(call: Call, room_id: str) -> Any:
    return {"chunk": call.api.history.members(call.who, room_id, call.integer("at", None),
                                            *(call.choice(name, tuple(MEMBERSHIP_RULES), "") if call.query(name) else None
                                              for name in ("membership", "not_membership")))}


def get_joined_members(call: Call, room_id: str) -> Any:
    return {"joined": call.api.history.joined_members(call.who, room_id)}


def query_filter(call: Call) -> tuple[Filter, JsonObject]:
    """The event filter in the query, as JSON."""
    source = parse_object(call.query("filter") or "", "filter")
    return event_filter(source), source


def get_messages(call: Call, room_id: str) -> Any:
    filter, source = query_filter(call)
    limit = call.limit(field(source, "limit", int, 10))
    backwards = call.choice("dir", ("b", "f"), "b") == "b"
    return call.api.history.messages(call.who, room_id, call.integer("from", None), backwards, limit,
                                   filter, call.integer("to", None), field(source, "lazy_load_members", bool, False))


def get_context(call: Call, room_id: str, event_id: str) -> Any:
    filter, source = query_filter(call)
    return call.api.history.context(call.who, room_id, event_id, call.limit(10), filter,
                                    field(source, "lazy_load_members", bool, False))


def get_relations(call: Call, room_id: str, event_id: str, rel_type: str | None = None, type: str | None = None) -> Any:
    recurse = call.flag("recurse")
    return call.api.relations.related(call.who, room_id, event_id, rel_type, type, call.integer("from", None), call.integer("to", None),
                                    call.choice("dir", ("b", "f"), "b") == "b", call.limit(50, 1), recurse)


def get_threads(call: Call, room_id: str) -> Any:
    participated = call.choice("include", ("all", "participated"), "all") == "participated"
    return call.api.relations.threads(call.who, room_id, participated, call.integer("from", None), call.limit(50, 1))


def room_aliases(call: Call, room_id: str) -> Any:
    return {"aliases": call.api.aliases.of_room(call.who, room_id)}


def get_alias(call: Call, alias: str) -> Any:
    return {"room_id": call.api.aliases.resolve(alias, call.asker), "servers": [call.api.world.name]}


def put_alias(call: Call, alias: str) -> Any:
    call.api.aliases.add(call.who, alias, call.field("room_id", str))


def get_visibility(call: Call, room_id: str) -> Any:
    return {"visibility": "public" if call.api.directory.is_published(call.who, room_id) else "private"}


def wants_public(call: Call) -> bool:
    visibility = call.field("visibility", str, "public")
    if visibility not in ("public", "private"):
        raise MatrixError("M_INVALID_PARAM", f"visibility must be public or private, not {quoted(visibility)}")
    return visibility == "public"


def put_visibility(call: Call, room_id: str) -> Any:
    call.api.directory.publish(call.who, room_id, wants_public(call))


def put_network_room(call: Call, network: str, room_id: str) -> Any:
    call.api.directory.publish_in_network(call.who, network, room_id, wants_public(call))


def get_hierarchy(call: Call, room_id: str) -> Any:
    suggested_only = call.flag("suggested_only")
    max_depth = min(call.integer("max_depth", MAX_SPACE_DEPTH), MAX_SPACE_DEPTH)
    return call.api.directory.hierarchy(call.who, room_id, suggested_only, max_depth, call.integer("from", 0), call.limit(50, 1))


def get_summary(call: Call, id: str) -> Any:
    who = call.api.identify(call.request, "user") if token_of(call.request) else call.who      # whom an application service names
    room_id = call.api.aliases.resolve(id, call.asker) if id[:1] == "#" else id
    return call.api.directory.summary(who, room_id)


def search_users(call: Call) -> Any:
    return call.api.directory.search_users(call.who, call.field("search_term", str), min(max(call.field("limit", int, 10), 1), 50))


def own_directory(call: Call) -> None:
    server = call.query("server")
    if server and server != call.api.world.name:
        raise forbidden(f"this homeserver speaks to no other one: it has the directory of {call.api.world.name}, "
                        f"not of {shorten(server)}")


def get_public_rooms(call: Call) -> Any:
    own_directory(call)
    return call.api.directory.public(call.integer("since", 0), call.limit(100))


def search_public_rooms(call: Call) -> Any:
    own_directory(call)
    since, filter = number_in(call.field("since", str, "") or "0"), call.field("filter", dict, {})
    if since is None:
        raise MatrixError("M_INVALID_PARAM", f"since is a next_batch or prev_batch of another answer, not {quoted(call.body['since'])}")
    types, network = field(filter, "room_types", list, []), call.field("third_party_instance_id", str, "")
    if not all(one is None or isinstance(one, str) for one in types):
        raise MatrixError("M_BAD_JSON", f"room_types must be texts or null, not {quoted(types)}")
    everywhere = call.field("include_all_networks", bool, False)
    if everywhere and network:
        raise MatrixError("M_INVALID_PARAM", "it is either include_all_networks or one third_party_instance_id")
    return call.api.directory.public(
        since, max(call.field("limit", int, 100), 0),
        field(filter, "generic_search_term", str, ""), types, None if everywhere else network)


def put_typing(call: Call, room_id: str) -> Any:
    seconds = min(max(call.field("timeout", int, 30_000), 0), 120_000) / 1000
    until = call.api.world.clock.monotonic() + seconds if call.field("typing", bool) else None
    call.api.typing.set(call.who, room_id, until)


def post_receipt(call: Call, room_id: str, receipt_type: str, event_id: str) -> Any:
    thread_id = call.body.get("thread_id", "")
    if not isinstance(thread_id, str) or ("thread_id" in call.body and not thread_id):
        raise MatrixError("M_INVALID_PARAM", f"thread_id must be \"main\" or the event ID of a root, not {quoted(thread_id)}")
    call.api.receipts.add(call.who, room_id, {receipt_type: event_id}, thread_id)


def post_read_markers(call: Call, room_id: str) -> Any:
    types = {str(type): call.field(type, str) for type in ("m.fully_read", "m.read", "m.read.private")
             if call.body.get(type) is not None}
    call.api.receipts.add(call.who, room_id, types)


def get_sync(call: Call) -> Any:
    """An application service may ask, too, as one of its users. What it is interested in it is told in transactions anyway; to
    sync without `user_id` the specification forbids it, and here it gets what its sender_localpart user sees.
    """
    chosen = call.query("filter") or "{}"
    filter = inline_filter(chosen) if chosen[:1] == "{" else SyncFilter(call.api.data.filter(call.who, chosen))
    timeout = call.integer("timeout", 0) / 1000
    full_state = call.flag("full_state")
    state_after = next((prefix + "state_after" for prefix in ("", "org.matrix.msc4222.")
                        if call.query(f"{prefix}use_state_after") == "true"), "")
    return call.api.sync.sync(call.who, call.integer("since", None), filter, timeout, full_state, state_after,
                              call.choice("set_presence", PRESENCES, "online"), call.request.check_client)


def get_events(call: Call) -> Any:
    """The same as /sync as a plain list (deprecated): what happens after `from`, or from now on."""
    start, room_id = call.integer("from", call.api.world.store.position), call.query("room_id")
    if room_id and room_id not in call.api.rooms.joined(call.who):
        raise not_in(call.who.user_id, room_id)
    source = {"room": {"timeline": {"limit": MAX_PAGE}, **({"rooms": [room_id]} if room_id else {})}}
    who = dataclasses.replace(call.who, device_id=None)      # messages to the device are for its /sync: here they would be lost
    timeout = call.integer("timeout", 0) / 1000
    answer = call.api.sync.sync(who, start, SyncFilter(source), timeout, check_client=call.request.check_client)
    rooms = json.loads(to_json(answer.get("rooms", {})))     # /sync has them written already
    chunk = [*answer.get("presence", {}).get("events", [])]
    for room_id, entry in rooms.get("invite", {}).items():
        chunk.append({**entry["invite_state"]["events"][-1], "room_id": room_id})
    for section in ("join", "leave"):
        for room_id, entry in rooms.get(section, {}).items():
            chunk += entry.get("timeline", {}).get("events", [])
            chunk += [{**event, "room_id": room_id} for event in entry.get("ephemeral", {}).get("events", [])]
    return {"start": str(start), "end": answer["next_batch"], "chunk": chunk}


def get_initial_sync(call: Call, room_id: str) -> Any:
    return call.api.history.initial_sync(call.who, room_id, call.limit(10), call.api.presence.events)


def get_presence(call: Call, user_id: str) -> Any:
    return call.api.presence.get(call.who, check_id("@", user_id))


def put_presence(call: Call) -> Any:
    presence = call.field("presence", str)
    if presence not in PRESENCES:
        raise MatrixError("M_INVALID_PARAM", f"presence is one of {', '.join(PRESENCES)}, not {shorten(presence)}")
    message = call.field("status_msg", str, None)
    check_length("status_msg", message, MAX_STATUS)
    call.api.presence.set(call.who, presence, message)


# -- Handlers: media.

INLINE_TYPES = (
    "text/css", "text/plain", "text/csv", "application/json", "application/ld+json",
    "image/jpeg", "image/gif", "image/png", "image/apng", "image/webp", "image/avif",
    "video/mp4", "video/webm", "video/ogg", "video/quicktime",
    "audio/mp4", "audio/webm", "audio/aac", "audio/mpeg", "audio/ogg", "audio/wave", "audio/wav", "audio/x-wav",
    "audio/x-pn-wav", "audio/flac", "audio/x-flac",
)


def upload(call: Call, server_name: str = "", media_id: str | None = None) -> Any:
    """At once, or for a URI that was made before."""
    media, content_type = call.api.media, call.request.headers.get("content-type") or "application/octet-stream"
    with media.uploading(call.who) if call.request.is_larger(SMALL_UPLOAD) else contextlib.nullcontext():
        content = call.bytes(call.api.world.settings.max_upload_bytes)
        if media_id is None:
            return {"content_uri": media.upload(call.who, content, content_type, call.query("filename"))}
        return media.fill(call.who, server_name, media_id, content, content_type, call.query("filename"))


def download(call: Call, server_name: str, media_id: str, filename: str | None = None) -> Any:
    timeout = call.integer("timeout_ms", 20_000, 0, 120_000) / 1000
    content_type, uploaded_as, content = call.api.media.download(server_name, media_id, timeout)
    return media_response(content_type, filename or uploaded_as, content)


def thumbnail(call: Call, server_name: str, media_id: str) -> Any:
    """The picture itself, whatever its size: to scale it takes more than the standard library has."""
    if call.integer("width", None, 1) is None or call.integer("height", None, 1) is None:
        raise MatrixError("M_MISSING_PARAM", "the query must have width and height")
    call.choice("method", ("crop", "scale"), "scale")
    answer = download(call, server_name, media_id)
    if not answer.content_type.lower().startswith("image/"):
        raise MatrixError("M_UNKNOWN", f"{shorten(answer.content_type)} is no type of a picture", 400)
    return answer


def media_response(content_type: str, filename: str | None, content: bytes) -> Response:
    disposition = "inline" if content_type.partition(";")[0].strip().lower() in INLINE_TYPES else "attachment"
    if filename:
        disposition += "; filename*=UTF-8''" + urllib.parse.quote(filename, safe="")
    headers = (f"Content-Disposition: {disposition}\r\nContent-Security-Policy: sandbox; default-src 'none'\r\n"
               "Cross-Origin-Resource-Policy: cross-origin\r\n")
    return Response(200, content, content_type, CORS + headers.encode())


def media_config(call: Call) -> Any:
    return {"m.upload.size": call.api.world.settings.max_upload_bytes}


# -- Handlers: for application services.

def ping(call: Call, id: str) -> Any:
    registration = call.who.appservice
    if not registration or registration.id != id:
        raise forbidden(f"the as_token is not that of the application service {shorten(id)}")
    return {"duration_ms": call.api.delivery.ping(registration, call.field("transaction_id", str, None))}


def map_uri(call: Call) -> Any:
    """URI mapping of the 2016 text: {"user_id": …} or {"alias": …}. A room that is private had better not be mapped."""
    kinds = {"user": ("users", "user_id"), "alias": ("aliases", "alias")}
    kind, key = kinds[call.request.path.rpartition("/")[2]]
    uri = call.query("uri")
    if uri is None:
        raise MatrixError("M_MISSING_PARAM", "the query must have uri, such as irc://localhost/%23lobby, "
                          "percent-encoded")
    if not is_uri(uri):
        raise MatrixError("M_INVALID_PARAM", f"{shorten(uri)!r} is not a URI of 2,048 bytes at most")
    id = call.api.world.registrations.map_uri(kind, uri)
    if not id:
        raise MatrixError("M_NOT_FOUND", f"no application service maps {shorten(uri)} to one of its {kind}")
    return {key: id}


# -- Handlers: third-party networks.

def get_protocols(call: Call) -> Any:
    return call.api.delivery.networks.protocols(call.asker)


def get_protocol(call: Call, protocol: str) -> Any:
    found = call.api.delivery.networks.protocols(call.asker, protocol)
    if not found:
        raise MatrixError("M_NOT_FOUND", f"no application service tells of a protocol {shorten(protocol)!r}")
    return found[protocol]


def look_up(call: Call, protocol: str = "") -> Any:
    """By the fields of a protocol; or, without one, by the Matrix ID."""
    kind = call.request.path.split("/")[5]
    key, sigil = THIRD_PARTY_IDS[kind], {"user": "@", "location": "#"}[kind]
    own = ("access_token", *IDENTITY) if call.who.appservice else ("access_token",)
    fields = {name: value for name, value in call.request.query.items() if name not in own}
    if not protocol:
        if key not in fields:
            raise MatrixError("M_MISSING_PARAM", f"the query must have {key}, or the path a protocol")
        fields = {key: check_id(sigil, fields[key])}
    return call.api.delivery.networks.look_up(kind, protocol, fields, call.asker)


# -- The table. The first letter of a path stands for a prefix; `python asbridge.py routes` prints whole paths.

PREFIXES = {"C": "/_matrix/client/v3", "R": "/_matrix/client/v3/rooms/{roomId}", "U": "/_matrix/client/v3/user/{userId}",
            "L": "/_matrix/client/v3/directory/list", "V": "/_matrix/client/v1", "N": "/_matrix/client/v1/rooms/{roomId}/relations",
            "K": "/_matrix/client/v3/room_keys", "D": "/_matrix/client/v1/media", "M": "/_matrix/media/v3", "A": "/_matrix/app/v1"}


def route_table(*rows: tuple[str, str, str, str, Callable[..., Any]]) -> list[Route]:
    return [Route(method, PREFIXES.get(path[0], path[0]) + path[1:], auth, spec, handler) for method, path, auth, spec, handler in rows]


ROUTES = route_table(
    # method   path                                            who           section of the spec            handler
    ("GET",    "/_matrix/client/versions",                     "nobody",     "API Versions",                versions),
    ("GET",    "/.well-known/matrix/client",                   "nobody",     "Server Discovery",            well_known),
    ("GET",    "C/capabilities",                               "user",       "Capabilities negotiation",    capabilities),
    # Accounts
    ("GET",    "C/register/available",                         "nobody",     "Account registration",        register_available),
    ("POST",   "C/register",                                   "nobody",     "AS: Permissions",             register),
    ("GET",    "C/login",                                      "nobody",     "Login",                       login_flows),
    ("POST",   "C/login",                                      "nobody",     "Login; AS: Permissions",      login),
    ("POST",   "C/logout",                                     "user",       "Login",                       just(Accounts.logout)),
    ("POST",   "C/logout/all",                                 "user",       "Login",                       just(Accounts.logout_all)),
    ("GET",    "C/account/whoami",                             "user",       "Current account",             whoami),
    ("POST",   "C/account/password",                           "user",       "Account management",          change_password),
    ("POST",   "C/account/deactivate",                         "user",       "Account management",          deactivate),
    ("GET",    "C/devices",                                    "user",       "Device Management",           get_devices),
    ("GET",    "C/devices/{deviceId}",                         "user",       "Device Management",           just(Accounts.device)),
    ("PUT",    "C/devices/{deviceId}",                         "user",       "Device Management",           put_device),
    ("DELETE", "C/devices/{deviceId}",                         "user",       "Device Management",           delete_device),
    ("POST",   "C/delete_devices",                             "user",       "Device Management",           delete_device),
    ("GET",    "C/profile/{userId}",                           "maybe",      "Profiles",                    get_profile),
    ("GET",    "C/profile/{userId}/{keyName}",                 "maybe",      "Profiles",                    get_profile_key),
    ("PUT",    "C/profile/{userId}/{keyName}",                 "user",       "Profiles",                    put_profile_key),
    ("DELETE", "C/profile/{userId}/{keyName}",                 "user",       "Profiles",                    delete_profile_key),
    ("GET",    "U/account_data/{type}",                        "self",       "Client Config",               get_account_data),
    ("PUT",    "U/account_data/{type}",                        "self",       "Client Config",               put_account_data),
    ("GET",    "U/rooms/{roomId}/account_data/{type}",         "self",       "Client Config",               get_room_account_data),
    ("PUT",    "U/rooms/{roomId}/account_data/{type}",         "self",       "Client Config",               put_room_account_data),
    ("GET",    "U/rooms/{roomId}/tags",                        "self",       "Room Tagging",                get_tags),
    ("PUT",    "U/rooms/{roomId}/tags/{tag}",                  "self",       "Room Tagging",                put_tag),
    ("DELETE", "U/rooms/{roomId}/tags/{tag}",                  "self",       "Room Tagging",                delete_tag),
    ("POST",   "U/openid/request_token",                       "self",       "OpenID",                      just(OpenId.token)),
    ("GET",    "/_matrix/federation/v1/openid/userinfo",       "nobody",     "Server-Server API, OpenID",   openid_userinfo),
    ("POST",   "U/filter",                                     "self",       "Filtering",                   post_filter),
    ("GET",    "U/filter/{filterId}",                          "self",       "Filtering",                   just(ClientData.filter)),
    ("GET",    "C/pushrules",                                  "user",       "Push Notifications",          get_push_rules),
    ("GET",    "C/pushrules/",                                 "user",       "Push Notifications",          get_push_rules),
    ("GET",    "C/pushrules/global",                           "user",       "Push Notifications",          get_push_rules),
    ("GET",    "C/pushrules/global/",                          "user",       "Push Notifications",          get_push_rules),
    ("GET",    "C/pushrules/global/{kind}/{ruleId}",           "user",       "Push Notifications",          get_push_rule),
    ("PUT",    "C/pushrules/global/{kind}/{ruleId}",           "user",       "Push Notifications",          put_push_rule),
    ("DELETE", "C/pushrules/global/{kind}/{ruleId}",           "user",       "Push Notifications",          delete_push_rule),
    ("GET",    "C/pushrules/global/{kind}/{ruleId}/enabled",   "user",       "Push Notifications",          get_push_rule),
    ("PUT",    "C/pushrules/global/{kind}/{ruleId}/enabled",   "user",       "Push Notifications",          put_push_enabled),
    ("GET",    "C/pushrules/global/{kind}/{ruleId}/actions",   "user",       "Push Notifications",          get_push_rule),
    ("PUT",    "C/pushrules/global/{kind}/{ruleId}/actions",   "user",       "Push Notifications",          put_push_actions),
    # End-to-end encryption
    ("POST",   "C/keys/upload",                                "user",       "Uploading keys",              upload_keys),
    ("POST",   "C/keys/query",                                 "user",       "Querying keys; AS: Querying", query_keys),
    ("GET",    "C/keys/changes",                               "user",       "Tracking device lists",       key_changes),
    ("POST",   "C/keys/claim",                                 "user",       "Claiming one-time keys",      claim_keys),
    ("POST",   "C/keys/device_signing/upload",                 "user",       "AS: Cross-signing",           upload_cross_signing),
    ("POST",   "C/keys/signatures/upload",                     "user",       "Cross-signing",               upload_signatures),
    ("PUT",    "C/sendToDevice/{eventType}/{txnId}",           "user",       "Send-to-Device messaging",    send_to_device),
    ("POST",   "K/version",                                    "user",       "Server-side key backups",     post_backup),
    ("GET",    "K/version",                                    "user",       "Server-side key backups",     just(Backups.get)),
    ("GET",    "K/version/{version}",                          "user",       "Server-side key backups",     just(Backups.get)),
    ("PUT",    "K/version/{version}",                          "user",       "Server-side key backups",     put_backup),
    ("DELETE", "K/version/{version}",                          "user",       "Server-side key backups",     just(Backups.delete)),
    *((method, f"K/keys{where}",                               "user",       "Server-side key backups",     handler)
      for method, handler in (("PUT", put_backup_keys), ("GET", get_backup_keys), ("DELETE", delete_backup_keys))
      for where in ("", "/{roomId}", "/{roomId}/{sessionId}")),
    # Rooms
    ("GET",    "C/sync",                                       "user",       "Syncing",                     get_sync),
    ("GET",    "C/events",                                     "user",       "r0: Syncing",                 get_events),
    ("GET",    "R/initialSync",                                "user",       "r0: Syncing",                 get_initial_sync),
    ("GET",    "C/presence/{userId}/status",                   "user",       "Presence",                    get_presence),
    ("PUT",    "C/presence/{userId}/status",                   "self",       "Presence",                    put_presence),
    ("POST",   "C/createRoom",                                 "user",       "Creation",                    create_room),
    ("POST",   "C/join/{roomId}",                              "user",       "Joining rooms",               join_room),
    ("POST",   "R/join",                                       "user",       "Joining rooms",               join_room),
    ("POST",   "C/knock/{roomId}",                             "user",       "Knocking on rooms",           knock_room),
    ("POST",   "R/invite",                                     "user",       "Joining rooms",               invite),
    ("POST",   "R/leave",                                      "user",       "Leaving rooms",               leave),
    ("POST",   "R/kick",                                       "user",       "Leaving rooms",               kick),
    ("POST",   "R/ban",                                        "user",       "Banning users in a room",     ban),
    ("POST",   "R/unban",                                      "user",       "Banning users in a room",     unban),
    ("POST",   "R/forget",                                     "user",       "Leaving rooms",               just(Rooms.forget)),
    ("GET",    "C/joined_rooms",                               "user",       "Listing rooms",               joined_rooms),
    ("PUT",    "R/send/{eventType}/{txnId}",                   "user",       "Sending; AS: Timestamps",     send),
    ("PUT",    "R/redact/{eventId}/{txnId}",                   "user",       "Redactions",                  redact),
    ("GET",    "R/state",                                      "user",       "Getting events",              just(History.state)),
    ("GET",    "R/state/{eventType}",                          "user",       "Getting events",              get_state_event),
    ("GET",    "R/state/{eventType}/{stateKey}",               "user",       "Getting events",              get_state_event),
    ("PUT",    "R/state/{eventType}",                          "user",       "Sending; AS: Timestamps",     put_state),
    ("PUT",    "R/state/{eventType}/{stateKey}",               "user",       "Sending; AS: Timestamps",     put_state),
    ("GET",    "R/event/{eventId}",                            "user",       "Getting events",              just(History.event)),
    ("GET",    "V/rooms/{roomId}/timestamp_to_event",          "user",       "Jump to event by timestamp",  get_event_near),
    ("GET",    "R/members",                                    "user",       "Getting events",              get_members),
    ("GET",    "R/joined_members",                             "user",       "Getting events",              get_joined_members),
    ("GET",    "R/messages",                                   "user",       "Getting events",              get_messages),
    ("GET",    "R/context/{eventId}",                          "user",       "Event Context",               get_context),
    ("GET",    "N/{eventId}",                                  "user",       "Relationships",               get_relations),
    ("GET",    "N/{eventId}/{relType}",                        "user",       "Relationships",               get_relations),
    ("GET",    "N/{eventId}/{relType}/{eventType}",            "user",       "Relationships",               get_relations),
    ("GET",    "V/rooms/{roomId}/threads",                     "user",       "Threading",                   get_threads),
    ("PUT",    "R/typing/{userId}",                            "self",       "Typing Notifications",        put_typing),
    ("POST",   "R/receipt/{receiptType}/{eventId}",            "user",       "Receipts",                    post_receipt),
    ("POST",   "R/read_markers",                               "user",       "Fully read markers",          post_read_markers),
    # Aliases and the directory
    ("GET",    "R/aliases",                                    "user",       "Room aliases",                room_aliases),
    ("GET",    "C/directory/room/{roomAlias}",                 "maybe",      "Room aliases; AS: Querying",  get_alias),
    ("PUT",    "C/directory/room/{roomAlias}",                 "user",       "Room aliases",                put_alias),
    ("DELETE", "C/directory/room/{roomAlias}",                 "user",       "Room aliases",                just(Aliases.delete)),
    ("GET",    "L/room/{roomId}",                              "maybe",      "Listing rooms",               get_visibility),
    ("PUT",    "L/room/{roomId}",                              "user",       "Listing rooms",               put_visibility),
    ("PUT",    "L/appservice/{networkId}/{roomId}",            "appservice", "AS: Room directories",        put_network_room),
    ("GET",    "C/publicRooms",                                "maybe",      "Listing rooms",               get_public_rooms),
    ("POST",   "C/publicRooms",                                "user",       "Listing rooms",               search_public_rooms),
    ("GET",    "V/rooms/{roomId}/hierarchy",                   "user",       "Spaces",                      get_hierarchy),
    ("GET",    "V/room_summary/{roomId}",                      "maybe",      "Room summaries",              get_summary),
    ("POST",   "C/user_directory/search",                      "user",       "User Directory",              search_users),
    # Media
    ("POST",   "M/upload",                                     "user",       "Content repository",          upload),
    ("POST",   "/_matrix/media/v1/create",                     "user",       "Content repository",          just(Media.create)),
    ("PUT",    "M/upload/{serverName}/{mediaId}",              "user",       "Content repository",          upload),
    ("GET",    "M/download/{serverName}/{mediaId}",            "nobody",     "Content repository",          download),
    ("GET",    "M/download/{serverName}/{mediaId}/{fileName}", "nobody",     "Content repository",          download),
    ("GET",    "M/thumbnail/{serverName}/{mediaId}",           "nobody",     "Content repository",          thumbnail),
    ("GET",    "M/config",                                     "user",       "Content repository",          media_config),
    ("GET",    "D/download/{serverName}/{mediaId}",            "user",       "Content repository",          download),
    ("GET",    "D/download/{serverName}/{mediaId}/{fileName}", "user",       "Content repository",          download),
    ("GET",    "D/thumbnail/{serverName}/{mediaId}",           "user",       "Content repository",          thumbnail),
    ("GET",    "D/config",                                     "user",       "Content repository",          media_config),
    # Third-party networks
    ("GET",    "C/thirdparty/protocols",                       "user",       "Third-party Networks",        get_protocols),
    ("GET",    "C/thirdparty/protocol/{protocol}",             "user",       "Third-party Networks",        get_protocol),
    ("GET",    "C/thirdparty/user",                            "user",       "Third-party Networks",        look_up),
    ("GET",    "C/thirdparty/user/{protocol}",                 "user",       "Third-party Networks",        look_up),
    ("GET",    "C/thirdparty/location",                        "user",       "Third-party Networks",        look_up),
    ("GET",    "C/thirdparty/location/{protocol}",             "user",       "Third-party Networks",        look_up),
    # For application services
    ("POST",   "V/appservice/{appserviceId}/ping",             "appservice", "AS: Pinging",                 ping),
    ("GET",    "A/user",                                       "nobody",     "AS, 2016 text: URI mapping",  map_uri),
    ("GET",    "A/alias",                                      "nobody",     "AS, 2016 text: URI mapping",  map_uri),
)


# ============================================================================
# 9. Inspector
# ============================================================================
# The homeserver on itself: who claims an ID, why an event went to an application
# service or did not and what became of it, what passed on the wire; and levers
# for a lesson or a test: faults, pause, replay, the clock. And the examiner: does
# an application service do what the specification asks? All of it is JSON under
# /_asbridge/ (its own, in no specification), and a page that uses nothing else.
# Above, "Why?" (3), what passes and the faults (7), and the doorkeeper (8) are made for it.

MAX_MISSES = 20                  # members that don't match, of those that `why` names


class Inspector:
    """Answers questions about a running homeserver. What it gives are the plain values of the API."""

    def __init__(self, world: World, delivery: Delivery) -> None:
        self.world, self.delivery = world, delivery

    def status(self) -> JsonObject:
        world = self.world
        with world.store.read() as reader:
            appservices = [self._appservice(reader, registration) for registration in world.registrations]
        return {"version": __version__, "server_name": world.name, "url": world.settings.public_url, **self.clock(),
                "appservices": appservices}

    def clock(self) -> JsonObject:
        return {"now": self.world.clock.now(), "wound": self.world.clock.wound}

    def _appservice(self, reader: Reader, registration: Registration) -> JsonObject:
        id, last = registration.id, reader.last_acknowledged(registration.id)
        namespaces = {kind: [{"regex": one.regex, "exclusive": one.exclusive} for one in entries]
                      for kind, entries in registration.namespaces.items()}
        return {"id": id, "url": registration.url, "sender": registration.sender(self.world.name),
                "namespaces": namespaces, "waiting": reader.count_waiting(id),
                "last_acknowledged": {"txn_id": str(last[0]), "ts": last[1]} if last else None,
                "faults": self.delivery.faults(id).told(), **self._worker(self.delivery.worker(id))}

    def _worker(self, worker: Worker | None) -> JsonObject:
        if worker is None:
            return {"state": "nothing is sent", "failures": 0, **dict.fromkeys(("down_since", "next_attempt", "open", "latency_ms"))}
        now, frozen, left = self.world.clock.now(), worker.transaction, worker.next_attempt - self.world.clock.monotonic()
        answered = [one.ms for one in list(worker.attempts) if one.status is not None][-1:]
        return {"state": worker.state, "failures": worker.failures, "down_since": worker.down_since,
                "next_attempt": now + int(left * 1000) if frozen and left > 0 else None,
                "open": {"txn_id": str(frozen.txn_id), "events": frozen.events} if frozen else None,
                "latency_ms": answered[0] if answered else None}

    # -- what was pushed

    def attempts(self, id: str) -> dict[int, list[JsonObject]]:
        """The attempts since the start, by transaction, old to new."""
        worker, found = self.delivery.worker(id), collections.defaultdict[int, list[JsonObject]](list)
        for one in list(worker.attempts) if worker else ():
            found[one.txn_id or 0].append({"ts": one.ts, "status": one.status, "error": one.error or None, "ms": one.ms,
                                           "fault": one.fault or None, "n": one.n, "failure": one.failure or None})
        return found

    def transactions(self, id: str, limit: int = -1) -> list[JsonObject]:
        """The transactions that are kept, old to new, with all of their events."""
        self.delivery.registration(id)
        with self.world.store.read() as reader:
            rows, attempts = reader.transactions(id, limit), self.attempts(id)
        return [{"txn_id": str(txn_id), "events": json.loads(body)["events"], "acknowledged": acknowledged is not None,
                 "acknowledged_ts": acknowledged, "attempts": attempts[txn_id]} for txn_id, body, acknowledged in rows]

    # -- why

    def explain(self, id: str) -> JsonObject:
        """What explain() says, and whether the ID exists."""
        told = explain(self.world.registrations, id)
        with self.world.store.read() as reader:
            return explained(told, reader)

    def why(self, event_id: str, id: str) -> JsonObject:
        """Why an event went to an application service or did not, and what became of it."""
        registration, tick = self.delivery.registration(id), tick_of(event_id)
        with self.world.store.read() as reader:
            room = reader.room_of(tick)
            event = reader.event(room.n, event_id) if room else None
            if not event or not room:
                raise MatrixError("M_NOT_FOUND", f"there is no event {shorten(event_id)} on this homeserver")
            reason, sent = reader.reason(id, tick), reader.transaction_of(id, tick)
            told = {"event_id": event_id, "appservice": id, "type": event.type, "sender": event.sender, "room_id": room.room_id,
                    "pushed": reason is not None, "reason": reason, "rules": self._rules(reader, registration, room, event),
                    "transaction": None, "state": None}
            forgotten = reason is None and sent is not None and not reader.remembers(id, tick)
        if reason is not None:
            told["state"] = "waiting" if not sent else "in a transaction" if sent[1] is None else "acknowledged"
            told["transaction"] = {"txn_id": str(sent[0]), "acknowledged": sent[1] is not None, "acknowledged_ts": sent[1],
                                   "attempts": self.attempts(id)[sent[0]]} if sent else None
        return {**told, "summary": self._summary(told, registration, forgotten)}

    def _rules(self, reader: Reader, registration: Registration, room: RoomRow, event: Event) -> list[JsonObject]:
        """Each rule of interest, as Audience has them (3): sender, target, then the room's members just before the event, its
        aliases, its ID.
        """
        def rules(name: str, kind: str, ids: Iterable[str]) -> list[JsonObject]:
            return [explain_rule(self.world.registrations, registration, name, kind, id) for id in ids]
        members = collections.defaultdict[Any, list[str]](list)
        for one in reader.state_at(room.n, event.tick - 1, type="m.room.member"):
            claimed = self.world.registrations.claim_of(registration, "users", one.state_key or "") is not None
            members[one.content.get("membership"), claimed].append(one.state_key or "")
        only = {"matches": False, "miss": "matches, but it is only invited: who has joined counts"}
        return [*rules("sender", "users", [event.sender]),
                *rules("target", "users", [event.state_key] if event.type == "m.room.member" and event.state_key else []),
                *[{**rule, **only} for rule in rules("member", "users", members["invite", True])],
                *rules("member", "users", members["join", True] + members["join", False][:MAX_MISSES]),
                *rules("alias", "aliases", reader.aliases_of(room.n)), *rules("room", "rooms", [room.room_id])]

    @staticmethod
    def _summary(told: JsonObject, registration: Registration, forgotten: bool) -> list[str]:
        id, matching = registration.id, [rule for rule in told["rules"] if rule["matches"]]
        if told["reason"] is not None:
            where = {"waiting": "it waits for the transaction before it", "in a transaction": "it is on its way",
                     "acknowledged": f"{id} has acknowledged it"}[told["state"]]
            attempts = told["transaction"]["attempts"] if told["transaction"] else []
            return [f"it goes to {id}: {told['reason']}", where,
                    *[f"attempt {n}: {one['failure'] or 'acknowledged'}" for n, one in enumerate(attempts, 1)]]
        if registration.url is None:
            return [f"nothing is sent to {id}: its url is null"]
        if forgotten:
            return [f"it is too long ago: of {id} the last {KEPT_TRANSACTIONS} transactions are kept"]
        if matching:
            rule = matching[0]
            but = "the room did not have that alias, or the registration was another" if rule["rule"] == "alias" else \
                "the registration was not loaded or another"
            return [f"it did not go to {id}, though today {rule['rule']} {rule['id']} matches {rule['namespace']}: "
                    f"when it was sent, {but}"]
        return [f"it did not go to {id}: no rule says yes",
                *[f"{rule['rule']} {rule['id']}: {rule['namespace'] or 'it'} {rule['miss']}" for rule in told["rules"]]]

    # -- rooms, for a lesson without another client

    def rooms(self) -> list[JsonObject]:
        with self.world.store.read() as reader:
            told = [(row, reader.contents(row.n, ("m.room.name", "m.room.canonical_alias"))) for row in reader.all_rooms(200)]
            return [{"room_id": row.room_id, "name": state.get("m.room.name", {}).get("name"),
                     "alias": state.get("m.room.canonical_alias", {}).get("alias") or next(iter(reader.aliases_of(row.n)), None),
                     "members": reader.count_members(row.n, "join")} for row, state in told]

    def timeline(self, room_id: str, limit: int) -> JsonObject:
        with self.world.store.read() as reader:
            row = reader.room_row(room_id)
            if not row:
                raise MatrixError("M_NOT_FOUND", f"there is no room {shorten(room_id)}")
            events, members = reader.events(row.n, 0, FOREVER, limit, True)[::-1], reader.members(row.n)
            people = set(reader.people())
        now = self.world.clock.now()
        return {"events": [event.for_client(now) for event in events], "members": members,
                "people": [user_id for user_id in members if user_id in people]}

    def people(self) -> list[str]:
        with self.world.store.read() as reader:
            return reader.people()

    def check_person(self, user_id: str) -> Who:
        """A local person to act as; never a ghost, whom only its application service speaks for."""
        people = self.people()
        if user_id not in people:
            raise MatrixError("M_NOT_FOUND", f"{shorten(user_id)} is none of the people here: "
                              f"{', '.join(people) or 'there are none yet'}")
        return Who(user_id)


# -- Who claims an ID, in sentences.

NOBODY_MAY = "nobody; people take user names of a-z, 0-9 and ._=/+- only"


def explained(told: JsonObject, reader: Reader | None) -> JsonObject:
    """Adds to what explain() says whether the ID exists (None: that can't be seen), and all of it in sentences."""
    id = told["maps_to"] if told["kind"] == "uri" else told["id"]
    look = {"@": Reader.user, "#": Reader.alias, "!": Reader.room_row}.get((id or "")[:1])
    told["exists"] = bool(look(reader, id)) if reader and look else None
    return {**told, "summary": explain_summary(told)}


def explain_summary(told: JsonObject) -> list[str]:
    id, owner, claims = told["id"], told["owner"], [one for one in told["appservices"] if one["matches"]]
    if told["kind"] == "uri":
        return [f"{id} maps to {told['maps_to']}" if told["maps_to"] else f"{id} maps to nothing: no application service has a rule "
                "that matches the whole of it and leads into its own namespace"]
    lines = [f"{one['id']}: {one['reason']}" + (", exclusively" if one["exclusive"] else "") for one in claims]
    if not claims:
        lines.append(f"no application service claims {id} itself; for each event in it, `why` looks at its members and aliases, too"
                     if told["kind"] == "room" else
                     f"no application service has to do with {id}" + ("" if told["local"] else ": it is of another server"))
    for one in told["appservices"]:
        lines += [line for namespace in one["namespaces"] for line in namespace_summary(one["id"], namespace, one["matches"])]
    if told["kind"] in ("user", "alias") and told["local"]:
        lines.append(f"it belongs to {owner['appservice']}" if owner else "it belongs to nobody exclusively")
        both = " and ".join([one["id"] for one in claims if one["exclusive"]])
        nobody_may = f"nobody, for {both} claim it exclusively" if " and " in both else NOBODY_MAY
        lines.append("who may create it: " + (", ".join(told["may_create"]) or nobody_may))
    if told["exists"] is not None:
        lines.append("it exists" if told["exists"] else "it does not exist yet")
    return lines + [f"when somebody wants it, {query['appservice']} is asked: {query['request']}"
                    for query in told["query"] if not told["exists"]]


def namespace_summary(id: str, namespace: JsonObject, claimed: bool) -> list[str]:
    """A miss, unless another entry matches; and how those decide otherwise who search, or want the whole ID."""
    name = f"{id}: {namespace['kind']}[{namespace['index']}] {namespace['regex']!r}"
    others = [how for key, how in (("unanchored", "were searched anywhere in the ID (as Dendrite and Conduit do)"),
                                   ("whole", "had to match the whole ID")) if namespace[key] != namespace["matches"]]
    return ([] if namespace["matches"] or claimed else [f"{name} {namespace['miss']}"]) + [
        f"{name} would {'not ' * namespace['matches']}match if it {how}" for how in others]


# -- Questions of the API that are more than a verb of the Inspector.

LIKE_SECRET = re.compile(r"""((?:token|password|secret)["']?\s*[:=]\s*\[?\s*)"""
                         r"""(?:"(?:[^"\\]|\\.)*"?|'[^']*'?|[^\s"'&,}\]]+)""", re.I)


def inspector(call: Call) -> Inspector:
    return Inspector(call.api.world, call.api.delivery)


def get_exchanges(call: Call) -> Any:
    now, found = call.api.delivery.wire.since(call.integer("since", 0), call.integer("timeout", 0, 0, 30_000) / 1000)
    return {"next": now, "exchanges": [one.told() for one in found]}


def get_exchange(call: Call) -> Any:
    """With headers and bodies. What must not be seen is cut."""
    one = call.api.delivery.wire.find(call.integer("n", 0))
    if not one:
        raise MatrixError("M_NOT_FOUND", f"the last {KEPT_EXCHANGES} exchanges are kept; this one is not among them")
    return {**one.told(), "request": {"headers": shown_headers(one.headers), "body": shown_body(one.body),
                                      "cut": len(one.body) == KEPT_BYTES},
            "answer": {"body": shown_body(one.answer), "cut": len(one.answer) == KEPT_BYTES}}


def shown_body(body: bytes) -> str:
    """With tokens and passwords cut, in a whole JSON body by its keys, and in whatever else it is by what looks like them."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        return TOKEN_IN_URL.sub(r"\1…", to_json(without_secrets(json.loads(text))))
    return LIKE_SECRET.sub(r"\1…", text)


def without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "…" if SECRET_KEY.search(key) else without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


def get_transactions(call: Call) -> Any:
    """New to old. Of their events only what they are."""
    found = inspector(call).transactions(call.required("appservice"), call.integer("limit", 50, 1, KEPT_TRANSACTIONS))
    keys = ("event_id", "type", "sender", "room_id", "state_key")
    return {"transactions": [{**one, "events": [{key: event[key] for key in keys if key in event} for event in one["events"]]}
                             for one in reversed(found)]}


def get_timeline(call: Call) -> Any:
    return inspector(call).timeline(call.required("room"), call.integer("limit", 50, 1, MAX_PAGE))


# -- Levers: people who come and speak, faults, what an application service gets, the clock.

FAULT_KEYS = ("appservice", "fault", "on", "times", "probability", "seed", "delay_ms", "status")


def post_people(call: Call) -> Any:
    return {"user_id": call.api.accounts.add_person(field(call.body, "name", str))["user_id"]}


def as_client(call: Call, who: Who, method: str, path: str, content: JsonObject, verb: Callable[[], JsonObject]) -> JsonObject:
    """Does what the person's client would ask for with this request; so it looks on the wire."""
    wire, began = call.api.delivery.wire, time.monotonic()
    one = wire.begin(Exchange(wire.number(), wire.clock.now(), who.user_id, HS, "request", method, "/_matrix/client/v3/" + path, {},
                              to_json(content).encode("utf-8", "replace")[:KEPT_BYTES], client=True))
    try:
        answer = verb()
        one.status, one.answer = 200, to_json(answer).encode()
        return answer
    except MatrixError as error:
        one.status, one.answer = error.status, to_json(error.body()).encode()
        raise
    finally:
        one.ms = round((time.monotonic() - began) * 1000, 2)
        wire.end(one)


def post_rooms(call: Call) -> Any:
    """Brings a person into a room: one that is named by alias or ID; a new one with this user; or else a new one of this name."""
    body, rooms = call.body, call.api.rooms
    who, room = inspector(call).check_person(field(body, "user_id", str)), field(body, "room", str)
    if room[:1] in ("#", "!"):
        path = f"join/{urllib.parse.quote(room, safe='')}"
        return as_client(call, who, "POST", path, {}, lambda: {"room_id": rooms.join(who, room)})
    options: JsonObject = {"preset": "public_chat", "name": room} if room[:1] != "@" else {
        "preset": "trusted_private_chat", "is_direct": True, "invite": [check_id("@", room)]}
    return as_client(call, who, "POST", "createRoom", options, lambda: {"room_id": rooms.create(who, options)})


def post_say(call: Call) -> Any:
    """The room may be named by an alias, too; who is not in it joins."""
    body, rooms, txn_id = call.body, call.api.rooms, secrets.token_hex(8)
    who, room = inspector(call).check_person(field(body, "user_id", str)), field(body, "room_id", str)
    content = {"msgtype": "m.text", "body": field(body, "body", str)}
    path = f"rooms/{urllib.parse.quote(room, safe='')}/send/m.room.message/{txn_id}"
    return as_client(call, who, "PUT", path, content, lambda: {     # who is in it already stays as he is
        "event_id": rooms.send(who, rooms.join(who, room), "m.room.message", content, txn_id)})


def post_faults(call: Call) -> Any:
    body = call.body
    for key in body.keys() - FAULT_KEYS:
        raise MatrixError("M_BAD_JSON", f"{shorten(key)!r} is no key of a fault; the nearest one is {nearest(key, FAULT_KEYS)!r}")
    probability = body.get("probability")
    if probability is not None and not is_number(probability):
        raise MatrixError("M_BAD_JSON", f"'probability' must be a number above 0 and up to 1, not {quoted(probability)}")
    faults = call.api.delivery.faults(field(body, "appservice", str))
    faults.add(field(body, "fault", str), on=field(body, "on", str, "transactions"), times=field(body, "times", int, None),
               probability=probability, seed=field(body, "seed", int, None), delay_ms=field(body, "delay_ms", int, 1000),
               status=field(body, "status", int, 500))
    return {"faults": faults.told()}


def lever(pull: Callable[[Delivery, str], JsonObject | None]) -> Callable[[Call], Any]:
    """What is done by hand with the application service that the query names, or the body of a POST."""
    def handler(call: Call) -> Any:
        id = field(call.body, "appservice", str) if call.request.method == "POST" else call.required("appservice")
        return pull(call.api.delivery, id)
    return handler


def post_replay(call: Call) -> Any:
    body = call.body
    txn_id = field(body, "txn_id", str, None)
    if txn_id is not None and not re.fullmatch(r"[0-9]{1,18}", txn_id):
        raise MatrixError("M_INVALID_PARAM", f"{shorten(txn_id)!r} is no transaction ID: decimal digits")
    id, new_id = field(body, "appservice", str), field(body, "new_id", bool, False)
    return {"txn_id": str(call.api.delivery.replay(id, int(txn_id) if txn_id else None, new_id))}


def post_ping(call: Call) -> Any:
    registration = call.api.delivery.registration(field(call.body, "appservice", str))
    return {"duration_ms": call.api.delivery.ping(registration, None)}


def post_clock(call: Call) -> Any:
    seconds: Any = call.body.get("advance")
    if not is_number(seconds) or not 0 <= seconds <= 10**9:
        raise MatrixError("M_BAD_JSON", f"'advance' must be a number of seconds from 0 on, not {quoted(seconds)}")
    call.api.world.clock.advance(seconds)
    return inspector(call).clock()


# -- The bridge examiner: does an application service do what the specification asks of it? It speaks HTTP and knows no database.

NOWHERE = "asbridge-examiner.invalid"    # a server that can't be (RFC 2606)
OURS = "org.asbridge.examiner"           # a key, and a type of event, that nobody else has
WRONG = "asbridge-examiner-wrong-token"
UNKNOWN = "/_matrix/app/v1/asbridge_examiner"
OLDER_EPHEMERAL = "de.sorunome.msc2409.ephemeral"
SILENT_CALLS = 2                         # so many in a row without an answer, and no more are made
Verdict = tuple[str, str]                # outcome, and what was seen


class Result(NamedTuple):
    """One row of an examination."""
    test: str
    outcome: str                 # passed, failed or skipped
    spec: str                    # the section; "AS:" the Application Service API
    seen: str                    # or why it was skipped


def nobody(namespace: Namespace, server_name: str) -> str | None:
    """An ID that the namespace claims and that surely nobody has; None if there is none, or its regex can't be analysed."""
    tag = secrets.token_hex(4)
    for word in (f"asbridge-nobody-{tag}", f"asbridge_nobody_{tag}", f"asbridgenobody{tag}", f"9{secrets.randbelow(10**17):017}"):
        strange = re.compile(f"{KINDS[namespace.kind]}[a-z0-9._=/+-]*{word}[a-z0-9._=/+-]*:{re.escape(server_name)}")
        if id := shared_id(chain(BEFORE, tree_of(strange), BEHIND), namespace):
            return id
    return None


class Examiner:
    """Calls an application service as its homeserver would, and sees whether it answers as the specification has it.

    Nothing is done to it that can't be undone: what is pushed comes from nobody, in rooms that nobody has, and is nothing to
    be kept. Only the two questions of Querying may lead a bridge to make a user or a room; they are asked with `queries`.
    """

    #: test, section of the specification, what is asked and judged
    CHECKS: tuple[tuple[str, str, Callable[[Examiner], Verdict]], ...] = (
        ("listens at its url",                              "AS: Registration",         lambda it: it._listens()),
        ("answers a ping",                                  "AS: Pinging",              lambda it: it._ping()),
        ("takes an empty transaction",                      "AS: Pushing events",       lambda it: it._empty()),
        ("takes the same transaction again",                "AS: Pushing events",       lambda it: it._again()),
        ("takes the hs_token from the header alone",        "AS: Authorisation",        lambda it: it._header_alone()),
        ("refuses a transaction without a token",           "AS: Authorisation",        lambda it: it._refuses("", "")),
        ("refuses a wrong token in the header",             "AS: Authorisation",        lambda it: it._refuses(WRONG, "")),
        ("refuses a wrong token in the query",              "AS: Authorisation",        lambda it: it._refuses("", WRONG)),
        ("refuses broken JSON, and is not broken by it",    "Standard error response",  lambda it: it._broken()),
        ("says 404 to an unknown path",                     "AS: Unknown routes",       lambda it: it._unknown(404, UNKNOWN)),
        ("says 405 to a wrong method",                      "AS: Unknown routes",       lambda it: it._unknown(405, it._last[0])),
        ("takes unknown keys in a transaction",             "AS: Pushing events",       lambda it: it._keys()),
        ("takes an event of an unknown type and shape",     "AS: Pushing events",       lambda it: it._type()),
        ("takes an event of a room that it does not know",  "AS: Pushing events",       lambda it: it._room()),
        ("takes ephemeral data",                            "AS: Ephemeral data",       lambda it: it._data("ephemeral")),
        ("takes ephemeral data, by its older name",         "AS: Ephemeral data",       lambda it: it._data(OLDER_EPHEMERAL)),
        ("describes its protocols",                         "AS: Third-party networks", lambda it: it._protocols()),
        ("answers when asked for an unknown user",          "AS: Querying",             lambda it: it._query("users")),
        ("answers when asked for an unknown alias",         "AS: Querying",             lambda it: it._query("aliases")),
    )

    def __init__(self, registration: Registration, settings: Settings, queries: bool = False) -> None:
        self.registration, self.server_name, self.queries = registration, settings.server_name, queries
        self.seconds = settings.query_timeout_ms / 1000      # for each call
        self._client = HttpClient(registration.url or "", cut=True)
        self._run = secrets.token_hex(4)                     # in the ID of each transaction
        self._pushed = 0                                     # transactions
        self._last: tuple[str, bytes] = ("", b"")            # path and body of the last one
        self._legacy = False                                 # it only knows the older paths
        self._silent = 0                                     # calls without an answer, since the last that had one
        self._hopeless = ""                                  # why no more is asked

    def results(self) -> list[Result]:
        """Asks everything, one after the other."""
        try:
            return [self._result(*row) for row in self.CHECKS]
        finally:
            self._client.close()

    def _result(self, test: str, spec: str, check: Callable[[Examiner], Verdict]) -> Result:
        if self._hopeless:
            return Result(test, "skipped", spec, self._hopeless)
        try:
            outcome, seen = check(self)
            self._silent = 0
        except CALL_FAILED as error:
            outcome, seen = "failed", self._plain(advice(self.registration, error))
            self._silent += isinstance(error, (TimeoutError, ConnectionRefusedError))
            if self._silent == SILENT_CALLS:
                self._hopeless = f"it did not answer {SILENT_CALLS} calls in a row"
        return Result(test, outcome, spec, seen)

    # -- How it is asked.

    def _call(self, method: str, path: str, body: bytes | None = None, header: str | None = None, query: str | None = None) -> Answer:
        """With the hs_token in both places, as the homeserver has it; or with what is given for one, '' being none."""
        in_header, in_query = (self.registration.hs_token if token is None else token for token in (header, query))
        headers = {"Content-Type": "application/json", "User-Agent": f"asbridge/{__version__}"}
        headers |= {"Authorization": f"Bearer {in_header}"} if in_header else {}
        for new, old in LEGACY_PATHS.items() if self._legacy else ():
            path = path.replace(new, old, 1)
        target = path + (f"?access_token={urllib.parse.quote(in_query, safe='')}" if in_query else "")
        return Answer(*self._client.request(method, target, body, headers, self.seconds))

    def _push(self, transaction: JsonObject | bytes, header: str | None = None, query: str | None = None) -> Answer:
        """The ID is no number: who compares numbers would take a homeserver's next ones for old."""
        self._pushed += 1
        data = transaction if isinstance(transaction, bytes) else to_json(transaction).encode()
        self._last = (f"/_matrix/app/v1/transactions/asbridge-examiner-{self._run}-{self._pushed}", data)
        return self._call("PUT", *self._last, header, query)

    def _event(self, type: str, content: JsonObject, **more: Any) -> Raw:
        """An event as the homeserver pushes it, but from nobody and in a room that nobody has."""
        now, tick = int(time.time() * 1000), secrets.randbelow(2**40)
        body = {"room_id": f"!{secrets.token_hex(9)}:{NOWHERE}", "sender": f"@nobody:{NOWHERE}", "type": type,
                "content": content, "origin_server_ts": now - 100, **more}
        whole = to_json({"event_id": event_id_of(tick, canonical_json(body)), **body})
        return Raw(Event(tick, type, None, body["sender"], now - 100, whole, None, None, None, None, None, 0).for_appservice(now))

    # -- What is seen.

    def _plain(self, text: str) -> str:
        """Without tokens, and without what would move the cursor of a terminal."""
        text = without_tokens(self.registration, text, "token")
        return " ".join("".join([char if char.isprintable() else " " for char in text]).split())

    def _said(self, answer: Answer) -> str:
        text = shorten(self._plain(answer.body.decode("utf-8", "replace")))
        if isinstance(answer.errcode, str):
            text = self._plain(f"{answer.errcode}: {shorten(answer.json.get('error', 'no error text'))}")
        return f"{answer.status} {text if answer.json is not None else quoted(text)}"

    @staticmethod
    def _judged(good: bool, seen: str, right: str) -> Verdict:
        return ("passed", seen) if good else ("failed", f"{seen}; right would be {right}")

    def _taken(self, answer: Answer, right: str = "200 with a JSON object") -> Verdict:
        return self._judged(answer.status == 200 and isinstance(answer.json, dict), self._said(answer), right)

    def _refused(self, answer: Answer, statuses: Iterable[int], right: str) -> Verdict:
        return self._judged(isinstance(answer.errcode, str) and answer.status in statuses, self._said(answer), right)

    # -- The checks.

    def _listens(self) -> Verdict:
        if self.registration.url is None:
            self._hopeless = "its url is null: nothing is sent to it"
            return "skipped", self._hopeless
        try:
            socket.create_connection((self._client.host, self._client.port), self.seconds).close()
        except OSError as error:
            self._hopeless = "it can't be reached"
            return "failed", advice(self.registration, error)
        return "passed", f"{self._client.host}:{self._client.port} takes connections"

    def _ping(self) -> Verdict:
        body = to_json({"transaction_id": f"asbridge-examiner-{self._run}"}).encode()
        return self._taken(self._call("POST", "/_matrix/app/v1/ping", body), "200 {} (the ping came with v1.7)")

    def _empty(self) -> Verdict:
        """Here it shows which paths it knows, and whether it has the same registration as we."""
        answer = self._push({"events": []})
        if answer.unknown_path:
            self._legacy = True
            older = self._push({"events": []})
            if older.status == 200:
                return "failed", f"only the legacy path /transactions/… is known: {self._said(older)}; at today's {self._said(answer)}"
            self._legacy = False
        if answer.status in (401, 403):
            self._hopeless = "it rejects the hs_token"
            return "failed", advice(self.registration, answer)
        return self._taken(answer)

    def _again(self) -> Verdict:
        return self._taken(self._call("PUT", *self._last))

    def _header_alone(self) -> Verdict:
        return self._taken(self._push({"events": []}, query=""), "200 (since v1.4 the query need not have it)")

    def _refuses(self, header: str, query: str) -> Verdict:
        return self._refused(self._push({"events": []}, header, query), (401, 403), "403 M_FORBIDDEN or 401")

    def _broken(self) -> Verdict:
        return self._refused(self._push(b'{"events": ['), range(400, 500), "400 M_NOT_JSON")

    def _unknown(self, status: int, path: str) -> Verdict:
        answer = self._call("GET", path)
        good = answer.status == status and answer.errcode == "M_UNRECOGNIZED"
        return self._judged(good, self._said(answer), f"{status} M_UNRECOGNIZED")

    def _keys(self) -> Verdict:
        return self._taken(self._push({"events": [], OURS: {"list": [1, None, {}]}}))

    def _type(self) -> Verdict:
        return self._taken(self._push({"events": [self._event(OURS, {"body": 1, "list": [[]]}, **{OURS: True})]}))

    def _room(self) -> Verdict:
        """A topic, which who does not know the room forgets. For a message some would note its sender."""
        return self._taken(self._push({"events": [self._event("m.room.topic", {"topic": "asbridge examines"}, state_key="")]}))

    def _data(self, key: str) -> Verdict:
        who, room_id, now = f"@nobody:{NOWHERE}", f"!nobody:{NOWHERE}", int(time.time() * 1000)
        receipt = {event_id_of(now, ""): {"m.read": {who: {"ts": now}}}}
        return self._taken(self._push({"events": [], key: [
            {"type": "m.typing", "room_id": room_id, "content": {"user_ids": [who]}},
            {"type": "m.receipt", "room_id": room_id, "content": receipt},
            {"type": "m.presence", "sender": who, "content": {"presence": "online", "last_active_ago": 1}}]}))

    def _query(self, kind: str) -> Verdict:
        namespaces = self.registration.namespaces[kind]
        id = next(filter(None, (nobody(one, self.server_name) for one in namespaces)), None)
        if not namespaces:
            return "skipped", f"it claims no {kind}"
        if not self.queries:
            return "skipped", "asked with --queries only: a bridge may create what it is asked for, and keep it"
        if id is None:
            return "skipped", f"no ID could be made up for {self.registration.regexes(kind)}"
        answer = self._call("GET", query_path(kind, id))
        good = answer.status in (200, 404) and isinstance(answer.json, dict)
        outcome, seen = self._judged(good, self._said(answer), "404 with an errcode")
        if good and not isinstance(answer.errcode, str):
            seen += ": it says that it created it" if answer.status == 200 else "; an errcode would say that the path is known"
        return outcome, f"{id}: {seen}"

    def _protocols(self) -> Verdict:
        answers = {protocol: self._call("GET", f"/_matrix/app/v1/thirdparty/protocol/{urllib.parse.quote(protocol, safe='')}")
                   for protocol in self.registration.protocols}
        if not answers:
            return "skipped", "its registration has no protocols"
        good = all(one.status == 404 or (one.status == 200 and is_protocol(one.json)) for one in answers.values())
        seen = "; ".join([f"{protocol}: {self._said(answer)}" for protocol, answer in answers.items()])
        return self._judged(good, seen, "200 with user_fields, location_fields, icon, field_types and instances, or 404")


def post_examine(call: Call) -> Any:
    body, api = call.body, call.api
    registration, queries = api.delivery.registration(field(body, "appservice", str)), field(body, "queries", bool, False)
    return {"results": [result._asdict() for result in Examiner(registration, api.world.settings, queries).results()]}


# -- The table. The page uses what is in it and nothing else.

def question(verb: Callable[..., Any], *names: str) -> Callable[[Call], Any]:
    """A verb of the Inspector, given what the query must have."""
    return lambda call: verb(inspector(call), *[call.required(name) for name in names])


def get_page(call: Call) -> Any:
    """Only the page's own script and style may run, and nothing may show the page in a frame."""
    nonce = secrets.token_urlsafe(16)
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'")
    headers = f"Content-Security-Policy: {policy}\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
    return Response(200, PAGE.replace("{nonce}", nonce).encode(), "text/html; charset=utf-8", headers.encode())


ADMIN_ROUTES = [Route("GET", "/", "nobody", "asbridge: the inspector's page", get_page), *(
    Route(method, INSPECTOR + path, "admin", "asbridge: " + what, handler) for method, path, what, handler in (
    ("GET",    "status",       "how everybody is",           question(Inspector.status)),
    ("GET",    "exchanges",    "what passed since",          get_exchanges),
    ("GET",    "exchange",     "one of them, opened",        get_exchange),
    ("GET",    "transactions", "of an AS, with attempts",    get_transactions),
    ("GET",    "explain",      "who claims an ID",           question(Inspector.explain, "id")),
    ("GET",    "why",          "why an event was pushed",    question(Inspector.why, "event", "appservice")),
    ("GET",    "rooms",        "rooms",                      lambda call: {"rooms": inspector(call).rooms()}),
    ("POST",   "rooms",        "join one, or make one",      post_rooms),
    ("GET",    "timeline",     "the last events of a room",  get_timeline),
    ("GET",    "people",       "local people",               lambda call: {"people": inspector(call).people()}),
    ("POST",   "people",       "a new person",               post_people),
    ("POST",   "say",          "say something as a person",  post_say),
    ("GET",    "faults",       "faults that are to happen",  lever(lambda delivery, id: {"faults": delivery.faults(id).told()})),
    ("POST",   "faults",       "one more",                   post_faults),
    ("DELETE", "faults",       "no more",                    lever(lambda delivery, id: delivery.faults(id).clear())),
    ("POST",   "pause",        "no more attempts",           lever(lambda delivery, id: delivery.hand(id).pause())),
    ("POST",   "resume",       "attempts again",             lever(lambda delivery, id: delivery.hand(id).pause(False))),
    ("POST",   "retry",        "now, not after the backoff", lever(lambda delivery, id: delivery.hand(id).retry())),
    ("POST",   "skip",         "give a transaction up",      lever(lambda delivery, id: {"txn_id": str(delivery.skip(id))})),
    ("POST",   "replay",       "send one again",             post_replay),
    ("POST",   "ping",         "ping an AS",                 post_ping),
    ("POST",   "clock",        "wind the clock on",          post_clock),
    ("POST",   "examine",      "examine an AS",              post_examine),
))]


# -- The page, to be skipped at first reading. It uses the API above and nothing else; what anybody wrote goes into it as text only.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>asbridge</title>
<style nonce="{nonce}">
:root {
  color-scheme: light dark; color: var(--ink); --gutter: 4.4rem;
  font: clamp(14px, .35vw + 9.5px, 20px)/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --book: "Iowan Old Style", "Palatino Linotype", Palatino, "URW Palladio L", Georgia, "Liberation Serif", serif;
  --code: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-variant-numeric: tabular-nums;
  --paper:  light-dark(#fbf9f3, #14161b); --card: light-dark(#fff, #1c1f26);    --wash: light-dark(#f3efe4, #22262f);
  --ink:    light-dark(#24211c, #ebe6da); --soft: light-dark(#6b6557, #a39d8f); --rule: light-dark(#dfd8c8, #363b46);
  --client: light-dark(#1f62a7, #84b8f5); --hs:   light-dark(#3f3a33, #d9d2c2); --as:   light-dark(#0b7059, #5ecfab);
  --bad:    light-dark(#bb2a1c, #ff8b7b); --lost: light-dark(#a5168f, #ff7fdc); --wait: light-dark(#8a5a00, #e9b44c) }
* { box-sizing: border-box; scrollbar-width: thin } [hidden] { display: none !important }
/* Text and controls. */
h1, h2, h3 { font: 600 1.3rem/1.2 var(--book); margin: 0 }
h1 { font-size: 1.55rem; font-style: italic } h3 { font-size: 1.05rem; margin-top: 1.1rem }
p { margin: .4rem 0 } small { font-size: .92em; color: var(--soft) }
code, pre, .code { font-family: var(--code); font-size: .86em; overflow-wrap: anywhere }
pre { background: var(--wash); padding: .7rem .8rem; border-radius: .5rem; margin: .3rem 0; white-space: pre-wrap; max-height: 24rem;
  overflow: auto }
button, input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: .45rem;
  padding: .28rem .65rem; min-width: 0; max-width: 100% }
button, summary { cursor: pointer } button:hover { background: var(--wash) }
:focus-visible { outline: 2.5px solid var(--client); outline-offset: 1px }
input[type=number] { width: 5.2rem } input[type=checkbox] { accent-color: var(--client); margin: 0 .3rem 0 0; vertical-align: -.1em }
summary { margin: .4rem 0 }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .12rem .9rem; margin: .6rem 0 }
dl.wide { grid-template-columns: repeat(2, auto minmax(0, 1fr)) }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-size: .92em; margin: .4rem 0 }
td, th { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-top: 1px solid var(--rule);
  overflow-wrap: break-word }
th { color: var(--soft); border: 0 } .why td:nth-child(2) { min-width: 11rem }
.lines { list-style: none; margin: .6rem 0; padding: 0 } .lines > li { padding: .35rem 0; border-top: 1px solid var(--rule) }
.bar { display: flex; flex-wrap: wrap; gap: .45rem; align-items: center }
.grow { flex: 1 1 auto } .bar > input.grow { flex-basis: 9rem }
.card .bar, main > section > .bar { margin: .5rem 0 } .card > .bar:first-child, main > section > .bar:first-child { margin-top: 0 }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; padding: .8rem 1rem; margin-bottom: .9rem }
.main { background: var(--lost); border-color: var(--lost); color: light-dark(#fff, #1c1018); font-weight: 600 }
.main:hover { background: var(--lost); filter: brightness(1.12) }
.link { border: 0; padding: 0 .2rem; background: none; color: var(--client) }
.link:hover { background: none; text-decoration: underline }
.said { font: 1.08em var(--book) }
.state { padding: .05rem .6rem; border-radius: 1rem; border: 1.5px solid; font-size: .9em; font-weight: 600; color: var(--as) }
.soft { color: var(--soft) } .good { color: var(--as) } .bad { color: var(--bad) } .wait { color: var(--wait) }
.fault { color: var(--lost); font-style: italic }
.tag { display: inline-block; font: .86em/1.3 var(--code); padding: 0 .35em; border-radius: .3em; border: 1px solid var(--rule);
  background: var(--card) }
/* The parts of the page. */
body { margin: 0; height: 100dvh; overflow: hidden; display: grid; background: var(--paper);
  grid-template: auto auto minmax(0, 1fr) / minmax(0, 1fr) }
header { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; align-items: center; padding: .5rem 1.1rem;
  border-bottom: 1px solid var(--rule) }
#tabs { display: flex; overflow-x: auto }
[role=tab] { border: 0; background: none; border-radius: .4rem .4rem 0 0; padding: .3rem .75rem }
[role=tab][aria-selected=true] { font-weight: 600; box-shadow: inset 0 -2.5px var(--client) }
#banner { margin: 0; padding: .4rem 1.1rem; background: var(--bad); color: var(--paper) }
main { grid-row: 3; display: grid; grid-template: minmax(0, 1fr) / minmax(0, 1.62fr) minmax(25rem, 1fr) }
main > section { grid-area: 1 / 2; overflow: auto; padding: 1rem 1.2rem; background: var(--paper) }
#details { z-index: 6; animation: slide .16s ease-out }
#timeline { display: grid; grid-template-columns: auto minmax(0, 1fr) auto; gap: .2rem .8rem; align-items: baseline;
  align-content: start; overflow: auto; height: calc(100dvh - 19rem); min-height: 10rem; margin: .6rem 0; padding: .5rem 0;
  border: solid var(--rule); border-width: 1px 0 }
time { font: .78em var(--code); color: var(--soft) }
dialog { border: 1px solid var(--rule); border-radius: .8rem; background: var(--card); color: inherit; padding: 1.3rem;
  max-width: 26rem } dialog::backdrop { background: #0007 }
#toast { position: fixed; bottom: 1.2rem; right: 1.2rem; z-index: 9; max-width: 30rem; padding: .5rem 1rem; border-radius: .6rem;
  color: var(--paper); background: var(--ink) }
#toast.bad { background: var(--bad) } #toast:empty { display: none }
/* The diagram: heads that stay, lifelines, and rows over them. --x is a column, in percent of what is right of the gutter. */
#diagram { grid-area: 1 / 1; display: flex; flex-direction: column; padding: 0; position: relative;
  border-right: 1px solid var(--rule) }
#diagram > .bar { margin: 0; padding: .5rem 1.1rem; gap: .4rem .9rem; border-bottom: 1px solid var(--rule) }
#diagram > .legend { font-size: .85em; color: var(--soft); border: solid var(--rule); border-width: 1px 0 0 }
.key { display: inline-block; width: 2.6rem; vertical-align: middle; margin-right: .35rem }
.key > span { display: block; position: relative }
#newer { position: absolute; bottom: 3.4rem; left: 50%; translate: -50%; border-radius: 2rem; z-index: 5; box-shadow: 0 2px 12px #0003 }
#empty { padding: 14vh 2rem 0; margin: 0; text-align: center; font: italic 1.15rem var(--book); color: var(--soft) }
#scroll { flex: 1; overflow: hidden scroll; --bg: var(--paper) }
#rows { position: relative; min-height: calc(100% - 3.6rem); padding-bottom: 1rem }
#heads { position: sticky; top: 0; z-index: 4; height: 3.6rem; background: linear-gradient(var(--paper) 82%, transparent);
  pointer-events: none }
.client { --tint: var(--client) } .hs, .row { --tint: var(--hs) } .as { --tint: var(--as) }
.again, .rail { --tint: light-dark(hsl(var(--hue) 75% 34%), hsl(var(--hue) 75% 70%)) }
.head, .life, .row > i { position: absolute; left: var(--at); --at: calc(var(--gutter) + (100% - var(--gutter)) * var(--x) / 100) }
.head { top: .55rem; translate: -50%; max-width: min(12rem, var(--room)); padding: .18rem .7rem; text-align: center; line-height: 1.2;
  border: 1.6px solid var(--tint); color: var(--tint); background: var(--card); border-radius: .3rem; pointer-events: auto }
.head > * { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: inherit }
.head small { font-size: .72em }
.life { top: -1.4rem; bottom: 0; border-left: 1.5px solid var(--tint); opacity: .5 }
/* An exchange: a label, the arrow of the request, and the answer's with its text; or, when others came between, only a part of that. */
.row { display: block; position: relative; width: 100%; padding: .3rem 0 0 var(--gutter); border: 0; border-radius: 0;
  background: none; line-height: 1.25; contain: layout paint style }
.row:hover, .row[aria-current=true] { --bg: var(--wash); background: color-mix(in srgb, var(--wash) 75%, transparent) }
.row:focus-visible { outline-offset: -3px }
.row > span { display: block; position: relative; margin-left: var(--left); width: var(--width) }
.row > .when { position: absolute; left: 0; top: .35rem; margin: 0 0 0 .9rem; width: auto; font: .74em var(--code); color: var(--soft) }
.row > .label { width: fit-content; min-width: var(--width); max-width: min(max(var(--width), 17rem), 100% - var(--left));
  padding: 0 .5rem; font-size: .9em; z-index: 1 }
.label > span { overflow-wrap: anywhere; background: var(--bg); padding: 0 .3em }
.again { border-color: var(--tint); color: var(--tint); font-weight: 700; background: color-mix(in srgb, var(--tint) 12%, var(--card)) }
.line { height: .75rem; color: var(--tint); --y: .375rem }
.answer { min-height: 1.25rem; font-size: .86em; color: var(--tint); padding: 0 1rem; --y: .62rem }
.answer > span { position: relative; background: var(--bg); padding: 0 .45em }
.answer em { font: italic 1.08em var(--book); white-space: nowrap }
.answer small { display: inline-block; max-width: 12em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  vertical-align: bottom }
.fine .answer { --tint: var(--as) } .failed .answer { --tint: var(--bad) } .lost .answer { --tint: var(--lost) }
.slash { display: inline-block; width: .7em; height: .95em; margin: 0 .3em -.12em; border: solid; border-width: 0 2px;
  transform: skewX(-24deg) }
/* An arrow is the line before and the head after: of a request full, of an answer dashed and open; where none came, a cross. */
.line::before, .answer::before { content: ""; position: absolute; left: .1rem; right: .1rem; top: var(--y); border-top: 1.7px solid }
.answer::before { border-top-style: dashed; opacity: .75 } .lost .answer::before { border-top-style: dotted }
.line::after, .answer::after { content: ""; position: absolute; top: calc(var(--y) - .29rem + .85px); right: .05rem; height: .58rem;
  width: .7rem; background: currentColor; clip-path: polygon(0 0, 100% 50%, 0 100%, 22% 50%) }
.answer::after { background: none; clip-path: none; border: solid; border-width: 1.7px 1.7px 0 0; width: .45rem; height: .45rem;
  top: calc(var(--y) - .225rem + .85px); rotate: 45deg }
.left .line::after { left: .05rem; rotate: 180deg } .right .answer::after { right: auto; left: .15rem; rotate: -135deg }
.none .answer::before, .none .answer::after { content: none }
.none .line::after { background: var(--bad); width: .75rem; height: .75rem; top: 0;
  clip-path: polygon(0 14%, 14% 0, 50% 36%, 86% 0, 100% 14%, 64% 50%, 100% 86%, 86% 100%, 50% 64%, 14% 100%, 0 86%, 36% 50%) }
.pending .line { animation: breathe 1.4s infinite alternate }
/* Who works on an answer, as a box on his line; and from a failed attempt to the next, a rail. A row clips what leaves it. */
.act, .rail { position: absolute; top: 0; bottom: 0; left: var(--at); border: solid var(--tint) }
.act { margin-left: calc(-.28rem + var(--deep) * .3rem); width: .56rem; background: var(--card); border-width: 0 1.5px }
.act.start { top: auto; height: .4rem; border-top-width: 1.5px } .act.end { bottom: auto; height: .95rem; border-bottom-width: 1.5px }
.act.only { top: -.38rem; height: 1.05rem; border-width: 1.5px; --at: 100% } .left .act.only { --at: 0% }
.rail { margin-left: calc(-1.2rem - var(--deep) * .45rem); width: .8rem; border-width: 0 0 0 2.5px }
.rail.leave { --at: 0%; top: var(--y); border-top-width: 2.5px; border-radius: .5rem 0 0 }
.rail.arrive { --at: 0%; top: -20rem; bottom: .3rem; border-bottom-width: 2.5px; border-radius: 0 0 0 .5rem }
.fresh > .line, .fresh > .answer { animation: draw .28s ease-out }
.fresh.left > .line, .fresh.right > .answer { --hidden: inset(-20rem -2rem -9px 100%) }
@keyframes draw { from { clip-path: var(--hidden, inset(-20rem 100% -9px -2rem)) } to { clip-path: inset(-20rem -2rem -9px) } }
@keyframes slide { from { translate: 1.5rem; opacity: 0 } } @keyframes breathe { to { opacity: .35 } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
@media (min-width: 62rem) { [data-tab=diagram] { display: none } }
@media (max-width: 61.99rem) {
  :root { --gutter: .3rem }
  main { grid-template-columns: minmax(0, 1fr) } main > section, #diagram { grid-area: 1 / 1; border: 0 }
  main > section:not(#diagram) { padding: .8rem } header { padding: .35rem .7rem } #diagram > .bar { padding: .4rem .7rem }
  #tabs { order: 9; width: 100%; justify-content: space-between }
  [role=tab] { flex: none; padding: .3rem .35rem; font-size: .88em }
  #where, .row > .when, #diagram > .legend { display: none }
  .answer { padding: 0 .4rem } dl.wide { grid-template-columns: auto minmax(0, 1fr) } #timeline { height: 46dvh }
}
</style>
<header>
  <h1>asbridge</h1><span id="where" class="soft"></span><nav id="tabs" role="tablist" aria-label="Parts of the inspector"></nav>
  <span class="grow"></span><span id="time" title="the homeserver's clock"></span>
  <button id="theme" aria-label="Switch between light and dark" title="light or dark">◐</button>
</header>
<p id="banner" role="alert" hidden>Not connected to the homeserver; trying again …</p>
<main>
  <section id="diagram" role="tabpanel" aria-label="Sequence diagram">
    <div class="bar">
      <label><input type="checkbox" id="hidesync" checked>hide /sync</label>
      <label><input type="checkbox" id="hideclient">hide clients</label>
      <select id="only" aria-label="Which application services"></select>
      <input id="find" class="grow" type="search" placeholder="filter: a type, a user, a status …" aria-label="Filter by text">
      <button id="clear" title="Hide what has passed until now; press again to show it">Clear</button>
    </div>
    <div id="scroll"><div id="heads"></div><div id="rows" role="group" aria-label="Exchanges, oldest first"><div id="lives"></div></div>
    </div>
    <button id="newer" hidden>↓ newer</button>
    <div class="bar legend" aria-hidden="true">
      <span><i class="key right"><span class="line"></span></i>request</span>
      <span><i class="key right fine"><span class="answer"></span></i>answer</span>
      <span><i class="key right lost"><span class="answer"><span><i class="slash"></i></span></span></i>the answer is lost</span>
      <span><i class="key right none"><span class="line"></span></i>no answer</span>
      <span><b class="tag again">…42</b> one transaction, sent again</span>
    </div>
  </section>
  <section id="services" role="tabpanel" aria-label="Application services"></section>
  <section id="transactions" role="tabpanel" aria-label="Transactions"></section>
  <section id="names" role="tabpanel" aria-label="Namespaces"></section>
  <section id="rooms" role="tabpanel" aria-label="Rooms"></section>
  <section id="details" aria-label="Details" tabindex="-1" hidden></section>
</main>
<dialog id="ask"><form method="dialog"></form></dialog>
<div id="toast" role="status"></div>
<script type="module" nonce="{nonce}">
// ---- What the page knows. All that it shows is made from this.
let hs = {appservices: [], server_name: "", now: 0};         // the last status; `at`: when it came; `standing`: its clock stands still
const seen = new Map();                                      // exchanges by n, the last KEPT
let since = null;                                            // the last change that is in it; null: all is asked for anew
let cleared = 0;                                             // exchanges up to this n are hidden
let tab = "services";                                        // what is shown (beside the diagram, where there is room)
const cards = new Map();                                     // application services by ID: {node, show}
const drawn = new Map();                                     // rows of the diagram by key: {node, as: what it shows}
let stick = true, top0 = 0;                                  // the diagram stays at its end; how far it was scrolled
let opener = null;                                           // what had the focus before the details were opened
let asking = null;                                           // the question for the token; whatever meets a 401 waits for it
let drawing = 0, soon = 0, fading = 0;                       // timers: the next drawing, the next status, the end of the toast

const KEPT = 1000, HUES = [210, 28, 262, 48, 238, 192];      // hues of transactions
const TABS = {diagram: "Diagram", services: "Services", transactions: "Transactions", names: "Namespaces", rooms: "Rooms"};
const KINDS = {client: "client", hs: "homeserver", as: "application service"};
const LOOKS = {"backing off": "bad", "paused": "wait", "nothing is sent": "soft", "passed": "good", "failed": "bad", "skipped": "soft"};

// ---- Elements.
const $ = id => document.getElementById(id), root = document.documentElement, wide = matchMedia("(min-width: 62rem)");
const nothing = x => x === null || x === undefined || x === false;

// The one way to make one: h("b.good", {title: …}, what is in it …). What anybody wrote goes in as text, so that it is no markup.
function h(tag, ...kids) {
  const [name, ...looks] = tag.split("."), node = document.createElement(name);
  const props = kids[0]?.constructor === Object ? kids.shift() : {};
  for (const [key, value] of Object.entries({class: looks.join(" ") || null, ...props})) {
    if (nothing(value)) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  return fill(node, kids);
}
function fill(node, ...kids) { node.replaceChildren(...kids.flat(9).filter(kid => !nothing(kid))); return node; }
// Something is only made anew when what it shows has changed: focus and selection stay where they are.
function refill(node, data, make = x => x) {
  const now = JSON.stringify(data);
  if (node.shows === now) return false;
  node.shows = now;
  return !!fill(node, make(data));
}
// The options of a select; what was chosen stays chosen.
function options(box, values, words = x => x) {
  const chosen = box.value, entries = values.map(value => [value, words(value)]);
  const made = refill(box, entries, all => all.map(([value, text]) => h("option", {value}, text)));
  if (made && values.includes(chosen)) box.value = chosen;
  return box;
}
const select = (label, values, props) => options(h("select", {"aria-label": label, ...props}), values);
const number = (label, name, value) => h("input", {type: "number", min: 0, step: "any", "aria-label": label, name, value});
const button = (text, click, props) => h("button", {type: "button", click, ...props}, text);
const verb = (text, words, path, data, props) => button(text, () => post(words, path, data), props);
const form = (submit, ...kids) => h("form.bar", {submit(event) { event.preventDefault(); submit(this); }}, kids);
const folded = (name, ...kids) => h("details", h("summary", name), kids);
const list = items => h("ol.lines", items.map(item => h("li", item)));
const table = (heads, rows) => h("table", h("tr", heads.map(text => h("th", {scope: "col"}, text))),
  rows.map(cells => h("tr", cells.map(cell => h("td", cell)))));
const facts = pairs => h("dl", pairs.filter(([, value]) => !nothing(value) && value.length !== 0)
  .map(([name, value]) => [h("dt", name), h("dd", value)]));

// ---- Words.
const ids = () => hs.appservices.map(one => one.id), joined = (...words) => words.filter(Boolean).join(" · ");
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`, pretty = value => JSON.stringify(value, null, 2);
const local = id => (id || "").endsWith(":" + hs.server_name) ? id.slice(0, -hs.server_name.length - 1) : id || "";
const tail = id => id.length > 8 ? "…" + id.slice(-5) : id, sentAs = got => `sent as ${tail(got.txn_id)}`;
const clock = ts => new Date(ts).toTimeString().slice(0, 8);
const exactly = ts => `${clock(ts)}.${String(Math.floor(ts % 1000)).padStart(3, "0")}`;
const span = s => s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`;
const took = ms => nothing(ms) ? "" : ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10000 ? `${Math.round(ms)} ms` : span(ms / 1000);
function short(path) {
  try { path = decodeURIComponent(path); } catch { /* then as it is */ }
  return path.replace(/^\/_matrix\/(client|app|media)\/(v\d+|r0|unstable)/, "").replace(/(\/send\/[^/]+)\/.*/, "$1")
    .replace(/([!$][\w-]{5})[\w-]{5,}(:[\w.:[\]-]+)?/g, "$1…").split("/").map(local).join("/");
}
// Of an exchange: did it fail, how does it look, what was asked, what is in it, what came of it; and all of that as a sentence.
const failed = x => x.lost || x.status === null || x.status >= 400;
const tone = x => !x.done ? "pending" : x.lost ? "lost" : x.status === null ? "none failed" : failed(x) ? "failed" : "fine";
const what = x => x.kind === "transaction" ? "PUT transaction" : `${x.method} ${short(x.path)}`;
const opening = event => `${event.type} by ${local(event.sender)}`;
const about = x => joined(x.events !== null && plural(x.events, "event"), x.first && opening(x.first), x.as && `as ${local(x.as)}`,
  x.kind === "query" && `does this ${x.path.includes("/users/") ? "user" : "room"} exist?`);
const outcome = x => x.status === null ? (x.error || "no answer").split("; ")[0] : `${x.status} · ${took(x.ms)}`;
const party = id => id === "hs" ? "homeserver" : local(id);
const asked = x => joined(what(x), x.txn_id, x.attempt && `attempt ${x.attempt}`, about(x));
const answered = x => x.done ? joined(outcome(x), x.lost && "the answer is lost", x.then) : "under way";
const sentence = x => `${party(x.from)} → ${party(x.to)}: ${asked(x)}: ${answered(x)}`;

// ---- The server.
async function api(method, path, data) {
  const token = sessionStorage.getItem("token"), headers = {"Content-Type": "application/json"}, posts = method === "POST";
  if (token) headers.Authorization = "Bearer " + token;
  const answer = await fetch(`/_asbridge/${path}` + (posts ? "" : "?" + new URLSearchParams(data)),
    {method, headers, body: posts ? JSON.stringify(data) : null, cache: "no-store"});
  const got = await answer.json();
  if (answer.status === 401) { await askToken(got.error, token); return api(method, path, data); }
  if (!answer.ok) throw Object.assign(new Error(got.error || answer.status), {answered: true});
  return got;
}
const get = (path, query) => api("GET", path, query);
// What a person started: says what came of it.
async function post(words, path, data, method = "POST") {
  try {
    const got = await api(method, path, data);
    toast(typeof words === "function" ? words(got) : words); refresh();
    return got;
  } catch (error) { return toast(error.message, true); }
}
function toast(text, bad) {
  refill($("toast"), text); $("toast").className = bad ? "bad" : "";
  clearTimeout(fading); fading = setTimeout(refill, bad ? 8000 : 3500, $("toast"), "");
}
function ask(question, text, yes, input) {
  const no = !input && h("button", {value: ""}, "Cancel"), dialog = $("ask");
  fill(dialog.firstChild, h("h2", question), h("div", text), h("div.bar", input, h("button.main", {value: "yes"}, yes), no));
  dialog.returnValue = ""; dialog.showModal();
  return new Promise(done => { dialog.onclose = () => done(dialog.returnValue === "yes"); });
}
async function askToken(why, used) {
  if (used !== sessionStorage.getItem("token")) return;
  const input = h("input", {type: "password", required: true, "aria-label": "admin_token"});
  asking ??= ask("The admin token, please", why, "Go on", input).then(() => sessionStorage.setItem("token", input.value.trim()));
  await asking; asking = null;
}

// ---- Live.
const connected = yes => { $("banner").hidden = yes; }, pause = ms => new Promise(done => setTimeout(done, ms));

async function listen() {
  for (let wait = 250;;) {
    try {
      const got = await get("exchanges", {since: since ?? 0, timeout: since === null ? 0 : 25000});
      if (since === null || got.next < since) { seen.clear(); clear(0); }         // another server, another story
      since = got.next; wait = 250; connected(true);
      got.exchanges.forEach(remember); schedule();
      if (got.exchanges.length) soon ||= setTimeout(() => { soon = 0; refresh(); }, 250);
      await pause(60);                                       // of a burst, many at once
    } catch (error) {
      since = null; connected(!!error.answered);
      await pause(wait = Math.min(wait * 2, 5000));
    }
  }
}
// `n` and `seq` are of one counter: a request stands at its n, an answer at the seq with which its exchange was first seen to be done.
function remember(x) {
  x.ended = seen.get(x.n)?.ended ?? (x.done ? x.seq : null);
  seen.set(x.n, x);
  if (seen.size > KEPT) seen.delete(seen.keys().next().value);
}
function clear(n) { cleared = n; refill($("clear"), n ? "Show all" : "Clear"); schedule(); }

async function refresh() {
  try {
    const got = await get("status");
    hs = {...got, at: performance.now(), standing: got.now === hs.now}; connected(true);    // a seeded homeserver's clock stands still
    refill($("where"), `${got.server_name} · ${got.url}`); options($("only"), ["", ...ids()], id => id || "all services");
    showServices(); schedule(); await panels[tab]?.();
  } catch (error) { connected(!!error.answered); }
}
const serverNow = () => hs.now + (hs.standing ? 0 : performance.now() - hs.at);

// ---- The diagram: first what is to be drawn, as plain rows; then only those rows are touched that are not drawn so already.
const fits = x => x.n > cleared && !($("hidesync").checked && /\/(sync|events)$/.test(x.path))
  && !($("hideclient").checked && x.lane === "client")
  && (!$("only").value || x.lane === "client" || [x.from, x.to].includes($("only").value))
  && (!$("find").value || (sentence(x) + JSON.stringify(x)).toLowerCase().includes($("find").value.toLowerCase()));

// The columns: people as long as there is room for each, else some of them together; the homeserver; application services.
function columns(shown) {
  const width = $("scroll").clientWidth, who = [...new Set(shown.filter(x => x.lane === "client").map(x => x.from))];
  const services = ids().filter(id => !$("only").value || id === $("only").value);
  const room = Math.max(1, Math.floor(width / 200) - 1 - services.length), alone = who.length > room ? who.slice(0, room - 1) : who;
  const rest = who.length > room || (!who.length && !$("hideclient").checked);
  const all = [...alone.map(id => ({id, kind: "client", name: local(id)})),
    ...(rest ? [{id: "*", kind: "client", name: alone.length ? "others" : "clients"}] : []),
    {id: "hs", kind: "hs", name: hs.server_name}, ...services.map(id => ({id, kind: "as", name: id}))];
  const margin = all.length < 3 ? 20 : width < 600 ? 16 : all.length === 3 ? 12 : 8;
  return all.map((one, i) => ({...one, x: all.length > 1 ? margin + i * (100 - 2 * margin) / (all.length - 1) : 50}));
}
// Requests and answers in the order in which they were; an answer that follows at once on its request shares its row.
function arrows(shown) {
  const all = shown.flatMap(x => [{x, at: x.n, part: "request"}, ...(x.done ? [{x, at: x.ended, part: "answer"}] : [])]);
  all.sort((a, b) => a.at - b.at);
  return all.flatMap((one, i) => all[i + 1]?.x === one.x ? {...one, part: "both"} : all[i - 1]?.x === one.x ? [] : one);
}
const transaction = x => x.txn_id && `${x.to} ${x.txn_id}`;
function layout() {
  const shown = [...seen.values()].filter(fits), all = columns(shown), column = new Map(all.map(one => [one.id, one]));
  const find = (id, x) => column.get(id) || (x.lane === "client" && column.get("*")) || column.get("hs");
  const attempts = Map.groupBy(shown, transaction), begun = new Map(), open = new Map();
  let second = "";
  const rows = arrows(shown).map(({x, part}, i) => {
    const row = {key: x.n + (part === "answer" ? "a" : ""), x, part, from: find(x.from, x), to: find(x.to, x)};
    if (part === "answer") row.far = i - begun.get(x.n) > 5; else begun.set(x.n, i);
    if (part !== "answer" && clock(x.ts) !== second) row.when = second = clock(x.ts);
    if (x.txn_id) {
      const same = attempts.get(transaction(x));
      row.hue = HUES[Number(x.txn_id.slice(-6)) % HUES.length];
      row.goesOn = x.done && failed(x) && (x.then || same.some(one => one.n > x.n));
      row.again = row.goesOn || x.attempt > 1 || same.length > 1;
    }
    row.marks = marksOf(row, open);
    return row;
  });
  return [all, rows.slice(-KEPT)];
}
// What goes on over several rows: who works on an answer ("act"), and from an attempt that failed to the next one ("rail").
// `open`: what has begun, by exchange or transaction.
function marksOf({x, part, from, to, hue, goesOn}, open) {
  const ends = part === "answer" ? x.n : transaction(x), works = !x.done || x.status !== null;
  const all = [...open].map(([key, one]) => ({...one, part: key !== ends ? "" : one.kind === "rail" ? "arrive" : "end"}));
  open.delete(ends);
  const begin = (key, part, kind, x, hue) => {
    const mark = {kind, x, hue, deep: [...open.values()].filter(one => one.kind === kind && one.x === x).length};
    all.push({...mark, part});
    if (part !== "only") open.set(key, mark);
  };
  if (part !== "answer" && works) begin(x.n, part === "both" ? "only" : "start", "act " + to.kind, to.x);
  if (part !== "request" && goesOn) begin(transaction(x), "leave", "rail", from.x, hue);
  return all;
}
function drawRow({key, x, part, from, to, marks, far, when, hue, again}) {
  const bars = (...parts) => marks.filter(one => parts.includes(one.part))
    .map(one => h("i", {class: `${one.kind} ${one.part}`, "--x": one.x, "--deep": one.deep, "--hue": one.hue}));
  const tag = x.txn_id && h(again ? "span.tag.again" : "span.tag", {"--hue": hue, title: x.txn_id}, tail(x.txn_id),
    x.attempt > 1 && ` attempt ${x.attempt}`);
  const label = [h("b", breakable(what(x))), " ", tag, h("small", " ", about(x), from.id === "*" && ` from ${local(x.from)}`),
    x.fault && h("span.fault", ` fault: ${x.fault}`)];
  const said = [x.lost && h("i.slash"), joined(outcome(x), x.lost && "lost"),
    part === "answer" && [" ", tag || (far && h("small", `to ${what(x)}`))], x.then && [" · ", h("em", x.then)]];
  return h("button", {type: "button", class: `row ${tone(x)} ${to.x > from.x ? "right" : "left"}`, tabindex: -1, "data-n": x.n,
    "data-key": key, "aria-label": sentence(x), "--left": Math.min(from.x, to.x) + "%", "--width": Math.abs(to.x - from.x) + "%"},
    bars("", "start", "end"), when && h("span.when", when),
    part !== "answer" && [h("span.label", h("span", label)), h(`span.line.${from.kind}`, bars("arrive"))],
    part !== "request" && h("span.answer", bars("only", "leave"), h("span", said)));
}
// What of a row can change.
const signature = ({x, part, from, to, when, far, again, marks}) => [x.seq, part, from.x, to.x, from.id, when, far, again,
  ...marks.map(one => [one.kind, one.part, one.x, one.deep])].join();
const breakable = path => path.split(/(?<=[/:])/).flatMap(part => [part, h("wbr")]);

function schedule() { drawing ||= requestAnimationFrame(draw); }

function draw() {
  drawing = 0;
  const [all, rows] = layout(), keys = new Set(rows.map(row => row.key)), focused = document.activeElement?.dataset.key;
  const burst = rows.filter(row => !drawn.has(row.key)).length > 8;       // then nothing moves in
  drawColumns(all);
  for (const [key, {node}] of drawn) if (!keys.has(key)) { node.remove(); drawn.delete(key); }
  let budget = 30, last = $("lives");                        // new rows in one frame, so that nothing stutters
  for (const row of rows) {
    const as = signature(row), old = drawn.get(row.key), stale = old?.as !== as;
    if (stale && !budget--) { schedule(); break; }
    if (stale) { old?.node.remove(); drawn.set(row.key, {node: drawRow(row), as}); }
    const {node} = drawn.get(row.key);
    if (!old && !burst) node.classList.add("fresh");
    if (last.nextSibling !== node) last.after(node);
    if (stale && row.key === focused) rove(null, node);
    last = node;
  }
  if (!$("rows").querySelector('.row[tabindex="0"]')) $("rows").querySelector(".row:last-child")?.setAttribute("tabindex", 0);
  follow();
}
function drawColumns(all) {
  refill($("heads"), all, () => all.map(one => h(`div.head.${one.kind}`, {"--x": one.x, "--room": 84 / all.length + "%", title: one.id},
    h("b", one.name), h("small", KINDS[one.kind]))));
  refill($("lives"), [all, !seen.size], () => [all.map(one => h(`div.life.${one.kind}`, {"--x": one.x})),
    !seen.size && h("p", {id: "empty"}, "Nothing has passed yet. Say something under Rooms, or ping a service.")]);
}
function follow() { if (stick) $("scroll").scrollTop = $("scroll").scrollHeight; $("newer").hidden = stick; }

// ---- Details of an exchange, and why.
function openDetails(name, ...content) {
  if ($("details").hidden) opener = document.activeElement;
  fill($("details"), h("div.bar", h("h2.grow", name), button("Close", closeDetails, {title: "Esc"})), content);
  Object.assign($("details"), {hidden: false, scrollTop: 0}).focus();
}
function closeDetails() {
  fill($("details")).hidden = true; mark(null);
  (opener?.isConnected ? opener : $("rows").querySelector('.row[tabindex="0"]'))?.focus();
}
function mark(n) {
  for (const row of $("rows").querySelectorAll(".row")) row.ariaCurrent = row.dataset.n === n ? "true" : null;
}
function parsed(text) { try { return JSON.parse(text); } catch { return null; } }
function message(name, one) {
  const json = parsed(one.body), body = json === null ? one.body : pretty(json);
  return [h("h3", name), h("div.code", facts(Object.entries(one.headers || {}))),
    body ? h("pre", {tabindex: 0}, body) : h("div.soft", "no body"), one.cut && h("div.soft", "… cut here")];
}
// The events that passed: what was sent, or in a transaction; of one whose body is cut, as the homeserver has them.
async function eventsOf(x) {
  const sent = parsed(x.answer.body)?.event_id, pushed = parsed(x.request.body)?.events;
  if (x.kind !== "transaction") return sent ? [{event_id: sent, type: "the event", sender: x.as || x.from}] : [];
  const all = pushed ? [] : (await get("transactions", {appservice: x.to})).transactions;
  return pushed || all.find(one => one.txn_id === x.txn_id)?.events || [];
}
async function openExchange(n) {
  const x = await get("exchange", {n}).catch(error => toast(error.message, true));
  if (!x) return;
  const events = await eventsOf(x).catch(() => []), service = x.kind === "transaction" ? x.to : null;
  openDetails(what(x), h("p.said", sentence(x)), facts([["at", exactly(x.ts)], ["path", h("code", `${x.method} ${x.path}`)],
    ["transaction", x.txn_id && h("code", x.txn_id)], ["attempt", x.attempt], ["acting as", x.as],
    ["answer", x.done ? h(failed(x) ? "b.bad" : "b.good", outcome(x)) : "under way"], ["error", x.error],
    ["fault", x.fault && h("span.fault", x.fault)], ["then", x.then]]), service && replayButtons(service, x.txn_id),
    events.length > 0 && [h("h3", "Events, and why they are sent"), list(events.map(e => eventLine(e, service)))],
    message("Request", x.request), message("Answer", x.answer));
  mark(String(n));
}
const replayButtons = (appservice, txn_id) => h("div.bar",
  verb("Replay", got => `${tail(got.txn_id)} is sent again`, "replay", {appservice, txn_id},
    {title: "the same ID: who deduplicates ignores it"}),
  verb("Replay as new", sentAs, "replay", {appservice, txn_id, new_id: true}, {title: "the same events in a new transaction"}));
function eventLine(e, service) {
  const text = [h("code", e.type), " by ", h("b", local(e.sender)), e.content?.body && `: ${e.content.body}`], place = h("div");
  const toggle = button("why?", () => {
    fill(place, !place.firstChild && whyBox(e.event_id, service));
    toggle.ariaExpanded = !!place.firstChild;
  }, {"aria-expanded": "false"});
  return [h("div.bar", h("span.grow", text), toggle), place];
}
function whyBox(event, service) {
  const result = h("div"), choice = select("Application service", ids(), {change: load});
  async function load() {
    fill(result, await get("why", {event, appservice: choice.value}).then(reasons, error => h("div.soft", error.message)));
  }
  if (service) choice.value = service;
  load();
  return h("div.card.why", h("div.bar", "for", choice), result);
}
const verdict = yes => yes ? h("b.good", "✓ match") : h("b.soft", "✗ miss");
function reasons(why) {
  const one = why.transaction, words = why.pushed ? why.summary.join("; ") : why.summary[0];
  const became = one && ["transaction ", h("code.tag", tail(one.txn_id)), ", " + plural(one.attempts.length, "attempt"),
    one.acknowledged ? `, acknowledged ${clock(one.acknowledged_ts)}` : ", not acknowledged yet"];
  const rules = why.rules.map(one => [one.rule, h("code", one.id),
    [verdict(one.matches), " ", h("code", one.namespace || ""), one.miss && h("div.soft", one.miss)]]);
  return [h("p.said", why.pushed ? h("b.good", "✓ ") : h("b.wait", "✗ "), words), table(["rule", "ID", "namespace"], rules),
    h("div", became || why.state)];
}

// ---- Application services, and the clock.
function showServices() {
  for (const [id, {node}] of cards) if (!ids().includes(id)) { node.remove(); cards.delete(id); }
  for (const one of hs.appservices) {
    if (!cards.has(one.id)) cards.set(one.id, serviceCard(one.id));
    const {node, show} = cards.get(one.id);
    if (!node.isConnected) $("services").insertBefore(node, $("clock"));
    show(one);
  }
}
function serviceCard(appservice) {
  const state = h("span"), url = h("p.soft.code"), faults = h("div.bar"), spaces = h("div");
  const fields = ["state", "queue", "next try", "open", "last ACK", "latency"].map(name => [h("dt", name), h("dd")]);
  const lose = verb("Lose the next ACK", "the next acknowledgement will be lost", "faults", {appservice, fault: "lose_ack", times: 1},
    {class: "main", title: "it answers 200, and the homeserver forgets that"});
  const toggle = button("Pause", () => post(toggle.textContent.toLowerCase() + "d", toggle.textContent.toLowerCase(), {appservice}));
  const sure = () => ask(`Skip the open transaction of ${appservice}?`, "It will never get these events.", "Skip it");
  const node = h("article.card", {"aria-label": appservice}, h("div.bar", h("h2", appservice), state, h("span.grow"), lose), url,
    h("dl.wide", fields), h("div.bar", toggle, verb("Retry now", "tried at once", "retry", {appservice}),
      verb("Ping", got => `pinged in ${took(got.duration_ms)}`, "ping", {appservice}),
      verb("Replay last", sentAs, "replay", {appservice}), verb("Replay as new", sentAs, "replay", {appservice, new_id: true}),
      button("Skip …", async () => { if (await sure()) post("skipped", "skip", {appservice}); }),
      button("Examine", () => examine(appservice))),
    faults, folded("More faults", faultForm(appservice)), folded("Namespaces", spaces));
  function show(one) {
    refill(state, one.state);
    state.className = "state " + (LOOKS[one.state] || "");
    refill(url, joined(one.url || "no url", one.sender));
    fieldsOf(one).forEach((text, i) => refill(fields[i][1], text));
    fields[0][1].className = one.down_since !== null ? "bad" : "";
    refill(toggle, one.state === "paused" ? "Resume" : "Pause");
    refill(faults, one.faults, all => all.length > 0 && [all.map(fault => h("span.tag.fault", faultWords(fault))),
      button("End all faults", () => post("no faults any more", "faults", {appservice}, "DELETE"))]);
    refill(spaces, one.namespaces, all => table(["", "regex", ""], Object.entries(all).flatMap(([kind, entries]) =>
      entries.map(entry => [kind, h("code", entry.regex), entry.exclusive ? "exclusive" : "shared"]))));
  }
  return {node, show};
}
function fieldsOf(one) {
  const last = one.last_acknowledged, down = one.down_since !== null, at = one.next_attempt;
  return [down ? `down since ${clock(one.down_since)}, ${plural(one.failures, "failure")}` : last ? "up" : "nothing sent yet",
    plural(one.waiting, "event"), at === null ? "–" : `in ${span(Math.max(0, at - serverNow()) / 1000)}`,
    one.open ? joined(tail(one.open.txn_id), plural(one.open.events, "event")) : "–",
    last ? `${tail(last.txn_id)} ${clock(last.ts)}` : "–", took(one.latency_ms) || "–"];
}
const faultWords = one => [one.fault, one.status, one.delay_ms && `${one.delay_ms} ms`, "on", one.on].filter(Boolean).join(" ") + ", " +
  (one.probability ? `p = ${one.probability}` : plural(one.times, "time"));
function faultForm(appservice) {
  const only = {delay: number("Milliseconds", "delay_ms", 1000), status: number("Status", "status", 500)};      // for these faults
  const choose = fault => { for (const name in only) only[name].hidden = only[name].disabled = name !== fault; };
  choose("lose_ack");
  return form(node => {
    const {how, amount, fault, on, ...more} = Object.fromEntries(new FormData(node));
    for (const name in more) more[name] = Number(more[name]);
    post("the fault is set", "faults", {appservice, fault, on, [how]: Number(amount), ...more});
  }, select("Fault", ["lose_ack", "refuse", "delay", "status", "duplicate", "garbage"],
    {name: "fault", change: event => choose(event.target.value)}), only.delay, only.status,
  select("On what", ["transactions", "queries", "ping"], {name: "on"}), number("How many times, or how probably", "amount", 1),
  select("Times or probability", ["times", "probability"], {name: "how"}), h("button", "Begin"));
}
async function examine(appservice) {
  toast(`examining ${appservice} …`);
  const results = (await post("examined", "examine", {appservice}))?.results;
  if (!results) return;
  const count = name => `${results.filter(one => one.outcome === name).length} ${name}`;
  openDetails(`Examination of ${appservice}`, h("p.said", ["passed", "failed", "skipped"].map(count).join(", ")),
    table(["", "test", "seen"], results.map(one =>
      [h(`b.${LOOKS[one.outcome]}`, one.outcome), [one.test, h("div.soft", one.spec)], one.seen])));
}
function clockCard() {
  const wind = seconds => post(`the clock was wound on by ${span(seconds)}`, "clock", {advance: seconds});
  const steps = Object.entries({"+1 s": 1, "+10 s": 10, "+1 min": 60, "+1 h": 3600});
  return h("article.card", {id: "clock"}, h("div.bar", h("h2", "The clock"), h("span.soft", {id: "wound"})),
    h("div.soft", "Backoff, time-outs and typing follow it; a minute of waiting becomes a click."),
    form(node => wind(Number(node.seconds.value)), steps.map(([text, seconds]) => button(text, () => wind(seconds))),
      number("Seconds", "seconds", 300), "s", h("button", "Wind on")));
}
function showTime() {
  if (!hs.now) return;
  showServices();                                            // when the next attempt is
  refill($("time"), clock(serverNow()) + (hs.wound ? ` (+${span(hs.wound)})` : ""));
  refill($("wound"), hs.wound ? `wound on by ${span(hs.wound)}` : "");
}

// ---- Transactions.
function transactionsPanel() {
  const choice = select("Application service", [], {change: show}), box = h("div");
  $("transactions").append(h("div.bar", h("h2.grow", "Transactions"), choice), box);
  async function show() {
    options(choice, ids());
    const id = choice.value, found = id ? (await get("transactions", {appservice: id, limit: 50})).transactions : [];
    refill(box, [id, found], () => found.length ? list(found.map(t => transactionLine(id, t))) : h("div.soft", "none yet"));
  }
  return show;
}
function transactionLine(appservice, t) {
  const attempt = (one, i) => button(`${i + 1}: ${one.status ?? "✕"}${one.fault ? " " + one.fault : ""}`, () => openExchange(one.n),
    {class: "link " + (one.error ? "bad" : "good"), title: joined(exactly(one.ts), took(one.ms), one.error)});
  const first = t.events[0], became = t.acknowledged ? h("b.good", `✓ ${clock(t.acknowledged_ts)}`) : h("b.wait", "not acknowledged");
  return [h("div.bar", h("code.tag", {title: t.txn_id}, tail(t.txn_id)),
    h("span.grow", plural(t.events.length, "event"), first && h("small", " · " + opening(first))), became),
    h("div.bar", h("span.grow", h("small", plural(t.attempts.length, "attempt"), " "), t.attempts.map(attempt)),
      replayButtons(appservice, t.txn_id)),
    folded(h("small", "events, and why"), list(t.events.map(e => eventLine(e, appservice))))];
}

// ---- Namespaces: who claims an ID, seen as it is typed.
function namesPanel() {
  const result = h("div", {"aria-live": "polite"}), examples = h("div.bar"), hint = "@user, #alias, !room or a URI";
  const later = () => { clearTimeout(timer); timer = setTimeout(look, 150); };
  const input = h("input.grow.code", {type: "search", placeholder: hint, "aria-label": "An ID or a URI", input: later});
  let timer = 0, asked = 0;
  async function look() {
    const mine = ++asked, id = input.value.trim();           // of answers, only that to the last question counts
    const got = id && await get("explain", {id}).then(explanation, error => h("div.soft", error.message));
    if (mine === asked) fill(result, got);
  }
  $("names").append(h("h2", "Who claims it?"), h("div.bar", input), examples, result);
  const example = entry => local(entry.regex.replace(/\\(.)/g, "$1").replace(/[.[(*+].*?(?=:|$)/, "bob")) + ":" + hs.server_name;
  const given = one => [...one.namespaces.users, ...one.namespaces.aliases].map(example);
  return () => refill(examples, [...hs.appservices.flatMap(given).slice(0, 4), `@alice:${hs.server_name}`],
    found => found.map(id => button(id, () => { input.value = id; look(); }, {class: "link code"})));
}
function explanation(got) {
  const whose = got.owner ? ["It belongs to ", h("b", got.owner.appservice), `: ${got.owner.reason}.`] :
    got.maps_to ? ["It maps to ", h("b", got.maps_to)] :
    got.appservices.some(one => one.matches) ? "Claimed, but by nobody exclusively." : "Nobody claims it.";
  const exists = nothing(got.exists) ? "" : got.exists ? "it exists" : "it does not exist yet";
  const maps = one => h("div", h("code", one.regex), ` of ${one.appservice} → `, h("b", one.maps_to || "no match"));
  return [h("p.said", whose), facts([["it is", joined("a " + got.kind, got.local && "of this homeserver", exists)],
    ["may create it", got.may_create.join(", ")],
    ["would be asked", got.query.map(one => h("div", one.appservice, ": ", h("code", one.request)))],
    ["maps to", got.uris.map(maps)]]),
    got.appservices.map(claim), folded("In sentences", list(got.summary))];
}
function claim(one) {
  const says = !one.matches ? "is not interested" : one.exclusive ? "claims it exclusively" : "is interested";
  const differs = (entry, key, how) => entry[key] !== entry.matches && h("div.wait", `${how}: ${entry[key] ? "match" : "miss"}`);
  const rows = one.namespaces.map(entry => [[`${entry.kind}[${entry.index}]`, entry.exclusive && h("div.soft", "exclusive")],
    h("code", entry.regex), [verdict(entry.matches), entry.miss && h("div.soft", entry.miss),
      differs(entry, "unanchored", "if searched anywhere"), differs(entry, "whole", "if it had to match the whole")]]);
  return h("article.card", h("div.bar", h("h2", one.id), h(one.matches ? "span.state" : "span.state.soft", says)),
    one.reason && h("div", one.reason), rows.length > 0 && table(["namespace", "regex", ""], rows));
}

// ---- Rooms: enough of a client for a lesson.
function roomsPanel() {
  const room = select("Room", [], {class: "grow", change: timeline}), who = select("Say it as", []), here = h("div.soft");
  const events = h("div", {id: "timeline", role: "log", tabindex: 0, "aria-label": "Timeline"});
  const field = (name, text) => h("input.grow", {name, required: true, placeholder: text, "aria-label": text});
  const speak = form(async node => {
    if (await post("said", "say", {room_id: room.value, user_id: who.value, body: node.body.value})) { node.reset(); timeline(); }
  }, who, field("body", "say something"), h("button", "Say"));
  const arrive = form(async node => {
    const got = await post(one => `${one.user_id} is here`, "people", {name: node.person.value.trim()});
    if (got) { node.reset(); await show(); who.value = got.user_id; }
  }, field("person", "a new person's name"), h("button", "Make a person"));
  const enter = form(async node => {
    const got = await post("", "rooms", {user_id: who.value, room: node.room.value.trim()});
    if (got) { node.reset(); await show(); room.value = got.room_id; timeline(); }
  }, field("room", "#alias to join, @user to write to, or a new room's name"), h("button", "Enter"));
  $("rooms").append(h("div.bar", h("h2", "Rooms"), room), events, speak, here, enter, arrive);
  async function show() {
    const [{rooms}, {people}] = await Promise.all([get("rooms"), get("people")]);
    const names = new Map(rooms.map(one => [one.room_id, joined(one.name || one.alias || one.room_id, plural(one.members, "member"))]));
    options(room, [...names.keys()], id => names.get(id)); options(who, people, id => "as " + local(id));
    speak.hidden = !people.length || !rooms.length; enter.hidden = !people.length;
    await timeline();
  }
  async function timeline() {
    if (!room.value) { refill(events, null, () => h("div.soft", "no rooms yet: make a person, who enters one")); return; }
    const got = await get("timeline", {room: room.value, limit: 50});
    const low = events.scrollHeight - events.scrollTop - events.clientHeight < 40;
    refill(here, `here: ${got.members.map(local).join(", ")}`);
    if (refill(events, got.events, all => all.map(timelineLine)) && low) events.scrollTop = events.scrollHeight;
  }
  return show;
}
function timelineLine(e) {
  const talk = e.type === "m.room.message", text = talk ? e.content.body ?? "(redacted)" :
    joined(e.type, e.content.membership || e.content.name || e.content.topic, e.state_key && local(e.state_key));
  const why = () => openDetails("Was it sent, and why?", h("p.said", `${local(e.sender)}: ${text}`), whyBox(e.event_id),
    h("h3", "The event"), h("pre", {tabindex: 0}, pretty(e)));
  return [h("time", clock(e.origin_server_ts)), h(talk ? "span" : "span.soft", h("b", local(e.sender)), " ", text),
    button("why?", why, {class: "link"})];
}

// ---- The page.
const panels = {transactions: transactionsPanel(), names: namesPanel(), rooms: roomsPanel()};
const on = (id, event, listener) => $(id).addEventListener(event, listener);
function chooseTab(name) {
  tab = wide.matches && name === "diagram" ? "services" : name;          // beside the others, the diagram is always there
  for (const one of $("tabs").children) { one.ariaSelected = one.dataset.tab === tab; one.tabIndex = one.dataset.tab === tab ? 0 : -1; }
  for (const id in TABS) $(id).hidden = id !== tab && !(wide.matches && id === "diagram");
  if (!$("details").hidden) closeDetails();
  refresh(); schedule();
}
// Arrow keys walk among the like; Tab goes past them.
function roving(id, selector, back, ahead, then) {
  on(id, "keydown", event => {
    const all = [...$(id).querySelectorAll(selector)], at = all.indexOf(event.target);
    const to = all[{[back]: at - 1, [ahead]: at + 1, Home: 0, End: all.length - 1}[event.key]];
    if (at < 0 || !to) return;
    event.preventDefault(); rove(event.target, to); then?.(to);
  });
}
function rove(from, to) { if (from) from.tabIndex = -1; to.tabIndex = 0; to.focus({preventScroll: !from}); }
$("services").append(clockCard());
$("tabs").append(...Object.entries(TABS).map(([name, text]) => button(text, () => chooseTab(name),
  {role: "tab", "data-tab": name, "aria-controls": name})));
roving("tabs", "[role=tab]", "ArrowLeft", "ArrowRight", one => one.click());
roving("rows", ".row", "ArrowUp", "ArrowDown");
on("rows", "click", event => {
  const row = event.target.closest(".row");
  if (!row) return;
  rove($("rows").querySelector('.row[tabindex="0"]'), row); openExchange(row.dataset.n);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !$("details").hidden && !$("ask").open) closeDetails();
});
for (const id of ["hidesync", "hideclient", "only", "find"]) on(id, "input", schedule);
on("clear", "click", () => clear(cleared ? 0 : Math.max(0, ...seen.keys())));
on("newer", "click", () => { stick = true; follow(); });
on("scroll", "scroll", () => {                               // rows that grow scroll too; only who goes up wants to stay there
  const box = $("scroll"), below = box.scrollHeight - box.scrollTop - box.clientHeight;
  if (box.scrollTop < top0 - 1 && below > 2) stick = false; else if (below < 40) stick = true;
  top0 = box.scrollTop; $("newer").hidden = stick;
});
new ResizeObserver(follow).observe($("rows")); new ResizeObserver(schedule).observe($("scroll"));
root.style.colorScheme = localStorage.getItem("theme");
on("theme", "click", () => {
  const now = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  localStorage.setItem("theme", root.style.colorScheme = now === "dark" ? "light" : "dark");
});
wide.addEventListener("change", () => chooseTab(tab));
chooseTab("diagram"); setInterval(showTime, 200); setInterval(refresh, 2000); refresh().then(listen);
</script>
</html>
"""


# ============================================================================
# 10. The application service
# ============================================================================
# The other side of section 7: what a bridge or bot is built on. AppService takes
# what the homeserver pushes and asks, and sees to it that an event is handled
# once; Intent acts on Matrix as one of its users, with the verbs of Client.
# Spec: Application Service API. Knows of sections 1 to 3 only: cut out with
# them, it works with any homeserver.

MAX_JSON_BYTES = 64 * 1024 * 1024        # of an answer or a transaction
KEPT_EVENTS, KEPT_TXNS = 20_000, 1_000   # how far back the application service knows what it has done
RETRY_FIRST, RETRY_LAST = 0.25, 15.0     # seconds between attempts to reach the homeserver
COMES_BACK = (429, 502, 503, 504)        # with these a homeserver says that it will answer later

#: What to do when the homeserver can't, or does not want to, ping us.
PING_HINTS = {
    "M_BAD_STATUS":         "something else answers at {url}, or the hs_token there is another",
    "M_CONNECTION_FAILED":  "the homeserver can't connect to {url}: is that where it would find us?",
    "M_CONNECTION_TIMEOUT": "the homeserver gets no answer from {url}: is a firewall between?",
    "M_FORBIDDEN":          "the as_token belongs to another application service than {id!r}",
    "M_UNKNOWN_TOKEN":      "the homeserver does not know the as_token: does it have this registration?",
    "M_UNRECOGNIZED":       "the homeserver is too old for pings; nothing else depends on it",
    "M_URL_NOT_SET":        "the homeserver's copy of the registration has url: null: it will push nothing",
}


class AppService:
    """An application service: override the hooks, on_…, and act on Matrix through intents. The front page has an example.

    `database`: a file that keeps what was handled, or ":memory:", which a restart forgets.
    """

    #: method, path (the prefix is missing in the 2016 text), handler
    ROUTES = (
        ("PUT",  r"(?:/_matrix/app/v1)?/transactions/([^/]+)",  "_put_transaction"),
        ("GET",  r"(?:/_matrix/app/v1)?/(users|rooms)/([^/]+)", "_get_existence"),
        ("GET",  r"/_matrix/app/(?:v1|unstable)/thirdparty/(protocol|user|location)(?:/([^/]+))?", "_get_third_party"),
        ("POST", r"/_matrix/app/v1/ping",                       "_post_ping"),
    )
    SCHEMA = """
        CREATE TABLE IF NOT EXISTS transactions_done(n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
        CREATE TABLE IF NOT EXISTS events_handled(n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
    """

    def __init__(self, registration: Registration, homeserver_url: str, database: str = ":memory:",
                 clock: Clock | None = None) -> None:
        if not is_base_url(homeserver_url):
            raise ValueError(f"{homeserver_url!r} is no URL of a homeserver; write one such as http://localhost:8008")
        self.registration, self.id = registration, registration.id
        self.homeserver_url, self.clock = homeserver_url, clock or Clock()
        self.client = Client(homeserver_url, registration.as_token)  # acts as nobody; owns the connections
        self.intents: dict[str | None, Intent] = {}          # by user ID; None: our own user
        self.bot = self.intent()
        self.stopping = False
        self.bells: list[Any] = []                           # rung when the homeserver calls, and to stop
        self.ready = threading.Event()                       # set once the homeserver was found and has been asked for a ping
        self._where = urllib.parse.urlsplit(registration.url or "")
        self._prefix = self._where.path.rstrip("/")          # before each path, if the url has one
        self._server: HttpServer | None = None
        self._in_order = threading.Lock()                    # guards the order: one transaction at a time
        self._db_guard = threading.Lock()                    # guards _db: one statement at a time
        self._db = (sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                    if database == ":memory:" else open_sqlite(database))
        with unusable(database), contextlib.ExitStack() as undo:
            undo.callback(self._db.close)
            self._db.executescript(self.SCHEMA)
            undo.pop_all()

    # -- To override: what the homeserver tells and asks. May be called from any thread, on_event from one at a time.

    def on_event(self, event: JsonObject) -> None:
        """One event, each once and in order; one of state has a `state_key`, whatever its type. What this raises is logged, and the
        event counts as handled; but if the homeserver could not be asked, it comes again.
        """

    def on_ephemeral(self, data: JsonObject) -> None:
        """Typing, a receipt or presence, if the registration asks for such. Passing: not kept if it can't be handled."""

    def on_user_query(self, user_id: str) -> bool:
        """Whether this user exists now; it may be registered here."""
        return False

    def on_alias_query(self, alias: str) -> bool:
        """Whether this alias exists now; the room may be created here."""
        return False

    def on_third_party_protocol(self, protocol: str) -> JsonObject | None:
        """Metadata of one of the registration's `protocols`: user_fields, location_fields, icon, field_types, and
        instances, each with network_id, desc and fields.
        """
        return None

    def on_third_party_user(self, protocol: str, fields: Mapping[str, str]) -> list[JsonObject]:
        """Users of the network, each with userid, protocol and fields. protocol '': the one with fields["userid"]."""
        return []

    def on_third_party_location(self, protocol: str, fields: Mapping[str, str]) -> list[JsonObject]:
        """Its channels, each with alias, protocol and fields. protocol '': the one with fields["alias"]."""
        return []

    # -- To use.

    def intent(self, user_id: str | None = None) -> Intent:
        """Acts as this user, '@localpart:server'; without one, as the application service's own user."""
        if user_id not in self.intents:
            self.intents.setdefault(user_id, Intent(self, user_id and check_id("@", user_id)))
        return self.intents[user_id]

    @property
    def server_name(self) -> str:
        """Asked of the homeserver the first time."""
        return server_of(self.bot.user_id)

    @property
    def port(self) -> int:
        return self._server.port if self._server else 0

    @property
    def url(self) -> str:
        """Where we listen; the registration's, but with the real port. '' if its url is null."""
        if self.registration.url is None:
            return ""
        host = f"[{self._where.hostname}]" if ":" in (self._where.hostname or "") else self._where.hostname
        return f"{self._where.scheme}://{host}:{self.port}{self._prefix}"

    def sql(self, statement: str, *values: Any) -> list[Any]:
        """Runs one statement, durably; its rows."""
        with self._db_guard:
            return self._db.execute(statement, values).fetchall()

    # -- Start and stop.

    def listen(self) -> None:
        """Takes the port of the registration's url, if it has one. start() does it if nobody has."""
        if self.registration.url is not None and self._server is None:
            port = self._where.port if self._where.port is not None else {"http": 80, "https": 443}[self._where.scheme]
            self._server = HttpServer((self._where.hostname or "127.0.0.1", port), self.answer)

    def start(self) -> None:
        """Listens, and looks for the homeserver."""
        self.listen()
        if self._server:
            self._server.start()
        threading.Thread(target=self._hello, name=f"{self.id} hello", daemon=True).start()

    def stop(self) -> None:
        """Ends after the event in hand; the rest of its transaction will come again."""
        self.stopping = True
        self.ring()
        server, self._server = self._server, None
        if server:
            server.stop()
        waited = self._in_order.acquire(timeout=1)
        with self._db_guard:
            self._db.close()
        if waited:
            self._in_order.release()
        self.client.close()

    def ring(self) -> None:
        """Wakes whoever waits for the homeserver to come back."""
        for each in list(self.bells):
            release(each)

    def _hello(self) -> None:
        """As soon as there is a homeserver: registers our own user, learns the server name, asks for a ping."""
        ready, seconds, url = bell(), RETRY_FIRST, self.homeserver_url
        self.bells.append(ready)
        while not self.stopping:
            try:
                log.info("%s: the homeserver %s is at %s", self.id, self.server_name, url)
                return self._ask_for_ping()
            except (Unreachable, MatrixError) as error:
                does = "refuses us" if isinstance(error, MatrixError) else "does not answer"
                log.warning("%s: the homeserver at %s %s: %s", self.id, url, does, self._hint(error))
                self.clock.wait(ready, self.clock.monotonic() + seconds)
                seconds = min(2 * seconds, RETRY_LAST)

    def _ask_for_ping(self) -> None:
        path = f"/_matrix/client/v1/appservice/{urllib.parse.quote(self.id, safe='')}/ping"
        try:
            answer = self.client.call("POST", path, {"transaction_id": secrets.token_hex(8)})
            ms = answer.get("duration_ms") if isinstance(answer, dict) else None
            log.info("%s: the homeserver reaches us, in %s ms", self.id, shorten(ms))
        except (Unreachable, MatrixError) as error:
            if not self.stopping:
                log.warning("%s: the homeserver does not reach us: %s", self.id, self._hint(error))
        finally:
            self.ready.set()

    def _hint(self, error: Exception) -> str:
        hint = PING_HINTS.get(error.errcode, "") if isinstance(error, MatrixError) else ""
        return f"{error}; {hint.format(url=self.url, id=self.id)}" if hint else str(error)

    # -- The endpoint: what the homeserver sends, from the request to the hook.

    def answer(self, request: Request) -> Response:
        try:
            handler, ids = self._route(request)
            self._check_token(request)
            self.ring()
            return json_response(200, getattr(self, handler)(*ids, request) or {})
        except MatrixError as error:
            return error_response(error)
        except ClientGone:
            raise
        except Exception:
            if not self.stopping:
                log.exception("%s: %s %s failed", self.id, request.method, request.path)
            return json_response(500, {"errcode": "M_UNKNOWN", "error": "it failed inside; the log says why"})

    def _route(self, request: Request) -> tuple[str, list[str]]:
        """The handler's name, and the IDs in the path."""
        path = request.path.removeprefix(self._prefix) if request.path.startswith(self._prefix + "/") else ""
        for method, regex, handler in self.ROUTES:           # each path has one method
            if match := re.fullmatch(regex, path):
                if method != request.method:
                    raise MatrixError("M_UNRECOGNIZED", f"this path takes {method}, not {request.method}", 405)
                return handler, [decode_segment(group or "") for group in match.groups()]
        raise MatrixError("M_UNRECOGNIZED", f"{shorten(request.path)} is no path of an application service")

    def _check_token(self, request: Request) -> None:
        """The hs_token says that it is our homeserver: in the header or, before v1.4, in the query; both must be it."""
        tokens = {bearer(request.headers), request.query.get("access_token", "")} - {""}
        if not tokens:
            raise MatrixError("M_MISSING_TOKEN", "no hs_token, as Authorization: Bearer or access_token=")
        right = self.registration.hs_token.encode()
        if not all(hmac.compare_digest(token.encode(), right) for token in tokens):
            raise MatrixError("M_FORBIDDEN", "this is not the hs_token of this application service")

    def _put_transaction(self, txn_id: str, request: Request) -> None:
        """200, which acknowledges it, when each event was handled and that is on disk. 503: it is to come again."""
        body = parse_object(request.body(MAX_JSON_BYTES))
        events = body.get("events")
        if not isinstance(events, list):
            raise MatrixError("M_BAD_JSON", "the body must have 'events': a list")
        ephemeral = body.get("ephemeral", body.get("de.sorunome.msc2409.ephemeral"))
        with self._in_order:
            # An ID may come back with other events: from a homeserver that was set up anew and counts from 1. What
            # was handled is known by event; only what has no ID is taken for done with its transaction.
            done = bool(self.sql("SELECT 1 FROM transactions_done WHERE id = ?", txn_id))
            for event in events:
                if self.stopping:
                    raise MatrixError("M_UNKNOWN", "the application service stops", 503)
                if isinstance(event, dict) and (not done or isinstance(event.get("event_id"), str)):
                    self._handle(event)
            for data in ephemeral if isinstance(ephemeral, list) and not done else ():
                try:
                    self.on_ephemeral(data)
                except Exception:
                    log.exception("%s: ephemeral data failed and is skipped", self.id)
            self._remember("transactions_done", txn_id, KEPT_TXNS)

    def _handle(self, event: JsonObject) -> None:
        """Once, whatever transactions it comes in: a crash repeats the event in hand and no other."""
        event_id = event.get("event_id")
        if isinstance(event_id, str) and self.sql("SELECT 1 FROM events_handled WHERE id = ?", event_id):
            return
        try:
            self._notice_membership(event)
            self.on_event(event)
        except Exception as error:
            if isinstance(error, Unreachable) or (isinstance(error, MatrixError) and error.status in COMES_BACK):
                raise MatrixError("M_UNKNOWN", f"event {event_id} can't be handled now: {error}", 503) from None
            log.exception("%s: event %s failed and is skipped", self.id, event_id)
        if isinstance(event_id, str):
            self._remember("events_handled", event_id, KEPT_EVENTS)

    def _notice_membership(self, event: JsonObject) -> None:
        """What somebody else did to one of our users."""
        content, user_id = event.get("content"), event.get("state_key")
        if event.get("type") == "m.room.member" and isinstance(content, dict) and isinstance(user_id, str):
            if (intent := self.intents.get(user_id)) and content.get("membership") != "join":
                intent.rooms.discard(str(event.get("room_id")))

    def _remember(self, table: str, id: str, keep: int) -> None:
        self.sql(f"INSERT OR IGNORE INTO {table}(id) VALUES (?)", id)
        if not secrets.randbelow(100):                       # now and then is enough
            self.sql(f"DELETE FROM {table} WHERE n <= (SELECT max(n) FROM {table}) - ?", keep)

    def _get_existence(self, kind: str, id: str, request: Request) -> None:
        if not (self.on_user_query(id) if kind == "users" else self.on_alias_query(id)):
            raise MatrixError("M_NOT_FOUND", f"{shorten(id)} does not exist here")

    def _get_third_party(self, kind: str, protocol: str, request: Request) -> Any:
        fields = {name: value for name, value in request.query.items() if name != "access_token"}
        hook = getattr(self, f"on_third_party_{kind}")
        found = hook(protocol) if kind == "protocol" else hook(protocol, fields)
        if not found:
            raise MatrixError("M_NOT_FOUND", f"there is no such third-party {kind} here")
        return found

    def _post_ping(self, request: Request) -> None:
        parse_object(request.body(65_536))


# -- Asking the homeserver. Client knows the paths and shapes of the client-server API, Intent what a ghost needs first.

class Unreachable(OSError):
    """The homeserver can't be asked; later it may be."""


@contextlib.contextmanager
def expecting(errcode: str) -> Iterator[None]:
    """A refusal with this errcode only ends the block."""
    try:
        yield
    except MatrixError as error:
        if error.errcode != errcode:
            raise


def client_path(*segments: str) -> str:
    """The path of a client-server endpoint, each segment percent-encoded."""
    return "/_matrix/client/v3/" + "/".join([urllib.parse.quote(segment, safe="") for segment in segments])


def query_string(query: Mapping[str, Any]) -> str:
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in without_none(query).items()}
    return "?" + urllib.parse.urlencode(words) if words else ""


class Client:
    """A Matrix client over HTTP, for any number of threads.

    With a `user_id` it acts as that user (Identity assertion), for which the token must be an as_token.
    Every verb raises MatrixError when the homeserver refuses, and Unreachable when it can't be asked.
    """

    def __init__(self, url: str, token: str = "", user_id: str | None = None) -> None:
        self.url, self.token = url, token
        self.acts_as = user_id                               # None: whose the token is
        self.connections: list[HttpClient] = []              # kept and idle, the last used on top
        self.new_txn_id: Callable[[], str] = lambda: secrets.token_hex(8)
        self.seen: list[JsonObject] = []                     # events that wait_for() has met
        self._since: str | None = None                       # where it goes on
        self.known_id = user_id                              # whose requests these are, once that is known

    def call(self, method: str, path: str, body: Any = None, /, seconds: float = 60.0, **query: Any) -> Any:
        """The JSON of the answer. What is None is left out of the query."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        target = path + query_string({"user_id": self.acts_as, **query})
        data = None if body is None else to_json(body).encode("utf-8", "replace")
        connection = self._connection()
        try:
            status, answer = connection.request(method, target, data, headers, seconds, MAX_JSON_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise Unreachable(f"{self.url} can't be asked: {error or type(error).__name__}") from error
        self.connections.append(connection)
        return self._result(status, answer)

    def _connection(self) -> HttpClient:
        try:
            return self.connections.pop()
        except IndexError:                                   # all are in use
            return HttpClient(self.url)

    def _result(self, status: int, answer: bytes) -> Any:
        if status < 300:
            try:
                return parse_json(answer)
            except MatrixError:
                raise Unreachable(f"{self.url} can't be asked: its answer is not JSON") from None
        told: JsonObject = {}
        with contextlib.suppress(MatrixError):
            told = parse_object(answer)
        errcode, error = told.pop("errcode", "M_UNKNOWN"), told.pop("error", answer[:200].decode("utf-8", "replace"))
        raise MatrixError(str(errcode), str(error), status, **told)

    def ask(self, method: str, *segments: str, body: Any = None, **query: Any) -> JsonObject:
        """The JSON object that the client-server endpoint with this path answers."""
        return cast(JsonObject, self.call(method, client_path(*segments), body, **query))

    def close(self) -> None:
        while self.connections:
            self.connections.pop().close()

    # -- Who am I.

    @property
    def user_id(self) -> str:
        if not self.known_id:
            told: Any = self.whoami()                        # a stranger may answer anything
            self.known_id = field(told if isinstance(told, dict) else {}, "user_id", str)
        return self.known_id

    def whoami(self) -> JsonObject:
        return self.ask("GET", "account", "whoami")

    def profile(self, user_id: str | None = None) -> JsonObject:
        return self.ask("GET", "profile", user_id or self.user_id)

    def set_displayname(self, name: str) -> None:
        self.ask("PUT", "profile", self.user_id, "displayname", body={"displayname": name})

    def set_avatar_url(self, url: str) -> None:
        self.ask("PUT", "profile", self.user_id, "avatar_url", body={"avatar_url": url})

    def account_data(self, type: str, room_id: str | None = None) -> JsonObject:
        where = ["rooms", room_id] if room_id else []
        return self.ask("GET", "user", self.user_id, *where, "account_data", type)

    def set_account_data(self, type: str, content: JsonObject, room_id: str | None = None) -> None:
        where = ["rooms", room_id] if room_id else []
        self.ask("PUT", "user", self.user_id, *where, "account_data", type, body=content)

    # -- Rooms and who is in them.

    def create_room(self, **options: Any) -> str:
        return str(self.ask("POST", "createRoom", body=options)["room_id"])

    def join(self, room: str) -> str:
        """Joins by ID or alias; the room's ID."""
        return str(self.ask("POST", "join", room, body={})["room_id"])

    def leave(self, room_id: str, reason: str | None = None) -> None:
        self.ask("POST", "rooms", room_id, "leave", body=without_none({"reason": reason}))

    def _change_membership(self, verb: str, room_id: str, user_id: str, reason: str | None = None) -> None:
        self.ask("POST", "rooms", room_id, verb, body=without_none({"user_id": user_id, "reason": reason}))

    invite = functools.partialmethod(_change_membership, "invite")
    kick = functools.partialmethod(_change_membership, "kick")
    ban = functools.partialmethod(_change_membership, "ban")
    unban = functools.partialmethod(_change_membership, "unban")

    def joined_rooms(self) -> list[str]:
        return list(self.ask("GET", "joined_rooms")["joined_rooms"])

    def joined_members(self, room_id: str) -> dict[str, JsonObject]:
        """User ID → display_name and avatar_url."""
        return dict(self.ask("GET", "rooms", room_id, "joined_members")["joined"])

    def members(self, room_id: str) -> list[JsonObject]:
        """The m.room.member events."""
        return list(self.ask("GET", "rooms", room_id, "members")["chunk"])

    def resolve(self, alias: str) -> str:
        return str(self.ask("GET", "directory", "room", alias)["room_id"])

    def set_alias(self, alias: str, room_id: str) -> None:
        self.ask("PUT", "directory", "room", alias, body={"room_id": room_id})

    def delete_alias(self, alias: str) -> None:
        self.ask("DELETE", "directory", "room", alias)

    # -- Events.

    def send(self, room_id: str, type: str, content: JsonObject, txn_id: str | None = None, ts: int | None = None) -> str:
        """The event's ID. The same `txn_id` again sends nothing again; `ts` is for application services."""
        where = "rooms", room_id, "send", type, txn_id or self.new_txn_id()
        return str(self.ask("PUT", *where, body=content, ts=ts)["event_id"])

    def say(self, room_id: str, text: str, txn_id: str | None = None) -> str:
        return self.send(room_id, "m.room.message", {"msgtype": "m.text", "body": text}, txn_id)

    def redact(self, room_id: str, event_id: str, reason: str | None = None, txn_id: str | None = None) -> str:
        where = "rooms", room_id, "redact", event_id, txn_id or self.new_txn_id()
        return str(self.ask("PUT", *where, body=without_none({"reason": reason}))["event_id"])

    def set_state(self, room_id: str, type: str, content: JsonObject, state_key: str = "", ts: int | None = None) -> str:
        return str(self.ask("PUT", "rooms", room_id, "state", type, state_key, body=content, ts=ts)["event_id"])

    def state(self, room_id: str, type: str, state_key: str = "") -> JsonObject:
        """The content of one state event."""
        return self.ask("GET", "rooms", room_id, "state", type, state_key)

    def all_state(self, room_id: str) -> list[JsonObject]:
        return list(self.call("GET", client_path("rooms", room_id, "state")))

    def event(self, room_id: str, event_id: str) -> JsonObject:
        return self.ask("GET", "rooms", room_id, "event", event_id)

    def messages(self, room_id: str, dir: str = "b", limit: int = 100, **query: Any) -> JsonObject:
        """`chunk`, `start` and `end`, from where to go on; without `end` there is no more. The latest first unless `dir` is "f"."""
        return self.ask("GET", "rooms", room_id, "messages", dir=dir, limit=limit, **query)

    def typing(self, room_id: str, typing: bool = True, timeout: int = 30_000) -> None:
        body = without_none({"typing": typing, "timeout": timeout if typing else None})
        self.ask("PUT", "rooms", room_id, "typing", self.user_id, body=body)

    def receipt(self, room_id: str, event_id: str, type: str = "m.read") -> None:
        self.ask("POST", "rooms", room_id, "receipt", type, event_id, body={})

    def sync(self, since: str | None = None, timeout: int = 0, filter: JsonObject | str | None = None) -> JsonObject:
        """`timeout` in milliseconds: how long the homeserver may wait for something new."""
        narrow = to_json(filter) if isinstance(filter, dict) else filter
        return self.ask("GET", "sync", seconds=60 + timeout / 1000, since=since, timeout=timeout, filter=narrow)

    def wait_for(self, test: Callable[[JsonObject], object], seconds: float = 10.0) -> JsonObject:
        """The first event of any room, past or to come, that passes `test`, with its room_id; TimeoutError."""
        deadline, at = time.monotonic() + seconds, 0
        while True:
            for event in self.seen[at:]:
                if test(event):
                    return event
            at, left = len(self.seen), deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no such event in {seconds} s; the last: {shorten(self.seen[-3:], 2000)}")
            self._look(int(min(left, 5.0) * 1000))

    def _look(self, timeout: int) -> None:
        """Adds to `seen` what is new."""
        answer = self.sync(self._since, timeout if self._since else 0, {"room": {"timeline": {"limit": 1000}}})
        self._since = answer["next_batch"]
        for rooms in answer.get("rooms", {}).values():
            for room_id, room in rooms.items():
                for part in ("invite_state", "knock_state", "state", "timeline"):
                    self.seen += [{**event, "room_id": room_id} for event in room.get(part, {}).get("events", ())]


class Intent(Client):
    """Acts as a user of the application service, who is registered before the first request and, where the homeserver
    refuses one, joined to the room that it is about: nobody need prepare a ghost. Made by AppService.intent().
    """

    ROOM_PATH = re.compile(r"/_matrix/client/v3/rooms/([^/]+)/")

    def __init__(self, service: AppService, user_id: str | None) -> None:
        super().__init__(service.homeserver_url, service.registration.as_token, user_id)
        self.service = service
        self.connections = service.client.connections        # shared by all intents
        self.registered = False                              # as far as is known here
        self.rooms: set[str] = set()                         # joined, as far as is known here

    def call(self, method: str, path: str, body: Any = None, /, seconds: float = 60.0, **query: Any) -> Any:
        self.ensure_registered()
        try:
            return super().call(method, path, body, seconds, **query)
        except MatrixError as error:
            if error.errcode != "M_FORBIDDEN" or not self._mend(method, path):
                raise
        return super().call(method, path, body, seconds, **query)

    def _mend(self, method: str, path: str) -> bool:
        """After a refusal: registers and joins, whatever is remembered. Has another attempt a chance?"""
        self.registered = False
        new, room = self.ensure_registered(), self.ROOM_PATH.match(path)
        if not room or method == "POST":                     # what is done by POST changes memberships
            return new
        room_id = urllib.parse.unquote(room[1])
        self.rooms.discard(room_id)
        self.ensure_joined(room_id)
        return True

    def ensure_registered(self) -> bool:
        """Whether the user was not registered before."""
        if self.registered:
            return False
        localpart, new = localpart_of(self.acts_as or "") or self.service.registration.sender_localpart, False
        with expecting("M_USER_IN_USE"):
            self.service.client.ask("POST", "register", body={
                "type": "m.login.application_service", "username": localpart, "inhibit_login": True})
            new = True
        self.registered = True
        return new

    def ensure_joined(self, room_id: str) -> None:
        """Joins, if need be on the invitation of the application service's own user."""
        if room_id in self.rooms:
            return
        try:
            self.join(room_id)
        except MatrixError as error:
            if error.errcode != "M_FORBIDDEN" or self is self.service.bot:
                raise
            try:
                self.service.bot.invite(room_id, self.user_id)
            except MatrixError as other:
                told = f"{error.error}; to be invited did not work either: {other.error}"
                raise MatrixError(error.errcode, told) from None
            self.join(room_id)

    def join(self, room: str) -> str:
        room_id = super().join(room)
        self.rooms.add(room_id)
        return room_id

    def leave(self, room_id: str, reason: str | None = None) -> None:
        self.rooms.discard(room_id)
        super().leave(room_id, reason)


# ============================================================================
# 11. The sample: an IRC bridge
# ============================================================================
# An IRC server whose channels are Matrix rooms: a person on IRC is a ghost on
# Matrix, a person on Matrix is a nick on IRC. What an IRC client says goes down
# this section: words, server, client, and in the bridge spool, sender, ghost.
# What Matrix says enters it at IrcBridge.on_event. Here it is decided how names
# map, what is relayed, and what has to outlive a crash. RFC 1459 and 2812 for IRC.
# Does not know the homeserver: all that it asks goes through an Intent (10).

IRC_NAME = "irc.asbridge"
LINE_BYTES = 510                   # of a line, without CRLF (RFC 2812, 2.3)
NICK_LENGTH = 30
CHANNEL_BYTES = 64                 # of a channel's name
TOPIC_BYTES = 390
MAX_CHANNELS = 50                  # that one client is on
MAX_TARGETS = 10                   # of one command, such as PRIVMSG
MAX_CLIENTS = 1_000                # connected
MAX_ROOMS = 10_000                 # channels with somebody on them
MAX_LINES = 200                    # that one Matrix message may become
MAX_LISTED = 400                   # lines in answer to one LIST or WHO
MAX_SPOOLED = 100_000              # jobs that wait for the homeserver; past it what makes more is refused
MAX_FAILURES = 10                  # answers 500, or bugs, until a job is given up
KEPT_SAID = 2_000                  # messages that a reply or a redaction can be about
SEND_BYTES = 262_144               # that wait for one client; past it the client is dropped
PIECE_BYTES = 16_384               # of them that are sent at once
REGISTER_SECONDS = 30.0            # from the connection to NICK and USER
IDLE_PING_SECONDS = 90.0           # silence until a PING, and from there to the end
CLOSING_SECONDS = 2.0              # for the last words to be read
LINES_PER_SECOND = 50              # a client that writes faster is read more slowly,
BURST = 200                        # but for so many lines
NICK_COST, NEW_CHANNEL_COST = 50, 10 # lines that these count for: they may make a new user or room on Matrix

# -- The words of IRC: commands, numerics, and lines as text. Knows of no connection.

NICK = re.compile(rf"(?![0-9-])[A-Za-z0-9\[\]\\`_^{{|}}-]{{1,{NICK_LENGTH}}}")
CHANNEL = re.compile(r"#[^\x00-\x20,:\x7f]+")
FOLD = str.maketrans(string.ascii_uppercase + "[]\\~", string.ascii_lowercase + "{}|^")   # RFC 1459, 2.2
FORMATTING = re.compile(r"\x03(?:\d{1,2}(?:,\d{1,2})?)?|\x04(?:[0-9A-Fa-f]{6})?|[\x00-\x08\x0b-\x1f\x7f]")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")   # in Matrix text, nothing that IRC may take for its own
ONE_LINE = {0: " ", 10: " ", 13: " "}


class Command(NamedTuple):
    """An IRC command, done by the method of IrcClient that is called do_ and its name. What is to happen on Matrix becomes a job,
    which is spooled, and done by the method of IrcBridge that is called _do_ and the job's name.
    """
    least: int                   # parameters
    early: bool = False          # may come before registering
    matrix: bool = False         # is refused while too much waits for Matrix


COMMANDS = {
    "CAP":       Command(1, early=True),                # capabilities: we have none
    "PASS":      Command(1, early=True),                # a password that nobody checks
    "USER":      Command(4, early=True),                # user and real name
    "NICK":      Command(0, early=True, matrix=True),   # choose or change the nick
    "MOTD":      Command(0),                            # message of the day
    "LUSERS":    Command(0),                            # how many are here
    "PING":      Command(1, early=True),                # are you there?
    "PONG":      Command(0, early=True),                # I am
    "QUIT":      Command(0, early=True),                # leave IRC
    "JOIN":      Command(1, matrix=True),               # enter channels; 0: leave all
    "PART":      Command(1),                            # leave channels
    "TOPIC":     Command(1, matrix=True),               # read or set the topic
    "NAMES":     Command(0),                            # who is in a channel
    "LIST":      Command(0),                            # which channels there are
    "MODE":      Command(1),                            # ask for modes; there are hardly any
    "INVITE":    Command(2, matrix=True),               # ask somebody into a channel
    "KICK":      Command(2),                            # refused: rights are managed on Matrix
    "PRIVMSG":   Command(0, matrix=True),               # say something
    "NOTICE":    Command(0, matrix=True),               # the same, to which no program answers
    "AWAY":      Command(0),                            # say that one is away
    "WHO":       Command(0),                            # who is in a channel, or who somebody is
    "WHOIS":     Command(1),                            # the same, in more words
    "USERHOST":  Command(1),                            # nicks with their hosts
    "ISON":      Command(1),                            # which of these nicks are here
    "VERSION":   Command(0),                            # what this is
}

#: The numeric replies whose last parameter is always the same.
NUMERICS = {
    1: "Welcome to Matrix by way of IRC",      376: "End of MOTD",                   433: "Nickname is already in use",
    5: "are supported by this server",         401: "No such nick or channel",       437: "Not available now; try again later",
    305: "You are no longer marked as away",   403: "No such channel",               442: "You're not on that channel",
    306: "You have been marked as away",       404: "Cannot send to channel",        443: "is already on channel",
    315: "End of WHO list",                    405: "You are on too many channels",  451: "You have not registered",
    318: "End of WHOIS list",                  411: "No recipient given",            461: "Not enough parameters",
    323: "End of LIST",                        412: "No text to send",               462: "You may not register again",
    331: "No topic is set",                    421: "Unknown command",               482: "Matrix decides on rights",
    366: "End of NAMES list",                  431: "No nickname given",             501: "Unknown mode flag",
    368: "End of channel ban list",            432: "Erroneous nickname",            502: "Only your own mode, please",
    407: f"Too many recipients: this one and the rest were not told ({MAX_TARGETS} at most)",
}
FEATURES = ("CASEMAPPING=rfc1459", "CHANTYPES=#", "PREFIX=", "CHANMODES=b,,,n", f"NICKLEN={NICK_LENGTH}",
            f"CHANNELLEN={CHANNEL_BYTES}", f"TOPICLEN={TOPIC_BYTES}", f"CHANLIMIT=#:{MAX_CHANNELS}", f"MAXTARGETS={MAX_TARGETS}",
            f"TARGMAX=NAMES:{MAX_TARGETS},WHOIS:{MAX_TARGETS},PRIVMSG:{MAX_TARGETS},NOTICE:{MAX_TARGETS}", "NETWORK=asbridge")
MOTD = ("This server is a bridge: its channels are Matrix rooms.",
        "JOIN #lobby, and people on Matrix find you in #{prefix}lobby:{server}.")


def fold(name: str) -> str:
    """A nick or channel as IRC compares it."""
    return name.translate(FOLD)


def is_channel(name: str) -> bool:
    return bool(CHANNEL.fullmatch(name)) and len(name.encode("utf-8", "replace")) <= CHANNEL_BYTES


def as_nick(text: str) -> str:
    """The valid nick that is nearest to any text."""
    nick = re.sub(r"[^A-Za-z0-9\[\]\\`_^{|}-]", "_", text)[:NICK_LENGTH]
    return nick if NICK.fullmatch(nick) else ("_" + nick)[:NICK_LENGTH]


def as_user(text: str) -> str:
    """What stands between ! and @."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:10] or "_"


def several(names: str) -> list[str]:
    """The names in a list with commas, each once."""
    return list({fold(name): name for name in names.split(",") if name}.values())


def decode_line(raw: bytes) -> str:
    """A line as it came, cut to 512 bytes: UTF-8, or else Latin-1."""
    for end in range(LINE_BYTES, LINE_BYTES - 4, -1):        # the cut may have hit a character
        with contextlib.suppress(UnicodeDecodeError):
            return raw[:end].decode("utf-8")
    return raw[:LINE_BYTES].decode("latin-1")


def parse_line(line: str) -> tuple[str, list[str]]:
    """Command, in upper case, and parameters, without tags and prefix. An empty command: nothing was said."""
    while line[:1] in ("@", ":"):
        line = line.partition(" ")[2].lstrip(" ")
    middle, colon, trailing = line.partition(" :")
    words = [word for word in middle.split(" ") if word]     # other white space is text (RFC 2812, 2.3.1)
    return (words[0].upper(), words[1:] + ([trailing] if colon else [])) if words else ("", [])


def parse_action(text: str) -> tuple[str, bool]:
    """The text, and whether it is what /me sends (CTCP ACTION)."""
    if text.startswith("\x01ACTION "):
        return text[8:].rstrip("\x01"), True
    return text, False


def encode_line(line: str) -> bytes:
    """A line as it is sent: nothing in it ends it sooner, and no half character stands at its end."""
    data = line.translate(ONE_LINE).encode("utf-8", "replace")[:LINE_BYTES]
    return data.decode("utf-8", "ignore").encode() + b"\r\n"


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` bytes, split at line ends, then between words, or else between characters."""
    pieces = []
    for line in re.split(r"[\r\n]+", text):
        rest = line.rstrip()
        while len(data := rest.encode("utf-8", "replace")) > limit:
            piece = data[:limit].decode("utf-8", "ignore")
            space = piece.rfind(" ") if rest[len(piece)] != " " else len(piece)
            piece = piece[:space] if space > len(piece) // 2 else piece
            pieces.append(piece)
            rest = rest[len(piece):].lstrip(" ")
        if rest.strip():
            pieces.append(rest)
    return pieces


def irc_lines(source: str, command: str, target: str, text: str, action: bool = False) -> list[str]:
    """`text` from `source` to `target`, in as many lines as it needs."""
    start, after = ("\x01ACTION ", "\x01") if action else ("", "")
    before = f":{source} {command} {target} :{start}"
    pieces = split_text(text, LINE_BYTES - len((before + after).encode("utf-8", "replace")))
    if len(pieces) > MAX_LINES:
        pieces[MAX_LINES - 1:] = [f"(and {len(pieces) - MAX_LINES + 1} more lines)"]
    return [before + piece + after for piece in pieces]


# -- The server: who and which channels there are, wherever they come from, and the connections. Knows no Matrix but the bridge.

@dataclass(eq=False)
class Person:
    """Somebody with a nick: on Matrix, or (IrcClient) connected here. Guarded, like Channel, by IrcServer.lock."""
    nick: str
    user: str
    host: str
    realname: str
    user_id: str = ""                                        # of a person on Matrix
    away: str = ""                                           # why; empty: there
    channels: set[Channel] = dataclasses.field(default_factory=set)

    @property
    def prefix(self) -> str:
        return f"{self.nick}!{self.user}@{self.host}"

    def tell(self, line: str) -> None:
        """People on Matrix hear it from the homeserver."""

    def hear(self, source: str, command: str, text: str, action: bool) -> None:
        for line in irc_lines(source, command, self.nick, text, action):
            self.tell(line)

    def tell_neighbours(self, line: str) -> None:
        """Tells everybody else who is on a channel with this person, once."""
        for person in set[Person]().union(*(channel.people for channel in self.channels)) - {self}:
            person.tell(line)


@dataclass(eq=False)
class Channel:
    name: str
    made: int                                                # seconds since 1970
    room_id: str = ""                                        # empty until the homeserver has made or found it
    topic: str = ""
    topic_by: str = ""
    topic_at: int = 0                                        # seconds since 1970
    people: set[Person] = dataclasses.field(default_factory=set)
    changes: int = 0                                         # counts joins and parts, for refresh()

    def tell(self, line: str, but: Person | None = None) -> None:
        for person in self.people - {but}:
            person.tell(line)

    def hear(self, source: str, command: str, text: str, action: bool, but: Person | None = None) -> None:
        for line in irc_lines(source, command, self.name, text, action):
            self.tell(line, but)

    def enter(self, person: Person) -> None:
        if person not in self.people:
            self.people.add(person)
            person.channels.add(self)
            self.changes += 1
            self.tell(f":{person.prefix} JOIN {self.name}")

    def exit(self, person: Person, line: str = "") -> None:
        """`line` tells it, if anything does."""
        if person in self.people:
            if line:
                self.tell(line)
            self.people.discard(person)
            person.channels.discard(self)
            self.changes += 1

    def change_topic(self, source: str, topic: str, at: int) -> None:
        """`at` in milliseconds."""
        self.topic, self.topic_by, self.topic_at = topic, source, at // 1000
        self.tell(f":{source} TOPIC {self.name} :{topic}")


class IrcServer:
    """Takes connections, and knows everybody and every channel there is on IRC."""

    def __init__(self, bridge: IrcBridge, bind: str, port: int) -> None:
        self.bridge, self.address = bridge, (bind, port)
        self._listener: socket.socket | None = None
        self._accepter: threading.Thread | None = None       # takes connections
        # Guards all that follows, every Person and Channel, and the bridge's maps of them. Held for one IRC line or one
        # event, in which nothing waits but our own disk: what goes to IRC is queued, what goes to Matrix is spooled.
        self.lock = threading.Lock()
        self.people: dict[str, Person] = {}                  # by folded nick: registered clients, people on Matrix
        self.channels: dict[str, Channel] = {}               # by folded name
        self.clients: set[IrcClient] = set()                 # connected, registered or not

    def find_person(self, nick: str) -> Person | None:
        return self.people.get(fold(nick))

    def find_channel(self, name: str) -> Channel | None:
        return self.channels.get(fold(name))

    def open_channel(self, name: str) -> Channel:
        """The channel, which is made if there is none."""
        if fold(name) not in self.channels:
            self.channels[fold(name)] = Channel(name, self.bridge.clock.now() // 1000)
        return self.channels[fold(name)]

    def may_open(self, name: str) -> bool:
        """Channels that somebody is on, here or on Matrix, are counted: those that a flooder has left keep out nobody."""
        return (fold(name) in self.channels or len(self.channels) < MAX_ROOMS
                or sum(bool(channel.people) for channel in self.channels.values()) < MAX_ROOMS)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1]) if self._listener else 0

    def listen(self) -> None:
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        with failing(f"{self.address[0]}:{self.address[1]} can't be listened at"):
            self._listener = socket.create_server(self.address, family=family, backlog=128)
        self._listener.settimeout(1.0)                       # where closing does not wake accept()

    def start(self) -> None:
        self._accepter = threading.Thread(target=self._accept, args=(self._listener,), name="irc accept", daemon=True)
        self._accepter.start()

    def stop(self) -> None:
        """Ends what listen() and start() began. Once it takes connections, bridge.stopping must be set before."""
        listener, self._listener = self._listener, None
        if listener:
            hang_up(listener)
            if self._accepter:
                self._accepter.join(2)
            listener.close()
        with self.lock:
            for client in self.clients:
                client.close("The bridge stops")

    def _accept(self, listener: socket.socket) -> None:
        seldom = Seldom()
        while not self.bridge.stopping:
            try:
                self._take(*listener.accept())
            except TimeoutError:
                pass
            except (OSError, RuntimeError) as error:         # no more handles or threads
                if self.bridge.stopping:
                    return
                if seldom():
                    log.error("%s: no more IRC clients can be taken: %s; there are %d", self.bridge.id, error, len(self.clients))
                time.sleep(0.1)

    def _take(self, sock: socket.socket, address: Any) -> None:
        host = re.sub("^:", "0:", address[0])                # no parameter may start with ':'
        client = IrcClient(self, sock, host)
        with self.lock:
            full = len(self.clients) >= MAX_CLIENTS
            self.clients.add(client)
        try:
            client.start()
        except RuntimeError:
            with self.lock:
                self.clients.discard(client)
            client.close("No more threads")                  # ends the one thread that there may be
            hang_up(sock)
            sock.close()
            raise
        if full:
            client.close("Too many clients")


class IrcClient(Person):
    """One IRC connection: one thread reads commands, another writes what waits for it. Nobody else waits for it."""

    def __init__(self, server: IrcServer, sock: socket.socket, host: str) -> None:
        super().__init__("", "", host, "")
        self.server, self.bridge, self.sock = server, server.bridge, sock
        self.registered = False                              # NICK and USER were taken: others see it
        self.negotiating = False                             # between CAP LS and CAP END
        self.register_by = time.monotonic() + REGISTER_SECONDS
        self.pause = bell()                                  # what a client that writes too fast waits on
        self.paid_until = 0.0                                # moved on by each line; may not pass the clock
        self.cost = 0.0                                      # of the line in hand: its jobs, and a tenth for each numeric
        self.news = threading.Condition()                    # guards the next two; the writer waits for them
        self.waiting = bytearray()                           # lines that are still to be sent
        self.fate = ""                                       # why the connection ends; nothing is said after that
        self.writer = threading.Thread(target=self.write, name=f"irc to {host}", daemon=True)

    # -- In: from bytes to a method do_x, for the command X.

    def start(self) -> None:
        self.sock.settimeout(REGISTER_SECONDS)
        with contextlib.suppress(OSError):                   # it is gone again, which the reader notices
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)     # else the second of two lines waits 40 ms
        self.writer.start()
        threading.Thread(target=self.read, name=f"irc from {self.host}", daemon=True).start()

    def read(self) -> None:
        """Obeys line after line until the client goes, or has to."""
        try:
            for raw in self.lines():
                self.cost = 0.0
                with self.server.lock:
                    self.obey(decode_line(raw).rstrip("\r"))
                if self.fate:
                    break
                self.slow_down()
        except OSError:
            pass                                             # the client went away
        except Exception:
            if not self.bridge.stopping:
                log.exception("the IRC client %s is dropped", self.nick)
            self.close("The server failed; its log says why")
        finally:
            self.end()

    def lines(self) -> Iterator[bytes]:
        """Until the client closes, is silent for too long, or has not registered in time."""
        buffer, pinged = b"", False
        while not self.end_if_late():
            self.sock.settimeout(IDLE_PING_SECONDS if self.registered else max(0.001, self.register_by - time.monotonic()))
            try:
                data = self.sock.recv(4096)
            except TimeoutError:
                if pinged:
                    return self.close("Ping timeout")
                if self.registered:
                    pinged = True
                    self.tell(f"PING :{IRC_NAME}")
                continue
            if not data:
                return
            pinged = False
            *whole, buffer = (buffer + data).split(b"\n")
            yield from whole
            buffer = buffer[:2 * LINE_BYTES]

    def end_if_late(self) -> bool:
        """Closes a connection that has not registered in time; whether it did."""
        late = not self.registered and time.monotonic() >= self.register_by
        if late:
            self.close("Not registered in time: NICK and USER are wanted")
        return late

    def obey(self, line: str) -> None:
        """Does what the line says, or says why not. Under the server's lock."""
        name, params = parse_line(line)
        command = COMMANDS.get(name)
        if not name or self.end_if_late():
            return
        if not self.registered and line.endswith((" HTTP/1.1", " HTTP/1.0")):
            self.close("This is IRC, not HTTP")              # a web page may try to speak for its reader
        elif not self.registered and not (command and command.early):
            self.reply(451)
        elif command is None:
            self.reply(421, name)
        elif len(params) < command.least:
            self.reply(461, name)
        elif self.registered and command.matrix and self.bridge.is_behind():
            self.reply(437, *params[:1])
        else:
            getattr(self, f"do_{name.lower()}")(*params[:15])

    def slow_down(self) -> None:
        now = self.bridge.clock.monotonic()
        self.paid_until = max(self.paid_until, now - BURST / LINES_PER_SECOND) + max(1.0, self.cost) / LINES_PER_SECOND
        if self.paid_until > now:
            self.bridge.clock.wait(self.pause, self.paid_until)

    def end(self) -> None:
        try:
            with self.server.lock:
                self.quit(self.fate or "Connection closed")
        except sqlite3.Error:                                # a full disk, say: its ghost stays until the next start
            if not self.bridge.stopping:
                log.exception("the IRC client %s has left, but not on Matrix", self.nick)
        self.close("Connection closed")
        self.writer.join(CLOSING_SECONDS)
        hang_up(self.sock)
        with self.server.lock:
            self.server.clients.discard(self)

    def quit(self, reason: str) -> None:
        """Leaves IRC: everybody who shares a channel is told, and Matrix."""
        if not self.registered:
            return
        del self.server.people[fold(self.nick)]
        self.tell_neighbours(f":{self.prefix} QUIT :{reason}")
        channels = list(self.channels)
        for channel in channels:
            channel.exit(self)
        for channel in channels if not self.bridge.stopping else ():     # else the sweep at the next start does it
            self.spool("leave", channel.name, reason=reason)

    # -- Out: from a line to bytes.

    def reply(self, number: int, *params: str) -> None:
        """A numeric; what NUMERICS has for it comes last."""
        self.cost += 0.1
        *middle, last = [*params, NUMERICS[number]] if number in NUMERICS else params
        self.tell(" ".join([f":{IRC_NAME} {number:03} {self.nick or '*'}", *middle, f":{last}"]))

    def reply_list(self, number: int, *params: str, words: Iterable[str]) -> None:
        """Tells a list of words in as many numerics as they need."""
        room = LINE_BYTES - len(" ".join([IRC_NAME, self.nick, *params]).encode()) - 10
        for piece in split_text(" ".join(words), room):
            self.reply(number, *params, piece)

    def listed(self, found: Sequence[T]) -> Iterator[T]:
        """As many of them as are listed, and then how many more there are."""
        yield from found[:MAX_LISTED]
        if len(found) > MAX_LISTED:
            self.tell(f":{IRC_NAME} NOTICE {self.nick} :and {len(found) - MAX_LISTED} more")

    def tell(self, line: str) -> None:
        """One line for the client; never waits. With too many that wait already the connection ends."""
        data = encode_line(line)
        with self.news:
            if self.fate:
                return
            if len(self.waiting) + len(data) <= SEND_BYTES:
                self.waiting += data
                return self.news.notify()
            self.waiting.clear()
            self.close("Too slow to read")
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)               # wakes the reader; the last words may still be taken

    def close(self, fate: str) -> None:
        """The connection ends when the client was told why, after what waits for it."""
        with self.news:
            if not self.fate:
                self.fate = fate
                self.waiting += encode_line(f"ERROR :Closing link: {fate}")
                self.news.notify()

    def write(self) -> None:
        with contextlib.suppress(OSError):                   # the reader notices, too
            while piece := self.next_piece():
                self.sock.sendall(piece)
        hang_up(self.sock)
        self.sock.close()

    def next_piece(self) -> bytes:
        """Some whole lines, once there are any; nothing when there will be no more."""
        with self.news:
            self.news.wait_for(lambda: self.waiting or self.fate)
            end = self.waiting.rfind(b"\n", 0, PIECE_BYTES) + 1
            piece = bytes(self.waiting[:end])
            del self.waiting[:end]
            return piece

    # -- Registering.

    def do_cap(self, verb: str, *wanted: str) -> None:
        """We have no capabilities, but clients ask first and wait for the answer."""
        verb = verb.upper()
        self.negotiating = verb in ("LS", "REQ") or (self.negotiating and verb != "END")
        if verb in ("LS", "LIST"):
            self.tell(f":{IRC_NAME} CAP {self.nick or '*'} {verb} :")
        elif verb == "REQ":
            self.tell(f":{IRC_NAME} CAP {self.nick or '*'} NAK :{' '.join(wanted)}")
        self.welcome()

    def do_pass(self, *_: str) -> None:
        if self.registered:
            self.reply(462)

    def do_user(self, user: str, mode: str, unused: str, realname: str, *_: str) -> None:
        if self.registered:
            return self.reply(462)
        self.user, self.realname = as_user(user), realname
        self.welcome()

    def do_nick(self, nick: str = "", *_: str) -> None:
        if not nick:
            self.reply(431)
        elif not NICK.fullmatch(nick):
            self.reply(432, nick)
        elif self.server.find_person(nick) not in (None, self) or self.bridge.is_bot(nick):
            self.reply(433, nick)
        elif self.registered:
            self.rename(nick)
        else:
            self.nick = nick
            self.welcome()

    def rename(self, nick: str) -> None:
        """On Matrix another ghost comes, and this one leaves."""
        old, line = self.nick, f":{self.prefix} NICK :{nick}"
        self.tell(line)
        self.tell_neighbours(line)
        del self.server.people[fold(old)]
        self.server.people[fold(nick)], self.nick = self, nick
        self.cost += NICK_COST
        for channel in self.channels:
            self.spool("join", channel.name)
            if to_localpart(old) != to_localpart(nick):      # else only the display name changes
                self.spool("leave", channel.name, old, reason=f"is now known as {nick}")

    def welcome(self) -> None:
        """Registers who has said who they are, and tells them what they are told first."""
        if self.registered or self.negotiating or not (self.nick and self.user):
            return
        if self.server.find_person(self.nick):               # somebody was quicker
            taken, self.nick = self.nick, ""
            return self.reply(433, taken)
        self.registered = True
        self.server.people[fold(self.nick)] = self
        self.reply(1)
        self.reply(2, f"Your host is {IRC_NAME}, running asbridge {__version__}")
        self.reply(3, "It began when Matrix did")
        self.reply(4, IRC_NAME, f"asbridge-{__version__}", "i", "n")
        self.reply(5, *FEATURES)
        self.do_lusers()
        self.do_motd()

    def do_motd(self, *_: str) -> None:
        self.reply(375, f"- {IRC_NAME} message of the day")
        for line in MOTD:
            self.reply(372, "- " + line.format(prefix=self.bridge.prefix, server=self.bridge.known_name()))
        self.reply(376)

    def do_lusers(self, *_: str) -> None:
        on_irc = sum(isinstance(person, IrcClient) for person in self.server.people.values())
        self.reply(251, f"There are {on_irc} people on IRC and {len(self.server.people) - on_irc} on Matrix")
        self.reply(254, str(len(self.server.channels)), "channels formed")
        self.reply(255, f"I have {on_irc} clients and 0 servers")

    def do_ping(self, token: str, *_: str) -> None:
        self.tell(f":{IRC_NAME} PONG {IRC_NAME} :{token}")

    def do_pong(self, *_: str) -> None:
        pass

    def do_quit(self, reason: str = "", *_: str) -> None:
        self.close(f"Quit: {reason}" if reason else "Quit")

    # -- Channels.

    def own_channel(self, name: str) -> Channel | None:
        """The channel, if this client is on it; otherwise it is told that not."""
        channel = self.server.find_channel(name)
        if channel and self in channel.people:
            return channel
        self.reply(442 if channel else 403, name)
        return None

    def do_join(self, names: str, *_: str) -> None:
        if names == "0":
            return self.do_part(",".join([channel.name for channel in self.channels]), "Left all channels")
        for name in filter(None, names.split(",")):
            if not is_channel(name):
                self.reply(403, name)
            elif len(self.channels) >= MAX_CHANNELS:
                self.reply(405, name)
            elif not self.server.may_open(name):
                self.reply(437, name)
            elif self not in (channel := self.server.open_channel(name)).people:
                self.cost += 0 if channel.room_id else NEW_CHANNEL_COST
                channel.enter(self)
                self.spool("join", channel.name)
                if channel.topic:
                    self.tell_topic(channel)
                self.do_names(channel.name)

    def do_part(self, names: str, reason: str = "", *_: str) -> None:
        for name in filter(None, names.split(",")):
            if channel := self.own_channel(name):
                channel.exit(self, f":{self.prefix} PART {channel.name} :{reason}")
                self.spool("leave", channel.name, reason=reason)

    def do_topic(self, name: str, text: str | None = None, *_: str) -> None:
        if not (channel := self.own_channel(name)):
            return
        if text is None:
            return self.tell_topic(channel)
        now = self.bridge.clock.now()
        channel.change_topic(self.prefix, text, now)
        self.spool("topic", channel.name, topic=FORMATTING.sub("", text), ts=now)

    def tell_topic(self, channel: Channel) -> None:
        if not channel.topic:
            return self.reply(331, channel.name)
        self.reply(332, channel.name, channel.topic)
        if channel.topic_by:
            self.reply(333, channel.name, channel.topic_by, str(channel.topic_at))

    def do_names(self, names: str = "*", *_: str) -> None:
        for name in several(names)[:MAX_TARGETS]:
            if channel := self.server.find_channel(name):
                self.reply_list(353, "=", channel.name, words=sorted(person.nick for person in channel.people))
            self.reply(366, channel.name if channel else name)

    def do_list(self, names: str = "", *_: str) -> None:
        wanted = {fold(name) for name in names.split(",") if is_channel(name)}
        self.reply(321, "Channel", "Users  Name")
        for channel in self.listed([one for key, one in sorted(self.server.channels.items()) if not wanted or key in wanted]):
            self.reply(322, channel.name, str(len(channel.people)), channel.topic)
        self.reply(323)

    def do_mode(self, target: str, changes: str = "", *_: str) -> None:
        channel = self.server.find_channel(target)
        if target.startswith("#"):
            if channel is None:
                self.reply(403, target)
            elif not changes:
                self.reply(324, channel.name, "+n")
                self.reply(329, channel.name, str(channel.made))
            elif changes.strip("+") == "b":
                self.reply(368, channel.name)
            else:
                self.reply(482, channel.name)
        elif fold(target) != fold(self.nick):
            self.reply(502)
        elif not changes:
            self.reply(221, "+i")
        elif changes.strip("+-iwos"):
            self.reply(501)

    def do_invite(self, nick: str, name: str, *_: str) -> None:
        person = self.server.find_person(nick)
        if person is None:
            return self.reply(401, nick)
        if channel := self.own_channel(name):
            if person in channel.people:
                return self.reply(443, person.nick, channel.name)
            self.reply(341, person.nick, channel.name)
            person.tell(f":{self.prefix} INVITE {person.nick} :{channel.name}")
            if person.user_id:
                self.spool("invite", channel.name, user=person.user_id)

    def do_kick(self, name: str, *_: str) -> None:
        if channel := self.own_channel(name):
            self.reply(482, channel.name)

    # -- Talking.

    def do_privmsg(self, targets: str = "", text: str = "", *_: str) -> None:
        if not (names := several(targets)):
            return self.reply(411)
        if not text:
            return self.reply(412)
        for target in names[:MAX_TARGETS]:
            self.speak("PRIVMSG", target, text)
        if len(names) > MAX_TARGETS:
            self.reply(407, names[MAX_TARGETS])

    def do_notice(self, targets: str = "", text: str = "", *_: str) -> None:
        """Says something as PRIVMSG does, but is never answered (RFC 2812, 3.3.2)."""
        for target in several(targets)[:MAX_TARGETS] if text else ():
            self.speak("NOTICE", target, text)

    def speak(self, command: str, target: str, text: str) -> None:
        """To people on IRC at once; to those on Matrix by way of the homeserver."""
        channel, person = self.server.find_channel(target), self.server.find_person(target)
        words, action = parse_action(text)
        if channel and self in channel.people:
            channel.hear(self.prefix, command, words, action, but=self)
            self.say(command, channel.name, words, action)
        elif person:
            person.hear(self.prefix, command, words, action)
            if person.user_id:
                self.say(command, person.user_id, words, action)
            elif person.away and command == "PRIVMSG":
                self.reply(301, person.nick, person.away)
        elif command == "PRIVMSG":
            self.reply(404 if channel else 403 if target.startswith("#") else 401, target)

    def do_away(self, text: str = "", *_: str) -> None:
        self.away = text
        self.reply(306 if text else 305)

    # -- Who is there.

    def do_who(self, mask: str = "*", *_: str) -> None:
        channel, person = self.server.find_channel(mask), self.server.find_person(mask)
        people = channel.people if channel else [person] if person else []
        for each in self.listed(sorted(people, key=lambda each: each.nick)):
            self.reply(352, channel.name if channel else "*", each.user, each.host, IRC_NAME, each.nick,
                       "G" if each.away else "H", f"0 {each.realname}")
        self.reply(315, mask)

    def do_whois(self, *params: str) -> None:
        for nick in several(params[-1])[:MAX_TARGETS]:
            if person := self.server.find_person(nick):
                self.describe(person)
            else:
                self.reply(401, nick)
            self.reply(318, person.nick if person else nick)

    def describe(self, person: Person) -> None:
        self.reply(311, person.nick, person.user, person.host, "*", person.realname)
        self.reply_list(319, person.nick, words=sorted(channel.name for channel in person.channels))
        self.reply(312, person.nick, IRC_NAME, "is on Matrix" if person.user_id else "is on IRC")
        if person.user_id:
            self.reply(320, person.nick, f"is {person.user_id} on Matrix")
        if person.away:
            self.reply(301, person.nick, person.away)

    def do_userhost(self, *nicks: str) -> None:
        found = [person for nick in nicks[:5] if (person := self.server.find_person(nick))]
        self.reply(302, " ".join([f"{p.nick}={'-' if p.away else '+'}{p.user}@{p.host}" for p in found]))

    def do_ison(self, *nicks: str) -> None:
        found = [self.server.find_person(nick) for nick in " ".join(nicks).split()]
        self.reply(303, " ".join([person.nick for person in found if person]))

    def do_version(self, *_: str) -> None:
        self.reply(351, f"asbridge-{__version__}", IRC_NAME, "an IRC door to Matrix")

    # -- On to the bridge: what is to be done on Matrix.

    def say(self, command: str, to: str, words: str, action: bool) -> None:
        """On Matrix. Colours are left out, and any other CTCP: that is between IRC clients only."""
        body = FORMATTING.sub("", words)
        if body and not words.startswith("\x01"):
            msgtype = "m.emote" if action else "m.notice" if command == "NOTICE" else "m.text"
            self.spool("say", to, msgtype=msgtype, body=body, ts=self.bridge.clock.now())

    def spool(self, do: str, to: str, nick: str = "", **job: Any) -> None:
        """What this client did is to be done on Matrix. `to`: a channel or a user ID."""
        self.cost += 1
        self.bridge.spool(do, nick=nick or self.nick, to=to, **job)


# -- The bridge: who is who, and what becomes of a line or an event on the other side. Knows IRC by the words and the server above.

MEDIA = {"m.image": "an image", "m.video": "a video", "m.audio": "a recording", "m.file": "a file", "m.sticker": "a sticker"}


def one_line(text: object) -> str:
    """A field of a Matrix event, such as a topic, as IRC can show it."""
    return CONTROL.sub("", str(text or "")).replace("\n", " ")


def strip_quote(body: str) -> tuple[str, str]:
    """A reply without the quotation that clients put before it, and the user ID that is quoted (or '')."""
    quoted = re.match(r"> (?:\* )?<(@[^>\n]+)>", body)
    return re.sub(r"\A(?:>[^\n]*\n)+\n?", "", body), quoted[1] if quoted else ""


class IrcBridge(AppService):
    """IRC people as ghosts @{prefix}{nick}:server, channels as rooms #{prefix}{channel}:server.

    What IRC hands over is on disk, with its transaction ID, before one thread sends it to Matrix, in order.
    What an IRC client had not yet read is lost with its socket: IRC has no acknowledgement.
    """

    SCHEMA = AppService.SCHEMA + """
        CREATE TABLE IF NOT EXISTS irc_spool(n INTEGER PRIMARY KEY AUTOINCREMENT, txn TEXT UNIQUE, job TEXT);
        CREATE TABLE IF NOT EXISTS irc_channels(name TEXT PRIMARY KEY, room_id TEXT UNIQUE);
        CREATE TABLE IF NOT EXISTS irc_direct(n INTEGER PRIMARY KEY, room_id TEXT UNIQUE, ghost TEXT, user_id TEXT);
        CREATE TABLE IF NOT EXISTS irc_nicks(user_id TEXT PRIMARY KEY, nick TEXT);
    """
    #: event type: method
    EVENTS = {
        "m.room.message":   "_on_message",
        "m.room.encrypted": "_on_message",
        "m.sticker":        "_on_message",
        "m.room.redaction": "_on_redaction",
        "m.room.topic":     "_on_topic",
        "m.room.member":    "_on_member",
    }

    def __init__(self, registration: Registration, homeserver_url: str, database: str = ":memory:",
                 clock: Clock | None = None) -> None:
        super().__init__(registration, homeserver_url, database, clock)
        options = registration.sample or {}
        self.prefix = str(options.get("prefix", "_irc_"))    # of ghosts' localparts, and of aliases
        self.irc = IrcServer(self, str(options.get("irc_bind", "127.0.0.1")), int(options.get("irc_port", 6667)))
        self.lock, self.people, self.channels = self.irc.lock, self.irc.people, self.irc.channels    # the same ones
        # The lock guards these, too:
        self.matrix: dict[str, Person] = {}                  # by user ID: people on Matrix
        self.rooms: dict[str, Channel] = {}                  # by room ID
        self.direct: dict[str, tuple[str, str]] = {}         # by room ID: ghost and person, the latest last
        self.said: dict[str, tuple[str, str]] = {}           # by event ID: who said it, and when
        # By whoever makes a ghost, and the same each time:
        self.dressed: dict[str, str] = {}                    # by ghost: the display name that it has
        self.work, self.heard = bell(), bell()               # something was spooled; the homeserver is back
        self.bells.append(self.heard)
        self._sender = threading.Thread(target=self._send, name="irc to matrix", daemon=True)
        with legible(database):
            self._load()

    def _load(self) -> None:
        for user_id, nick in self.sql("SELECT user_id, nick FROM irc_nicks"):
            self._add_person(user_id, nick)
        for name, room_id in self.sql("SELECT name, room_id FROM irc_channels"):
            self.rooms[room_id] = channel = self.irc.open_channel(name)
            channel.room_id = room_id
        for room_id, ghost, user_id in self.sql("SELECT room_id, ghost, user_id FROM irc_direct ORDER BY n"):
            self.direct[room_id] = (ghost, user_id)

    @property
    def irc_port(self) -> int:
        return self.irc.port

    def start(self) -> None:
        """Listens for IRC, too. Ghosts that a former process left in channels leave: nobody is connected."""
        self.irc.listen()
        try:
            super().start()
        except OSError:
            self.irc.stop()
            raise
        self.sql("DELETE FROM irc_spool WHERE txn LIKE 'sweep%'")
        for channel in list(self.rooms.values()):
            self.spool("sweep", to=channel.name, txn=f"sweep-{channel.name}")
        self._sender.start()
        self.irc.start()

    def stop(self) -> None:
        self.stopping = True
        self.irc.stop()
        release(self.work)
        self.ring()
        if self._sender.is_alive():
            self._sender.join(1)
        super().stop()

    # -- Names: a ghost has its nick in its user ID, a room its channel in its alias; a person on Matrix keeps the nick that it
    #    was given first.

    def known_name(self) -> str:
        """The homeserver's, without asking for it."""
        return server_of(self.bot.known_id or "") or "server"

    def ghost_id(self, nick: str) -> str:
        return f"@{self.prefix}{to_localpart(nick)}:{self.server_name}"

    def ghost_nick(self, user_id: str) -> str:
        """The nick that a ghost's ID has, or ''."""
        return from_localpart(localpart_of(user_id)[len(self.prefix):]) if self.is_ghost(user_id) else ""

    def is_ghost(self, user_id: str) -> bool:
        return (user_id.startswith(f"@{self.prefix}") and server_of(user_id) == self.server_name
                and user_id != self.bot.user_id)             # which may be called like a ghost

    def is_ours(self, user_id: str) -> bool:
        return self.is_ghost(user_id) or user_id == self.bot.user_id

    def is_bot(self, nick: str) -> bool:
        """Whether the ghost of this nick would be our own user."""
        return self.prefix + to_localpart(nick) == self.registration.sender_localpart

    def client_of(self, ghost: str) -> IrcClient | None:
        """Who is connected and stands behind this ghost."""
        person = self.irc.find_person(self.ghost_nick(ghost))
        return person if isinstance(person, IrcClient) else None

    def person(self, user_id: str, realname: str = "") -> Person:
        """Somebody on Matrix, with a nick that stays."""
        person = self.matrix.get(user_id)
        if person is None:
            base = as_nick(from_localpart(localpart_of(user_id)))
            nicks = (base[:NICK_LENGTH - len(suffix)] + suffix
                     for suffix in ("", "_m", *(f"_m{n}" for n in range(2, len(self.people) + 3))))
            nick = next(nick for nick in nicks if not self.irc.find_person(nick))
            self.sql("INSERT OR REPLACE INTO irc_nicks VALUES (?, ?)", user_id, nick)
            person = self._add_person(user_id, nick)
        person.realname = realname or person.realname
        return person

    def _add_person(self, user_id: str, nick: str) -> Person:
        person = Person(nick, as_user(localpart_of(user_id)), server_of(user_id), user_id, user_id)
        self.matrix[user_id] = self.people[fold(nick)] = person
        return person

    def nick_of(self, user_id: str) -> str:
        client = self.client_of(user_id)
        return client.nick if client else self.ghost_nick(user_id) or self.person(user_id).nick

    def channel_alias(self, name: str) -> str:
        return f"#{self.prefix}{fold(name)[1:]}:{self.server_name}"

    def channel_of(self, alias: str) -> str:
        """The channel's name that an alias has, or ''."""
        name, ours = "#" + localpart_of(alias)[len(self.prefix):], alias.startswith(f"#{self.prefix}")
        return name if ours and server_of(alias) == self.server_name and is_channel(name) else ""

    # -- From IRC to Matrix: what a client does is a job on disk, until the sender has done it or the homeserver refuses it for
    #    good. The sender is the only thread that asks the homeserver for anything, but for the two queries at the end.

    def is_behind(self) -> bool:
        """Whether so much waits for the homeserver that no more is taken."""
        [(waiting,)] = self.sql("SELECT (SELECT max(n) FROM irc_spool) - (SELECT min(n) FROM irc_spool)")
        return bool(waiting and waiting >= MAX_SPOOLED)

    def spool(self, do: str, *, txn: str = "", **job: Any) -> None:
        """Puts a job on disk. `txn`: its transaction ID, if that can be derived from what the job answers."""
        self.sql("INSERT OR IGNORE INTO irc_spool(txn, job) VALUES (?, ?)",
                 txn or secrets.token_hex(8), to_json({"do": do, **job}))
        release(self.work)

    def _send(self) -> None:
        while not self.stopping:
            try:
                rows = self.sql("SELECT n, txn, job FROM irc_spool ORDER BY n LIMIT 100")
                if not rows:
                    self.clock.wait(self.work, math.inf)
                for n, txn, job in rows:
                    if not self._send_one({"txn": txn, **parse_object(job.encode())}):
                        break
                    self.sql("DELETE FROM irc_spool WHERE n = ?", n)
            except sqlite3.Error:                            # a full disk, say; or stop() closed the database
                if not self.stopping:
                    log.exception("%s: the spool can't be used", self.id)
                    self.clock.wait(self.heard, self.clock.monotonic() + RETRY_LAST)

    def _send_one(self, job: JsonObject) -> bool:
        """Until it is done or refused for good; False when the bridge stops before."""
        seconds, failures = RETRY_FIRST, 0
        while not self.stopping:
            try:
                getattr(self, "_do_" + job["do"])(job)
                return True
            except Unreachable as error:
                problem: Exception = error
            except MatrixError as error:
                problem, failures = error, failures + (error.status == 500)
                if (error.status < 500 and error.status not in (401, 408, 429)) or failures >= MAX_FAILURES:
                    self._refused(job, error)
                    return True
                wish = error.extra.get("retry_after_ms")
                seconds = max(seconds, wish / 1000 if isinstance(wish, (int, float)) else 0)
            except Exception as error:
                problem, failures = error, failures + 1
                log.exception("%s: a job of the IRC bridge failed: %s", self.id, job["do"])
                if failures >= MAX_FAILURES:
                    return True
            log.warning("%s: can't send; again in %.2f s: %s", self.id, seconds, self._hint(problem))
            self.clock.wait(self.heard, self.clock.monotonic() + seconds)
            seconds = min(2 * seconds, RETRY_LAST)
        return False

    def _refused(self, job: JsonObject, error: MatrixError) -> None:
        what = " ".join(str(job[key]) for key in ("do", "nick", "to") if key in job)
        log.log(logging.DEBUG if job["do"] == "leave" else logging.WARNING,
                "%s: the homeserver refuses: %s: %s", self.id, what, error)
        with self.lock:
            client, channel = self.irc.find_person(job.get("nick", "")), self.irc.find_channel(job.get("to", ""))
            if client and job["do"] == "join" and channel:
                channel.exit(client, f":{IRC_NAME} KICK {channel.name} {client.nick} :{error.error}")
            elif client and job["do"] != "leave":
                client.tell(f":{IRC_NAME} NOTICE {client.nick} :Matrix refuses that: {error.error}")

    # -- The jobs: each may be done again after a crash.

    def _do_say(self, job: JsonObject) -> None:
        target = job["to"] if job["to"].startswith("#") else job["nick"] + ",isnick"
        uri = f"irc://{self.server_name.partition(':')[0]}/{urllib.parse.quote(target, safe=',')}"
        event = "m.room.message", {"msgtype": job["msgtype"], "body": job["body"], "external_url": uri}, job["txn"], job.get("ts")
        room_id = self.room_of(job)
        try:
            self.ghost(job["nick"]).send(room_id, *event)
        except MatrixError as error:
            with self.lock:                                  # a talk that is over: this word opens another
                over = error.status in (403, 404) and self._drop_direct(room_id)
            if not over:
                raise
            self.ghost(job["nick"]).send(self.room_of(job), *event)

    def _do_topic(self, job: JsonObject) -> None:
        room_id, content = self.channel_room(job["to"]), {"topic": job["topic"]}
        with expecting("M_FORBIDDEN"):
            self.ghost(job["nick"]).set_state(room_id, "m.room.topic", content, ts=job["ts"])
            return
        self.bot.set_state(room_id, "m.room.topic", content, ts=job["ts"])

    def _do_join(self, job: JsonObject) -> None:
        ghost, room_id = self.ghost(job["nick"]), self.channel_room(job["to"])
        try:
            ghost.ensure_joined(room_id)
        except MatrixError:
            if not self._forget_lost_room(job["to"]):
                raise
            ghost.ensure_joined(self.channel_room(job["to"]))

    def _forget_lost_room(self, name: str) -> bool:
        """Whether a channel's alias is gone, as with a homeserver whose database is a new one."""
        with expecting("M_NOT_FOUND"):
            self.bot.resolve(self.channel_alias(name))
            return False
        with self.lock:
            channel = self.irc.open_channel(name)
            self.rooms.pop(channel.room_id, None)
            channel.room_id = ""
        return True

    def _do_invite(self, job: JsonObject) -> None:
        self.ghost(job["nick"]).invite(self.channel_room(job["to"]), job["user"])

    def _do_leave(self, job: JsonObject) -> None:
        """A nick leaves a channel, or a ghost any room."""
        ghost = self.intent(job.get("ghost") or self.ghost_id(job["nick"]))
        ghost.leave(self.room_of(job), FORMATTING.sub("", job["reason"]))

    def _do_accept(self, job: JsonObject) -> None:
        """A person invites a ghost: into a talk of two it goes, others it leaves again."""
        ghost = self.intent(job["ghost"])
        ghost.join(job["room"])
        if job["direct"] or self._present(ghost, job["room"]) <= {ghost.user_id, job["user"]}:
            self._keep_direct(job["room"], ghost.user_id, job["user"])
        else:
            ghost.leave(job["room"], f"IRC sees only rooms of two and #{self.prefix}channel:{self.server_name}")

    def _do_sweep(self, job: JsonObject) -> None:
        """Nobody was connected when this was spooled: the ghosts in the channel leave."""
        with self.lock:
            channel = self.irc.open_channel(job["to"])
        for ghost in self.refresh(channel):
            self.intent(ghost).leave(channel.room_id, "the bridge was started again")

    # -- What a job needs: a ghost and a room, made when they are needed first.

    def ghost(self, nick: str) -> Intent:
        """The ghost of this nick, with it as display name."""
        intent = self.intent(self.ghost_id(nick))
        if self.dressed.get(intent.user_id) != nick:
            try:
                intent.set_displayname(nick)
            except MatrixError as error:
                if error.status >= 500 or error.status == 429:
                    raise
                log.warning("%s: no display name for %s: %s", self.id, nick, error)
            self.dressed[intent.user_id] = nick
        return intent

    def room_of(self, job: JsonObject) -> str:
        if "room" in job:
            return str(job["room"])
        if job["to"].startswith("#"):
            return self.channel_room(job["to"])
        return self.direct_room(self.ghost(job["nick"]), job["to"])

    def channel_room(self, name: str) -> str:
        """The room of a channel, which is created, or found, if need be."""
        with self.lock:
            channel = self.irc.open_channel(name)
        if not channel.room_id:
            alias, room_id = self.channel_alias(name), ""
            with expecting("M_ROOM_IN_USE"):                 # no look-up first: the homeserver may ask us back
                room_id = self.bot.create_room(preset="public_chat", name=name, room_alias_name=localpart_of(alias))
            room_id = room_id or self.bot.resolve(alias)
            self.sql("INSERT OR REPLACE INTO irc_channels VALUES (?, ?)", name, room_id)
            with self.lock:
                channel.room_id, self.rooms[room_id] = room_id, channel
            self.refresh(channel)
        return channel.room_id

    def refresh(self, channel: Channel) -> list[str]:
        """Learns who is in the room, and its topic, where no event has told; the ghosts in it."""
        topic = ""
        with expecting("M_NOT_FOUND"):
            topic = str(self.bot.state(channel.room_id, "m.room.topic").get("topic", ""))
        while True:
            changes = channel.changes
            members = self.bot.joined_members(channel.room_id)
            people = {user_id: member for user_id, member in members.items() if not self.is_ours(user_id)}
            with self.lock:
                if changes == channel.changes:               # else look again: somebody came or went meanwhile
                    self._set_people(channel, people)
                    if topic and topic != channel.topic:
                        channel.change_topic(IRC_NAME, topic, self.clock.now())
                    return [user_id for user_id in members if self.is_ghost(user_id)]

    def _set_people(self, channel: Channel, members: Mapping[str, JsonObject]) -> None:
        for person in [person for person in channel.people if person.user_id and person.user_id not in members]:
            channel.exit(person, f":{person.prefix} PART {channel.name}")
        for user_id, member in members.items():
            channel.enter(self.person(user_id, one_line(member.get("display_name"))))

    def direct_room(self, ghost: Intent, user_id: str) -> str:
        """The latest room of these two, or a new one to which the person is invited."""
        with self.lock:
            pair = (ghost.user_id, user_id)
            room_id = next((room for room in reversed(self.direct) if self.direct[room] == pair), "")
        if not room_id:
            room_id = self._find_direct(ghost, user_id) or ghost.create_room(
                preset="trusted_private_chat", is_direct=True, invite=[user_id])
            self._keep_direct(room_id, ghost.user_id, user_id)
        return room_id

    def _find_direct(self, ghost: Intent, user_id: str) -> str:
        """A room that was created just before a crash."""
        for room_id in ghost.joined_rooms():
            if room_id not in self.rooms and self._present(ghost, room_id) == {ghost.user_id, user_id}:
                return room_id
        return ""

    @staticmethod
    def _present(ghost: Intent, room_id: str) -> set[str]:
        """Who is in a room or invited."""
        return {each["state_key"] for each in ghost.members(room_id) if each["content"]["membership"] in ("join", "invite")}

    def _keep_direct(self, room_id: str, ghost: str, user_id: str) -> None:
        self.sql("INSERT OR REPLACE INTO irc_direct VALUES (NULL, ?, ?, ?)", room_id, ghost, user_id)
        with self.lock:
            self.direct.pop(room_id, None)
            self.direct[room_id] = (ghost, user_id)

    def _drop_direct(self, room_id: str) -> str:
        """The ghost whose direct room this was, or ''."""
        ghost, _ = self.direct.pop(room_id, ("", ""))
        if ghost:
            self.sql("DELETE FROM irc_direct WHERE room_id = ?", room_id)
        return ghost

    # -- From Matrix to IRC: what people say, as lines. What ghosts and our own user do, IRC knows already.

    def on_event(self, event: JsonObject) -> None:
        method = self.EVENTS.get(event.get("type", ""))
        known = self.server_name                             # asked of the homeserver before the lock is taken
        if known and method and isinstance(event.get("content"), dict):
            with self.lock:
                getattr(self, method)(event, self.rooms.get(event["room_id"]))

    def _on_message(self, event: JsonObject, channel: Channel | None) -> None:
        if channel or event["room_id"] in self.direct:
            command, text, action = self.readable(event)
            self._keep_said(event, self.nick_of(event["sender"]))
            if not self.is_ours(event["sender"]):
                self._relay(event, channel, command, text, action)

    def readable(self, event: JsonObject) -> tuple[str, str, bool]:
        """A message as IRC can show it: PRIVMSG or NOTICE, the text, and whether it is an action."""
        content, mark = event["content"], ""
        relation = content.get("m.relates_to")
        relation = relation if isinstance(relation, dict) else {}
        if relation.get("rel_type") == "m.replace" and isinstance(content.get("m.new_content"), dict):
            content, mark = content["m.new_content"], "* "
        kind = str(content.get("msgtype")) if event["type"] == "m.room.message" else event["type"]
        text = CONTROL.sub("", str(content.get("body", "")).replace("\r\n", "\n").replace("\t", " "))
        if kind == "m.room.encrypted":
            return "NOTICE", "(an encrypted message, which the bridge can't read)", False
        if kind in MEDIA:
            file = content.get("file")
            url = content.get("url") or (file.get("url") if isinstance(file, dict) else "")
            return "PRIVMSG", f"{mark}{MEDIA[kind]}: {text} {one_line(url)}", False
        if "m.in_reply_to" in relation and not relation.get("is_falling_back"):
            text = self._reply(text, relation["m.in_reply_to"])
        if kind == "m.location":
            text = f"{text} {one_line(content.get('geo_uri'))}"
        return "NOTICE" if kind == "m.notice" else "PRIVMSG", mark + text, kind == "m.emote"

    def _reply(self, text: str, to: Any) -> str:
        """'bob: yes', as one answers on IRC."""
        text, user_id = strip_quote(text)
        nick, _ = self.said.get(str(to.get("event_id")) if isinstance(to, dict) else "", ("", ""))
        nick = nick or self.quoted_nick(user_id)
        return f"{nick}: {text}" if nick else text

    def quoted_nick(self, user_id: str) -> str:
        """The nick of somebody whom the body of a message names: that may be anybody, or nobody at all, who then gets no nick."""
        person = self.client_of(user_id) or self.matrix.get(user_id)
        nick = person.nick if person else self.ghost_nick(user_id)
        return nick if NICK.fullmatch(nick) else ""

    def _keep_said(self, event: JsonObject, nick: str) -> None:
        at = time.gmtime(event.get("origin_server_ts", 0) // 1000 % 86_400)      # of its day only: it may be a day beyond any calendar
        self.said[event["event_id"]] = (nick, time.strftime("%H:%M:%S UTC", at))
        if len(self.said) > KEPT_SAID:
            del self.said[next(iter(self.said))]

    def _relay(self, event: JsonObject, channel: Channel | None, command: str, text: str, action: bool) -> None:
        """Tells a channel, or whoever a direct room is with."""
        ghost, user_id = self.direct.get(event["room_id"], ("", ""))
        if to := channel or self.client_of(ghost):
            to.hear(self.person(event["sender"]).prefix, command, text, action)
        elif ghost:
            nick = self.nick_of(ghost)
            self.spool("say", nick=nick, to=user_id, room=event["room_id"], msgtype="m.notice",
                       body=f"{nick} is not on IRC and can't read this.", txn=f"away-{event['event_id']}")

    def _on_redaction(self, event: JsonObject, channel: Channel | None) -> None:
        """Says whose and which, but does not repeat what somebody wanted to be gone."""
        if not self.is_ours(event["sender"]):
            nick, at = self.said.get(str(event.get("redacts") or event["content"].get("redacts")), ("", ""))
            what = f"{nick}'s message of {at}" if nick else "a message"
            self._relay(event, channel, "PRIVMSG", f"deletes {what}", True)

    def _on_topic(self, event: JsonObject, channel: Channel | None) -> None:
        if channel and event.get("state_key") == "" and not self.is_ours(event["sender"]):     # else it is no topic
            topic, at = one_line(event["content"].get("topic")), event.get("origin_server_ts", 0)
            channel.change_topic(self.person(event["sender"]).prefix, topic, at)

    def _on_member(self, event: JsonObject, channel: Channel | None) -> None:
        target, membership = event.get("state_key"), event["content"].get("membership")
        gone = membership in ("leave", "ban")
        if not isinstance(target, str) or (self.is_ours(target) and self.is_ours(event["sender"])):
            return                                           # no membership, or our own doing
        if gone and not channel:
            self._forget_direct(event)
        elif self.is_ours(target):
            self._on_ghost(event, channel, target, membership)
        elif channel and gone:
            self._gone(event, channel, self.person(target))
        elif channel and membership == "join":
            channel.enter(self.person(target, one_line(event["content"].get("displayname"))))

    def _gone(self, event: JsonObject, channel: Channel, person: Person) -> None:
        """Somebody has left a channel, or was put out of it."""
        sender, reason = event["sender"], one_line(event["content"].get("reason"))
        if sender == person.user_id:
            return channel.exit(person, f":{person.prefix} PART {channel.name} :{reason}")
        source = IRC_NAME if self.is_ours(sender) else self.person(sender).prefix
        channel.exit(person, f":{source} KICK {channel.name} {person.nick} :{reason or self.nick_of(sender)}")

    def _on_ghost(self, event: JsonObject, channel: Channel | None, ghost: str, membership: object) -> None:
        """What people on Matrix do to a ghost, or to our own user."""
        client, txn = self.client_of(ghost), f"member-{event['event_id']}"
        job = {"ghost": ghost, "room": event["room_id"], "user": event["sender"], "txn": txn}
        if membership == "invite" and client and channel:
            client.tell(f":{self.person(event['sender']).prefix} INVITE {client.nick} :{channel.name}")
        elif membership == "invite" and client:
            self.spool("accept", direct=event["content"].get("is_direct") is True, **job)
        elif membership == "invite":
            reason = (f"{self.nick_of(ghost)} is not on IRC" if self.is_ghost(ghost)
                      else f"join #{self.prefix}channel:{self.server_name}")
            self.spool("leave", reason=reason, **job)
        elif membership in ("leave", "ban") and channel and client:
            self._gone(event, channel, client)
            # What was spooled before may bring the ghost back; this comes after it.
            client.spool("leave", channel.name, reason="was kicked", txn=txn)

    def _forget_direct(self, event: JsonObject) -> None:
        """One of the two has left: the ghost leaves, too, and the next word opens a new room."""
        ghost = self._drop_direct(event["room_id"])
        if ghost and event["state_key"] != ghost:
            txn = f"member-{event['event_id']}"
            self.spool("leave", ghost=ghost, room=event["room_id"], reason="alone here", txn=txn)

    # -- Queries: the homeserver waits for the answer, so they ask it at once.

    def on_user_query(self, user_id: str) -> bool:
        """Whoever is connected."""
        if not self.is_ghost(user_id):                       # may ask the homeserver for its name, so before the lock is taken
            return False
        with self.lock:
            client = self.client_of(user_id)
        if client:
            self.ghost(client.nick)
        return client is not None

    def on_alias_query(self, alias: str) -> bool:
        """Any channel, whose room is made now."""
        name = self.channel_of(alias)
        with self.lock:
            may = bool(name) and self.irc.may_open(name)
        if not may:
            return False
        room_id = self.channel_room(name)
        if name != fold(name):
            with contextlib.suppress(MatrixError):           # another spelling of the same channel
                self.bot.set_alias(alias, room_id)
        return True

    def on_third_party_protocol(self, protocol: str) -> JsonObject | None:
        if protocol != "irc":
            return None
        types = {"nickname": {"regexp": r"[^\s#:]+", "placeholder": "nickname"},
                 "channel":  {"regexp": r"#[^\s,]+", "placeholder": "#channel"}}
        return {"user_fields": ["nickname"], "location_fields": ["channel"], "icon": "", "field_types": types,
                "instances": [{"network_id": self.id, "desc": f"IRC, {IRC_NAME}", "fields": {}}]}

    def on_third_party_user(self, protocol: str, fields: Mapping[str, str]) -> list[JsonObject]:
        """Who is connected, by nickname or ghost."""
        ghost = fields.get("userid", "") if protocol == "" else self.ghost_id(fields.get("nickname", ""))
        if protocol not in ("", "irc") or not self.is_ghost(ghost):      # before the lock is taken, too
            return []
        with self.lock:
            client = self.client_of(ghost)
        return [{"userid": self.ghost_id(client.nick), "protocol": "irc", "fields": {"nickname": client.nick}}] if client else []

    def on_third_party_location(self, protocol: str, fields: Mapping[str, str]) -> list[JsonObject]:
        """Any channel: its room is made when somebody joins."""
        channel = self.channel_of(fields.get("alias", "")) if protocol == "" else fields.get("channel", "")
        if protocol not in ("", "irc") or not is_channel(channel):
            return []
        return [{"alias": self.channel_alias(channel), "protocol": "irc", "fields": {"channel": fold(channel)}}]


# ============================================================================
# 12. Running it
# ============================================================================
# The configuration, Homeserver, which puts the sections together for a program
# or a test, the command line, and main, which is all of it in short. Decides
# nothing about Matrix.

# -- The configuration: what can be set, what is right, and everything that is wrong at once.

SAMPLE_REGISTRATION: JsonObject = {
    "id": "irc",
    "url": "http://127.0.0.1:9009",
    "as_token": "example-as-token-change-me-wfghWEGh3wgWHEf3478sHFWE",
    "hs_token": "example-hs-token-change-me-ugw8243igya57aaABGFfgeyu",
    "sender_localpart": "_irc_bot",
    "rate_limited": False,
    "protocols": ["irc"],
    "namespaces": {
        "users": [{"exclusive": True, "regex": "@_irc_.*"}],
        "aliases": [{"exclusive": True, "regex": "#_irc_.*"}],
        "rooms": [],
    },
    "uris": {
        "users": [{"regex": "irc://localhost/(?P<nick>[^,/?#]+),(?:isuser|isnick)",
                   "user_id": "@_irc_{nick}:{server_name}"}],
        "aliases": [{"regex": "irc://localhost/(?:%23|#)?(?P<channel>[^,/?#]+)(?:,ischannel)?",
                     "alias": "#_irc_{channel}:{server_name}"}],
    },
    "asbridge.sample": {"irc_port": 6667},
}


@dataclass
class Config(Settings):
    """A whole configuration: what the homeserver reads, and what it takes to start it."""
    port: int = 8008
    database: str = "asbridge.db"
    registrations: Sequence[Registration] = ()
    one_cpu: bool = True


def is_server_name(text: str) -> bool:
    return bool(SERVER_NAME.fullmatch(text)) and len(text) <= 230


def is_rate_limit(value: JsonObject) -> bool:
    return value.keys() == {"per_second", "burst"} and all(is_number(number) and number > 0 for number in value.values())


ADMIN_TOKEN = re.compile("[!-~]([ -~]*[!-~])?")
#: Each key: its type, what else must hold of its value, and what would be right. None is right where it is the default.
CONFIG_KEYS: dict[str, tuple[type, Callable[[Any], object] | None, str]] = {
    "server_name":       (str,  is_server_name,                        "a name such as 'localhost' or 'example.org'"),
    "bind":              (str,  None,                                  "an address of this machine, such as '127.0.0.1'"),
    "port":              (int,  lambda it: 0 <= it <= 65535,           "a port from 0 to 65535; 0: any free one"),
    "database":          (str,  lambda it: it and "\0" not in it,      "a file, or ':memory:'"),
    "registrations":     (list, None,                                  "a list of paths, relative to this file, or of registrations"),
    "open_registration": (bool, None,                                  "true or false"),
    "public_url":        (str,  lambda it: not it or is_base_url(it),  "'http://host:port', as clients reach it"),
    "admin_token":       (str,  ADMIN_TOKEN.fullmatch,                 "a long random text of printable ASCII"),
    "max_event_bytes":   (int,  lambda it: it > 0,                     "a number of bytes"),
    "max_request_bytes": (int,  lambda it: it > 0,                     "a number of bytes"),
    "max_upload_bytes":  (int,  lambda it: it > 0,                     "a number of bytes"),
    "retry_first_ms":    (int,  lambda it: it > 0,                     "milliseconds"),
    "retry_max_ms":      (int,  lambda it: it > 0,                     "milliseconds"),
    "push_timeout_ms":   (int,  lambda it: it > 0,                     "milliseconds"),
    "query_timeout_ms":  (int,  lambda it: it > 0,                     "milliseconds"),
    "room_version":      (str,  lambda it: it in ROOM_VERSIONS,        f"one of {', '.join(map(quoted, ROOM_VERSIONS))}"),
    "rate_limit":        (dict, is_rate_limit,                         '{"per_second": 10, "burst": 50}'),
    "one_cpu":           (bool, None,                                  "true to keep to one processor, which is faster, or false"),
}


class ConfigReader:
    """Turns a parsed configuration into a Config, or raises one ConfigError with everything that is wrong."""

    def __init__(self, data: Any, where: str, folder: str) -> None:
        self.where, self.folder = where, folder              # relative paths start from the folder
        self.findings: list[Finding] = []                    # what is wrong
        self.rests: list[tuple[str, Sequence[Namespace]]] = []   # what can be read of registrations that can't be used
        self.data: JsonObject = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.wrong("", "is not an object", "a configuration has the keys " + ", ".join(CONFIG_KEYS))

    def wrong(self, key: str, what: str, right: str) -> None:
        self.findings.append(Finding(f"{self.where}: {key}" if key else self.where, what, right))

    def read(self) -> Config:
        values, registrations = self.look()
        if self.findings:
            raise ConfigError(self.findings)
        config = Config(**values, registrations=[registration for _, registration in registrations])
        if "database" in self.data and config.database != ":memory:":
            config.database = os.path.join(self.folder, config.database)
        return config

    def look(self) -> tuple[JsonObject, list[tuple[str, Registration]]]:
        """The values and registrations that can be used, each of these with where it stands; what is wrong becomes a finding."""
        values = {key: value for key, value in self.data.items() if key != "registrations" and self._check(key, value)}
        sources = self.data.get("registrations", [])
        registrations = self._registrations(sources if self._check("registrations", sources) else [])
        self.findings += check_together(registrations)
        first, most = (values.get(key, getattr(Settings, key)) for key in ("retry_first_ms", "retry_max_ms"))
        if first > most:
            self.wrong("retry_first_ms", f"is {first}, more than retry_max_ms, which is {most}", "write a smaller number")
        return values, registrations

    def _check(self, key: str, value: Any) -> bool:
        if key not in CONFIG_KEYS:
            self.wrong(key, "is not a key of the configuration", f"the nearest one is {nearest(key, CONFIG_KEYS)!r}")
            return False
        type_, fits, right = CONFIG_KEYS[key]
        good = (fits is None or bool(fits(value))) if is_a(value, type_) else value is None and getattr(Config, key) is None
        if not good:
            self.wrong(key, "is none that can be used" if SECRET_KEY.search(key) else f"is {quoted(value)}", f"write {right}")
        return good

    def _registrations(self, sources: Iterable[Any]) -> list[tuple[str, Registration]]:
        found = []
        for index, source in enumerate(sources):
            is_path = isinstance(source, (str, os.PathLike))
            where = os.path.join(self.folder, source) if is_path else f"{self.where}: registrations[{index}]"
            try:
                if not isinstance(source, Registration):
                    source = load_registration(where) if is_path else read_registration(source, where)
                found.append((where, source))
            except ConfigError as error:
                self.findings += error.findings
                self.rests.append((where, error.rest))
        return found


def config_reader(path: str | None) -> ConfigReader:
    """For a configuration file, or a registration alone, or without a file for the sample; ConfigError if it can't be read."""
    if path is None:
        return ConfigReader({"registrations": [SAMPLE_REGISTRATION]}, "built in", "")
    data = load_file(path)
    if isinstance(data, dict) and {"as_token", "hs_token", "sender_localpart", "namespaces"} & data.keys():
        data = {"registrations": [os.path.basename(path)]}
    return ConfigReader(data, path, os.path.dirname(path))


def read_config(path: str | None) -> Config:
    """The configuration of config_reader(); ConfigError says everything that is wrong with it."""
    return config_reader(path).read()


def beside(database: str, id: str) -> str:
    """The database of an application service, next to the homeserver's."""
    root, extension = os.path.splitext(database)
    return database if database == ":memory:" else f"{root}-{urllib.parse.quote(id, safe='')}{extension}"


# -- The homeserver in one piece, for a program or a test: in which order things start and end, and what a test can ask of them.

SEEDED_START = 1_704_067_200_000         # the first moment of 2024, where the time of a seeded homeserver begins
TOP_KEYS = ("type", "sender", "state_key", "room_id", "event_id")


def differences(event: JsonObject, wanted: Mapping[str, Any]) -> list[str]:
    """What of an event, or else of its content, is not as it is wanted."""
    has = {key: (event if key in TOP_KEYS else event["content"]).get(key) for key in wanted}
    return [f"{key} is {shorten(repr(has[key]))}" for key in wanted if has[key] != wanted[key]]


class Homeserver:
    """A homeserver and the sample application services of its registrations, in this process.

        with asbridge.Homeserver(registrations=[...]) as hs:
            alice = hs.client("alice")

    Embedded it takes a free port, keeps everything in memory, says nothing and touches no signals. `registrations`
    are Registration objects, or plain objects as in a registration file. `keys` are those of the configuration. With a
    `seed` IDs, tokens and times are the same in every run of a program that settles between its steps; time stands still
    but for advance().
    """

    _server: HttpServer                                      # from start() to stop()
    world: World                                             # this and what follows: another after reset()
    delivery: Delivery
    api: Api
    inspector: Inspector

    def __init__(self, registrations: Sequence[Any] = (), *, port: int = 0, database: str = ":memory:",
                 clock: Clock | None = None, seed: int | None = None, samples: bool = True, **keys: Any) -> None:
        sources = {**keys, "port": port, "database": database, "registrations": list(registrations)}

        def read() -> Config:
            return ConfigReader(sources, "Homeserver", os.curdir).read()
        self.config = read()
        self.reread: Callable[[], Sequence[Registration]] = lambda: read().registrations     # for reload(); ConfigError
        self.clock, self.seed = clock or Clock(SEEDED_START if seed is not None else None), seed
        self.samples: list[IrcBridge] = []
        self._run_samples = samples
        self._worlds = 0                                     # that there have been: each has IDs of its own
        self._started = False
        log.addHandler(logging.NullHandler())                # silent, unless whoever embeds it wants to hear

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.config.bind, self.config.bind)
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.port}"

    def __enter__(self) -> Homeserver:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> Homeserver:
        """Returns when everything listens. OSError if a port is taken, DatabaseError if the database can't be used."""
        config = self.config
        self._server = HttpServer((config.bind, config.port), lambda request: self.api(request))
        config.public_url = config.public_url or self.url
        with legible(config.database):
            self._open(config.registrations)
        self._go(self._server, *self.samples)
        return self

    def _open(self, registrations: Sequence[Registration]) -> None:
        """Makes the world, and what answers and pushes in it. If that fails all that was made ends, the HTTP server, too."""
        config = self.config
        with contextlib.ExitStack() as undo:
            undo.callback(self._server.stop)
            if config.database != ":memory:":
                look_first(config.database, config.server_name)      # before the samples make files beside it
            undo.callback(self._stop_samples)
            known = [self._sample(one) if one.sample is not None and self._run_samples else one for one in registrations]
            self.world = World(config, self.clock, Registrations(config.server_name, known), config.database,
                               None if self.seed is None else f"{self.seed}.{self._worlds}")
            undo.callback(self.world.store.close)
            self.world.add_senders()
            self.delivery = Delivery(self.world)
            self.api = Api(self.world, self.delivery, ROUTES + ADMIN_ROUTES)
            self.inspector = Inspector(self.world, self.delivery)
            undo.callback(self.delivery.stop)
            self.delivery.start()                            # before the first request can freeze a transaction
            undo.pop_all()
        self._started = True

    def _sample(self, registration: Registration) -> Registration:
        """Makes the sample application service of a registration listen; the registration with its real port."""
        sample = IrcBridge(registration, self.url, beside(self.config.database, registration.id), self.clock)
        self.samples.append(sample)
        sample.listen()
        return dataclasses.replace(registration, url=sample.url) if registration.url else registration

    def _go(self, *parts: HttpServer | AppService) -> None:
        """All of them start, or everything stops."""
        try:
            for part in parts:
                part.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends what was started; again is no error. What was answered is kept."""
        if self._started:
            self._close(self._server)

    def _close(self, *servers: HttpServer) -> None:
        """The servers stop before the database is closed."""
        self._started, self.world.stopping = False, True
        self._stop_samples()
        self.delivery.stop()
        self.world.store.waiters.wake()
        for server in servers:
            server.stop()
        self.api.typing.timer.stop()
        self.api.presence.timer.stop()
        self.world.store.close()

    def _stop_samples(self) -> None:
        while self.samples:
            self.samples.pop().stop()

    def reset(self) -> None:
        """A new world behind the same port, with the same registrations: nobody and nothing is in it, and no time is wound on.
        For a database in memory only.
        """
        if self.config.database != ":memory:":
            raise ValueError(f"reset() would delete {self.config.database}; it is for ':memory:'")
        running = list(self.world.registrations)
        ports = {sample.id: sample.irc_port for sample in self.samples}
        self._close()
        self.clock.wound = 0.0
        self._worlds += 1
        if self.clock.start is not None:
            self.clock.start += DAY_MS                       # who remembers events by their ID must not take new ones for old
        self._open([dataclasses.replace(one, sample={**(one.sample or {}), "irc_port": ports[one.id]}) if one.id in ports else one
                    for one in running])
        self._go(*self.samples)

    def reload(self) -> list[str]:
        """Reads the registrations again and says what changed. ConfigError, and nothing changes, if one is wrong.

        A sample application service that is running goes on as it is.
        """
        fresh = {registration.id: registration for registration in self.reread()}
        before = {registration.id: registration for registration in self.config.registrations}
        same = {id for id in fresh if id in before and vars(fresh[id]) == vars(before[id])}   # the files say the same
        changes = [f"added {id!r}" for id in fresh if id not in before] + [f"removed {id!r}" for id in before if id not in fresh]
        changes += [f"changed {id!r}" for id in fresh if id in before and id not in same]
        running = self.world.registrations.by_id
        self.config.registrations = list(fresh.values())
        self.world.use(Registrations(self.config.server_name, [running[id] if id in same else fresh[id] for id in fresh]))
        self.delivery.reload()
        log.info("registrations read again: %s", ", ".join(changes) or "nothing changed")
        return changes

    # -- For tests: who acts.

    def client(self, name: str, password: str | None = None) -> Client:
        """A new person, logged in; without a password nobody can log in as them again."""
        client = Client(self.url, self.api.accounts.add_person(name, password)["access_token"])
        client.new_txn_id = map(str, itertools.count(1)).__next__
        return client

    def appservice(self, id: str) -> Client:
        """A client with the as_token of an application service."""
        return Client(self.url, self.delivery.registration(id).as_token)

    # -- For tests: to wait for what is to happen, or not to wait.

    def advance(self, seconds: float) -> None:
        """Winds the clock on: back-off, time-outs and typing run out without anybody waiting."""
        self.clock.advance(seconds)

    def settle(self, timeout: float = 5.0) -> None:
        """Returns when every outbox is empty and acknowledged; an AssertionError says what is stuck."""
        deadline = time.monotonic() + timeout
        while waiting := self.waiting():
            if time.monotonic() > deadline:
                raise AssertionError(f"not settled after {timeout} s: "
                                     + "; ".join([self._stuck(id, count) for id, count in waiting.items()]))
            time.sleep(0.002)

    def waiting(self) -> dict[str, int]:
        """Events that application services have not acknowledged, by application service."""
        with self.world.store.read() as reader:
            counts = {one.id: reader.count_waiting(one.id) for one in self.world.registrations}
        return {id: count for id, count in counts.items() if count}

    def _stuck(self, id: str, count: int) -> str:
        worker = self.delivery.worker(id)
        if not worker:
            return f"{count} events for {id!r}, to which nothing is sent"
        failed = [one.failure for one in list(worker.attempts)[-1:] if one.failure]
        tried = f"after {counted(worker.failures, 'failed attempt')}"
        return "; ".join([f"{counted(count, 'event')} for {id!r}, {worker.state}, {tried}", *failed])

    def wait_for(self, timeout: float = 5.0, **wanted: Any) -> JsonObject:
        """The first event of any room, past or to come, with these values: of `type`, `sender`, `state_key`, `room_id`, or of
        keys of its content. An AssertionError prints the nearest ones and where they went.
        """
        deadline, at, seen = time.monotonic() + timeout, 0, list[JsonObject]()
        while True:
            with self.world.store.read() as reader:
                events = reader.all_events(at, 1000)
            for event in events:
                at, found = event.tick, json.loads(event.json)
                if not differences(found, wanted):
                    return cast(JsonObject, found)
                seen.append(found)
            if not events:
                if time.monotonic() > deadline:
                    raise AssertionError(self._not_found(seen, wanted, timeout))
                time.sleep(0.002)

    def _not_found(self, seen: list[JsonObject], wanted: Mapping[str, Any], timeout: float) -> str:
        lines = [f"no event with {', '.join(f'{key}={value!r}' for key, value in wanted.items())} in {timeout} s; the nearest:"]
        seen.reverse()                                       # of those that are equally near, the last
        for event in sorted(seen, key=lambda event: len(differences(event, wanted)))[:3]:
            lines.append(f"  {event['type']} of {event['sender']} ({event['event_id']}): {'; '.join(differences(event, wanted))}")
            lines += [f"    {'; '.join(self.why(event['event_id'], one.id)['summary'][:3])}" for one in self.world.registrations]
        lines += [f"  no event at all has {key!r}; {', '.join(TOP_KEYS)} are of the event itself, all else of its content"
                  for key in wanted if not any(key in where for event in seen for where in (event, event["content"]))]
        return "\n".join(lines if seen else [*lines[:1], "  there are no events at all"])

    # -- For tests: what went to an application service, and why.

    def transactions(self, id: str) -> list[JsonObject]:
        """What was pushed to an application service, old to new: txn_id, events, acknowledged, acknowledged_ts, and attempts,
        each with ts, status, error, ms and fault.
        """
        return self.inspector.transactions(id)

    def why(self, event_id: str, id: str) -> JsonObject:
        """Why an event went to an application service (`reason`, `transaction`), or what each of the `rules` said; `summary` is
        all of it in sentences.
        """
        return self.inspector.why(event_id, id)

    def explain(self, id: str) -> JsonObject:
        """Who claims a user ID, alias, room ID or URI, and why; `summary` is all of it in sentences."""
        return self.inspector.explain(id)

    # -- For tests: what is to go wrong, and the levers.

    def faults(self, id: str) -> Faults:
        """What is to go wrong with an application service: hs.faults("irc").lose_ack(times=1)."""
        return self.delivery.faults(id)

    def pause(self, id: str) -> None:
        """Nothing more is pushed until resume()."""
        self.delivery.hand(id).pause()

    def resume(self, id: str) -> None:
        self.delivery.hand(id).pause(False)

    def retry(self, id: str) -> None:
        """Ends the backoff."""
        self.delivery.hand(id).retry()

    def skip(self, id: str) -> str:
        """Gives up the open transaction, which the application service refuses for ever, say; its ID."""
        return str(self.delivery.skip(id))

    def replay(self, id: str, txn_id: str | None = None, new_id: bool = False) -> str:
        """Sends an acknowledged transaction (the last, if none is named) again, the same bytes with the same ID or with a new
        one; its ID.
        """
        return str(self.delivery.replay(id, None if txn_id is None else int(txn_id), new_id))


# -- The command line: what can be asked for. Each command is a function of the arguments that returns the exit code.

HELP_END = """examples:
  python asbridge.py                              a homeserver and an IRC bridge, to play with
  python asbridge.py --config bridge.yaml         a homeserver for the bridge of this registration
  python asbridge.py --role appservice --homeserver http://127.0.0.1:8008
                                                  only the IRC bridge, for another homeserver
"""


FLAGS = {"server_name": str, "bind": str, "port": int, "database": str}      # keys of the configuration


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="asbridge.py", epilog=HELP_END, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A Matrix homeserver with its Application Service API, and an IRC bridge.")
    parser.add_argument("--config", metavar="FILE", help="a configuration, or one registration (JSON or YAML)")
    parser.add_argument("--role", choices=("both", "homeserver", "appservice"), default="both", help="run only one half")
    parser.add_argument("--homeserver", metavar="URL", default="http://127.0.0.1:8008", help="for --role appservice")
    for key, kind in FLAGS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"{CONFIG_KEYS[key][2]} (overrides the file)")
    parser.add_argument("--port-file", metavar="FILE", help="write the real port there, once everything listens")
    parser.add_argument("--trace", action="store_true", help="show the traffic between homeserver and application services")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="a line to read, or a JSON object each")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every request")
    parser.add_argument("-q", "--quiet", action="store_true", help="log only what goes wrong")
    parser.add_argument("--version", action="version", version=f"asbridge {__version__}")
    refuse_unknown_option(parser, [one for one in arguments if one not in ("-h", "--help")])
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="check | explain | generate | routes")
    add_explain(commands.add_parser("explain", help="who claims a user ID, alias, room ID or URI, and why"))
    add_generate(commands.add_parser("generate", help="print a fresh registration"))
    add_check(commands.add_parser("check", help="say what is wrong with registrations, or with the application services behind them"))
    commands.add_parser("routes", help="print the table of endpoints").set_defaults(command=run_routes)
    return parser.parse_args(arguments)


def refuse_unknown_option(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """For else, what stands behind it would be taken for a command."""
    unknown = next(iter(parser.parse_known_args(arguments)[1]), "")
    if unknown.startswith("-"):
        known = re.findall("--[a-z-]+", parser.format_help())
        parser.error(f"there is no option {unknown}; the nearest one is {nearest(unknown, known)}")


def add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="a user ID, an alias, a room ID, or a URI such as irc://host/channel")
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="whose registrations? (default: the sample's)")
    parser.add_argument("--server-name", default=argparse.SUPPRESS, help="of the homeserver (default: localhost)")
    parser.add_argument("--database", default=argparse.SUPPRESS, help="a file that says who exists already; it is only read")
    parser.add_argument("--json", action="store_true", help="as the inspector's API has it")
    parser.set_defaults(command=run_explain)


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="of the registration, such as irc")
    parser.add_argument("--url", default="http://127.0.0.1:29300", help="where the application service listens")
    parser.add_argument("--server-name", default=argparse.SUPPRESS, help="of the homeserver (default: localhost)")
    parser.add_argument("--prefix", help="of its users and aliases (default: the ID and '_')")
    parser.set_defaults(command=run_generate)


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="the same as --config FILE")
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="a configuration, or one registration")
    parser.add_argument("--server-name", default=argparse.SUPPRESS, help="of the homeserver that they are for")
    parser.add_argument("--port", type=int, default=argparse.SUPPRESS, help="of that homeserver")
    parser.add_argument("--examine", action="store_true", help="take its place for a moment and see whether the application "
                        "services do as the specification asks")
    parser.add_argument("--queries", action="store_true", help="with --examine: ask for an unknown user and alias, too; a bridge "
                        "may create and keep them")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(command=run_check)


def flags_of(args: argparse.Namespace) -> tuple[JsonObject, ConfigReader]:
    """The keys of the configuration that the command line sets, and a reader with what is wrong with them."""
    reader = ConfigReader(without_none({key: getattr(args, key) for key in FLAGS}), "command line", "")
    return reader.look()[0], reader


def config_of(args: argparse.Namespace) -> Config:
    """The file and the flags, which override it; without a file the sample."""
    config = read_config(args.config)
    flags, reader = flags_of(args)
    for key, value in flags.items():
        setattr(config, key, value)
    if args.role == "appservice" and not any(one.sample is not None for one in config.registrations):
        reader.wrong("--role appservice", "has nothing to run", 'a registration needs the key "asbridge.sample": {"irc_port": 6667}')
    if not is_base_url(args.homeserver):
        reader.wrong("--homeserver", f"is {quoted(args.homeserver)}", "write 'http://host:port'")
    if reader.findings:
        raise ConfigError(reader.findings)
    return config


# -- The commands that answer a question and end.

def print_table(*rows: Sequence[str]) -> None:
    """Aligned; the last column may be as long as it is."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip())


def run_routes(args: argparse.Namespace) -> int:
    print_table(("method", "path", "who may call", "section of the specification"),
                *((route.method, route.path, route.auth, route.spec) for route in ROUTES + ADMIN_ROUTES))
    return 0


def run_generate(args: argparse.Namespace) -> int:
    print(json.dumps(generate_registration(args.id, args.url, args.prefix, args.server_name or "localhost"), indent=2))
    return 0


def generate_registration(id: str, url: str, prefix: str | None = None, server_name: str = "localhost") -> JsonObject:
    """A registration with random tokens, ready to be written to a file; ConfigError if it would not be one."""
    prefix = to_localpart((prefix or f"{id}_").lstrip("@#"))
    escaped, server = (re.sub(r"([.+\[\]])", r"\\\1", text) for text in (prefix, server_name))
    if not is_base_url(url):
        raise ConfigError([Finding("--url", f"is {quoted(url)}", f"write {REGISTRATION_KEYS['url'][2]}")])
    return {"id": id, "url": url, "as_token": secrets.token_hex(32), "hs_token": secrets.token_hex(32),
            "sender_localpart": f"{prefix}bot", "rate_limited": False,
            "namespaces": {"users": [{"exclusive": True, "regex": f"@{escaped}.*:{server}"}],
                           "aliases": [{"exclusive": True, "regex": f"#{escaped}.*:{server}"}], "rooms": []}}


def run_explain(args: argparse.Namespace) -> int:
    """By the registrations, and by the database if there is one; it is only read."""
    config = config_of(args)
    try:
        told, reader = explain(Registrations(config.server_name, config.registrations), args.id), None
        with legible(config.database), contextlib.ExitStack() as then:
            if os.path.exists(config.database):
                reader = Reader(then.enter_context(contextlib.closing(open_sqlite(config.database, read_only=True))))
            told = explained(told, reader)
    except (MatrixError, DatabaseError, sqlite3.Error) as error:
        print(error.error if isinstance(error, MatrixError) else error, file=sys.stderr)
        return 2
    print(json.dumps(told, indent=2) if args.json else "\n".join(map(printable, told["summary"])))
    if not args.config:
        print("(by the registration of the sample; --config FILE asks yours)", file=sys.stderr)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Says everything that can be said of a configuration, and opens no database; 1 if something is wrong with it."""
    args.config = args.file or args.config
    if args.examine:
        return examine(config_of(args), args)
    flags, reader = flags_of(args)
    if reader.findings:
        raise ConfigError(reader.findings)
    findings = diagnose(args.config, flags)
    keys = ("level", "where", "what", "why", "right")
    objects = [{key: getattr(finding, key) for key in keys} for finding in findings]
    print(json.dumps(objects, indent=2) if args.json else report(findings))
    return int(any(finding.level == "error" for finding in findings))


def diagnose(path: str | None, flags: JsonObject) -> list[Finding]:
    try:
        reader = config_reader(path)
    except ConfigError as error:
        return error.findings
    values, registrations = reader.look()
    values = {"server_name": "localhost", "port": 8008, **values, **flags}
    return reader.findings + Doctor(values["server_name"], values["port"]).examine(registrations, reader.rests)


def report(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, and how many there are."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level}: {finding.where}: {finding.what}")
        lines += [f"    why:   {finding.why}"] * bool(finding.why)
        lines += ["    " + re.sub("^write ", "write: ", finding.right)] * bool(finding.right)
    counts = collections.Counter(finding.level for finding in findings)
    total = ", ".join(counted(count, level) for level, count in sorted(counts.items()))
    return "\n".join([*map(printable, lines), total or "nothing to complain of"])


def examine(config: Config, args: argparse.Namespace) -> int:
    """Takes the homeserver's place for a moment, in memory, and examines the application service of each registration."""
    set_up_log(args)
    if not args.verbose:
        log.setLevel(logging.ERROR)                          # what it finds is what it says
    registrations = [dataclasses.replace(one, sample=None) if one.sample is not None and reachable(one.url) == "answers" else one
                     for one in config.registrations]
    hs = Homeserver(**{**vars(config), "database": ":memory:", "registrations": registrations})
    try:
        hs.start()
        found = [(one.id, *result) for one in hs.world.registrations for result in examination(hs, one, args.queries)]
    except START_ERRORS as error:
        taken = f":{config.port} " in str(error)
        print(f"asbridge: port {config.port} is taken, and check --examine takes the homeserver's place: stop it for that moment. "
              "If it is asbridge itself, leave it: its inspector has the button Examine." if taken
              else why_not_started(error, config), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        hs.stop()
    print_examination(found, args.json)
    return int(any(outcome == "failed" for _, _, outcome, _, _ in found))


def examination(hs: Homeserver, registration: Registration, queries: bool) -> list[Result]:
    """Waits for an application service that is about to start. What our own samples create is gone with them."""
    deadline = time.monotonic() + hs.config.query_timeout_ms / 1000
    if reachable(registration.url) == "does not answer yet":
        print(f"nothing listens yet at {registration.url}; start {registration.id} now", file=sys.stderr)
    while reachable(registration.url) == "does not answer yet" and time.monotonic() < deadline:
        time.sleep(0.1)
    return Examiner(registration, hs.config, queries or registration.id in {sample.id for sample in hs.samples}).results()


def print_examination(found: Sequence[tuple[str, str, str, str, str]], as_json: bool) -> None:
    keys = ("appservice", "test", "outcome", "spec", "seen")
    if as_json:
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in found], indent=2))
        return
    print_table(keys, *found)
    counts = collections.Counter(outcome for _, _, outcome, _, _ in found)
    print(", ".join([f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")]))


# -- The log.

class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = {"ts": int(record.created * 1000), "level": record.levelname, "message": record.getMessage(),
                **getattr(record, "exchange", {})}
        if record.exc_info:
            text["exception"] = self.formatException(record.exc_info)
        return json.dumps(text)


class Lines(logging.Formatter):
    """A line each; an arrow of the trace in the colour of what became of it."""

    COLOURS = {"--->": "36", "<---": "32", "<-/-": "33"}     # cyan, green, yellow; what was refused is red

    def __init__(self, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self.coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        one = getattr(record, "exchange", None)
        if one is None:
            return super().format(record)
        line = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d}  {record.getMessage()}"
        colour = "31" if one["back"] and (one["status"] or 0) >= 400 else self.COLOURS[one["arrow"]]
        return f"\x1b[{colour}m{line}\x1b[0m" if self.coloured else line


def set_up_log(args: argparse.Namespace) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if args.log_format == "json" else Lines(sys.stderr.isatty() and not os.environ.get("NO_COLOR")))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO)
    trace.setLevel(logging.DEBUG if args.trace else logging.WARNING)


# -- The program: starts, says that it is ready, and ends on a signal.

START_ERRORS = (OSError, DatabaseError, sqlite3.Error, MatrixError)


def run(config: Config, args: argparse.Namespace, stop: Any) -> int:
    """Runs the parts until the bell `stop` rings; 1 if one can't start, or if nobody can be told that they are ready."""
    running: list[Homeserver | IrcBridge] = []
    try:
        for part in parts_of(config, args):
            running.append(part)
            part.start()
    except START_ERRORS as error:
        print(why_not_started(error, config), file=sys.stderr)
        return 1
    try:
        ready = ", ".join([introduce(part, args) for part in running])
        with failing("what is printed can't be written"):    # who waits for this line would wait for ever
            print(f"asbridge ready at {ready}", flush=True)
        while not stop.acquire(timeout=1):                   # a signal that came just before would else be handled after the wait
            pass
    except OSError as error:
        complain(f"asbridge: {error.strerror}")
        return 1
    finally:
        for part in running:
            part.stop()
    return 0


def parts_of(config: Config, args: argparse.Namespace) -> Iterator[Homeserver | IrcBridge]:
    """The homeserver, with its samples or without; or the samples only, for another homeserver."""
    if args.role == "appservice":
        for one in config.registrations:
            if one.sample is not None:
                yield IrcBridge(one, args.homeserver, beside(config.database, one.id))
    else:
        hs = Homeserver(samples=args.role == "both", **vars(config))
        hs.reread = lambda: config_of(args).registrations
        yield hs


def introduce(part: Homeserver | IrcBridge, args: argparse.Namespace) -> str:
    """Where it is ready. Of a homeserver the log says more, its port goes to the file for it, and SIGHUP is heard."""
    if isinstance(part, IrcBridge):
        return f"{part.url or 'no url'} (IRC on port {part.irc_port})"
    reload_on_sighup(part)
    threading.Thread(target=describe, args=(part,), name="describe", daemon=True).start()
    for line in suggestions(part) if not args.quiet else ():
        log.info("try: %s", line) if args.log_format == "json" else complain(f"  try: {line}")
    if args.port_file:
        with failing(f"--port-file {args.port_file}"):
            with open(args.port_file + ".new", "w", encoding="utf-8") as file:
                file.write(f"{part.port}\n")
            os.replace(args.port_file + ".new", args.port_file)      # nobody sees it half written
    return part.url


def why_not_started(error: Exception, config: Config) -> str:
    if isinstance(error, sqlite3.Error):
        return (f"asbridge: {config.database} is damaged, or can't be used: {error}; put back a copy of it, or name another --database")
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        where = "--port 0 takes any free one"
        if f":{config.port} " not in str(error):
            where = "for the sample the ports stand in its registration: url, and asbridge.sample.irc_port"
        return f"asbridge: {error.strerror}; stop the program that has this port, or use another ({where})"
    return f"asbridge: {error}"


def describe(hs: Homeserver) -> None:
    """Says of each application service what it is, whether it answers, and what waits for it."""
    try:
        waiting = hs.waiting()
    except MatrixError:                                      # stopped already
        return
    for registration in hs.world.registrations:
        names = ", ".join(str(namespace) for kind in KINDS for namespace in registration.namespaces[kind]) or "no namespaces"
        log.info("application service %s %s (%s): %s; events that wait: %d; %s", registration.id,
                 f"at {registration.url}" if registration.url else "without a url", reachable(registration.url),
                 registration.sender(hs.world.name), waiting.get(registration.id, 0), names)
        warn_of(hs, registration)


def warn_of(hs: Homeserver, registration: Registration) -> None:
    """Says of a registration that is used what may not be as it is meant."""
    for key in registration.unknown:
        log.warning("application service %s: nobody reads the key %r of its registration; the nearest one is %r",
                    registration.id, key, nearest(key, KNOWN_KEYS))
    for finding in said_at_start(registration, hs.world.name, thorough=len(hs.config.registrations) <= 20):   # it takes time
        log.warning("application service %s: %s", registration.id, finding)


def reachable(url: str | None) -> str:
    if url is None:
        return "nothing is sent"
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), 1).close()
        return "answers"
    except OSError:
        return "does not answer yet"


def suggestions(hs: Homeserver) -> list[str]:
    """What to try, ready to be pasted."""
    register = """-d '{"username": "alice", "password": "wonderland", "auth": {"type": "m.login.dummy"}}'"""
    talk = r"(printf 'NICK bob\r\nUSER bob 0 * :Bob\r\nJOIN #lobby\r\nPRIVMSG #lobby :hello from IRC\r\n'; cat)"
    closed = hs.config.admin_token is None and not is_loopback(hs.config.bind)
    needs = "it needs an admin_token in the configuration" if closed else "it shows all that passes"
    lines = [f"open {hs.url}/      # the inspector: {needs}"]
    if hs.samples:
        port = hs.samples[0].irc_port
        lines += [f"irssi -c 127.0.0.1 -p {port} -n bob      # then: /join #lobby", f"{talk} | nc 127.0.0.1 {port}",
                  f"curl -s {hs.url}/_matrix/client/v3/register {register}"]
    return lines


def reload_on_sighup(hs: Homeserver) -> None:
    """One after the other, and once for signals that come together."""
    again = bell()

    def reload_when_rung() -> None:
        while True:
            again.acquire()
            reload(hs)
    if hasattr(signal, "SIGHUP"):
        threading.Thread(target=reload_when_rung, name="reload", daemon=True).start()
        signal.signal(signal.SIGHUP, lambda number, frame: release(again))


def reload(hs: Homeserver) -> None:
    before = set(hs.world.registrations)
    try:
        hs.reload()
        for registration in set(hs.world.registrations) - before:
            warn_of(hs, registration)
    except ConfigError as error:
        log.error("the registrations are not read again, for something is wrong with them:\n%s", error)
    except MatrixError as error:
        log.error("the registrations can't be taken: %s", error)


def complain(line: str) -> None:
    """To stderr, which may be full or have no reader."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


# -- The process, and what it gets from the machine.

def fill_standard_files() -> None:
    """Whoever starts us may have closed stdin, stdout or stderr: nothing else is to be opened in their place, and written to."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))      # noqa: SIM115


def raise_handles() -> None:
    """Many systems give a process 1,024 handles until it asks for more, which is too few for 2,000 clients."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        limits = importlib.import_module("resource")         # not on Windows
        soft, hard = limits.getrlimit(limits.RLIMIT_NOFILE)
        wanted = 10_240 if hard == limits.RLIM_INFINITY else min(hard, 10_240)
        if soft != limits.RLIM_INFINITY and soft < wanted:
            limits.setrlimit(limits.RLIMIT_NOFILE, (wanted, hard))


def keep_to_one_cpu() -> None:
    """One thread at a time runs Python. To hand that over to a thread on another processor takes several times as
    long as on the same one. For Linux; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})      # several of us spread
        sys.setswitchinterval(0.0005)                        # to pass it on costs little there


def ring_on_signals(stop: Any) -> None:
    """The first signal rings; a second one ends the process at once, but for that which `timeout` sends together with the first."""
    since: list[float] = []

    def rung(number: int, frame: Any) -> None:
        since.append(time.monotonic())
        if len(since) == 1:
            release(stop)
        elif since[-1] - since[0] > 0.1:
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, rung)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. 0: done. 1: it failed while running, or found something wrong. 2: the command line or the configuration is wrong,
    or `explain` can't answer. 130: `check --examine` was interrupted.
    """
    warnings.filterwarnings("ignore", "Possible ", FutureWarning)     # Python's about regexes such as [[a]
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if args.command:
            return int(args.command(args))
        config = config_of(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    set_up_log(args)
    raise_handles()
    gc.freeze()                                              # what there is now stays: not to be looked at again and again
    if config.one_cpu:
        keep_to_one_cpu()                                    # before there are threads
    stop = bell()
    ring_on_signals(stop)
    return run(config, args, stop)


if __name__ == "__main__":
    try:
        fill_standard_files()
        sys.exit(main())
    except BrokenPipeError:                                  # "routes | head", say
        os._exit(1)
