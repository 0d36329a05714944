"""Parts are values: looked up by name, given as an object, or a registered one with some fields changed."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from flaxmpc.errors import brief, unknown
from flaxmpc.nn.same import same

P = TypeVar("P")


class Registry(Mapping[str, P], Generic[P]):
    """The named parts of one kind, such as every published activation.

    A part is an object with a `name`, and what the kind's protocol asks for. It must be hashable: a compiled program
    holds it. Of a frozen dataclass a config can change fields; `functools.partial`s and plain functions go in a field.

    Args:
        kind: what messages call a part of this kind.
        part_type: the type that every part has.
        also: names of parts by what others call them; a part is found under both.
    """

    def __init__(self, kind: str, part_type: type[P], also: Mapping[str, str] | None = None):
        self.kind = kind
        self.part_type = part_type
        self.also = also or {}
        self._parts: dict[str, P] = {}

    def register(self, part: P) -> P:
        """Adds a part under its own name, so that configs can name it.

        The same part may come again, made anew by the same definition, see `flaxmpc.nn.same`: the last is kept.

        Raises:
            ValueError: the name is taken by another part.
            TypeError: it is not what the kind asks for.
        """
        name = self._own(part).name  # pyright: ignore[reportAttributeAccessIssue]
        if name in self.also or not same(self._parts.get(name, part), part):
            raise ValueError(f"{self.kind} {name!r} is registered already, as another part: give this one its own name")
        self._parts[name] = part
        return part

    def resolve(self, spec: Any) -> P:
        """A part from a name, an object of the kind, or `{"name": ..., field: value}` for a changed registered part.

        Raises:
            ValueError: an unknown name (the message lists the known ones and the closest) or field.
            TypeError: neither a name, nor a mapping, nor a part of this kind.
        """
        if isinstance(spec, str):
            return self[spec]
        if isinstance(spec, Mapping):
            changes = dict(spec)
            part = self.resolve(changes.pop("name", None))
            fields = _fields(part)
            for field in changes:
                if field not in fields:
                    raise unknown(f"field of {self.kind} {spec['name']!r}", field, fields)
            for field, value in changes.items():
                if not _alike(getattr(part, field), value):
                    raise ValueError(
                        f"{field} of {self.kind} {spec['name']!r} is {brief(value)}; "
                        f"one like {brief(getattr(part, field))} is needed"
                    )
            changes = {field: tuple(value) if isinstance(value, list) else value for field, value in changes.items()}
            return dataclasses.replace(part, **changes)  # pyright: ignore[reportType, reportArgumentType]
        return self._own(spec)

    def _own(self, part: Any) -> P:
        """The part. TypeError: it is none of this kind."""
        if not isinstance(part, self.part_type) or isinstance(part, type):
            raise TypeError(f"{self.kind} must be a name or a {self.part_type.__name__}, not {brief(part)}")
        if type(part).__hash__ is None:
            raise TypeError(f"{self.kind} {brief(part.name)} cannot be hashed: make its class a frozen dataclass, say")  # pyright: ignore[reportAttributeAccessIssue]
        return part

    def spec(self, part: P) -> str | dict[str, Any]:
        """What `resolve` turns back into the part, ready for JSON: its name, or its name and the changed fields.

        Raises:
            ValueError: the part's name is not registered, or it differs from the one of that name in a function or
                another object, so a config that holds it cannot be written.
        """
        name = part.name  # pyright: ignore[reportAttributeAccessIssue]
        if name not in self._parts:
            raise ValueError(
                f"{self.kind} {name!r} is not registered, so it cannot be written to a config; register it"
            )
        known = self._parts[name]
        if type(part) is not type(known) or not _fields(part):
            if not same(part, known):
                raise ValueError(f"{self.kind} {name!r} is another part than the registered one: give it an own name")
            return name
        changes = {
            field: getattr(part, field)
            for field in _fields(part)
            if getattr(part, field) != getattr(known, field) and not same(getattr(part, field), getattr(known, field))
        }
        for field, value in changes.items():
            if not isinstance(value, (str, int, float, tuple, type(None))):
                raise ValueError(
                    f"{self.kind} {name!r} has another {field} than the registered one, which no config can hold: "
                    "give it an own name and register it"
                )
        return {"name": name, **changes} if changes else name

    def __getitem__(self, name: str) -> P:
        part = self._parts.get(self.also.get(name, name))
        if part is None:
            raise unknown(self.kind, name, self._parts)
        return part

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self.also

    def __iter__(self):
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _fields(part: Any) -> tuple[str, ...]:
    """The names of a part's fields; none for what is no dataclass."""
    return tuple(field.name for field in dataclasses.fields(part)) if dataclasses.is_dataclass(part) else ()


def _alike(known: Any, value: Any) -> bool:
    """Whether a config may put a value in the place of another: text for text, numbers for numbers, or for none."""
    if isinstance(known, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(known) and all(map(_alike, known, value))
    if isinstance(known, (str, bool)):
        return type(value) is type(known)
    kinds = int if isinstance(known, int) else (int, float, type(None)) if known is None else (int, float)
    return isinstance(known, (int, float, type(None))) and isinstance(value, kinds) and not isinstance(value, bool)
