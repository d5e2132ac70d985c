"""The demo's page as a browser shows it, by mouse and by keyboard, on a desktop and on a phone; what its server answers, and what not."""

import contextlib
import functools
import http.client
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tnt_lightning import load_run, runs, trained
from tnt_lightning.data import Digits
from tnt_lightning.predict import predict

from . import layouts
from .browser import CHROMIUM, Browser
from .conftest import train
from .processes import Started

SHORT = ("trainer=debug", "recipe.warmup_epochs=0")
Place = tuple[int, int]
UPLOAD = "button[aria-label='Click to upload or drop files']"
NAMES = ["<b>cat</b>", "${1+1}{{2}}"]  # as text they are harmless


@pytest.fixture(autouse=True)
def _has_gradio():
    pytest.importorskip("gradio", reason="of the extra demo; uv run --extra demo pytest has it")


class Served:
    """A demo that runs, with an address."""

    def __init__(self, place: Path, *words: str):
        place.mkdir()
        self.place = place
        self.command = Started(
            ["-m", "tnt_lightning.demo", *words], cwd=place, out=place / "out", err=place / "err", TMPDIR=str(place), COLUMNS="200"
        )

    @property
    def url(self) -> str:
        out = self.command.out
        self.command.until(lambda: out.read_text().endswith("\n"))
        return out.read_text().split()[1]

    def answer(self, path: str, *, host: str | None = None, body: object = None) -> tuple[int, str]:
        where = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(where, timeout=30)
        headers = {"Host": host or where, "Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    @property
    def kept(self) -> list[Path]:
        """Files that were sent, and are still there; Gradio leaves an empty one beside each."""
        return [file for file in self.place.glob("tnt-demo-*/**/*") if file.is_file() and file.stat().st_size]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def digits(place) -> Path:
    train(place / "digits", *SHORT)
    return place / "digits"


@pytest.fixture(scope="module")
def photos(place) -> Path:
    """A run of a network that has no words, whose classes have odd names."""
    layouts.folder(place / "data")
    train(
        place / "photos", "data=folder", f"data.root={place / 'data'}", "recipe=digits", "model=deit_ti", "data.in_chans=3",
        "image_size=32", "data.batch_size=4", "data.num_workers=0", *SHORT,
    )  # fmt: skip
    (place / "photos" / runs.CLASSES).write_text(json.dumps(NAMES))
    return place / "photos"


@pytest.fixture(scope="module")
def both(place, digits, photos) -> Iterator[tuple[Served, Served]]:
    """Started at the same time, which on two cores takes that of one."""
    served = [Served(place / "of_digits", f"run={digits}"), Served(place / "of_photos", f"run={photos}", "host=0.0.0.0")]
    yield served[0], served[1]
    for one in served:
        one.command.kill()


@pytest.fixture(scope="module")
def words(both) -> Served:
    """The demo of a TNT."""
    return both[0]


@pytest.fixture(scope="module")
def plain(both) -> Served:
    """That of another network."""
    return both[1]


@pytest.fixture(scope="module")
def chromium(place) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(place / "profile")
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, both) -> Iterator[Browser]:
    """As nobody has used it; the pages may have asked no other host for anything, and have had no error."""
    chromium.asked.clear()
    chromium.said.clear()
    yield chromium
    urls = [served.url.replace("0.0.0.0", "127.0.0.1") for served in both]
    assert chromium.asked and not [url for url in chromium.asked if not url.startswith((*urls, "data:", "blob:"))]
    assert not chromium.said


def opened(browser: Browser, served: Served, **screen) -> Browser:
    browser.open(served.url, **screen)
    browser.until("document.querySelectorAll('.view').length")
    return browser


@functools.cache
def bundled() -> Any:
    """The bundled test images, of which the page has eight as samples."""
    data = Digits(num_classes=10, in_chans=1, image_size=8)
    data.setup()
    return data.parts.test


def sample(number: int) -> Image.Image:
    return bundled()[number][0]


def labels(count: int) -> list[int]:
    """Of so many at equal distances, of 359."""
    return [bundled().labels[round(i * 358 / (count - 1))] for i in range(count)]


CAPTION = "document.querySelector('#{} figcaption')?.innerText ?? ''"
SAID = "document.querySelector('.said').innerText"
CLASSES = "Array.from(document.querySelectorAll('.classes li'), one => [one.children[0].innerText, one.children[1].innerText])"
CONTROLS = "Array.from(document.querySelectorAll('input[type=number]'), one => one.value).join()"
FOCUS = """(() => {
  const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
  return [one.tagName, style.outlineStyle != 'none' && parseFloat(style.outlineWidth) >= 2,
          box.left >= 0 && box.right <= innerWidth && box.top < innerHeight && box.bottom > 0 && box.height > 0];
})()"""
OUTSIDE = """Array.from(document.querySelectorAll('h1, h2, p, label, figcaption, li, button, input, .view')).filter(one => {
  const box = one.getBoundingClientRect(), cut = one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX != 'visible';
  return box.width && (box.right > innerWidth + 1 || box.left < -1 || (cut && one.tagName != 'INPUT'));
}).map(one => one.outerHTML.slice(0, 200))"""


def explained(run: Path, image: Image.Image, block: int, patch: Place, word: Place, *, outer_head: int = 0) -> dict[str, str]:
    """What `explain` says, worked out here: the digits have 2 x 2 patches of 2 x 2 words. Places are from 0; a head from 1, 0 the mean."""
    with torch.no_grad():
        _, seen = load_run(run).explain(inputs(image), blocks=[block])
    outer = seen.outer[block][0, outer_head - 1] if outer_head else seen.outer[block][0].mean(0)
    of_patch, inner = outer[1 + patch[0] * 2 + patch[1]], seen.inner[block].mean(1)[patch[0] * 2 + patch[1]]

    def most(row: torch.Tensor) -> str:
        order = row.argsort(descending=True)[:3].tolist()
        return ", ".join(f"{at // 2 + 1},{at % 2 + 1} ({100 * row[at].item():.1f}%)" for at in order)

    this, that = f"patch {patch[0] + 1},{patch[1] + 1}", f"word {word[0] + 1},{word[1] + 1}"
    return {
        "image": f"{this} is chosen",
        "patch": f"{this} attends most to {most(of_patch[1:])}; to the class token with {100 * of_patch[0].item():.1f}%",
        "token": f"the class token attends most to {most(outer[0, 1:])}; to itself with {100 * outer[0, 0].item():.1f}%",
        "word": f"{that} of {this} attends most to {most(inner[word[0] * 2 + word[1]])}",
    }


def inputs(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32))[None, None] / 255


def attended(run: Path, image: Image.Image) -> Place:
    """The patch to which the class token of the last block attends most."""
    with torch.no_grad():
        outer = load_run(run).explain(inputs(image))[1].outer[3]
    return divmod(int(outer[0].mean(0)[0, 1:].argmax()), 2)


def shows(browser: Browser, wanted: dict[str, str]) -> None:
    for name, said in wanted.items():
        browser.until(CAPTION.format(name), lambda caption, said=said: said in caption, said)


def lists(browser: Browser, run: Path, file: Path) -> None:
    """The classes, as `predict` has them; the last digit of a percentage may be rounded otherwise."""
    [seen] = predict(trained.of_a_run(run), [str(file)])
    listed = browser.js(CLASSES)
    assert [name for name, _ in listed] == [name for _, name, _ in seen.top]
    shares = [float(percent.removesuffix("%")) for _, percent in listed]
    assert shares == pytest.approx([100 * share for *_, share in seen.top], abs=0.051)


def test_by_mouse_a_click_chooses_a_patch_or_a_word_and_images_are_dropped(browser, words, digits, tmp_path):
    opened(browser, words)
    image = sample(0)
    image.save(tmp_path / "first.png")
    lists(browser, digits, tmp_path / "first.png")  # a sample image is there at once
    shows(browser, explained(digits, image, 3, attended(digits, image), (0, 0)))
    for view, patch in (("image", (0, 1)), ("patch", (1, 0)), ("token", (1, 1))):
        browser.click(f"#{view} [data-place='{patch[0]},{patch[1]}']")
        shows(browser, explained(digits, image, 3, patch, (0, 0)))
    for view, word in (("word", (1, 0)), ("words", (0, 1))):
        browser.click(f"#{view} [data-place='{word[0]},{word[1]}']")
        shows(browser, explained(digits, image, 3, (1, 1), word))
    assert browser.js(CONTROLS) == "3,2,2,1,2", "block, patch, word: the fields follow"

    browser.click(".samples button:last-child")
    image = sample(358)
    shows(browser, explained(digits, image, 3, attended(digits, image), (0, 1)))

    image = sample(200)
    image.resize((40, 40), Image.Resampling.NEAREST).save(tmp_path / "other.png")
    browser.drop(UPLOAD, tmp_path / "other.png")
    browser.until(SAID, lambda said: said.startswith("other.png: most probably "))
    lists(browser, digits, tmp_path / "other.png")

    (tmp_path / "broken.png").write_bytes((tmp_path / "other.png").read_bytes()[:60])
    browser.drop(UPLOAD, tmp_path / "broken.png")
    browser.until(SAID, lambda said: said.startswith("broken.png: not a readable image (") and "Traceback" not in said)
    assert browser.js("document.querySelector('.said').getAttribute('role')") == "alert"
    browser.drop(UPLOAD, tmp_path / "first.png")
    browser.until(SAID, lambda said: said.startswith("first.png: most probably "))
    assert not words.kept, "what is sent is not kept"


def test_by_keyboard_on_a_phone_everything_is_reached_and_does_what_it_says(browser, words, digits, tmp_path):
    opened(browser, words, width=390, height=844, dark=True)
    assert browser.js("getComputedStyle(document.querySelector('.said')).color") == "rgb(244, 244, 245)"
    stops = []
    for _ in range(60):
        browser.press("Tab")
        tag, outlined, on_screen = browser.js(FOCUS)
        if tag == "BODY":
            break
        assert outlined and on_screen, (stops, tag)
        stops.append(browser.name())
    fields = ["Block", "Patch, row", "Patch, column", "Word, row", "Word, column"]
    assert sorted(stops) == sorted([
        ("button", "Click to upload or drop files"),
        *(("button", f"Sample image {number} of 8, class {label}") for number, label in enumerate(labels(8), start=1)),
        *(("combobox", f"Heads, {which} attention") for which in ("outer", "inner")),
        *((role, f"{how} for {name}") for name in fields for role, how in (("spinbutton", "number input"), ("slider", "range slider"))),
    ])  # fmt: skip

    def reach(name: str) -> None:
        for _ in range(len(stops) + 1):
            if browser.name()[1] == name:
                return
            browser.press("Tab")
        raise AssertionError(name)

    image = sample(round(358 / 7))
    reach("Sample image 2 of 8, class 2")
    browser.press("Enter")
    browser.until(SAID, lambda said: said.startswith("Sample image of class 2: "))
    chosen = {"block": 3, "patch": list(attended(digits, image)), "word": [0, 0]}
    shows(browser, explained(digits, image, **chosen))
    reach("number input for Block")
    browser.press("Backspace", "7", "Backspace", "1")
    chosen["block"] = 1
    shows(browser, explained(digits, image, **chosen))
    reach("range slider for Block")
    browser.press("ArrowRight")
    chosen["block"] = 2
    shows(browser, explained(digits, image, **chosen))
    reach("Heads, outer attention")
    browser.press("ArrowDown", "ArrowDown", "Enter")
    head = browser.until(CAPTION.format("patch"), lambda caption: "head " in caption and "mean" not in caption)
    head = int(head.split("head ")[1][0])
    shows(browser, explained(digits, image, **chosen, outer_head=head))
    for name, place, at in (
        ("Patch, row", "patch", 0),
        ("Patch, column", "patch", 1),
        ("Word, row", "word", 0),
        ("Word, column", "word", 1),
    ):
        reach(f"range slider for {name}")
        browser.press("ArrowLeft" if chosen[place][at] else "ArrowRight")
        chosen[place][at] = 1 - chosen[place][at]
        shows(browser, explained(digits, image, **chosen, outer_head=head))

    image.save(tmp_path / "own.png")
    browser.chosen_file(tmp_path / "own.png", lambda: (reach("Click to upload or drop files"), browser.press("Enter")))
    browser.until(SAID, lambda said: said.startswith("own.png: most probably "))


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_or_scrolls_sideways(browser, words, plain, width):
    for served in (words, plain):
        opened(browser, served, width=width, height=844)
        assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert browser.js(OUTSIDE) == []
    widths = browser.js("Array.from(document.querySelectorAll('.view'), one => one.getBoundingClientRect().width)")
    assert all(one > 200 for one in widths)


def test_of_a_network_without_words_there_are_classes_alone_and_a_photo_is_turned(browser, plain, photos, tmp_path):
    opened(browser, plain)
    photo = layouts.photo(size=(64, 40))
    photo.getexif()[0x0112] = 6
    photo.save(tmp_path / "a <i>b.jpg", exif=photo.getexif())
    browser.drop(UPLOAD, tmp_path / "a <i>b.jpg")
    browser.until(SAID, lambda said: "b.jpg: most probably " in said)
    lists(browser, photos, tmp_path / "a <i>b.jpg")
    assert sorted(name for name, _ in browser.js(CLASSES)) == sorted(NAMES), "names are text, whatever they hold"
    said = browser.js("document.body.innerText")
    assert "Visual words are a TNT's: a VisionTransformer has none" in said and "32 x 32 pixels" in said
    assert browser.js("document.querySelectorAll('.view').length") == 1 and "attends" not in said
    assert "note   host=0.0.0.0: everyone on the network can reach this page" in plain.command.err.read_text()
    assert plain.url.startswith("http://127.0.0.1:"), "an address that a browser takes"


# ---- the server


def test_what_is_not_needed_is_not_answered(words, tmp_path):
    secret = words.place / "secret.png"
    sample(0).save(secret)
    assert words.answer("/")[0] == 200
    for path in (
        f"file={secret}",
        "file=/etc/passwd",
        f"file={words.url}",
        "proxy=https://example.org",
        "info",
        "openapi.json",
        "call/looked",
    ):
        assert words.answer(f"/gradio_api/{path}")[0] == 404, path
    assert words.answer("/docs")[0] == words.answer("/openapi.json")[0] == 404
    assert words.answer("/", host="example.org")[0] == 400, "a name elsewhere that leads here"

    config = json.loads(words.answer("/config")[1])
    assert not any(one["api_name"] for one in config["dependencies"] if one.get("api_visibility") != "private")
    [upload] = [one for one in config["dependencies"] if any(event == "upload" for _, event in one["targets"])]
    elsewhere = f"{words.url}/static/img/logo_nosize.svg"
    for path in (str(secret), "/etc/passwd", elsewhere):
        for more in ({}, {"is_stream": True}, {"url": elsewhere}):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
            for inputs, said in (
                ([file, 3, 0, 0, 1, 1, 1, 1], "no such file was sent"),
                ([None, file, 0, 0, 1, 1, 1, 1], '"success":false'),
            ):
                body = {"data": inputs, "fn_index": upload["id"], "session_hash": "abc"}
                assert words.answer("/gradio_api/queue/join", body=body)[0] == 200
                answer = words.answer("/gradio_api/queue/data?session_hash=abc")[1]
                assert '"success":false' in answer and said in answer, answer
    assert secret.exists() and not words.kept


def test_a_users_mistake_is_one_line_and_exit_code_2(digits, tmp_path, monkeypatch, called):
    monkeypatch.chdir(tmp_path)
    run = f"run={digits}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            ((run, f"port={port}"), f"port={port}: cannot be had (Address already in use); choose another, or leave port= out"),
            ((run, "port=0"), "port=0: not a whole number from 1 to 65535"),
            ((run, "port=web"), "port=web: not a whole number from 1 to 65535"),
            ((run, f"port={'9' * 5000}"), "not a whole number from 1 to 65535"),
            ((run, "host=no-such-host.invalid"), "host=no-such-host.invalid: no IPv4 address; 127.0.0.1 is for this machine alone"),
            ((run, "host=::1"), "host=::1: no IPv4 address"),
            ((run, "host=192.0.2.1"), "host=192.0.2.1: not an address of this machine; 127.0.0.1 is for it alone"),
            ((run, "share"), "share: not of the form KEY=VALUE; there are run=, model=, weights=, host= and port="),
            ((run, "share=true"), "share=: a run has its own"),
            (("run=nothing",), "no such run directory"),
            (("host=127.0.0.1",), "no network is named; give run=DIR"),
        ):
            code, out, err = called("demo", *words)
            assert code == 2 and not out and len(err) == 1 and err[0].startswith("error: ") and message in err[0], (words, err)
    monkeypatch.setattr("tnt_lightning.demo.find_spec", lambda name: None)
    code, _, err = called("demo", run)
    assert code == 2 and err == ["error: gradio, which shows the page, is missing: pip install 'tnt-lightning[demo]'"]


def test_two_demos_have_a_port_each_and_an_interrupt_ends_one_quietly(words, plain):
    assert words.url != plain.url
    plain.command.process.send_signal(signal.SIGINT)
    assert plain.command.ends() == 130
    out, err = plain.command.out.read_text(), plain.command.err.read_text()
    assert len(out.splitlines()) == 1 and len(err.splitlines()) == 1, (out, err)
    words.command.process.send_signal(signal.SIGTERM)
    assert words.command.ends() == 143
    assert not [*plain.place.glob("tnt-demo-*"), *words.place.glob("tnt-demo-*")], "no file of theirs is left"
