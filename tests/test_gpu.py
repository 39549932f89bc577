"""One GPU under real threads: never two families at once."""

from __future__ import annotations

import threading

from colab_gpu.gpu import Arbiter, SimulatedDevice


def test_one_family_at_a_time():
    arbiter, inside, most = Arbiter(SimulatedDevice(15)), [], []

    def work(family):
        for _ in range(20):
            with arbiter.turn(family):
                inside.append(family); most.append(len(inside)); inside.pop()

    threads = [threading.Thread(target=work, args=(f,)) for f in ("images", "chat") * 2]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(most) == 1 and len(most) == 80 and arbiter.owner is None and not arbiter.waiting
