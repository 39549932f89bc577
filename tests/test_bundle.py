"""The wheel that the package makes of itself, the notebook that carries it, and the ways to get them: command and routes."""

import ast
import base64
import csv
import email
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from test_routes import CALLER, WORKER, ask, start

from colab_gpu import __version__
from colab_gpu.bundle import build_wheel, is_private, notebook, notebook_json, one_form, package_folder, read_template, safe_address
from colab_gpu.errors import InvalidSetting, Unavailable

ROOT = Path(__file__).resolve().parent.parent
NAME = f"colab_gpu-{__version__}-py3-none-any.whl"
TINY = ("tiny.whl", b"")
DIGEST = "import hashlib; from colab_gpu.bundle import build_wheel; print(hashlib.sha256(build_wheel(%s)[1]).hexdigest())"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def members(wheel):
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def text_of(cell):
    return "".join(cell["source"])


def cell_with(made, line):
    [cell] = [cell for cell in made["cells"] if cell["cell_type"] == "code" and any(found.startswith(line) for found in text_of(cell).splitlines())]
    return cell


def carried(made):
    """The wheel in a notebook, as its cell has it when it was run."""
    names = {}
    exec(text_of(cell_with(made, "WHEEL_NAME")), names)  # noqa: S102
    return names["WHEEL_NAME"], base64.b64decode(names["WHEEL_BASE64"])


def address_in(made):
    [line] = [line for line in text_of(cell_with(made, "STACK_API_BASE")).splitlines() if line.startswith('STACK_API_BASE = "')]
    return ast.literal_eval(line.partition("=")[2].partition("#@param")[0].strip())


# --- the wheel


@pytest.mark.parametrize("demo_model", [True, False])
def test_the_wheel_is_one(demo_model):
    name, wheel = build_wheel(demo_model)
    found, info = members(wheel), f"colab_gpu-{__version__}.dist-info"
    assert name == NAME and [str(part) for part in parse_wheel_filename(name)[:2]] == ["colab-gpu", __version__]
    *rows, last = csv.reader(io.StringIO(found[f"{info}/RECORD"].decode()))
    assert last == [f"{info}/RECORD", "", ""] and list(found)[-1] == f"{info}/RECORD"
    assert [row[0] for row in rows] == list(found)[:-1]
    for member, digest, size in rows:
        assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(found[member]).digest()).decode().rstrip("="), member
        assert int(size) == len(found[member])
    assert email.message_from_bytes(found[f"{info}/WHEEL"])["Tag"] == "py3-none-any"
    assert email.message_from_bytes(found[f"{info}/METADATA"])["Version"] == __version__
    assert "Apache License" in found[f"{info}/licenses/LICENSE"].decode()
    package = {member.removeprefix("colab_gpu/"): body for member, body in found.items() if member.startswith("colab_gpu/")}
    assert all(body == (package_folder() / member).read_bytes() for member, body in package.items())
    assert {"__init__.py", "cli.py", "py.typed", "service_template.ipynb"} <= set(package)
    assert any(member.startswith("demo_model/") for member in package) == demo_model
    assert not [member for member in found if "__pycache__" in member or ".." in member or member.startswith("/")]


def test_it_has_every_requirement():
    told = email.message_from_bytes(members(build_wheel(False)[1])[f"colab_gpu-{__version__}.dist-info/METADATA"])
    needs = [Requirement(need) for need in told.get_all("Requires-Dist")]
    assert {"torch", "diffusers"} <= {need.name for need in needs if need.marker and need.marker.evaluate({"extra": "images"})}
    assert [need.name for need in needs if need.marker is None] == ["requests"]
    everything = {str(need.specifier): need.name for need in needs if need.marker and need.marker.evaluate({"extra": "all"})}
    assert "pyngrok" in everything.values() and "pytest" not in everything.values()
    assert set(told.get_all("Provides-Extra")) == {"all", "chat", "dev", "images", "mcp", "notebook", "postgres", "tunnel"}


def test_the_same_files_give_the_same_bytes():
    mask = {"umask": 0o077} if os.name == "posix" else {}
    for seed, zone in (("1", "Pacific/Kiritimati"), ("2", "UTC")):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TZ": zone, "GPU_WORKER_TOKEN": "sesame"}
        done = subprocess.run([sys.executable, "-c", DIGEST % "False"], env=env, text=True, capture_output=True, cwd="/", **mask)
        assert done.stdout.strip() == sha256(build_wheel(False)[1]), done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Makes virtual environments without colab-gpu. Other people's packages are there, by a path that brings no editable installation along."""

    def make():
        folder = tmp_path_factory.mktemp("venv")
        venv.create(folder, symlinks=os.name != "nt")
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))
        assert run(python, "-c", "from importlib.util import find_spec; print(find_spec('colab_gpu'), find_spec('requests') is None)") == "None False", "colab-gpu is installed here other than editable"
        return python

    return make


@pytest.fixture(scope="module")
def fresh(bare, tmp_path_factory):
    """Makes virtual environments with one wheel in them."""

    def make(wheel, name):
        python, folder = bare(), tmp_path_factory.mktemp("wheel")
        (folder / name).write_bytes(wheel)
        run(python, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps", "--ignore-installed", "--quiet", folder / name)
        return python

    return make


def run(*command, **env):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("GPU_", "STACK_", "COLAB_GPU_", "IMAGEN_", "PIP_"))}
    done = subprocess.run([str(part) for part in command], env={**clean, **env}, text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(fresh):
    return fresh(*reversed(build_wheel()))


def test_it_installs_and_runs(installed):
    assert run(installed.parent / "colab-gpu", "--version") == f"colab-gpu {__version__}"
    where = run(installed, "-c", "import colab_gpu.cli; print(colab_gpu.cli.__file__)")
    assert Path(where).is_relative_to(installed.parent.parent)
    assert run(installed, "-c", "from colab_gpu.models import find_model; print(find_model('demo').location)").startswith(str(installed.parent.parent))


def test_an_installed_package_makes_the_wheel_it_came_from(installed):
    for small in (False, True):
        assert run(installed, "-c", DIGEST % small) == sha256(build_wheel(small)[1])
    made = json.loads(run(installed.parent / "colab-gpu", "notebook", "-o", "-", "--no-demo-model"))
    assert carried(made) == build_wheel(False)


@pytest.fixture(scope="module")
def from_setuptools(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "colab_gpu", folder / "colab_gpu", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder / "out", folder)
    [path] = (folder / "out").iterdir()
    return path


def test_setuptools_packs_the_same(from_setuptools):
    theirs, ours = members(from_setuptools.read_bytes()), members(build_wheel()[1])
    inside = {name: body for name, body in theirs.items() if name.startswith("colab_gpu/")}
    assert from_setuptools.name == NAME and inside == {name: body for name, body in ours.items() if name.startswith("colab_gpu/")}
    info = f"colab_gpu-{__version__}.dist-info"
    told, tells = (email.message_from_bytes(found[f"{info}/METADATA"]) for found in (theirs, ours))
    assert {one_form(need) for need in told.get_all("Requires-Dist")} == set(tells.get_all("Requires-Dist"))
    for field in ("Name", "Version", "Summary", "Author", "License", "Keywords", "Requires-Python"):
        assert told[field] == tells[field], field
    assert set(told.get_all("Provides-Extra")) == set(tells.get_all("Provides-Extra"))
    assert theirs[f"{info}/entry_points.txt"].decode().split() == ours[f"{info}/entry_points.txt"].decode().split()


def test_what_setuptools_installed_makes_our_wheel(fresh, from_setuptools):
    assert run(fresh(from_setuptools.read_bytes(), from_setuptools.name), "-c", DIGEST % "True") == sha256(build_wheel()[1])


# --- the notebook


def test_the_notebook_is_one_and_carries_the_package():
    made = notebook("https://gpu.example.org/")
    nbformat.validate(nbformat.from_dict(made))
    assert carried(made) == build_wheel() and address_in(made) == "https://gpu.example.org"
    assert all(len(line) <= 10_000 for cell in made["cells"] for line in text_of(cell).splitlines())
    changed = [i for i, (a, b) in enumerate(zip(made["cells"], read_template()["cells"], strict=True)) if a != b]
    assert len(changed) == 2 and {**made, "cells": []} == {**read_template(), "cells": []}
    package = cell_with(made, "WHEEL_NAME")
    assert package["metadata"]["cellView"] == "form" and package["metadata"]["jupyter"] == {"source_hidden": True}
    assert text_of(package).startswith("#@title · The package") and made["cells"].index(package) + 1 == next(
        i for i, cell in enumerate(made["cells"]) if "Install" in text_of(cell) and text_of(cell).startswith("#@title"))


def test_without_an_address_only_the_package_is_new():
    made = notebook(wheel=TINY)
    assert address_in(made) == "" and carried(made) == TINY
    assert sum(a != b for a, b in zip(made["cells"], read_template()["cells"], strict=True)) == 1


def test_every_code_cell_is_python():
    for cell in notebook("https://gpu.example.org", build_wheel(False))["cells"]:
        if cell["cell_type"] == "code":
            compile(text_of(cell), cell["id"], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


BREAKING = st.sampled_from(['"', "'", '"""', "\\", "\\\"", "\n", "\r", "\u2028", "\x00", "#", "{", "}", "%", "@", ";", " ", "é", "\U0001f600", "\ud800", "/", ":", "?", "["])
HOSTS = st.sampled_from(["gpu.example.org", "127.0.0.1:3001", "[::1]:3001", "", "me:sesame@gpu.example.org"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)
@given(scheme=st.sampled_from(["http://", "https://", "HTTPS://", "ftp://", ""]), host=HOSTS,
       rest=st.lists(st.one_of(BREAKING, st.text(max_size=5)), max_size=6).map("".join))
def test_an_address_stays_a_string(scheme, host, rest):
    try:
        made = notebook(scheme + host + rest, TINY)
    except InvalidSetting as e:
        assert "sesame" not in e.message and "\n" not in e.message
        return
    json.dumps(made).encode()
    tree, plain = (ast.parse(text_of(cell_with(found, "STACK_API_BASE"))) for found in (made, read_template()))
    told = [ast.dump(line) for line in plain.body if not (isinstance(line, ast.Assign) and line.targets[0].id == "STACK_API_BASE")]
    [given_] = [line.value for line in tree.body if ast.dump(line) not in told]
    assert isinstance(given_, ast.Constant) and given_.value == (scheme + host + rest).strip().rstrip("/")
    assert "sesame" not in given_.value


@pytest.mark.parametrize("address", ["http://gpu.example.org/a%20b", "https://xn--bcher-kva.example/x", "http://[fe80::1]:8000", "https://a.b/~c/(d)"])
def test_addresses_that_are_fine(address):
    assert safe_address(f" {address}/ ") == address


def test_who_can_be_reached_from_afar():
    far = ["https://name.ngrok-free.app", "http://8.8.8.8:3001", "https://[2606:4700::1]"]
    here = ["http://localhost:3001", "http://LOCALHOST.", "http://127.9.9.9", "http://[::1]", "http://[::ffff:127.0.0.1]", "http://0.0.0.0:3001", "http://10.1.2.3",
            "http://172.16.0.1", "http://192.168.1.2", "http://169.254.1.1", "http://100.64.0.1", "http://[fd00::1]", "http://gpu", "http://pc.local"]
    assert not any(map(is_private, far)) and all(map(is_private, here))


@pytest.mark.parametrize("name", ["service_template.ipynb", None])
def test_a_package_that_lacks_something_says_so(name, tmp_path, monkeypatch):
    copy = tmp_path / "colab_gpu"
    shutil.copytree(ROOT / "colab_gpu", copy, ignore=shutil.ignore_patterns("__pycache__", "demo_model", *([name] if name else [])))
    monkeypatch.setattr("colab_gpu.bundle.package_folder", lambda: copy)
    monkeypatch.setattr("colab_gpu.bundle._built", __import__("colab_gpu.bundle").bundle._built.__wrapped__)
    with pytest.raises(Unavailable) as e:
        notebook("", TINY) if name else build_wheel()
    assert "install it" in e.value.message and not e.value.retryable and str(tmp_path) not in e.value.message


# --- the command


@pytest.fixture
def command(tmp_path):
    def call(*argv, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "STACK_", "COLAB_GPU_"))}
        done = subprocess.run([sys.executable, "-m", "colab_gpu", "notebook", *map(str, argv)], cwd=tmp_path, capture_output=True,
                              env={**clean, "PYTHONPATH": str(ROOT), **env})
        out, err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in err, err
        return done.returncode, out, err

    return call


def test_command_writes_a_file(command, tmp_path):
    code, out, err = command(STACK_WORKER_TOKEN="sesame-w", GPU_CLIENT_TOKEN="sesame-c", NGROK_AUTHTOKEN="sesame-n", HF_TOKEN="sesame-h")
    body = (tmp_path / "colab-gpu.ipynb").read_bytes()
    assert (code, err) == (0, "") and len(out.splitlines()) == 1
    assert out.startswith("colab-gpu.ipynb: ") and " MB, without a server's address" in out
    assert carried(json.loads(body)) == build_wheel() and address_in(json.loads(body)) == ""
    for found in (body, *members(carried(json.loads(body))[1]).values(), out.encode()):
        assert b"sesame-" not in found


@pytest.mark.parametrize(("argv", "env", "address"), [
    ([], {"STACK_API_BASE": "https://one.example.org"}, "https://one.example.org"),
    (["--server", "https://two.example.org/"], {"STACK_API_BASE": "https://one.example.org"}, "https://two.example.org"),
    ([], {}, ""),
])
def test_command_knows_the_address(command, tmp_path, argv, env, address):
    code, out, err = command("-o", "n.ipynb", "--no-demo-model", *argv, **env)
    assert code == 0 and err == "" and (address or "without") in out
    assert address_in(json.loads((tmp_path / "n.ipynb").read_bytes())) == address
    code, out, _ = command("-o", "n.ipynb", "--no-demo-model", "--json", *argv, **env)
    assert json.loads(out) == {"file": "n.ipynb", "bytes": (tmp_path / "n.ipynb").stat().st_size, "server": address}


def test_command_to_standard_output(command, tmp_path):
    code, out, err = command("-o", "-", "--no-demo-model", "--server", "http://192.168.1.7:3001")
    assert code == 0 and out.encode() == notebook_json("http://192.168.1.7:3001", build_wheel(False)) and not list(tmp_path.iterdir())
    assert "Colab cannot reach http://192.168.1.7:3001" in err and "--tunnel" in err and len(err.splitlines()) == 2


@pytest.mark.parametrize(("argv", "words"), [
    (["-o", "no/such/folder.ipynb"], "--output"), (["-o", "."], "--output"), (["--server", "nonsense"], "STACK_API_BASE"),
    (["--server", "https://example.org/'x\""], "address has a character"), (["--server", "https://example.org\nx"], "address has a character"),
])
def test_command_refuses(command, tmp_path, argv, words):
    code, out, err = command(*argv)
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["https://me:sesame@example.org", "https://me:sesame@exa mple.org:x", "me:sesame@example.org", "https://me:se/same@example.org"])
def test_command_repeats_no_password(command, address):
    code, out, err = command("--server", address)
    assert code == 2 and out == "" and "STACK_API_BASE" in err and "same" not in err


# --- the routes


def fetch(server, path, token=None, **headers):
    """A route's bytes, whatever they are."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=60)
    head = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request("GET", path, headers={**head, **{k.replace("_", "-"): v for k, v in headers.items()}})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


@pytest.fixture
def server(tmp_path):
    with start(tmp_path, GPU_CLIENT_TOKEN=CALLER) as made:
        yield made


def test_doors(server, tmp_path):
    for path in ("/notebook?demo_model=0", "/dist/", f"/dist/{NAME}?demo_model=0"):
        assert [ask(server, "GET", path, token=token)[1]["error"] for token in (None, "wrong")] == ["client_token_required", "invalid_client_token"]
        assert ask(server, "GET", path, token=CALLER, X_Forwarded_For="8.8.8.8", Host="name.ngrok-free.app")[0] == 200
    assert ask(server, "GET", "/notebook", token=WORKER)[1]["error"] == "invalid_client_token"
    assert {ask(server, "GET", path, token=WORKER, X_Forwarded_For="8.8.8.8")[0] for path in ("/dist/", f"/dist/{NAME}?demo_model=0")} == {200}
    with start(tmp_path / "b", GPU_WORKER_TOKEN="") as server:  # neither token: this machine only, and no blank token opens
        assert {ask(server, "GET", path)[0] for path in ("/dist/", "/notebook?demo_model=0")} == {200}
        for path in ("/dist/", "/notebook"):
            assert ask(server, "GET", path, X_Forwarded_For="8.8.8.8", Authorization="Bearer ")[1]["error"] == "client_token_required"
    with start(tmp_path / "c", GPU_CLIENT_AUTH="none") as server:
        assert {ask(server, "GET", path, Host="anything")[0] for path in ("/dist/", "/notebook?demo_model=0")} == {200}


def test_the_notebook_knows_the_address_it_was_asked_under(server):
    def address(**headers):
        status, body, _ = fetch(server, "/notebook?demo_model=0", CALLER, **headers)
        assert status == 200 and CALLER.encode() not in body and WORKER.encode() not in body
        return address_in(json.loads(body))

    assert address() == server.url
    assert address(Host="name.ngrok-free.app", X_Forwarded_Proto="https") == "https://name.ngrok-free.app"
    assert address(Host="gpu.example.org:8443", X_Forwarded_Proto="https, http") == "https://gpu.example.org:8443"
    assert address(Host="gpu.example.org", X_Forwarded_Proto="javascript") == "http://gpu.example.org"
    for host in ("me:sesame@example.org", 'a"+evil+"', "a b", "a/../b?c", "a'b", "a\\b"):
        status, body, _ = fetch(server, "/notebook?demo_model=0", CALLER, Host=host)
        assert status == 400 or (status == 200 and address_in(json.loads(body)) in ("", "http://a/../b")), host


def test_the_notebook_as_a_download(server):
    status, body, headers = fetch(server, "/notebook", CALLER)
    assert status == 200 and headers["Content-Type"] == "application/x-ipynb+json" and carried(json.loads(body)) == build_wheel()
    assert headers["Content-Disposition"] == 'attachment; filename="colab-gpu.ipynb"' and headers["X-Content-Type-Options"] == "nosniff"
    assert body == notebook_json(server.url)
    assert fetch(server, "/notebook", CALLER, If_None_Match=headers["ETag"])[:2] == (304, b"")
    assert fetch(server, "/notebook", CALLER, If_None_Match=headers["ETag"], Host="else.example.org")[0] == 200
    status, small, other = fetch(server, "/notebook?demo_model=0", CALLER)
    assert carried(json.loads(small)) == build_wheel(False) and other["ETag"] != headers["ETag"]
    assert {json.loads(fetch(server, f"/notebook?demo_model={n}", CALLER)[1])["field"] for n in ("2", "yes", "-1")} == {"demo_model"}


def test_the_wheel_as_a_download(server):
    status, told, _ = fetch(server, "/dist/", WORKER, Accept="application/json")
    assert json.loads(told) == {"files": [{"filename": NAME, "url": f"/dist/{NAME}", "size": len(build_wheel()[1]), "hashes": {"sha256": sha256(build_wheel()[1])}}]}
    status, body, headers = fetch(server, json.loads(told)["files"][0]["url"], WORKER)
    assert (status, body) == (200, build_wheel()[1]) and headers["Content-Disposition"] == f'attachment; filename="{NAME}"'
    assert fetch(server, f"/dist/{NAME}", WORKER, If_None_Match=headers["ETag"])[0] == 304
    assert fetch(server, f"/dist/{NAME}?demo_model=0", WORKER)[1] == build_wheel(False)[1]
    assert [fetch(server, f"/dist/{name}", WORKER)[0] for name in ("x.whl", "..%2f..%2fsetup.py", "%00")] == [404, 404, 400]


def test_pip_finds_the_wheel(tmp_path):
    with start(tmp_path) as server:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--find-links", f"{server.url}/dist/",
            "-d", tmp_path / "got", f"colab-gpu=={__version__}", no_proxy="*")
    assert (tmp_path / "got" / NAME).read_bytes() == build_wheel()[1]


def test_others_are_served_while_a_wheel_is_built(server, monkeypatch):
    asked, go, answers = threading.Event(), threading.Event(), []

    def slowly(demo_model=True):
        asked.set()
        assert go.wait(60)
        return TINY

    monkeypatch.setattr("colab_gpu.server.build_wheel", slowly)
    waiting = threading.Thread(target=lambda: answers.append(ask(server, "GET", "/notebook", token=CALLER)), daemon=True)
    waiting.start()
    assert asked.wait(60)
    assert ask(server, "GET", "/healthz")[0] == 200
    go.set()
    waiting.join(60)
    assert [answer[0] for answer in answers] == [200]


def test_the_routes_are_described(server):
    paths = ask(server, "GET", "/openapi.json")[1]["paths"]
    assert paths["/notebook"]["get"]["security"] == [{"callerToken": []}]
    for path in ("/dist/", "/dist/{name}"):
        assert paths[path]["get"]["security"] == [{"callerToken": []}, {"workerToken": []}]


# --- all of it


@pytest.mark.slow
def test_a_notebook_from_a_server_works_with_nothing_but_itself(server, bare, tmp_path):
    for name in ("diffusers", "ipywidgets", "nbclient"):
        pytest.importorskip(name)
    from stages import Notebook

    nowhere = "http://127.0.0.1:9"
    env = {"STACK_WORKER_TOKEN": WORKER, "GPU_CLIENT_TOKEN": CALLER, "COLAB_GPU_DATA": tmp_path / "worker", "START_OLLAMA": 0, "OLLAMA_URL": nowhere,
           "PIP_NO_INDEX": 1, "HF_HUB_OFFLINE": 1, "HF_HOME": tmp_path / "hub", "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": "127.0.0.1"}
    made = json.loads(fetch(server, "/notebook", CALLER)[1])
    with Notebook(made, bare(), tmp_path, env, {"STOP_NOW": True}, timeout_s=600) as notebook:
        *first, stop = range(len(notebook.cells))
        shown = notebook.run_all(first)
        job = submit_picture(server)  # one job more, from outside
        shown.append(notebook.run(stop))
    assert any(f"colab-gpu {__version__}, from this notebook" in str(cell) for cell in shown), shown
    [picture] = [picture for cell in shown for picture in cell.pictures]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert job["status"] == "completed" and job["workerId"] == "colab-worker" and job["result"]["model"] == "demo"
    assert WORKER not in json.dumps(notebook.content) and CALLER not in json.dumps(notebook.content)


def submit_picture(server):
    """A job as a caller submits it, when it has ended."""
    payload = {"prompt": "a red boat", "num_inference_steps": 5, "seed": 1}
    job = ask(server, "POST", "/gpu-jobs", {"tool": "imagenGenerate", "payload": payload}, CALLER)[1]["job"]
    while job["status"] in ("queued", "leased"):
        job = ask(server, "GET", f"/gpu-jobs/{job['id']}?wait=25&inline=0", token=CALLER)[1]["job"]
    return job
