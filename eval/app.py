"""The web page: edit images, compare adapters blind, look at runs.

    python eval/app.py --model models/tiny

Then open http://127.0.0.1:7999 in a browser on this machine. Ctrl-C ends it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import time
from typing import Annotated

import typer

from data_prep.cli import run_command
from data_prep.files import make_folder
from eval.page.limits import Limits, api_key_for, check_exposure, check_port, parse_auth
from eval.request.knobs import AdapterUse
from eval.request.lookup import find_model
from eval.request.options import ModelOptions, PlaceOptions, with_options
from eval.request.provenance import model_name

PORT = 7999


@with_options(ModelOptions, PlaceOptions)
def app(
    model: ModelOptions,
    place: PlaceOptions,
    *,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder with the runs and adapters to choose from.", show_default="$CHECKPOINT_DIR, or runs"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter that is selected when the page opens, by the name that the page shows.", show_default="none"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the page's results. The page serves files from this folder only.")
    ] = Path("outputs/page"),
    examples: Annotated[
        str | None, typer.Option(help="Dataset file to draw the images and prompts of comparisons from.")
    ] = None,
    examples_root: Annotated[
        str | None,
        typer.Option(help="Folder that the paths in --examples are relative to.", show_default="the dataset's own"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than this machine's own needs --auth.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = PORT,
    share: Annotated[
        bool, typer.Option("--share", help="Make the page public through Gradio's tunnel. Needs --auth.")
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            help="Login as USER:PASSWORD. The environment variable APP_AUTH keeps it out of the process list.",
            envvar="APP_AUTH",
        ),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(help="Largest uploaded file, in megabytes.")] = Limits.max_upload_mb,
    max_image_pixels: Annotated[
        int, typer.Option(help="Largest area that an upload keeps, in pixels. Larger images are scaled down.")
    ] = Limits.max_image_pixels,
    max_count: Annotated[int, typer.Option(help="Largest number of images per edit.")] = Limits.max_count,
    api: Annotated[
        bool, typer.Option("--api", help="Also serve OpenAI's POST /v1/images/edits, beside the page.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that the API asks for. The environment variable APP_API_KEY keeps it out of the process list.",
            envvar="APP_API_KEY",
            show_default="a random key, printed at the start",
        ),
    ] = None,
    preload: Annotated[
        bool, typer.Option("--preload", help="Load the model and the selected adapter before the page opens.")
    ] = False,
) -> None:
    """Starts a web page that edits images, compares two adapters blind and shows how training went.

    Without --auth, only this machine can open it. Edits wait in a queue and run one at a time.
    """
    limits = Limits(max_upload_mb, max_image_pixels, max_count)
    login = parse_auth(auth)
    key = api_key_for(api_key) if api else None
    check_exposure(host, share, login)
    check_port(host, port)
    make_folder(out)
    from eval.bases.auto import open_model
    from eval.page.api.routes import Api
    from eval.page.server import Address, make_studio, read_examples, serve  # seconds of imports, after the checks
    from train.record.lookup import checkpoint_folder

    placement = place.place()
    editor, name = open_model(model, placement), model_name(find_model(model.model or ""))
    title = f"{editor.abilities.base} ({name}) on {placement.device}, {placement.numbers['dtype']}"
    studio = make_studio(editor, title, out.resolve(), (runs or checkpoint_folder()).resolve(), limits, adapter)
    studio.examples = read_examples(examples, examples_root) if examples else []
    if preload:
        start = time.perf_counter()
        editor.preload([AdapterUse(each.path) for each in studio.adapters() if each.name == adapter])
        print(f"loaded {name} in {time.perf_counter() - start:.1f} s", flush=True)
    places = [place for place in [Path(find_model(model.model or ""))] if place.is_dir()]
    if key and not api_key:
        print(f"The API's key, for as long as this runs: {key}", flush=True)
    serve(studio, Address(host, port, share, login), Api(studio, key, name, places=places) if key else None)


if __name__ == "__main__":
    run_command(app)
