"""`python -m tnt_lightning.demo run=DIR`, or `model=... weights=...`: a page on this machine that shows what a network sees in an image.

The classes with their probabilities and, of a TNT, what a patch attends to (outer attention), and what the words in it attend to (inner
attention). The page asks no other machine for anything; an image that is dropped there is read into memory and its file removed.
"""

import errno
import ipaddress
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnt_lightning.cli import Parser, answered
from tnt_lightning.errors import UserError, one_line

if TYPE_CHECKING:
    from gradio import Blocks
    from torch import Tensor

    from tnt_lightning.trained import Trained

HOST, PORT = "127.0.0.1", 7860
TRIES = 100  # ports that are looked at where none is given
LARGEST = "64mb"  # of a file that is sent
TOP = 5  # classes
SAMPLES = 8
PAGES = 64  # whose images are in memory
# Of what Gradio answers, files by their path among it, the page needs this alone.
API, OPEN = "/gradio_api/", ("upload", "queue/", "heartbeat/", "cancel", "reset")
# Whatever Gradio's own files may ask for, a browser asks nobody but this server.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'none'"


def main() -> None:
    parser = Parser(prog="python -m tnt_lightning.demo", description=__doc__)
    keys = (
        "run=DIR (a run, or a checkpoint in one), or model=NAME weights=SOURCE and knobs of that model; "
        f"host={HOST} for this machine alone, or host=0.0.0.0 for everyone on the network; port={PORT}, or without it the next free one"
    )
    parser.add_argument("words", metavar="KEY=VALUE", nargs="+", help=keys)
    arguments = parser.parse_args()
    with answered():
        _demo(arguments.words)


def _demo(words: list[str]) -> None:
    if find_spec("gradio") is None:
        raise UserError("gradio, which shows the page, is missing: pip install 'tnt-lightning[demo]'")
    from rich.console import Console

    from tnt_lightning import trained  # late, as torch is

    keys, others = trained.split(words)
    if others:
        raise UserError(f"{others[0]}: not of the form KEY=VALUE; there are run=, model=, weights=, host= and port=")
    host = keys.pop("host", HOST)
    with listening(host, keys.pop("port", None)) as listener, tempfile.TemporaryDirectory(prefix="tnt-demo-") as uploads:
        # Before Gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        with Console(stderr=True).status("load the network and sample images"):
            network = trained.find(keys)
            samples = sample_images(network)
        if not is_loopback(host):
            print(f"note   host={host}: everyone on the network can reach this page, and send images to this machine", file=sys.stderr)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out the folder goes, too
        serve(page(network, samples, Path(uploads).resolve()), listener)


# ---- the server


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: str | None) -> socket.socket:
    """A socket at that port, which must be free, or at the first free one from PORT. UserError where there is none."""
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise UserError(f"port={port}: not a whole number from 1 to 65535")
    try:
        socket.getaddrinfo(host or None, None, socket.AF_INET)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"host={host}: no IPv4 address; {HOST} is for this machine alone, 0.0.0.0 for the network") from None
    for number in range(PORT, PORT + TRIES) if port is None else [int(port)]:
        try:
            return socket.create_server((host, number))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"host={host}: not an address of this machine; {HOST} is for it alone, 0.0.0.0 for the network") from None
            if port is not None:
                why = os.strerror(error.errno) if error.errno else error
                raise UserError(f"port={port}: cannot be had ({why}); choose another, or leave port= out for a free one") from None
    raise UserError(f"none of the ports {PORT} to {PORT + TRIES - 1} is free; port=N names another")


def serve(blocks: "Blocks", listener: socket.socket) -> None:
    """Until it is interrupted."""
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    from tnt_lightning.pictures import views

    host, port = listener.getsockname()
    closed: dict[str, Any] = dict(docs_url=None, redoc_url=None, openapi_url=None)
    app = FastAPI(**closed)
    app.add_middleware(Sealed)
    if is_loopback(host):  # a page elsewhere whose name leads here would otherwise be answered
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])
    gradio.mount_gradio_app(
        app, blocks, path="/", css=STYLE + views.STYLE, max_file_size=LARGEST, footer_links=[], run_history=False, show_error=True,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, app_kwargs=closed,
    )  # fmt: skip
    print(f"page   http://{HOST if host == '0.0.0.0' else host}:{port} (Ctrl-C ends it)", flush=True)
    # An open page keeps a connection, and to end that is an error by the server's log.
    uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)).run(sockets=[listener])


class Sealed:
    """ASGI: answers what the page asks for, and tells a browser that the page may ask nobody else."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if path.startswith(API) and not path.removeprefix(API).startswith(OPEN):
            scope = {**scope, "path": "/no-such-page"}

        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sealed)


# ---- the page


def sample_images(network: "Trained") -> "list[tuple[str, Tensor]]":
    """(name, uint8 pixels (C, H, W)) of some images of a run's own data; none of weights from elsewhere, or where the data is gone."""
    from tnt_lightning.figures import own_images

    if network.run is None:
        return []
    network.data.download = False
    try:
        found = own_images(network)
        places = found.spread(SAMPLES)
        return list(zip([found.called[place] for place in places], found.take(places), strict=True))
    except (UserError, OSError) as error:
        print(f"note   no sample images: {one_line(str(error))}", file=sys.stderr)
        return []


def page(network: "Trained", samples: "Sequence[tuple[str, Tensor]]", uploads: Path) -> "Blocks":
    """Of one network. An image is held in memory, until PAGES others have been opened.

    uploads: the folder where Gradio puts files, which are removed as soon as they are read
    """
    import gradio as gr
    import torch

    from tnt_lightning.data.images import BrokenImage
    from tnt_lightning.models import TNT
    from tnt_lightning.pictures import views
    from tnt_lightning.pictures.draw import words_across

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = network.model.to(device)
    is_tnt = isinstance(model, TNT)
    grid = model.grid_size if is_tnt else (1, 1)
    side = words_across(model) if is_tnt else 1

    # What the page calls. Pixels are uint8 (C, H, W), or None before there is an image; `chosen` are the values of the controls.

    def normalised(pixels: Any) -> Any:
        return network.data.batch_transform(pixels[None].to(device), torch.zeros(1), training=False)[0]

    def classes(pixels: Any) -> list[tuple[str, float]]:
        """The most probable ones: (name, probability)."""
        with torch.inference_mode():
            best = model(normalised(pixels)).float().softmax(1)[0].topk(min(TOP, network.data.num_classes))
        return [(network.named(label), share) for label, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def looked(pixels: Any, *chosen: Any) -> list[Any]:
        """Figures, of a choice."""
        if pixels is None:
            return [gr.skip()] * len(figures)
        block, outer_head, inner_head, row, column, word_row, word_column = map(int, chosen)
        choice = views.Choice(block, outer_head, inner_head, (row - 1, column - 1), (word_row - 1, word_column - 1))
        return views.of_tnt(model, normalised(pixels), pixels, choice)

    def shown(name: str, pixels: Any, *chosen: Any) -> list[Any]:
        """All that changes with an image: at first the patch to which the class token attends most is chosen."""
        best = classes(pixels)
        first = [_status(f"{name}: most probably {best[0][0]} ({100 * best[0][1]:.1f}%)"), pixels, _classes(best)]
        if not is_tnt:
            return [*first, views.image(pixels)]
        row, column = views.most_attended(model, normalised(pixels), int(chosen[0]))
        chosen = (*chosen[:3], row + 1, column + 1, *chosen[5:])
        return [*first, row + 1, column + 1, *looked(pixels, *chosen)]

    def uploaded(file: str, *chosen: Any) -> list[Any]:
        name = Path(file).name
        try:
            pixels = network.images([file])[0][0]  # type: ignore[index]
        except BrokenImage as error:
            said = _status(f"{name}: not a readable image ({error.why})", alert=True)
            # Those of a slider would make it anew, without its own preprocess.
            return [None, said, gr.skip(), gr.skip(), *(chosen[3:5] if is_tnt else ()), *[gr.skip()] * len(figures)]
        finally:
            Path(file).unlink(missing_ok=True)
        return [None, *shown(name, pixels, *chosen)]

    def sent(payload: Any) -> str:
        """The file of an upload. A request can name any file of this machine."""
        file = Path(payload.path).resolve() if payload else uploads
        if not (file.is_relative_to(uploads) and file.is_file()):
            raise gr.Error("no such file was sent")
        return str(file)

    async def as_named(file: Any, *_: Any) -> Any:
        """Of a mounted page Gradio would copy any file of this machine that a request names, or fetch an address: `sent` has the word."""
        return file

    def sampled(event: gr.EventData, *chosen: Any) -> list[Any]:
        name, pixels = samples[_place(event, (len(samples),))[0]]
        return shown(f"Sample image of {name}", pixels, *chosen)

    def first(*chosen: Any) -> list[Any]:
        return shown(f"Sample image of {samples[0][0]}", samples[0][1], *chosen)

    def patch_chosen(event: gr.EventData, pixels: Any, *chosen: Any) -> list[Any]:
        row, column = (at + 1 for at in _place(event, grid))
        return [row, column, *looked(pixels, *chosen[:3], row, column, *chosen[5:])]

    def word_chosen(event: gr.EventData, pixels: Any, *chosen: Any) -> list[Any]:
        row, column = (at + 1 for at in _place(event, (side, side)))
        return [row, column, *looked(pixels, *chosen[:5], row, column)]

    # What it consists of.

    def whole(label: str, most: int, value: int = 1) -> gr.Slider:
        slider: Any = gr.Slider(1, most, value, step=1, label=label, visible=most > 1, buttons=[], min_width=140)
        # While a number is typed its field may be empty, or hold too much: Gradio would raise, and forget what is typed next. A method of
        # the one slider, since Gradio writes a file beside the module of a subclass.
        slider.preprocess = lambda payload: min(most, max(1, round(payload or 1)))
        return slider

    def head(label: str, count: int) -> gr.Dropdown:
        choices = [(f"mean of {count}", 0), *((f"head {one}", one) for one in range(1, count + 1))]
        return gr.Dropdown(choices, value=0, label=label, visible=count > 1, filterable=False, min_width=140)

    def figure(name: str) -> gr.HTML:
        return gr.HTML(js_on_load=CHOSEN, apply_default_css=False, elem_id=name, elem_classes="figure")

    kind = escape(type(model).__name__)
    with gr.Blocks(title=f"{network.name}: what it sees", analytics_enabled=False, delete_cache=(60, 60), fill_width=True) as blocks:
        state = gr.State(None)
        gr.HTML(
            f"<h1>What a {kind} sees</h1><p>{escape(network.name)}. {escape(network.about)}{HOW if is_tnt else ''}</p>",
            elem_classes="title",
        )
        with gr.Row():
            with gr.Column(min_width=300):
                upload: Any = gr.File(label="Drop an image here, or choose a file", file_types=["image"], height=160)
                upload.preprocess = sent
                if samples:
                    chooser = gr.HTML(_samples(samples), js_on_load=CHOSEN, apply_default_css=False)
                status = gr.HTML(_status("No image yet."), apply_default_css=False)
                listed = gr.HTML(apply_default_css=False)
            with gr.Column(min_width=300):
                image = figure("image")
                figures: list[Any] = [image]
                if not is_tnt:
                    gr.HTML(f"<p>Visual words are a TNT's: a {kind} has none, so no attention is shown.</p>")
            if is_tnt:
                blocks_with_words = [one for one in model.blocks if hasattr(one, "inner")]
                with gr.Column(min_width=300):
                    block = whole("Block", len(model.blocks), len(model.blocks))
                    with gr.Row():
                        outer_head = head("Heads, outer attention", model.blocks[0].outer.attn.num_heads)
                        inner_head = head("Heads, inner attention", blocks_with_words[0].inner.attn.num_heads if blocks_with_words else 1)
                    with gr.Row():
                        row, column = whole("Patch, row", grid[0]), whole("Patch, column", grid[1])
                    with gr.Row():
                        word_row, word_column = whole("Word, row", side), whole("Word, column", side)
        if is_tnt:
            with gr.Row():
                for name in ("patch", "token", "word", "words"):
                    with gr.Column(min_width=200):
                        figures.append(figure(name))
            _, patch, token, word, words = figures
        controls: list[Any] = [block, outer_head, inner_head, row, column, word_row, word_column] if is_tnt else []
        of_an_image = [status, state, listed, *([row, column] if is_tnt else []), *figures]
        quiet: dict[str, Any] = dict(show_progress="minimal", api_visibility="private")
        upload.upload(uploaded, [upload, *controls], [upload, *of_an_image], **quiet)
        if samples:
            chooser.select(sampled, controls, of_an_image, **quiet)
            blocks.load(first, controls, of_an_image, **quiet)
        for control in controls:
            control.input(looked, [state, *controls], figures, trigger_mode="always_last", **quiet)
        if is_tnt:
            for view in (image, patch, token):
                view.select(patch_chosen, [state, *controls], [row, column, *figures], **quiet)
            for view in (word, words):
                view.select(word_chosen, [state, *controls], [word_row, word_column, *figures], **quiet)
    for component in blocks.blocks.values():
        component.async_move_resource_to_block_cache = as_named  # type: ignore[union-attr, unused-ignore]
    blocks.state_session_capacity = PAGES
    return blocks


def _place(event: Any, sizes: Sequence[int]) -> list[int]:
    """What was clicked at, as data-place has it. A page that is ours sends nothing else."""
    import gradio as gr

    with suppress(AttributeError, TypeError, ValueError):
        place = [int(part) for part in event.place.split(",")]
        if len(place) == len(sizes) and all(0 <= at < size for at, size in zip(place, sizes, strict=True)):
            return place
    raise gr.Error("no such place")


def _status(said: str, *, alert: bool = False) -> str:
    return f'<p class="said" role="{"alert" if alert else "status"}">{escape(said)}</p>'


def _classes(best: Sequence[tuple[str, float]]) -> str:
    lines = [
        f'<li><span>{escape(name)}</span><span>{100 * share:.1f}%</span><i style="width:{100 * share:.1f}%"></i></li>'
        for name, share in best
    ]
    return f'<h2>Classes, with their probabilities</h2><ol class="classes">{"".join(lines)}</ol>'


def _samples(samples: "Sequence[tuple[str, Tensor]]") -> str:
    from tnt_lightning.pictures import views

    buttons = [
        f'<button type="button" data-place="{number}" aria-label="Sample image {number + 1} of {len(samples)}, {escape(name)}" '
        f'title="{escape(name)}"><img class="{views.look(pixels)}" src="{views.png(pixels)}" alt=""></button>'
        for number, (name, pixels) in enumerate(samples)
    ]
    return f'<div class="samples" role="group" aria-label="Sample images">{"".join(buttons)}</div>'


HOW = " Click a patch or a word, or choose it by the fields. Red is much: a map goes from 0 to its own largest value."
CHOSEN = """element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-place]');
  if (chosen) trigger('select', {place: chosen.dataset.place});
})"""
STYLE = """
.title h1{font-size:1.4rem;margin:0}
.title p,.said,figcaption{overflow-wrap:anywhere}
.figure figure{margin:0 auto;max-width:34rem}
.html-container h2{font-size:1rem;font-weight:600;margin:.25rem 0 .5rem}
.figure figcaption{margin:.5rem 0;font-size:.9rem}
.said{margin:.25rem 0}
.said[role=alert]{padding:.5rem .75rem;border-left:4px solid #d33;background:#d332}
.classes{list-style:none;margin:0;padding:0}
.classes li{display:grid;grid-template-columns:1fr auto;gap:0 1rem;margin:.4rem 0}
.classes span{overflow-wrap:anywhere}
.classes i{height:.35rem;min-width:1px;border-radius:.2rem;background:#f97316;grid-column:1/-1}
.samples{display:flex;flex-wrap:wrap;gap:.4rem}
.samples button{padding:2px;border:2px solid #8886;border-radius:.3rem}
.samples img{display:block;width:3.25rem;height:3.25rem;object-fit:contain}
.crisp{image-rendering:pixelated}
:focus-visible{outline:3px solid #2f6fde!important;outline-offset:2px}
"""


if __name__ == "__main__":
    main()
