"""What the README promises of strangers, as tests that take too long for the quick ones.

    python -m pytest -q .ci/test_hostile.py

What is random follows a seed, as in test_durability.py.
"""

from __future__ import annotations

import collections
import contextlib
import re
import time

from test_durability import eventually, linux, person, program, recorder, registration, rng, say  # noqa: F401

import asbridge

# ============================================================================
# HTTP: a hundred thousand requests that should not be
# ============================================================================


# ============================================================================
# Regexes: random ones, and how long they really take
# ============================================================================

class TooLong(Exception):
    pass


class Backtracking:
    """Matches as Python does, from what Python's own parser reads, and counts the steps up to a limit."""

    def __init__(self, pattern, limit):
        self.flags, self.limit, self.steps, self.tests = pattern.flags & ~re.VERBOSE, limit, 0, {}
        self.program = self.read(re._parser.parse(pattern.pattern))

    def read(self, items):
        return tuple(part for name, value in items for part in self.part(str(name), value))

    def part(self, name, value):
        if name == "SUBPATTERN":
            return self.read(value[3])
        if name == "BRANCH":
            return [(name, [self.read(option) for option in value[1]])]
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return [(name, value[0], value[1], self.read(value[2]))]
        return [(name, value if name == "AT" else self.one_char(name, value))]

    def one_char(self, name, value):
        """Whether a character is this one, as `re` has it."""
        def member(kind, item):
            if kind == "CATEGORY":
                return asbridge.CATEGORIES[str(item).removeprefix("CATEGORY_")]
            return "-".join([f"\\U{code:08x}" for code in (item if kind == "RANGE" else (item,))])
        if name == "ANY":
            return re.compile(".", self.flags).match
        members = [(str(kind), item) for kind, item in (value if name == "IN" else [(name.removeprefix("NOT_"), value)])]
        negated = "^" * (name == "NOT_LITERAL" or members[0][0] == "NEGATE")
        return re.compile(f"[{negated}{''.join([member(*one) for one in members if one[0] != 'NEGATE'])}]", self.flags).match

    def count(self, text, whole):
        self.text, self.steps = text, 0
        with contextlib.suppress(TooLong):
            self.match(self.program, 0, lambda at: at == len(text) or not whole)
        return self.steps

    def step(self):
        self.steps += 1
        if self.steps > self.limit:
            raise TooLong

    def match(self, parts, at, then):
        self.step()
        if not parts:
            return then(at)
        (name, *what), rest = parts[0], parts[1:]
        if name == "BRANCH":
            return any(self.match(option, at, lambda end: self.match(rest, end, then)) for option in what[0])
        if name == "AT":
            there = at == 0 if "BEGINNING" in str(what[0]) else self.text[at:] in ("", "\n")
            return there and self.match(rest, at, then)
        if name not in ("MAX_REPEAT", "MIN_REPEAT"):
            return at < len(self.text) and what[0](self.text[at]) and self.match(rest, at + 1, then)
        return self.repeat(name, *what, lambda end: self.match(rest, end, then), at)

    def repeat(self, name, low, high, body, then, at, done=0, last=-1):
        self.step()

        def again():
            return done < high and (done < low or at != last) and self.match(
                body, at, lambda end: self.repeat(name, low, high, body, then, end, done + 1, at))
        if done < low:
            return again()
        return again() or then(at) if name == "MAX_REPEAT" else then(at) or again()


FEW = ["a", "b", "ab", "ba", "aa", "[ab]", "a", "b", "^", "$", "k", "\u212a", "[\u00e9-\u212a]"]
MANY = ["a", "b", "ab", "c", ".", "[^a]", "[a-z]", "[^b_]", "_", "1", r"\w", r"\d", r"\s", r"\W", r"[^\W]", "\u00e9", r"\.", "\n",
        "[[:alpha:]]", "[[:punct:]]"]


def random_regex(rng, atoms, depth):  # noqa: F811
    kind = rng.random() if depth else 0
    if kind < 0.3:
        return rng.choice(atoms)
    if kind < 0.55:
        return "".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(1, 4))])
    if kind < 0.75:
        return "(?:" + "|".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(2, 3))]) + ")"
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,3}", "{0,30}", "{3,}", "*?", "+?", "??"])
    return f"(?:{random_regex(rng, atoms, depth - 1)}){repeat}"


def random_text(rng, alphabet):  # noqa: F811
    """A short text again and again, and an end at which most matches fail."""
    pumped = "".join([rng.choice(alphabet) for _ in range(rng.randint(1, 4))])
    return ("".join(rng.choices("ab1_", k=rng.randint(0, 2))) + pumped * 32)[:32] + "!"


def test_no_random_regex_takes_more_steps_than_it_is_thought_to(rng, say):  # noqa: F811
    verdicts, end = collections.Counter(), time.monotonic() + 20
    while time.monotonic() < end:
        atoms, whole = rng.choice([FEW, MANY]), rng.random() < 0.3
        parts = [random_regex(rng, atoms, rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
        regex = "".join([rng.choice(["", "", "", "(?i)", "(?s)"]), *parts, rng.choice(["", "b", "!", "$"])])
        try:
            pattern = asbridge.compile_regex(regex)
        except re.error:
            continue
        cost = asbridge.cost_of(pattern, uri=whole)
        verdicts[cost.verdict] += 1
        assert cost.verdict == "harmless" or asbridge.DESERVES_A_LOOK.search(regex) or whole, regex
        limit = 1500 * max(33, cost.ways)
        if cost.verdict in ("harmless", "heavy") and limit < 300_000:
            matching = Backtracking(pattern, limit)
            for _ in range(5):
                text = random_text(rng, "aab1_.c\nkK\u212a\u00e9" if atoms is MANY else "aabk\u212a")
                assert matching.count(text, whole) <= limit, (cost, regex, text)
    say(f"regexes: {dict(verdicts)}")
    assert len(verdicts) > 2


# ============================================================================
# Rules of rooms: a long walk beside a model
# ============================================================================


# ============================================================================
# Application services that misbehave
# ============================================================================


# ============================================================================
# IRC clients that misbehave
# ============================================================================


# ============================================================================
# Many at once
# ============================================================================


# ============================================================================
# Faults of the machine
# ============================================================================
