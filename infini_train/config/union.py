"""Fields that hold one of several dataclasses, chosen by `kind` among those of a table that one can read and extend."""

from collections.abc import Mapping
from typing import Annotated, Any, Union

import pydantic


def one_of(table: Mapping[str, type], without: str | None = None) -> pydantic.GetPydanticSchema:
    """The annotation of such a field; the table is read when a validator is built. `without`: a kind that won't do."""

    def choose(source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        members = tuple(member for kind, member in table.items() if kind != without)
        union: Any = Union[members]  # noqa: UP007 (of a table, not of names)
        return handler(Annotated[union, pydantic.Field(discriminator="kind")])

    return pydantic.GetPydanticSchema(choose)
