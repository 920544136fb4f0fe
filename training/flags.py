"""One flag per field of a pydantic model: one list of keys, types, defaults and help texts for files and flags.

typer makes an option of each parameter in a command's signature, so a command gets a parameter for each field.
"""

from collections.abc import Callable, Collection
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape

Command = Callable[..., None]
CONFIG = Annotated[Path | None, typer.Option(help="TOML file with these flags as keys; flags win.")]
CONVERTED = (bool, int, float, Path)  # by typer; everything else reaches the model as it was typed


def flags_of(model: type[BaseModel], without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command, in place of its ``**flags``, ``--config`` and a flag for each field of a model but ``without``.

    Flags that are not typed reach it as None. Limits are left to the model, whose message names the value.

    Raises:
        TypeError: A field does not say in which panel of ``--help`` its flag stands.
    """
    fields = {name: field for name, field in model.model_fields.items() if name not in without}
    options = {"config": CONFIG, **{name: _option(name, field) for name, field in fields.items()}}
    flags = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in options.items()]

    def decorate(command: Command) -> Command:
        *own, _ = signature(command).parameters.values()  # the last one is **flags
        command.__signature__ = Signature([*own, *flags])  # type: ignore[attr-defined]  # what signature() reads
        return command

    return decorate


def _option(name: str, field: FieldInfo) -> Any:
    """The annotation of a parameter from which typer makes the option of a field."""
    words = name.replace("_", "-")
    names = f"--{words}/--no-{words}" if field.default is True else f"--{words}"
    return Annotated[_kind(field) | None, typer.Option(names, help=_help(field), rich_help_panel=_panel(name, field))]


def _kind(field: FieldInfo) -> Any:
    """What typer makes of the words that are typed."""
    members = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
    kind = next(member for member in members if member is not NoneType)
    if get_origin(kind) is list:
        return list[int] if get_args(kind) == (int,) else list[str]
    return kind if kind in CONVERTED else str


def _help(field: FieldInfo) -> str:
    """The description, and what holds where the flag is not typed. Brackets would be markup to typer."""
    text, default = field.description or "", field.get_default()
    if default is True:
        text += " [on]"
    elif default not in (None, "", []) and default is not False and not field.is_required():
        text += f" [{default}]"
    return escape(text.replace(" [", " [default: "))


def _panel(name: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "panel" not in extra:
        raise TypeError(f"the field {name!r} does not say in which panel of --help it stands")
    return str(extra["panel"])
