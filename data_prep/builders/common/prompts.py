"""Instructions from templates: `Remove the {tag}`, filled with what is known of a row."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Annotated

import typer

from data_prep.errors import InputError
from data_prep.rows.tables import BadRow

PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", help="Instruction for every row. Its {fields} are filled in from the row."),
]
TemplatesOption = Annotated[
    Path | None,
    typer.Option("--templates", help="Text file with one instruction per line. Each row draws one at random."),
]


@dataclass(frozen=True)
class Templates:
    """One or more instructions with fields. Which one a row gets depends on the seed and on its id alone."""

    texts: tuple[str, ...]
    seed: int

    def fields(self) -> set[str]:
        """The names in braces."""
        return {name for text in self.texts for _, name in _parse(text) if name is not None}

    def check_fields(self, known: Collection[str]) -> None:
        """Raises `InputError` for a field that no row can fill."""
        for name in sorted(self.fields()):
            if name not in known:
                shown = ", ".join(f"{{{each}}}" for each in known)
                raise InputError(f"unknown field {{{name}}} in a prompt template: known here are {shown}")

    def fill(self, id: str, values: Mapping[str, str]) -> str:
        """The instruction of a row.

        Args:
            id: id of the row.
            values: field -> text.

        Raises:
            BadRow: the row does not know a field of its template.
        """
        text = random.Random(f"{self.seed}/{id}/prompt").choice(self.texts)
        return "".join(literal + _value(name, values, text) for literal, name in _parse(text))


def make_templates(prompt: str | None, file: Path | None, seed: int) -> Templates | None:
    """What `--prompt` or `--templates` says; None if neither is given.

    Raises:
        InputError: both are given, or they cannot be read, are empty, or not templates.
    """
    if prompt is not None and file is not None:
        raise InputError("--prompt and --templates both give the instruction: use only one of them")
    if prompt is not None:
        return _checked([prompt], "--prompt", seed)
    return read_templates(file, seed) if file is not None else None


def read_templates(file: Path, seed: int) -> Templates:
    """A text file with one template a line.

    Raises:
        InputError: it cannot be read, is empty, or a line is not a template.
    """
    try:
        text = read_text(file)
    except BadRow as error:
        raise InputError(f"{file} {error}") from None
    return _checked([line.strip() for line in text.split("\n") if line.strip()], str(file), seed)


def read_text(path: Path) -> str:
    """The text of a small UTF-8 file, without a byte-order mark and outer space.

    Raises:
        BadRow: it cannot be read, or is not UTF-8. The message continues a sentence that begins with the path.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadRow(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadRow("is not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise BadRow("holds zero bytes: save it as UTF-8 text")
    return text.strip()


def _checked(texts: list[str], where: str, seed: int) -> Templates:
    if not any(text.strip() for text in texts):
        raise InputError(f"{where} is empty: it must hold an instruction")
    for text in texts:
        try:
            list(_parse(text))
        except ValueError as error:
            raise InputError(
                f"{text!r} of {where} is not a template ({error}): fields are {{name}}, a brace itself is {{{{ or }}}}"
            ) from None
    return Templates(tuple(texts), seed)


def _parse(text: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the name of the field that follows it, None at the end."""
    parts = []
    for literal, name, spec, conversion in Formatter().parse(text):
        if spec or conversion or name == "":
            raise ValueError("a field is a plain name in braces")
        parts.append((literal, name))
    return parts


def _value(name: str | None, values: Mapping[str, str], text: str) -> str:
    if name is None:
        return ""
    if not (value := values.get(name, "").strip()):
        raise BadRow(f"the prompt template {text!r} needs {{{name}}}, which this row does not have")
    return value
