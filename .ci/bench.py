"""How fast asbridge is, next to a server that hardly does anything and, if you like, next to Synapse. For Linux.

    python .ci/bench.py                       asbridge, and the ceiling: raw sockets, a thread per connection, one canned answer
    python .ci/bench.py --synapse VENV        and Synapse (python -m venv VENV && VENV/bin/pip install matrix-synapse)
    python .ci/bench.py versions send ...     only these

The servers run one after the other, in turns, with an application service that is interested in all that is sent.
A figure is the median of the rounds; of what was lost, came twice or out of order, the worst of them.
A ratio is asbridge's figure divided by the other's. Beyond some 50000 answers per second it is the client that can't do more.
asbridge keeps to one processor by itself; the raw server runs where the system puts its threads.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MEASURES = ["start", "versions", "send", "flood", "deliver", "sync", "idle"]
ASBRIDGE = pathlib.Path(__file__).resolve().parent.parent / "asbridge.py"
now = time.monotonic        # one clock for all processes


def split(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """The head and the body of the first HTTP message, and what follows it; None as long as it isn't whole."""
    head, found, rest = data.partition(b"\r\n\r\n")
    fields = head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:     # JSON on one line: each second line is a part of it
        return (head, b"".join(rest.split(b"\r\n")[1::2]), b"") if rest.endswith(b"0\r\n\r\n") else None
    at = fields.find(b"\r\ncontent-length:")
    length = int(fields[at + 17:].partition(b"\r\n")[0]) if found and at >= 0 else 0
    return (head, rest[:length], rest[length:]) if found and len(rest) >= length else None


def serve(port: int) -> None:
    """The raw server, with one answer to everything, and the application service, which says when asked what has come."""
    canned = {"event_id": "$" + "e" * 43, "room_id": "!room:localhost", "access_token": "token", "versions": ["v1.15"]}
    came = []

    def answer(head: bytes, body: bytes) -> object:
        if b"/transactions/" in head:
            came.append((now(), body))      # is read when nobody is in a hurry
            return {}
        if b"/came " in head:
            events = [(event["event_id"], when) for when, body in came for event in json.loads(body)["events"]]
            came.clear()
            return events
        if body:
            json.loads(body)        # no homeserver gets by without
        return canned

    def talk(sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):      # who has been measured is killed
            while received := sock.recv(1 << 17):
                data += received
                while whole := split(data):
                    head, body, data = whole
                    text = json.dumps(answer(head, body)).encode()
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                                 b"Content-Length: %d\r\n\r\n%s" % (len(text), text))

    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=talk, args=(sock,), daemon=True).start()


class Client:
    """Keep-alive connections to a server, known by their file descriptors."""

    def __init__(self, port: int, connections: int) -> None:
        self.epoll, self.data, self.began = select.epoll(), {}, {}
        self.socks = {sock.fileno(): sock for sock in [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]}
        for fd, sock in self.socks.items():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        for each in (self.epoll, *self.socks.values()):
            each.close()

    def ask(self, fd: int, request: bytes) -> None:
        self.data[fd], self.began[fd] = b"", now()
        self.socks[fd].sendall(request)

    def answers(self, timeout: float = 60):
        """As far as there are any: (connection, when asked, when answered, body)."""
        for fd, _ in self.epoll.poll(timeout):
            received = self.socks[fd].recv(1 << 18)
            self.data[fd] += received
            whole = split(self.data[fd])
            if not received or (whole and b" 200 " not in whole[0][:13]):
                raise ConnectionError(f"no answer, or none that was hoped for: {self.data[fd]!r}")
            if whole:
                yield fd, self.began[fd], now(), whole[1]


class Load:
    """Somebody in a room of a server, and what is measured with her."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid, self.token, self.room, self.number = port, pid, "", "", 0
        self.versions = self.request("GET", "versions")     # without a token, as anybody asks

    def request(self, method: str, path: str, content=None) -> bytes:
        body = json.dumps(content) if content else ""
        return (f"{method} /_matrix/client/{path} HTTP/1.1\r\nHost: localhost\r\n"
                + (f"Authorization: Bearer {self.token}\r\n" if self.token else "")
                + (f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else "") + f"\r\n{body}").encode()

    def message(self) -> bytes:
        self.number += 1
        content = {"msgtype": "m.text", "body": f"message {self.number}."}
        return self.request("PUT", f"v3/rooms/{self.room}/send/m.room.message/{self.number}", content)

    def call(self, *request) -> dict:
        return json.loads(self.press(1, 0, lambda: self.request(*request))[0][3])

    def enter(self) -> None:
        account = {"username": "loader", "password": "a long passw0rd", "auth": {"type": "m.login.dummy"}}
        self.token = self.call("POST", "v3/register", account)["access_token"]
        self.room = self.call("POST", "v3/createRoom", {"preset": "private_chat"})["room_id"]

    def press(self, connections: int, seconds: float, make, rate: float = math.inf) -> list:
        """Ask as fast as the connections can, or at a rate, at least once."""
        with contextlib.closing(Client(self.port, connections)) as client:
            done, asked, free, began = [], 0, list(client.socks), now()
            while (more := not asked or now() < began + seconds) or len(free) < connections:
                wait = began + asked / rate - now() if free and more else 60
                if wait <= 0:
                    client.ask(free.pop(), make())
                    asked += 1
                    continue
                for got in client.answers(wait):
                    done.append(got)
                    free.append(got[0])
            return done

    def arrivals(self, sink: "Load", done: list) -> tuple[dict, list]:
        """By event ID when what was sent was asked for and answered, and, in order, when it came to the application service."""
        sent = {json.loads(body)["event_id"]: (asked, answered) for _, asked, answered, body in done}
        came, news = [], now()
        while now() < news + (10 if len(came) < len(sent) else 0.2):
            if more := [pair for pair in sink.call("GET", "came") if pair[0] in sent]:
                came, news = came + more, now()
            time.sleep(0.02)
        return sent, came

    def wake(self, client: Client, pause: float, since: str) -> tuple[float, float, str]:
        """All connections but one wait in /sync: seconds from a send's start until they have it, KiB before, the next since."""
        def poll(since: str) -> bytes:      # as one who is offline: her presence would wake her, too
            return self.request("GET", f"v3/sync?timeout=600000&set_presence=offline&since={since}")

        sender, *waiting = client.socks
        for fd in waiting:
            client.ask(fd, poll(since))
        time.sleep(pause)
        kib, left, ended, synced = resident(self.pid), len(client.socks), 0.0, b""
        client.ask(sender, self.message())
        while left:
            for fd, _, answered, body in client.answers():
                if fd == sender:
                    left -= 1
                elif b"message %d." % self.number in body:
                    left, ended, synced = left - 1, answered, body
                else:
                    client.ask(fd, poll(json.loads(body)["next_batch"]))
        return ended - client.began[sender], kib, json.loads(synced)["next_batch"]

    def measure(self, name: str, length: float, sink: "Load"):
        if name in ("versions", "send"):
            make, counts = (self.message, (1, 8, 64)) if name == "send" else (lambda: self.versions, (8, 64))
            for count in counts:
                self.press(count, length / 4, make)     # the first ones are slower
                done = self.press(count, length, make)
                yield f"{name}: answers per s, {count} connection{'s' * (count > 1)}", len(done) / (done[-1][2] - done[0][1])
                if name == "send" and sink:
                    self.arrivals(sink, done)       # so that the next ones start with nothing under way
        elif name in ("flood", "deliver"):
            pace = (16, length, self.message) if name == "flood" else (8, length * 2, self.message, 200)
            sent, came = self.arrivals(sink, self.press(*pace))
            first, disorder, earliest = dict(reversed(came)), 0, math.inf
            for asked, answered in map(sent.__getitem__, first):        # from the last to the first
                disorder += asked > earliest        # one that came later had been answered before this one was sent
                earliest = min(earliest, answered)
            late = sorted(max(0, when - sent[event_id][1]) * 1000 for event_id, when in first.items())
            what = "16 connections" if name == "flood" else "200 per s"
            yield f"{name}: events per s until the AS has the last, {what}", len(first) / (came[-1][1] - min(sent.values())[0])
            yield f"{name}: ms from the answer until the AS has it, p50", late[len(late) // 2]
            yield f"{name}: ms from the answer until the AS has it, p99", late[len(late) * 99 // 100]
            yield f"{name}: lost", len(sent) - len(first)
            yield f"{name}: came twice", len(came) - len(first)
            yield f"{name}: out of order", disorder
        else:
            waiting, count, pause = (1, int(50 * length), 0.02) if name == "sync" else (1000, 1, 3)
            since, before, took = self.call("GET", "v3/sync")["next_batch"], resident(self.pid), []
            with contextlib.closing(Client(self.port, waiting + 1)) as client:
                for _ in range(count):
                    seconds, kib, since = self.wake(client, pause, since)
                    took.append(seconds * 1000)
            whom = "a waiting /sync has it, p50" if name == "sync" else "1000 waiting /sync have it"
            yield f"{name}: ms from the send until {whom}", statistics.median(took)
            if name == "idle":
                yield "idle: KiB of memory for each of them", (kib - before) / waiting


def resident(pid: int) -> float:
    """The memory of a process in KiB."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def command(kind: str, folder: pathlib.Path, port: int, sink_port: int, synapse: str) -> list[str]:
    if kind in ("raw", "sink"):
        return [sys.executable, os.path.abspath(__file__), "--serve", str(port)]
    (folder / "registration.json").write_text(json.dumps({
        "id": "bench", "url": f"http://127.0.0.1:{sink_port}", "as_token": "bench as", "hs_token": "bench hs", "rate_limited": False,
        "sender_localpart": "as", "namespaces": {"users": [{"exclusive": False, "regex": "@loader:.*"}], "rooms": [], "aliases": []}}))
    if kind == "synapse":
        free = {"per_second": 1e6, "burst_count": 1000000}
        (folder / "log.json").write_text(json.dumps({"version": 1, "root": {"level": "ERROR"}}))
        (folder / "x.json").write_text(json.dumps({
            "server_name": "localhost", "report_stats": False, "log_config": "log.json", "signing_key_path": "signing.key",
            "listeners": [{"port": port, "type": "http", "bind_addresses": ["127.0.0.1"], "resources": [{"names": ["client"]}]}],
            "database": {"name": "sqlite3", "args": {"database": "synapse.db"}}, "trusted_key_servers": [], "macaroon_secret_key": "x",
            "enable_registration": True, "enable_registration_without_verification": True, "rc_message": free, "rc_registration": free,
            "rc_room_creation": free, "app_service_config_files": ["registration.json"]}))
        program = [os.path.abspath(f"{synapse}/bin/python"), "-m", "synapse.app.homeserver", "-c", "x.json"]
        subprocess.run([*program, "--generate-keys"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return program
    (folder / "x.json").write_text(json.dumps({"port": 0, "registrations": ["registration.json"]}))
    program = [sys.executable, str(ASBRIDGE)]
    if kind == "module":
        (folder / "asbridge.py").write_bytes(ASBRIDGE.read_bytes())
        program = [sys.executable, "-m", "asbridge"]
        subprocess.run([*program, "--version"], cwd=folder, check=True, stdout=subprocess.DEVNULL)      # leaves its bytecode behind
    return [*program, "--config", "x.json", "--port-file", "port", "-q"]


@contextlib.contextmanager
def running(kind: str, sink_port: int = 0, synapse: str = ""):
    """A server: the load for it, after how many seconds it answered, and its memory then."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        arguments = command(kind, pathlib.Path(name), port, sink_port, synapse)
        began = now()
        process = subprocess.Popen(arguments, cwd=name, stdout=subprocess.DEVNULL)
        try:
            while True:
                if process.poll() is not None or now() > began + 60:
                    raise RuntimeError(f"{kind} does not start")
                with contextlib.suppress(OSError, ValueError):
                    if "--port-file" in arguments:
                        port = int(pathlib.Path(name, "port").read_text())
                    load = Load(port, process.pid)
                    load.call("GET", "versions")
                    break
                time.sleep(0.002)
            seconds, kib = now() - began, resident(process.pid)
            yield load, seconds, kib
        finally:
            process.kill()
            process.wait()


def measured(kind: str, wanted: list[str], length: float, sink: Load, synapse: str):
    if "start" in wanted:
        for label, what in (("start", kind), ("start as -m asbridge", "module" if kind == "asbridge" else kind)):
            with running(what, sink.port, synapse) as (_, seconds, kib):
                yield f"{label}: s until the first answer", seconds
                yield f"{label}: MiB of memory then", kib / 1024
    able = MEASURES[1:3] if kind == "raw" else MEASURES[1:]
    for names in (able[:5], able[5:]):      # idle has a server of its own: memory that others leave behind would hide what it needs
        if names := [name for name in names if name in wanted]:
            with running(kind, sink.port, synapse) as (load, _, _):
                load.enter()
                for name in names:
                    yield from load.measure(name, length, kind != "raw" and sink)


def plain(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.0f}" if figure >= 100 or not figure else f"{figure:#.2g}".rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--synapse", metavar="VENV", help="also measure the Synapse that is installed there")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=2, help="how long a measure lasts, about; default: 2")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if unknown := set(args.measures) - set(MEASURES):
        parser.error(f"no such measure: {', '.join(unknown)}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # -m asbridge is about having a cache
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # by way of the finally blocks
    kinds, figures = ["asbridge", "raw", "synapse"][:3 if args.synapse else 2], {}
    with running("sink") as (sink, _, _):
        for number in range(args.rounds):
            for kind in kinds:
                print(f"round {number + 1} of {args.rounds}: {kind}", file=sys.stderr)
                for label, figure in measured(kind, args.measures or MEASURES, args.seconds, sink, args.synapse):
                    figures.setdefault(label, {}).setdefault(kind, []).append(figure)
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, rounds: {args.rounds}, seconds: {args.seconds:g}")
    print(f"{'':60}{'asbridge':>10}", *(f"{kind:>10}{'ratio':>8}" for kind in kinds[1:]), sep="")
    for label, by_kind in figures.items():
        of_all = max if label.endswith(("lost", "twice", "order")) else statistics.median
        typical = {kind: of_all(some) for kind, some in by_kind.items()}
        line = f"{label:60}{plain(typical['asbridge']):>10}"
        for kind in kinds[1:]:
            other = typical.get(kind)
            line += f"{plain(other):>10}{plain(typical['asbridge'] / other if other else None):>8}"
        print(line)


if __name__ == "__main__":
    main()
