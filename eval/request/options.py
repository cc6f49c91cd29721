"""Options that the commands of `eval/` share: each is declared once, as a field of a dataclass or as a knob of an edit."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from eval.request.knobs import Declared
from eval.request.request import KNOBS
from eval.request.sizes import SizeLimits

if TYPE_CHECKING:
    from eval.request.placement import Placement

DtypeName = Literal["bfloat16", "float16", "float32"]
OffloadName = Literal["none", "model", "layer"]
WeightsName = Literal["full", "int8", "fp8", "nf4"]


def with_options(*records: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose options are the fields of dataclasses, each declared there once: `Annotated[type, typer.Option(…)]`.

    The function is given one of each, then the options that are its own; who calls it names options.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            bound = signature.bind(**given)
            bound.apply_defaults()
            values = bound.arguments
            made = [record(**{each.name: values.pop(each.name) for each in fields(record)}) for record in records]
            function(*made, **values)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[len(records) :]
        parameters = [*(each for record in records for each in _parameters(record)), *own]
        signature = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters])
        command.__signature__, command.__doc__ = signature, function.__doc__  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(record: type) -> list[inspect.Parameter]:
    hints, empty = get_type_hints(record, include_extras=True), inspect.Parameter.empty
    kind = inspect.Parameter.KEYWORD_ONLY
    defaults = {each.name: empty if each.default is MISSING else each.default for each in fields(record)}
    return [inspect.Parameter(name, kind, default=value, annotation=hints[name]) for name, value in defaults.items()]


def given_options(*records: Any) -> list[str]:
    """Options of dataclasses for `with_options` that were given another value than their default, as typed: `--push`."""
    found = []
    for record in records:
        hints = get_type_hints(type(record), include_extras=True)
        for each in fields(record):
            if getattr(record, each.name) not in (each.default, []):
                declared = get_args(hints[each.name])[1]
                names = (declared.default, *(declared.param_decls or ()))  # typer takes the first name for a default
                usual = f"--{each.name.replace('_', '-')}"
                found.append(next((name for name in names if isinstance(name, str)), usual))
    return found


def option(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for typer, whose message then begins with the option's name."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


def knob_options(*names: str) -> type:
    """A dataclass for `with_options` whose options are knobs of an edit: those of these fields, by default all."""
    chosen = [each for each in KNOBS if each.field in names or not names]
    return make_dataclass("KnobOptions", [(each.name, _annotation(each), field(default=None)) for each in chosen])


def given_knobs(options: Any) -> dict[str, Any]:
    """The fields of `EditRequest` that a command line sets."""
    found = {each: getattr(options, each.name, None) for each in KNOBS}
    return {each.field: tuple(value) if each.several else value for each, value in found.items() if value is not None}


def _annotation(knob: Declared) -> Any:
    declared, kind = knob.knob, knob.type
    words: dict[str, Any] = {"help": declared.help or None, "show_default": declared.default or True}
    if declared.parse:
        words |= {"parser": option(knob.parse), "metavar": declared.metavar}
    return Annotated[(list[kind] if knob.several else kind) | None, typer.Option(**words)]


@dataclass(frozen=True)
class ModelOptions:
    """The options for the base model and the sizes of its images."""

    model: Annotated[
        str | None,
        typer.Option(help="Base model: a folder, also one below $MODEL_DIR, or a hub id.", show_default="required"),
    ] = None
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Largest area of an image, in pixels.", show_default="as the adapter was trained"),
    ] = None
    vision_pixels: Annotated[
        int | None,
        typer.Option(
            help="Area at which the text encoder sees the images, in pixels.", show_default="as the adapter was trained"
        ),
    ] = None
    depth_model: Annotated[
        str | None,
        typer.Option(help="Model for depth maps: a folder or a hub id.", show_default="$DEPTH_MODEL, or V2-Small"),
    ] = None

    @property
    def limits(self) -> SizeLimits:
        """The sizes.

        Raises:
            InputError: one is too small or too large.
        """
        return SizeLimits(self.max_pixels, self.vision_pixels)


@dataclass(frozen=True)
class PlaceOptions:
    """The options for a `Placement`; None for the default."""

    device: Annotated[
        str | None, typer.Option(help="Device that the models run on.", show_default="cuda if there is one")
    ] = None
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Data type of the model weights.", show_default="bfloat16 on cuda, float32 on cpu"),
    ] = None
    encoder_device: Annotated[
        str | None, typer.Option(help="Device that the text encoder and the VAE run on.", show_default="as --device")
    ] = None
    offload: Annotated[
        OffloadName,
        typer.Option(help="Keep in CPU memory the parts not in use (model), or also the transformer's blocks (layer)."),
    ] = "none"
    weights: Annotated[
        WeightsName | None,
        typer.Option(help="Format of the transformer's weights: as --dtype (full), or quantised.", show_default="full"),
    ] = None
    gguf: Annotated[Path | None, typer.Option(help="GGUF file to read the transformer from.", show_default="no")] = None
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Encode and decode in tiles, which needs less memory for large images.")
    ] = False
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the transformer's block. The first image takes longer, later steps are faster."
        ),
    ] = False

    def place(self, device: str | None = None) -> "Placement":
        """The placement, on this device or another.

        Raises:
            InputError: this machine cannot serve it.
        """
        from eval.request.placement import make_placement  # torch, after everything else has been checked

        words = {each.name: getattr(self, each.name) for each in fields(self)}
        return make_placement(**words | {"device": device or self.device, "weights": self.weights or "full"})
