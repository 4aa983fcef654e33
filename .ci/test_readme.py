"""The README's lessons, to the letter: each command is typed where it says, and what comes must be what stands there.

    python -m pytest -q .ci/test_readme.py

They need bash, curl and the README's own ports, without which they are skipped, and take a quarter of a minute. IDs, numbers
and times may be others, but what is one ID in a lesson must be one here, and two must be two. "…" is anything: a part of a
line, or any number of lines.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

HERE = pathlib.Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
PORTS = {8008: "the homeserver", 9009: "the IRC bridge's application service", 6667: "IRC", 29300: "the bridges of the lessons"}

START, LESSONS, AFTER = re.split(r"(?m)^## Lessons\n((?:.*\n)*?)(?=^## )", README)
INTRODUCTION, *PARTS = re.split(r"(?m)^### (?=\d)", LESSONS)
LESSON = {part.partition("\n")[0]: part for part in PARTS}
BLOCK = re.compile(r"(?m)^```(\w*)\n((?:.*\n)*?)```$")
OUTSIDE = [line for _, block in BLOCK.findall(START + AFTER) for line in block.splitlines() if line.startswith("python asbridge.py")]


# ============================================================================
# What the README says
# ============================================================================

class File(NamedTuple):
    """A file that the reader saves."""
    name: str
    text: str


class Step(NamedTuple):
    """What is typed after "1$", "2$", "3$" or "3>", and the lines that come then. Without a prompt: what stands in terminal 1 or 3."""
    prompt: str
    typed: str
    expected: list[str]


def steps_of(part):
    """What a reader of this part saves and types, and what he is to see."""
    for block in BLOCK.finditer(part):
        language, text = block.groups()
        if language == "console":
            yield from console(text)
        elif language == "python":
            paragraph = part[:block.start()].rstrip().rsplit("\n\n", 1)[-1]
            yield File(re.findall(r"\bas `(\w+\.py)`", paragraph)[-1], text)
        else:
            assert language == "mermaid", f"what is to be done with a block in {language or 'no language'}?"


def console(text):
    step = Step("", "", [])
    for line in text.splitlines():
        if prompt := re.match(r"([123]\$|3>) ", line):
            if step.typed or step.expected:
                yield step
            step = Step(prompt[1], line[prompt.end():], [])
        else:
            step.expected.append(line)
    yield step


# What differs from run to run. All but the times are names: each of the README's stands for one of ours.
DIFFERS = {
    "event": r"\$[\w-]{43}",
    "room": r"![A-Za-z]{18}(?=:)",
    "transaction": r"\b1\d{15}\b",
    "number": r"(?<= #)\d+ +",                               # of an exchange; the column is padded
    "clock": r"\b\d\d:\d\d:\d\d\.\d{3}\b",
    "duration": r"(?<= in )\d+(?:\.\d+)?(?= ?m?s\b)",
    "left_out": r"…",
}
ANYTHING = {"clock": DIFFERS["clock"], "duration": DIFFERS["duration"], "left_out": ".*"}
SCANNER = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in DIFFERS.items()))


def comes(expected, lines, known):
    """Are these the expected lines? If so, `known` learns which of the README's IDs is which of ours."""
    group = {}

    def differing(found):
        kind, text = found.lastgroup, found[0]
        if kind in ANYTHING:
            return ANYTHING[kind]
        if text in known:
            return re.escape(known[text])
        if text in group:
            return f"(?P={group[text]})"
        others = "|".join([*map(re.escape, known.values()), *(f"(?P={name})" for name in group.values())])
        group[text] = f"id{len(group)}"
        return (f"(?!{others})" if others else "") + f"(?P<{group[text]}>{DIFFERS[kind]})"

    def pattern(line):
        if line == "…":
            return r"(?:.*\n)*?"
        made, at = "", 0
        for found in SCANNER.finditer(line):
            made += re.escape(line[at:found.start()]) + differing(found)
            at = found.end()
        return made + re.escape(line[at:]) + r"\n"

    match = re.fullmatch("".join(map(pattern, expected)), "".join(line + "\n" for line in lines))
    known.update({text: match[name] for text, name in group.items()} if match else {})
    return match is not None


def among(expected):
    """With others before, between and after them: of terminals 1 and 3 the README shows what matters now."""
    return ["…", *(one for line in expected for one in (line, "…"))]


# ============================================================================
# Three terminals
# ============================================================================

def eventually(test, seconds=10.0):
    """The first true value of test(), or the last one when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := test()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


class Terminal:
    """What runs in it, and all that was ever written there."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment
        self.process, self.lines = None, []

    def start(self, command):
        assert self.process is None, "something runs in this terminal"
        self.process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, encoding="utf-8",
                                        bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self.reader.start()

    def _read(self, written):
        for line in written:
            self.lines.append(line.rstrip())

    def type(self, line):
        assert self.process is not None, "nothing runs in this terminal"
        if line == "^D":
            self.process.stdin.close()
            self.end()
        else:
            self.process.stdin.write(line + "\n")

    def in_shell(self, command):
        """What a command writes, in the shell that runs here."""
        start, end = len(self.lines), secrets.token_hex(8)
        self.type(f"{{ {command}\n}} </dev/null; printf '\\n%s\\n' {end}")
        assert eventually(lambda: end in self.lines[start:], 60), f"{command} does not end; it wrote {self.lines[start:]}"
        written = self.lines[start:-1]
        return written if written[-1] else written[:-1]

    def end(self, sign=None):
        """The exit code of what runs, by itself or after Ctrl-C or the like."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        try:
            if sign is not None:
                process.send_signal(sign)
            return process.wait(10)
        finally:
            process.kill()
            process.wait()
            self.reader.join(10)
            process.stdout.close()
            with contextlib.suppress(OSError):               # nobody may have read what was typed last
                process.stdin.close()


@pytest.fixture
def terminals(tmp_path):
    """Terminals 1, 2 and 3, in a fresh folder with asbridge.py in it. A shell runs in the second. In the end nothing runs."""
    for program in ("bash", "curl"):
        if not shutil.which(program):
            pytest.skip(f"the README's commands need {program}")
    for port, what in PORTS.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            pytest.skip(f"the README needs port {port} for {what}: {error}")
    folder, programs = tmp_path / "lesson", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    shutil.copy(HERE / "asbridge.py", folder)
    (programs / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (programs / "python").chmod(0o755)
    unwanted = ("PYTHONPATH", "PYTEST_ADDOPTS", "BASH_ENV", "FORCE_COLOR", "PY_COLORS")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted} | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "NO_COLOR": "1",
        "COLUMNS": "80", "no_proxy": "*"}
    made = {number: Terminal(folder, environment) for number in "123"}
    try:
        made["2"].start("bash")
        yield made
    finally:
        for terminal in made.values():
            terminal.end(signal.SIGKILL)


def at_rest():
    """Has the homeserver handed over what it could? Whoever types is slower than that. One that does not run is at rest."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", 8008, timeout=10)) as connection:
        try:
            connection.request("GET", "/_asbridge/status")
            services = json.loads(connection.getresponse().read())["appservices"]
        except ConnectionRefusedError:
            return True
        return all((each["waiting"] == 0 and each["open"] is None) or each["state"] == "backing off" for each in services)


def do(step, terminals, known):
    """Types it; what really came, if that is not what was to come."""
    expected = [line.rstrip() for line in step.expected]
    if step.prompt:
        eventually(at_rest)
    if step.prompt == "2$":
        written = terminals["2"].in_shell(step.typed)
        return None if comes(expected, written, known) else written
    places = [(terminals[number], 0) for number in "13"]
    if step.prompt:
        terminal = terminals[step.prompt[0]]
        places = [(terminal, len(terminal.lines))]
        (terminal.type if step.prompt == "3>" else terminal.start)(step.typed)
    if eventually(lambda: any(comes(among(expected), terminal.lines[start:], known) for terminal, start in places)):
        return None
    return [line for terminal, start in places for line in terminal.lines[start:]]


def shown(step, really):
    parts = {"typed": [f"{step.prompt} {step.typed}" if step.prompt else "(nothing; one looks at terminals 1 and 3)"],
             "the README shows": step.expected or ["(nothing)"], "what really came": really or ["(nothing)"]}
    return "\n".join(f"{title}:\n" + "".join(f"    {line}\n" for line in lines) for title, lines in parts.items())


# ============================================================================
# The tests
# ============================================================================

@pytest.mark.parametrize("title", LESSON)
def test_each_command_of_the_lesson_does_what_stands_there(title, terminals, tmp_path):
    known = {}                                               # the README's IDs: ours
    for step in (*steps_of(INTRODUCTION), *steps_of(LESSON[title])):
        if isinstance(step, File):
            (tmp_path / "lesson" / step.name).write_text(step.text, encoding="utf-8")
        elif (really := do(step, terminals, known)) is not None:
            pytest.fail(f"in lesson {title}\n\n{shown(step, really)}", pytrace=False)
    eventually(at_rest)
    terminals["3"].end(signal.SIGTERM)
    said = [line for line in terminals["3"].lines if "PRIVMSG" in line or "m.room.message" in line]
    assert len(said) == len({*said})                         # nothing twice, whatever was pushed twice
    assert terminals["1"].end(signal.SIGINT) in (0, None)    # lesson 5 starts none
    assert not [line for line in terminals["1"].lines if "Traceback" in line]
    assert not list((tmp_path / "lesson").glob("asbridge*.db*"))            # its server keeps nothing


@pytest.mark.parametrize("command", OUTSIDE)
def test_each_command_outside_the_lessons_starts_or_makes_a_registration_without_an_error(command, terminals, tmp_path):
    one, two = terminals["1"], terminals["2"]
    if into := re.search(r" generate .* > (\S+)$", command):
        assert two.in_shell(command) == []
        assert two.in_shell(f"python asbridge.py check {into[1]} && echo taken")[-1] == "taken"
        return
    if config := re.search(r"--config (\S+)", command):      # one that a bridge wrote
        (tmp_path / "lesson" / config[1]).write_text(
            "id: mybridge\nurl: http://127.0.0.1:29300\nas_token: one\nhs_token: two\nsender_localpart: my_bot\n"
            "namespaces:\n  users:\n    - regex: '@my_.*:localhost'\n      exclusive: true\n")
    one.start(command)
    ready = "asbridge ready at http://127.0.0.1:8008"
    assert eventually(lambda: ready in one.lines or one.process.poll() is not None) and ready in one.lines, one.lines
    assert one.end(signal.SIGINT) == 0
    assert not [line for line in one.lines if "Traceback" in line or "error:" in line]


def test_the_readme_has_lessons_and_commands_outside_them():
    assert len(LESSON) == 5 and all(sum(isinstance(step, Step) for step in steps_of(part)) >= 2 for part in PARTS)
    assert {command.split()[2:3] == ["generate"] for command in OUTSIDE} == {True, False} and len(OUTSIDE) == 3
