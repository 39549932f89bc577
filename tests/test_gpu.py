"""One GPU under real threads: turns, room, fairness, and a card that is measured by a command."""

from __future__ import annotations

import os
import stat
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colab_gpu.errors import Interrupted, OutOfMemory
from colab_gpu.gpu import Arbiter, Cpu, Cuda, SimulatedDevice, accelerator_info, ask_nvidia_smi, find_device

GIB = 1 << 30


class Family:
    """A family whose memory is written down on the simulated card, and comes back late if it should."""

    def __init__(self, card, family, late=0):
        self.card, self.family, self.late, self.kept = card, family, late, None

    def held_bytes(self):
        return self.card.used.get(self.family, 0) if self.kept is None else self.kept

    def leave(self, need_bytes):
        if not self.late: self.card.used.pop(self.family, None)
        else: self.kept = 0

    def come_back(self, _seconds):
        self.late -= 1
        if self.late <= 0 and self.kept == 0: self.card.used.pop(self.family, None)


def switching(card, **options):
    arbiter = Arbiter(card, **options)
    families = {name: Family(card, name) for name in ("images", "chat")}
    for family in families.values(): arbiter.join(family)
    return arbiter, families


def test_one_family_at_a_time():
    arbiter, inside, most = Arbiter(SimulatedDevice(15)), [], []

    def work(family):
        for _ in range(10):
            with arbiter.turn(family):
                inside.append(family); time.sleep(0.001); most.append(len(inside)); inside.pop()

    threads = [threading.Thread(target=work, args=(f,)) for f in ("images", "chat") * 2]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(most) == 1 and len(most) == 40 and arbiter.owner is None and not arbiter.waiting


def test_two_families_switch_on_a_card_of_15_gb_and_stay_where_both_fit():
    card = SimulatedDevice(15 * GIB)
    arbiter, _ = switching(card, timeout_s=0)
    for _ in range(5):
        for family, need in (("images", 10 * GIB), ("chat", 8 * GIB)):
            with arbiter.turn(family, 0 if family in card.used else need):
                card.used[family] = need
                assert set(card.used) == {family} and card.free_bytes() >= 0
    with arbiter.turn("images", 5 * GIB): card.used["images"] = 5 * GIB
    with arbiter.turn("chat"): pass
    assert card.used == {"chat": 8 * GIB, "images": 5 * GIB}


def test_a_turn_begins_when_the_memory_is_seen_not_when_it_is_promised():
    card = SimulatedDevice(15 * GIB)
    card.used["chat"] = 8 * GIB
    chat = Family(card, "chat", late=3)
    arbiter = Arbiter(card, clock=lambda: 0.0, sleep=chat.come_back)
    arbiter.join(chat)
    with arbiter.turn("images", 10 * GIB):
        assert "chat" not in card.used and chat.late == 0


def test_who_holds_what_and_what_would_fit_is_said():
    card, ticks = SimulatedDevice(15 * GIB), iter(range(1000))
    card.used["chat"] = 8 * GIB
    liar = Family(card, "chat", late=10**6)
    arbiter = Arbiter(card, timeout_s=30, clock=lambda: float(next(ticks)), sleep=lambda s: None)
    arbiter.join(liar)
    with pytest.raises(OutOfMemory, match=r"images needs 10.0 GiB on simulated and can have 7.0 GiB \(chat left, but its memory did not come back in 30 s\)"), \
            arbiter.turn("images", 10 * GIB):
        raise AssertionError("there was no room")
    assert arbiter.owner is None and not arbiter.waiting


def test_nobody_is_sent_away_for_what_can_never_fit_nor_for_ones_own_models():
    card = SimulatedDevice(15 * GIB)
    card.used.update(chat=5 * GIB, images=9 * GIB)
    arbiter, _ = switching(card, timeout_s=0)
    with pytest.raises(OutOfMemory, match="has 15.0 GiB in all"), arbiter.turn("images", 16 * GIB):
        raise AssertionError
    assert card.used["chat"] == 5 * GIB
    with arbiter.turn("images", 12 * GIB): assert card.used == {"images": 9 * GIB}, "it drops its own old model itself"


def test_a_holder_that_fails_is_said_and_nothing_stays_locked():
    card, said = SimulatedDevice(15 * GIB), []
    card.used["chat"] = 8 * GIB

    class Broken(Family):
        def leave(self, need_bytes): raise ConnectionError("gone")

    arbiter = Arbiter(card, timeout_s=0, say=said.append)
    arbiter.join(Broken(card, "chat"))
    with pytest.raises(OutOfMemory, match="chat holds 8.0 GiB, chat failed to leave"), arbiter.turn("images", 10 * GIB): raise AssertionError
    assert said == ["[gpu] chat failed to leave (ConnectionError)."]
    with pytest.raises(ZeroDivisionError), arbiter.turn("images"): 1 / 0  # noqa: B018
    with arbiter.turn("images"), arbiter.turn("images"): assert arbiter.turn_of == "images"
    assert arbiter.owner is None


def test_a_turn_of_another_family_inside_a_turn_is_a_bug_and_is_said():
    arbiter, _ = switching(SimulatedDevice(GIB))
    with arbiter.turn("images"), pytest.raises(RuntimeError, match="would never end"), arbiter.turn("chat"): raise AssertionError


def test_a_canceled_job_leaves_the_line():
    arbiter, canceled, ended = Arbiter(SimulatedDevice(GIB)), threading.Event(), []

    def check():
        if canceled.is_set(): raise Interrupted("The job was canceled.")

    def wait():
        with pytest.raises(Interrupted), arbiter.turn("chat", check=check): raise AssertionError
        ended.append(True)

    with arbiter.turn("images"):
        thread = threading.Thread(target=wait)
        thread.start()
        while not arbiter.waiting: time.sleep(0.001)
        canceled.set()
        thread.join(30)
        assert ended and not arbiter.waiting and arbiter.turn_of == "images"


def test_on_a_cpu_nobody_waits():
    arbiter = Arbiter(Cpu())
    with arbiter.turn("images", 10**15), arbiter.turn("chat", 10**15): assert arbiter.owner is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["images", "chat"]), min_size=1, max_size=40), st.integers(1, 10))
def test_the_warm_family_goes_first_and_nobody_starves(arrivals, prefer):
    from colab_gpu.gpu import following
    now = [0.0]
    arbiter = Arbiter(SimulatedDevice(GIB), prefer_s=prefer, clock=lambda: now[0])
    arbiter.waiting = [(family, 0.0) for family in arrivals]
    kept = {"images": 0, "chat": 0}
    while arbiter.waiting:
        ticket = following(arbiter)
        if ticket[0] != arbiter.warm: arbiter.warm, arbiter.warm_since = ticket[0], now[0]
        arbiter.waiting = [t for t in arbiter.waiting if t is not ticket]
        now[0] += 1
        others = [f for f, _ in arbiter.waiting if f != ticket[0]]
        kept = {f: (kept[f] + 1 if f in others else 0) for f in kept}
        assert max(kept.values()) <= prefer + 1


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def write(body):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write


def test_a_card_is_measured_without_torch(nvidia_smi):
    nvidia_smi('[ "$1" = --query-gpu=name,memory.total,memory.free ] && echo "Tesla T4, 15360, 15101"')
    assert ask_nvidia_smi() == ("Tesla T4", 15360 << 20, 15101 << 20)
    device = find_device()
    assert isinstance(device, Cuda) and device.kind == "cuda" and device.free_bytes() == 15101 << 20
    assert accelerator_info(device) == {"accelerator": "Tesla T4", "memory": "15.0 GiB"}


@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed because it could not talk to the driver.'", "echo 'T4, [N/A], [N/A]'", "true"])
def test_a_driver_that_fails_is_no_card(nvidia_smi, body):
    nvidia_smi(body)
    assert ask_nvidia_smi() is None and isinstance(find_device(), Cpu)
