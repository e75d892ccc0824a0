"""scripts/demo.py: the answers to a picture, and the requests that its server refuses."""

import base64
import http.client
import json
import socket
import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
import torch
import yaml
from helpers.browser import chromium
from helpers.configs import compose
from helpers.exports import digits_facts, digits_run
from helpers.servers import running
from PIL import Image

from rld_lightning.data.decode import BadImageError
from rld_lightning.errors import UserError
from rld_lightning.losses import RLDLoss
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.finished import read_run
from rld_lightning.tasks.demo import answers as demo_task
from rld_lightning.tasks.demo import web_server as demo_server
from rld_lightning.tasks.demo.answers import Demo, shown_rows
from rld_lightning.tasks.demo.web_server import HEADERS, MOST_BYTES, TYPES, DemoServer, serve
from rld_lightning.tasks.teacher.recorded import teacher_of


def set_teacher(folder, **values):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["teacher"].update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a run on digits with a teacher whose classes are in another order, both networks, and the page."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    student = digits_run(folder)
    torch.manual_seed(1)
    teacher = create_model("resnet14", 10).eval()
    facts = digits_facts("resnet14")
    facts["class_names"] = facts["class_names"][::-1]
    save_weights(teacher, folder.parent / "teacher.safetensors", facts)
    set_teacher(folder, name="resnet14", weights=str(folder.parent / "teacher.safetensors"))
    return folder, student, teacher, Demo(read_run(folder))


def picture(kind="PNG", size=(13, 9), **options):
    values = torch.arange(size[0] * size[1] * 3).mul(37).remainder(256).to(torch.uint8)
    image = Image.fromarray(values.reshape(size[1], size[0], 3).numpy())
    image.save(file := BytesIO(), kind, **options)
    return file.getvalue()


# Answers to a picture


def test_refined_teacher_is_that_of_rld(place):
    _, student, teacher, page = place
    content = picture()
    found = page.ask(content, 3)
    pixels = page.student.transform(Image.open(BytesIO(content)))[None]
    with torch.no_grad():
        s, t = student(pixels)[0], teacher(pixels)[0].flip(0)  # by name
    loss = page.loss
    assert found["networks"]["student"]["class"] == str(int(s.argmax()))
    assert found["networks"]["teacher"]["class"] == str(int(t.argmax()))
    assert found["networks"]["teacher"]["probability"] == pytest.approx(t.softmax(0).max().item(), abs=1e-5)
    assert all(found["networks"][role]["milliseconds"] > 0 for role in ("teacher", "student"))
    refined = loss.refined(t[None], torch.tensor([3])).div(loss.temperature).softmax(-1)[0].nan_to_num()
    for row in found["rows"]:
        index = int(row["class"])
        assert row["masked"] == bool(t[index] >= t[3])
        assert row["true"] == (index == 3)
        assert row["refined"] == pytest.approx(refined[index].item(), abs=1e-5)
        assert row["teacher"] == pytest.approx((t / loss.temperature).softmax(0)[index].item(), abs=1e-5)
    assert found["masked"] == int((t >= t[3]).sum())
    for side in ("teacher", "student"):
        assert sum(row[side] for row in found["rows"]) + found["others"][side] == pytest.approx(1, abs=1e-5)
    assert found["terms"] == pytest.approx(
        {**{k: float(v) for k, v in RLDLoss(warmup_epochs=1)(s[None], t[None], torch.tensor([3])).items()},
         "kd": found["terms"]["kd"]}, abs=1e-4,
    )  # fmt: skip


def test_rows_are_the_best_of_both_and_another_label_changes_the_mask(place):
    page = place[3]
    content = picture()
    first, best, worst = page.ask(content), *(page.ask(content, label) for label in (0, 9))
    assert first["networks"]["student"]["class"] == page.student.classes[first["label"]]
    for found in (first, best, worst):
        probs = [row["student"] for row in found["rows"]]
        assert probs == sorted(probs, reverse=True)
        assert 5 <= len(probs) <= 10
        assert found["others"]["count"] == 10 - len(probs)
        assert found["networks"] == first["networks"]  # the networks are not asked again
    assert [row["masked"] for row in best["rows"]] != [row["masked"] for row in worst["rows"]]
    with pytest.raises(ValueError, match="no class 10"):
        page.ask(content, 10)
    logits = torch.arange(20.0)
    sample = type("", (), {"student_logits": logits, "teacher_logits": -logits, "label": 10})
    assert shown_rows(sample) == [19, 18, 17, 16, 15, 10, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_of_any_shape_are_read(place, kind):
    assert place[3].ask(picture(kind, (90, 2)))["seen"].startswith("data:image/png;base64,")


def test_other_files_are_refused_before_decoding(place, monkeypatch):
    page = place[3]
    vast = bytearray(picture())
    vast[16:24] = (8000).to_bytes(4) * 2  # the header's width and height
    monkeypatch.setattr(demo_task, "decode_image", lambda *_, **__: pytest.fail("decoded"))
    for content, reason in (
        (picture("GIF"), "GIF"),
        (picture("BMP"), "BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"no", "identify"),
        (bytes(vast), "more than 50,000,000"),
    ):
        with pytest.raises(BadImageError, match=reason):
            page.ask(content)


def test_few_pictures_are_cached(place):
    page = place[3]
    for side in range(8, 20):
        page.ask(picture(size=(side, 8)))
    assert len(page._remembered) == 8


def test_run_without_a_suitable_teacher_is_refused_in_a_sentence(place, tmp_path):
    folder, _, _, page = place
    file = str(folder.parent / "teacher.safetensors")
    digits_run(tmp_path)
    broken = create_model("resnet14", 10)
    torch.nn.init.constant_(broken.fc.bias, torch.nan)
    save_weights(broken, tmp_path / "nan.safetensors", digits_facts("resnet14"))
    for values, reason in (
        (
            {"name": "resnet14", "weights": str(tmp_path / "nan.safetensors")},
            "teacher resnet14 has logits that are",
        ),
        ({"weights": "gone.pt"}, "not at gone.pt"),
        ({"weights": [file, file]}, "made of several"),
        ({"name": "torchscript", "weights": file}, "a program"),
        ({"name": "resnet14", "image_size": 10**9}, "image_size=1000000000"),
        ({"image_size": None, "class_map": "/etc/passwd"}, "not read"),
        ({"class_map": None, "name": "my_package.teachers:build"}, "an external network"),
    ):
        set_teacher(tmp_path, **({"weights": file} | values))
        with pytest.raises((ValueError, OSError), match=reason):
            Demo(read_run(tmp_path))
    set_teacher(tmp_path, name="resnet14", weights="gone.pt")
    assert teacher_of(read_run(tmp_path), file).weights == file
    for option in ("device=cuda",) if not torch.cuda.is_available() else ():
        with pytest.raises(UserError, match="not there"):
            demo_task.demo(compose(f"run={folder}", option, name="demo", resolve=False))
    assert page.facts()["names"] == {"student": "resnet8", "teacher": "resnet14"}


# The server


@pytest.fixture(scope="module")
def server(place):
    page = place[3]
    with running(DemoServer(page.facts(), page.ask, 0)) as server:
        yield server


def request(server, method="POST", path="/ask", body=None, **headers):
    """Returns status, headers and body; a header of None is omitted."""
    port = server.server_address[1]
    own = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "image/png"}
    own["Content-Length"] = str(len(body or b""))
    own |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for name, value in own.items():
        for one in [value] if isinstance(value, str) else value or []:
            connection.putheader(name, one)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_page_is_complete_with_its_security_headers(server):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, headers, content = request(server, "GET", path)
        assert (status, headers.get_content_type()) == (200, kind)
        assert all(headers[name] == value for name, value in HEADERS.items())
        assert b"http://" not in content  # nothing of elsewhere
        assert b"https://" not in content
        assert b"innerHTML" not in content
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    facts = json.loads(request(server, "GET", "/facts")[2])
    assert facts["most_bytes"] == MOST_BYTES
    assert facts["types"] == list(TYPES)
    assert server.server_address[0] == "127.0.0.1"


def test_picture_is_answered(server, place):
    status, headers, content = request(server, path="/ask?label=4", body=picture())
    assert (status, headers.get_content_type(), headers["X-Content-Type-Options"]) == (
        200,
        "application/json",
        "nosniff",
    )
    assert json.loads(content) == place[3].ask(picture(), 4)
    port = 1234  # of the other end of a tunnel
    assert request(server, body=picture(), Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


@pytest.mark.parametrize("path", ["/../conf/fit.yaml", "/page.html", "//etc/passwd", "/%2e%2e/x", "/ask", "/page.css/"])
def test_other_paths_do_not_exist(server, path):
    assert request(server, "GET", path)[0] == 404


HOSTS = ["evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "localhost:80:80", "", None]


@pytest.mark.parametrize(
    ("expected", "changed"),
    [
        *((421, {"Host": host}) for host in [*HOSTS, ["127.0.0.1", "evil.example"]]),
        *((403, {"Origin": origin}) for origin in ["http://evil.example", "null", "http://localhost:1", None]),
        *((415, {"Content_Type": kind}) for kind in ["text/plain", "image/svg+xml", "image/png; x=1", None]),
        *((411, {"Content_Length": length}) for length in ["-1", "+9", "\u0661".encode().decode("latin1"), "x", None]),
        (411, {"Content_Length": ["9", "10"]}),
        (411, {"Transfer_Encoding": "chunked"}),
        *((413, {"Content_Length": str(length)}) for length in [0, MOST_BYTES + 1, 10**11]),
        *((404, {"path": path}) for path in ["/", "/ask?label=-1", "/ask?label=1&x", "/ask?label=9999999", "/ask/"]),
        (400, {"path": "/ask?label=10"}),
        (422, {"body": b"no"}),
        (501, {"method": "OPTIONS"}),
        (501, {"method": "PUT"}),
    ],
)
def test_invalid_requests_are_refused(server, expected, changed):
    body = b"" if {"Content_Length", "Transfer_Encoding"} & set(changed) else picture()
    status, headers, content = request(server, **({"body": body} | changed))
    assert status == expected
    assert all(headers[name] == value for name, value in HEADERS.items())
    assert b"Traceback" not in content


def test_error_of_a_network_is_printed_and_the_server_continues(capsys):
    def fail(content, label):
        raise RuntimeError("out of \x1b[31mpaint")

    with running(DemoServer({}, fail, 0)) as server:
        status, _, content = request(server, body=picture())
        assert (status, json.loads(content)["error"]) == (500, "That failed; the terminal says why.")
        assert request(server, "GET", "/")[0] == 200
    assert "RuntimeError: out of" in capsys.readouterr().out


def test_connections_are_limited_and_a_port_is_used_once(capsys):
    with running(DemoServer({}, lambda *_: {}, 0)) as server:
        silent = [socket.create_connection(server.server_address) for _ in range(40)]
        with pytest.raises((ConnectionError, http.client.BadStatusLine)):
            request(server, "GET", "/")
        for connection in silent:
            connection.close()
        with pytest.raises(UserError, match=f"port={server.server_address[1]} cannot be had"):
            serve({}, lambda *_: {}, server.server_address[1])


TAB = "\ue004"


@pytest.mark.parametrize("said", ["GET / HTTP/1.1\r\n", "POST /ask HTTP/1.1\r\n{}Content-Length: 99999\r\n\r\n"])
def test_slow_requests_are_ended(monkeypatch, said):
    monkeypatch.setattr(demo_server, "_MOST_SECONDS", 0.2)
    with running(DemoServer({}, lambda content, label: {}, 0)) as server:
        host = f"127.0.0.1:{server.server_address[1]}"
        rules = f"Host: {host}\r\nOrigin: http://{host}\r\nContent-Type: image/png\r\n"
        with socket.create_connection(server.server_address, timeout=5) as connection:
            connection.sendall(said.format(rules).encode())
            end = time.monotonic() + 5
            with suppress(OSError):  # it is closed
                while time.monotonic() < end:
                    connection.sendall(b"x")
                    time.sleep(0.02)
            assert time.monotonic() < end


@pytest.mark.slow
def test_page_works_in_a_real_browser(server, place, tmp_path):
    page = place[3]
    (tmp_path / "picture.png").write_bytes(picture())
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path / "moving.gif").write_bytes(picture("GIF"))
    with chromium(tmp_path / "profile") as browser:
        browser.open(server.address)
        browser.wait("return document.querySelectorAll('#label option').length == 10")
        browser.type("#file", tmp_path / "picture.png")
        browser.wait("return !document.getElementById('result').hidden")
        said = page.ask(picture())

        def names():
            return browser.run("return [...document.querySelectorAll('#rows .name')].map(e => e.firstChild.data)")

        assert names()[: len(said["rows"])] == [row["class"] for row in said["rows"]]
        assert browser.run("return document.getElementById('label').value") == str(said["label"])
        assert browser.run("return document.getElementById('picture').naturalWidth") == 13
        assert browser.wait("return document.getElementById('seen').naturalWidth") == 8

        # Another label, by the keyboard alone.
        other = max(set(range(10)) - {said["label"]}, key=lambda label: page.ask(picture(), label)["masked"])
        browser.run("document.getElementById('file').focus()")
        browser.press(TAB, str(other))
        asked = page.ask(picture(), other)
        browser.wait(f"return document.getElementById('status').textContent.startsWith('{asked['masked']} ')")
        masked = "return [...document.querySelectorAll('#rows .row')].map(e => e.classList.contains('masked'))"
        assert browser.run(masked)[: len(asked["rows"])] == [row["masked"] for row in asked["rows"]]

        # Phone, dark: everything fits across.
        for width, scheme in ((360, "dark"), (1200, "light")):
            browser.resize(width)
            browser.prefer(scheme)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            ground = browser.run("return getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        assert browser.log() == []

        # Another picture, dropped.
        drop = """const files = new DataTransfer(), drawn = document.createElement('canvas');
            drawn.toBlob(blob => { files.items.add(new File([blob], 'drawn.webp', {type: blob.type}));
            dispatchEvent(new DragEvent('drop', {dataTransfer: files, cancelable: true})); }, 'image/webp')"""
        browser.run(drop)
        browser.wait("return document.getElementById('picture').naturalWidth == 300")
        browser.wait("return document.getElementById('status').textContent.includes('masked')")

        # What is no picture is said in a sentence, and nothing of the last one stays.
        browser.type("#file", tmp_path / "note.png")
        browser.wait("return document.getElementById('status').className == 'bad'")
        assert "cannot be read" in browser.run("return document.getElementById('status').textContent")
        assert browser.run("return document.getElementById('result').hidden")
        browser.type("#file", tmp_path / "moving.gif")
        browser.wait("return document.getElementById('status').textContent.startsWith('JPEG')")


@pytest.mark.slow
def test_class_names_are_text_in_a_real_browser(place, tmp_path):
    page = place[3]
    named = page.facts() | {"classes": ["<img src=x onerror=document.title='bad'>", *"bcdefghij"]}

    def ask(content, label):
        found = page.ask(content, label)
        found["rows"][0]["class"] = found["networks"]["student"]["class"] = named["classes"][0]
        return found | {"words": named["classes"][:1]}

    (tmp_path / "picture.png").write_bytes(picture())
    with running(DemoServer(named, ask, 0)) as server, chromium(tmp_path / "profile") as browser:
        browser.open(server.address)
        browser.wait("return document.querySelectorAll('#label option').length == 10")
        browser.type("#file", tmp_path / "picture.png")
        browser.wait("return !document.getElementById('result').hidden")
        assert browser.run("return document.querySelectorAll('img').length") == 2
        assert "<img" in browser.run("return document.getElementById('words').textContent")
        assert browser.run("return document.title") == "How RLD refines the teacher for a picture"


POST = """
const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
const options = {method: 'POST', mode: arguments[2], body: new Blob([bytes], {type: 'image/png'})};
return fetch(arguments[0], options).then(answer => answer.status, () => 'failed');
"""


@pytest.mark.slow
def test_other_pages_cannot_send_requests_in_a_real_browser(tmp_path):
    asked = []
    content = base64.b64encode(picture()).decode()
    (tmp_path / "index.html").write_text("<title>other</title>")
    other = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    with (
        running(DemoServer({}, lambda *question: asked.append(question) or {}, 0)) as server,
        running(other),
        chromium(tmp_path / "profile", "--host-resolver-rules=MAP rebound.example 127.0.0.1") as browser,
    ):
        port = server.server_address[1]
        browser.open(server.address)
        assert browser.run(POST, f"{server.address}ask", content, "cors") == 200
        assert len(asked) == 1
        # A page of another program on this machine, and one of nowhere.
        for address in (f"http://127.0.0.1:{other.server_address[1]}/", "data:text/html,<title>other</title>"):
            browser.open(address)
            assert browser.run("return document.title") == "other"
            for mode in ("cors", "no-cors"):
                assert browser.run(POST, f"{server.address}ask", content, mode) in ("failed", 0)
        # A stranger's name that points here.
        browser.open(f"http://rebound.example:{port}/")
        assert "for this machine alone" in browser.run("return document.body.textContent")
        assert browser.run(POST, f"http://rebound.example:{port}/ask", content, "cors") in ("failed", 421)
        assert len(asked) == 1
