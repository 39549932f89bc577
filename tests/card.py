"""A card in miniature for the tests of both executors: its use is what there really is, not what anybody claims."""

import weakref
from contextlib import contextmanager

import torch
from processes import seen

from colab_gpu import images
from colab_gpu.gpu import Arbiter, SimulatedDevice


class Card(SimulatedDevice):
    """A card of `total` bytes for a daemon at `url` and the pipelines of this process.

    In use are the weights of every pipeline that still lives, whoever may hold it, but for those of a model on the `shelf` that wait elsewhere, and
    what the daemon's models take, which comes back a while after they are off its list. `lowest` is the least
    that was ever free when something had just been loaded: below 0, more was loaded than there was room for.
    """
    def __init__(self, total, url):
        super().__init__(total)
        self.url, self.lowest, self.loads, self.parts, self.shelf = url, total, [], weakref.WeakSet(), None

    def watch(self, monkeypatch):
        "From now on count the pipelines that are loaded."
        whole = images.load_pipeline

        def counted(source, **options):
            pipe = whole(source, **options)
            self.parts.update(part for part in pipe.components.values() if hasattr(part, "parameters"))
            self.loads.append(source.name)
            self.look()
            return pipe
        monkeypatch.setattr(images, "load_pipeline", counted)
        return self

    def images_bytes(self):
        waiting = [model.pipe for model in self.shelf.loaded.values() if model.away or model.offloaded] if self.shelf else []
        elsewhere = {id(part) for pipe in waiting for part in pipe.components.values()}
        return sum(tensor.numel() * tensor.element_size() for part in list(self.parts) if id(part) not in elsewhere
                   for tensor in (*part.parameters(), *part.buffers()))

    def chat_bytes(self): return seen(self.url)["memory"]
    def free_bytes(self): return self.total - self.images_bytes() - self.chat_bytes()
    def look(self): self.lowest = min(self.lowest, self.free_bytes())


class Watched(Arbiter):
    "An arbiter that looks at the card at the end of each turn, and remembers whose turns there were."
    def __init__(self, card, **options):
        super().__init__(card, **options)
        self.turns, self.said = [], []
        self.say = self.said.append

    @contextmanager
    def turn(self, family, *args, **options):
        with super().turn(family, *args, **options):
            self.turns.append(family)
            try: yield
            finally: self.device.look()


class Scarce:
    "Memory that suffices while `enough(pipe, pictures)`; the denoiser and the decoder run out of it otherwise."

    def __init__(self, model, monkeypatch, enough, where="unet"):
        self.calls, part = [], getattr(model.pipe, where)
        name = "decode" if where == "vae" else "forward"
        whole = getattr(part, name)

        def short(sample, *args, **kwargs):
            self.calls.append(len(sample))
            if not enough(model, len(sample)): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return whole(sample, *args, **kwargs)
        monkeypatch.setattr(part, name, short)
