"""The soak's tools: what each must come to is a function of its payload alone, so that the tester can tell a wrong result from a right one.

`mill` takes steps and reports them. `press` makes files. `moody` fails now and then in passing. `hold` keeps the interpreter to itself.
`wrong` never works. `gate` waits until the tester lets it go.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

KINDS = ("mill", "press", "moody", "hold", "wrong")
REFUSAL = "Job {n} can never work: submit another."


def fingerprint(tool: str, n: int) -> str:
    """What the run of job `n` computes."""
    return hashlib.sha256(f"{tool}:{n}".encode()).hexdigest()


def files_of(payload: dict[str, Any]) -> dict[str, bytes]:
    """The files that a `press` job makes, by name."""
    n, size = payload["n"], payload.get("bytes", 1000)
    return {f"page-{i}.bin": random.Random(f"{n}:{i}").randbytes(size + 17 * i) for i in range(payload.get("files", 1))}


def expected(tool: str, payload: dict[str, Any]) -> tuple[str, Any, dict[str, str]]:
    """How a job must end: its status, its result or detail, and its files' digests by name."""
    if tool == "wrong":
        return "failed", REFUSAL.format(n=payload["n"]), {}
    files = files_of(payload) if tool == "press" else {}
    result = {"n": payload["n"], "fingerprint": fingerprint(tool, payload["n"])}
    return "completed", result, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def draw(number: random.Random, n: int, lease_s: float) -> tuple[str, dict[str, Any]]:
    """A job at random: a tool and its payload."""
    tool = number.choices(KINDS, (40, 25, 15, 17, 3))[0]
    payload: dict[str, Any] = {"n": n, "ms": round(number.lognormvariate(4.2, 0.9))}  # median 67 ms, one in twenty over 290
    payload["ms"] = min(payload["ms"], 900)
    if tool == "press":
        payload |= {"files": number.randint(1, 3), "bytes": number.choice((10, 1000, 40_000, 300_000))}
    if tool == "hold":  # mostly at most 0.3 of a lease, at times three of them
        payload["ms"] = round(lease_s * 3000 if number.random() < 0.03 else min(payload["ms"] * 3, lease_s * 300))
    return tool, payload
