"""One flag per field of a pydantic model: one list of keys, types, defaults and help texts for files and flags."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = Callable[..., None]
PLAIN = {bool: bool, int: int, float: float, Path: Path}


def flags_of(model: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command ``--config`` and a flag for each field; those not typed reach it as None.

    Limits are left to the model, whose message names the value.
    """
    file = Annotated[Path | None, typer.Option(help="TOML file with these flags as keys; flags win.")]
    annotations = {"config": file, **{name: _flag(name, field) for name, field in model.model_fields.items()}}

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
        command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *more]}
        return command

    return decorate


def _flag(name: str, field: FieldInfo) -> Any:
    flag, kinds = "--" + name.replace("_", "-"), [k for k in _kinds(field.annotation) if k is not type(None)]
    plain, default = PLAIN.get(kinds[0], str), field.get_default()
    shown = "" if field.is_required() or plain is bool or default in (None, "", []) else f" [{default}]"
    help_ = (field.description or "") + shown
    if get_origin(kinds[0]) is list:
        item: Any = list[int] if get_args(kinds[0]) == (int,) else list[str]
        return Annotated[item | None, typer.Option(flag, help=help_)]
    return Annotated[plain | None, typer.Option(f"{flag}/--no-{flag[2:]}" if default is True else flag, help=help_)]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return (annotation,) if get_origin(annotation) in (list, None) else get_args(annotation)
