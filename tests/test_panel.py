"""The panel without a browser: buttons, fields and repaints, in ipywidgets 7.7 and 8. It needs neither torch nor a kernel, but for the last test."""

import threading
import time

import pytest

pytest.importorskip("ipywidgets")

import ipywidgets
from panel_service import PuppetService, ended, job, model, picture

from colab_gpu import panel as room
from colab_gpu.errors import Unavailable
from colab_gpu.panel import MOST_LINES, STATES, Panel, esc, log_html, show

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
SECRET = "open-sesame-4711"


def walk(root):
    yield root
    for child in getattr(root, "children", ()):
        yield from walk(child)


def registered():
    """Every widget that ipywidgets knows."""
    known = getattr(ipywidgets.widgets.widget, "_instances", None)
    return set(ipywidgets.Widget.widgets if known is None else known)


def buttons(panel):
    return [each for each in walk(panel.widget) if isinstance(each, ipywidgets.Button)]


def shown(panel):
    return "\n".join(each.value for each in walk(panel.widget) if isinstance(each, ipywidgets.HTML))


def press(panel, button):
    button.click()
    if panel.doer.thread is not None:
        panel.doer.thread.join(30)
    assert panel.doer.busy == ""
    panel.refresh()


def ticks(panel):
    """Wait for two repaints by the panel's thread."""
    seen, done = [], threading.Event()
    snapshot = panel.service.snapshot

    def counted():
        seen.append(threading.current_thread().name)
        if seen.count("colab-gpu-panel") == 2:
            done.set()
        return snapshot()

    panel.service.snapshot = counted
    assert done.wait(60)


@pytest.fixture
def service(request):
    return PuppetService(getattr(request, "param", "worker"))


@pytest.fixture
def panel(service):
    made = Panel(service)
    yield made
    made.close()


both = pytest.mark.parametrize("service", ["worker", "all in one"], indirect=True)


# --- buttons and fields


@both
def test_every_button_does_its_verb_in_a_thread(panel, service):
    service.now["state"] = "waiting"
    panel.refresh()
    for button in buttons(panel):
        press(panel, button)
        assert "Something went wrong" not in panel.trouble.value, button.description
    verbs = {verb for verb, *_ in service.told}
    assert verbs == {"connect", "preload", "start", "drain", "stop", "client_token"}  # ngrok's token was not typed
    assert not any(in_main for *_, in_main in service.told)


def test_connect_takes_what_was_typed(panel, service):
    panel.connection.address.value = " https://other.example "
    panel.connection.token.widget.value = SECRET
    press(panel, panel.connection.button)
    assert service.told == [("connect", "https://other.example", SECRET, False)]
    assert "Done: connect." in panel.trouble.value
    press(panel, panel.connection.button)
    assert service.told[-1] == ("connect", "https://other.example", "", False)  # blank keeps


@pytest.mark.parametrize("start", [True, False])
def test_a_typed_token_is_in_no_widget(start):
    service = PuppetService()
    service.broken = ValueError(f"Invalid header value 'Bearer {SECRET}'") if start else None
    panel = Panel(service)
    panel.connection.token.widget.value = SECRET
    everything = [str(each.get_state()) for each in walk(panel.widget)]
    assert not any(SECRET in state for state in everything)
    assert "received" in panel.connection.token.widget.placeholder
    press(panel, panel.controls.start if start else panel.connection.button)
    assert service.told[0][:3] == ("connect", "", SECRET) if start else ("connect", "https://queue.example", SECRET)
    everything = [str(each.get_state()) for each in walk(panel.widget)]
    assert not any(SECRET in state for state in everything) and SECRET not in "".join(panel.doer.notes)
    assert panel.connection.token.typed == ""
    panel.close()


@pytest.mark.parametrize("service", ["all in one"], indirect=True)
def test_ngroks_token_is_passed_on(panel, service):
    panel.public.ngrok.widget.value = SECRET
    assert panel.public.ngrok.widget.value == ""
    press(panel, panel.public.use)
    assert service.told == [("ngrok", SECRET, False)]
    press(panel, panel.public.use)
    assert len(service.told) == 1 and "first" in panel.trouble.value
    panel.public.ngrok.widget.value = SECRET
    press(panel, panel.controls.start)
    assert [verb for verb, *_ in service.told[1:]] == ["ngrok", "start"]


def test_start_passes_on_what_was_typed(panel, service):
    panel.connection.address.value = "https://typed.example"
    press(panel, panel.controls.start)
    assert service.told == [("connect", "https://typed.example", "", False), ("start", False)]


def test_models_are_chosen_or_named(panel, service):
    assert panel.images.choice.options == ("demo", "stabilityai/sdxl-turbo") and panel.images.choice.value == "demo"
    panel.images.choice.value = "stabilityai/sdxl-turbo"
    press(panel, panel.images.button)
    panel.chat.name.value = " gemma3:4b "
    press(panel, panel.chat.button)
    assert [told[:3] for told in service.told] == [("preload", "images", "stabilityai/sdxl-turbo"), ("preload", "chat", "gemma3:4b")]
    assert panel.chat.name.value == ""
    service.now["choices"] = {"images": ["stabilityai/sdxl-turbo", "another"], "chat": []}
    panel.refresh()
    assert panel.images.choice.value == "stabilityai/sdxl-turbo" and panel.chat.choice.value is None
    press(panel, panel.chat.button)
    assert len(service.told) == 2 and "type its name" in panel.trouble.value


def test_buttons_follow_the_state(panel, service):
    enabled = {}
    for state in [*STATES, "unheard of"]:
        service.now["state"] = state
        panel.refresh()
        enabled[state] = [not each.disabled for each in (panel.controls.start, panel.controls.drain, panel.controls.stop)]
    assert enabled.pop("stopped") == [True, False, False]
    assert enabled.pop("starting") == enabled.pop("draining") == [False, False, True]
    assert all(each == [False, True, True] for each in enabled.values()) and len(enabled) == 5
    assert "unheard of" in panel.state.value


def test_one_verb_at_a_time(panel, service):
    service.gate = threading.Event()
    panel.controls.start.click()
    assert panel.controls.start.disabled and panel.connection.button.disabled and "Starting" in panel.state.value
    panel.connection.token.widget.value = SECRET
    panel.connection.button.click()  # a page that has not heard of it yet
    assert panel.connection.token.typed == SECRET  # not lost
    service.gate.set()
    panel.doer.thread.join(30)
    panel.refresh()
    assert [verb for verb, *_ in service.told] == ["start"] and not panel.connection.button.disabled


def test_the_address_follows_the_service_until_somebody_types(panel, service):
    assert panel.connection.address.value == "https://queue.example"
    service.now["server"] = {"url": "https://new.example", "token": True, "says": ""}
    panel.refresh()
    assert panel.connection.address.value == "https://new.example"
    panel.connection.address.value = "https://typed.example"
    service.now["server"] = {"url": "https://newer.example", "token": True, "says": ""}
    panel.refresh()
    assert panel.connection.address.value == "https://typed.example"


@both
def test_modes_show_what_they_need(panel, service):
    worker, public = panel.connection.widget.layout.display, panel.public.widget.layout.display
    assert (worker, public) == ((None, "none") if service.now["mode"] == "worker" else ("none", None))
    assert ("https://name.ngrok-free.app" in shown(panel)) == (service.now["mode"] == "all in one")
    assert ("&lt;hello&gt;" in panel.public.snippet.value) == (service.now["mode"] == "all in one")


def test_the_callers_token_is_shown_for_a_minute():
    service, now = PuppetService("all in one"), [1000.0]
    panel = Panel(service, clock=lambda: now[0])
    assert "the-callers-token" not in shown(panel)
    press(panel, panel.public.show)
    assert "the-callers-token" in panel.public.shown.value
    now[0] += 59
    panel.refresh()
    assert "the-callers-token" in panel.public.shown.value
    now[0] += 1
    panel.refresh()
    assert not any("the-callers-token" in str(each.get_state()) for each in walk(panel.widget))
    press(panel, panel.public.show)
    field = panel.public.shown
    panel.close()
    assert field.value == "" and panel.public.visible_token == ""


# --- errors


def test_errors_are_sentences(panel, service):
    service.broken = Unavailable("The server is full: try again in a minute.")
    press(panel, panel.controls.start)
    assert "The server is full: try again in a minute." in panel.trouble.value and not panel.doer.notes
    service.broken = None
    press(panel, panel.controls.start)
    assert "full" not in panel.trouble.value


def test_bugs_are_named_and_their_details_logged(panel, service):
    service.broken = KeyError("nonsuch<b>")
    press(panel, panel.controls.start)
    assert "Something went wrong here: KeyError" in panel.trouble.value and "<b>" not in panel.trouble.value.replace("<b>Tesla", "")
    assert "Traceback" in panel.log.value and "panel_service.py" in panel.log.value


def test_a_service_that_cannot_be_asked(panel, service):
    kept, service.now = service.now, RuntimeError("it broke")
    panel.refresh()
    assert "Something went wrong here: RuntimeError: it broke" in panel.trouble.value
    service.now = {**kept, "state": "waiting"}
    panel.refresh()
    assert "it broke" not in panel.trouble.value and "Waiting for jobs" in panel.state.value


def test_what_is_wrong_now_is_on_top(panel, service):
    service.now["error"] = "The tunnel is gone."
    panel.refresh()
    assert "The tunnel is gone." in panel.trouble.value and panel.trouble.layout.display is None
    service.now["error"] = ""
    panel.refresh()
    assert panel.trouble.value == "" and panel.trouble.layout.display == "none"


# --- what is painted


def test_everything_is_escaped():
    service = PuppetService(
        "all in one", state=HOSTILE, error=HOSTILE, lines=[HOSTILE], counts={HOSTILE: 1}, choices={"images": [HOSTILE], "chat": [HOSTILE]},
        server={"url": HOSTILE, "token": True, "says": HOSTILE}, public={"state": HOSTILE, "url": HOSTILE, "kind": HOSTILE, "error": HOSTILE},
        gpu={"accelerator": HOSTILE, "total_bytes": 100, "free_bytes": 10, "holders": {HOSTILE: 50}, "turn": HOSTILE},
        models=[model(HOSTILE, family, state=HOSTILE, says=HOSTILE) for family in ("images", "chat")],
        jobs=[job(tool=HOSTILE, phase=HOSTILE, title=HOSTILE, words=HOSTILE)],
        recent=[ended(tool=HOSTILE, status=HOSTILE, title=HOSTILE, words=HOSTILE), ended(1, status="failed", detail=HOSTILE)])
    service.snippet = lambda: HOSTILE
    panel = Panel(service)
    service.broken = Unavailable(HOSTILE)
    press(panel, panel.controls.stop)
    assert "<script" not in shown(panel) and "<img" not in shown(panel)
    assert shown(panel).count("&lt;script&gt;") > 15
    panel.close()


def test_odd_text_can_be_sent(panel, service):
    service.now["jobs"] = [job(title="half a pair \ud83d", words="\ud83d" * 5000)]
    panel.refresh()
    assert "half a pair ?" in shown(panel)
    shown(panel).encode()


def test_the_log_is_bounded(panel, service):
    service.now["lines"] = [f"line {n} " + "x" * 5000 for n in range(1000)]
    panel.refresh()
    assert panel.log.value.count("line ") == MOST_LINES and "line 999 " in panel.log.value
    assert len(panel.log.value) < 320 * MOST_LINES
    assert log_html([]) and len(esc("x" * 10_000)) == 300


def test_jobs_are_painted(panel, service):
    service.now.update(jobs=[job(1, preview=picture(1, format="JPEG")), job(2, tool="ollamaChat", total=0, words="Because & so", tokens=1234)],
                       state="running")
    panel.refresh()
    first, second = (panel.jobs.now.used[f"job-{n}", 0] for n in (1, 2))
    assert (first.bar.value, first.picture.widget.format, first.picture.widget.layout.display) == (15, "jpeg", None)
    assert bytes(first.picture.widget.value) == service.now["jobs"][0]["preview"]
    assert "1,234 tokens" in second.head.value and "Because &amp; so" in second.words.value and second.picture.widget.layout.display == "none"
    assert 10 <= second.bar.value <= 90
    assert panel.lively


def test_recent_pictures_are_made_small_once(panel, service, monkeypatch):
    made = []
    monkeypatch.setattr(room, "thumbnail", lambda data: made.append(data) or b"small")
    service.now["recent"] = [ended(n, picture=picture(n)) for n in range(3)] + [ended(9)]
    panel.refresh()
    panel.refresh()
    service.now["recent"] = [ended(4, picture=picture(4)), *service.now["recent"]]
    panel.refresh()
    assert len(made) == 4 and len(panel.jobs.recent.widget.children) == 5
    service.now["recent"] = [ended(n) for n in range(40)]
    panel.refresh()
    assert len(panel.jobs.recent.widget.children) == 12


def test_a_thumbnail_is_small(panel, service):
    pytest.importorskip("PIL")
    service.now["recent"] = [ended(picture=picture(1, 1024))]
    panel.refresh()
    image = panel.jobs.recent.used["job-0", 0].picture.widget
    assert image.format == "jpeg" and len(image.value) < 20_000
    service.now["recent"] = [ended(picture=b"no picture at all")]
    panel.refresh()
    assert image.layout.display == "none"


def test_models_show_how_far_they_are(panel, service):
    service.now["models"] = [model("a", percent=40), model("b", percent=None), model("c", state="ready"), model("d", state="failed", says="No such.")]
    panel.refresh()
    views = {name: view for (name, _), view in panel.images.rows.used.items()}
    assert views["a"].bar.value == 40 and "4.0 GiB" in views["a"].text.value and "9.0 GiB free" in views["a"].text.value
    assert [views[name].bar.layout.display for name in "abcd"] == [None, None, "none", "none"]
    assert "No such." in views["d"].text.value and panel.lively


def test_a_job_may_come_twice(panel, service):
    service.now["recent"] = [ended(1), ended(1, status="interrupted")]
    panel.refresh()
    assert len(panel.jobs.recent.widget.children) == 2


# --- repaints


@both
def test_an_idle_repaint_sets_nothing(panel, service):
    service.now.update(models=[model(state="ready")], recent=[ended(n, picture=picture(n)) for n in range(3)], lines=["a line"],
                       jobs=[job(preview=picture())], state="running", requestsPerMonth=20_000)
    panel.refresh()
    changes = []
    for each in walk(panel.widget):
        each.observe(changes.append)
        each.layout.observe(changes.append)
    for _ in range(3):
        panel.refresh()
    assert changes == []
    service.now["jobs"] = [job(step=4, preview=service.now["jobs"][0]["preview"])]
    panel.refresh()
    assert {(type(change["owner"]).__name__, change["name"]) for change in changes} <= {("HTML", "value"), ("IntProgress", "value")}
    assert changes


def test_widgets_are_used_again(panel, service):
    def fill(n):
        service.now.update(jobs=[job(n), job(n + 1)], recent=[ended(m) for m in range(n, n + 12)], models=[model(f"m{n}")])
        panel.refresh()

    fill(0)
    fill(1)
    before = len(registered())
    for n in range(2, 50):
        fill(n)
    assert len(registered()) == before


def test_closed_panels_leave_one_sentence_and_nothing_else(service):
    service.now.update(jobs=[job(1)], recent=[ended(2)], models=[model()])
    Panel(service).close()
    before = len(registered())
    panels = [Panel(service) for _ in range(5)]
    assert [each.closed for each in panels] == [True] * 4 + [False]
    panels[-1].close()
    panels[-1].close()
    assert len(registered()) - before <= 5 * 6  # the roots with their sentence: box, text, layouts, style
    assert "newer panel" in panels[0].widget.children[0].value and len(panels[0].widget.children) == 1
    panels[0].refresh()
    assert room._OPEN == []


def test_the_thread_repaints_and_ends(service):
    panel = Panel(service).begin()
    thread = panel._thread
    assert panel.begin()._thread is thread and thread.daemon
    service.now["state"] = "waiting"
    ticks(panel)
    assert "Waiting for jobs" in panel.state.value
    newer = Panel(service)
    thread.join(30)
    assert panel.closed and not thread.is_alive() and newer._thread is None
    newer.close()


def test_a_panel_ends_with_its_service(service):
    panel = Panel(service).begin()
    service.closed = True
    panel._thread.join(30)
    assert panel.closed and "newer panel" in panel.widget.children[0].value
    other = PuppetService()
    stale = Panel(PuppetService())
    stale.service.closed = True  # the cell was run again: its service is closed, a new one is made
    Panel(other).close()
    assert stale.closed


class Colab:
    """What is needed of `google.colab.output`."""

    def __init__(self):
        self.calls = {}

    def register_callback(self, name, call):
        self.calls[name] = call


def test_in_colab_the_page_pulls(service, capsys):
    colab = Colab()
    panel = show(service, colab=colab)
    assert panel._thread is None  # what a thread changes does not arrive there
    service.now["state"] = "waiting"
    answer = colab.calls["colab_gpu.refresh"](panel.id).data
    assert answer == {"on": True, "hot": False} and "Waiting for jobs" in panel.state.value
    assert colab.calls["colab_gpu.refresh"]().data["on"]
    press(panel, panel.public.show)
    assert colab.calls["colab_gpu.refresh"](panel.id).data["hot"]  # so that the token goes when its minute is over
    newer = Panel(service, colab=colab).begin()
    assert colab.calls["colab_gpu.refresh"](panel.id).data["on"] is False
    assert colab.calls["colab_gpu.refresh"](newer.id).data["on"] is True
    newer.close()
    assert colab.calls["colab_gpu.refresh"](newer.id).data["on"] is False
    capsys.readouterr()


def test_verbs_touch_no_widget(service):
    """In Colab a thread's changes are lost, and with them the knowledge that they are to be sent."""
    panel, changed = Panel(service, colab=Colab()), []
    for each in walk(panel.widget):
        each.observe(lambda change: changed.append(threading.current_thread().name))
    for button in buttons(panel):
        press(panel, button)
    assert changed and set(changed) == {threading.current_thread().name}
    panel.close()


def test_watch_ends(service, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    now, seen = [0.0], []
    panel = Panel(service, clock=lambda: now[0])
    snapshot = service.snapshot
    service.snapshot = lambda: seen.append(now[0]) or snapshot()
    panel.watch(5)
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]
    service.now["jobs"] = [job()]
    seen.clear()
    panel.watch(2)
    assert len(seen) == 4  # twice a second while something is under way, the first time by then

    def interrupted(s):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    panel.watch()
    monkeypatch.setattr(time, "sleep", lambda s: panel.close())
    panel.watch()
    assert panel.closed


def test_show_displays_once_a_cell(service, monkeypatch):
    displayed = []
    monkeypatch.setattr(room, "display", lambda thing: displayed.append(thing))
    monkeypatch.setattr(room, "get_ipython", lambda: type("Shell", (), {"execution_count": 7})())
    panel = Panel(service, colab=Colab())
    panel._ipython_display_()
    panel._ipython_display_()
    assert [type(each).__name__ for each in displayed] == ["VBox", "Javascript"]
    assert panel.id in displayed[1].data and "PAGE" not in displayed[1].data
    panel.close()


# --- the real service


def test_a_real_service(tmp_path):
    pytest.importorskip("torch")
    from colab_gpu.client import Client
    from colab_gpu.config import Settings
    from colab_gpu.server import QueueServer
    from colab_gpu.service import Service

    server = QueueServer({"GPU_WORKER_TOKEN": SECRET, "COLAB_GPU_DATA": str(tmp_path)}).start()
    service = Service(Settings({"STACK_API_BASE": server.url, "START_OLLAMA": 0, "IMAGEN_MODEL_ID": "demo", "OLLAMA_URL": "http://127.0.0.1:9",
                                "COLAB_GPU_DATA": str(tmp_path), "WORKER_GUARD": 0}, environ={}), say=None)
    panel = Panel(service)
    try:
        assert "token yet." in shown(panel) and panel.tabs.selected_index == 2
        press(panel, panel.connection.button)
        assert "No worker" in panel.trouble.value
        panel.connection.token.widget.value = "wrong-token"
        press(panel, panel.connection.button)
        assert "refused the token" in panel.trouble.value
        panel.connection.token.widget.value = SECRET
        press(panel, panel.connection.button)
        assert f"Connected to {server.url}" in panel.trouble.value
        press(panel, panel.images.button)
        press(panel, panel.controls.start)
        assert not panel.controls.stop.disabled and "imagenGenerate" in panel.trouble.value
        drawn = Client(server.url).submit("imagenGenerate", {"prompt": HOSTILE}).wait(120)
        assert drawn.status == "completed"
        deadline = time.monotonic() + 60
        while not panel.jobs.recent.used and time.monotonic() < deadline:
            time.sleep(0.05)
            panel.refresh()
        assert "&lt;script&gt;" in shown(panel) and "<script" not in shown(panel) and "<b>" in panel.memory.value
        assert panel.jobs.recent.used[drawn.id, 0].picture.widget.format == "jpeg"
        assert SECRET not in shown(panel)
        press(panel, panel.controls.stop)
        assert "Stopped" in panel.trouble.value and panel.controls.stop.disabled
    finally:
        panel.close()
        service.close()
        server.stop()
