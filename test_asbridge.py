"""The specification of asbridge, as tests: in the order of the file, each name a sentence.

    python -m pytest

Rules are tested without sockets, the rest over real ones on free ports of the loopback interface. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

import asbridge
from asbridge import MatrixError

HERE = os.path.dirname(os.path.abspath(asbridge.__file__))


# ============================================================================
# Helpers
# ============================================================================

def registration(id="irc", url=None, users=("@_irc_.*",), aliases=("#_irc_.*",), rooms=(), exclusive=True, **more):
    """A registration as plain data; `more` adds keys or replaces them."""
    def entries(regexes):
        return [{"regex": regex, "exclusive": exclusive} for regex in regexes]
    return {"id": id, "url": url, "as_token": f"as-{id}", "hs_token": f"hs-{id}", "sender_localpart": f"_{id}_bot", "rate_limited": False,
            "namespaces": {"users": entries(users), "aliases": entries(aliases), "rooms": entries(rooms)}, **more}


@contextlib.contextmanager
def refused(errcode, status=None, text=""):
    """What is inside must raise this MatrixError, with this in its text."""
    with pytest.raises(MatrixError) as caught:
        yield caught
    assert caught.value.errcode == errcode, caught.value
    assert status in (None, caught.value.status), caught.value
    assert text in caught.value.error, caught.value.error


def eventually(test, seconds=5.0):
    """The first true value of test(); it is asked again and again until the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := test()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {test}"
        time.sleep(0.002)
    return value


class Recorder:
    """An application service that writes down what it is sent. `answer` may be replaced: request, body -> (status, JSON or bytes)."""

    def __init__(self):
        self.requests = []                                   # (method, path, headers, query, body)
        self.answer = lambda request, body: (200, {})
        self.server = asbridge.HttpServer(("127.0.0.1", 0), self._serve)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _serve(self, request):
        body = request.body(50_000_000)
        self.requests.append((request.method, urllib.parse.unquote(request.path), request.headers, request.query, body))
        status, answer = self.answer(request, body)
        return asbridge.Response(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    @property
    def transactions(self):
        """(txn_id, body) of each push that came, in order, repeated ones too."""
        return [(path.rsplit("/", 1)[1], body) for method, path, _, _, body in list(self.requests) if "/transactions/" in path]

    @property
    def events(self):
        """The events pushed, those of a repeated transaction once."""
        return [event for body in dict(self.transactions).values() for event in json.loads(body)["events"]]

    def texts(self):
        return [event["content"]["body"] for event in self.events if event["type"] == "m.room.message"]

    def stop(self):
        self.server.stop()


@pytest.fixture
def recorder():
    """Makes application services that record; they end with the test."""
    made = []

    def make():
        made.append(Recorder())
        return made[-1]
    yield make
    for one in made:
        one.stop()


@pytest.fixture
def start():
    """Starts homeservers with these registrations and configuration keys; they end with the test."""
    made = []

    def make(*registrations, **keys):
        made.append(asbridge.Homeserver(registrations, **keys).start())
        return made[-1]
    yield make
    for hs in made:
        hs.stop()


def ask(hs, method, path, token=None, body=None, headers=None):
    """One plain HTTP request: (status, JSON)."""
    client = asbridge.HttpClient(hs.url)
    try:
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = client.request(method, path, data, sent)
        return status, json.loads(answer or b"{}")
    finally:
        client.close()


def acting(hs, id, user_id, register=True):
    """A client with the as_token of an application service, acting as one of its users."""
    if register:
        hs.api.accounts.register_ghost(hs.world.registrations.by_id[id], asbridge.localpart_of(user_id), inhibit_login=True)
    return asbridge.Client(hs.url, hs.world.registrations.by_id[id].as_token, user_id)


def test_smoke(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    for i in range(3):
        alice.say(room, f"n{i}")
    hs.settle()
    assert r.texts() == ["n0", "n1", "n2"]
    with refused("M_FORBIDDEN", 403, "outside"):
        acting(hs, "irc", "@alice:localhost", register=False).say(room, "x")
