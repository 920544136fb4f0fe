"""Bodies of requests that bring more than this service knows: what asks for nothing is taken, left out and counted.

Null asks for nothing, in a field that nobody knows too.
"""

import json
from functools import cache
from typing import Annotated, Any, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from latentwire.service.schemas.inference import Strict

OTHER = "other"


class Only:
    """Takes a field with values that ask for nothing, any where none are given: clients send every field they know."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = list(neutral)

    def _check(self, value: Any) -> Any:
        if self._neutral and value not in self._neutral:
            expected = " or ".join(map(json.dumps, self._neutral))
            raise PydanticCustomError(
                "not_done", "this service does not do that; expected {expected}", {"expected": expected}
            )
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": self._neutral} if self._neutral else {"description": "Taken, and not used."}


Unused = Annotated[Any, Only()]


class Lenient(Strict):
    """A body in which null is as good as absent, also in a field that is not known."""

    _nulls: int = PrivateAttr(0)

    @model_validator(mode="wrap")
    @classmethod
    def _drop_nulls(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return handler(body)
        kept = {name: value for name, value in body.items() if value is not None}
        made = handler(kept)
        made._nulls = len((body.keys() - kept.keys()) - cls.model_fields.keys())
        return made

    @classmethod
    @cache
    def _idle(cls) -> frozenset[str]:
        fields = cls.model_fields.items()
        return frozenset(name for name, field in fields if any(isinstance(one, Only) for one in field.metadata))

    @property
    def ignored_fields(self) -> list[str]:
        """Fields that were taken and not used, ``OTHER`` for each that is not known."""
        return [*(self._idle() & self.model_fields_set), *[OTHER] * self._nulls]


def below(place: str, *parts: Lenient) -> list[str]:
    """What parts of a body leave out, with their place before it."""
    return [f"{place}.{name}" for part in parts for name in part.ignored_fields]
