"""Profiles as JSON: the shipped ones by name, others by path."""

import json
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from kvsim.errors import UsageError
from kvsim.profiles.costs import Grid, PrefillFit, TransferCurve
from kvsim.profiles.profile import Part, Profile

FORMAT = 1


class ProfileError(UsageError):
    """A profile that does not exist or cannot be read; the message says which there are, or what is wrong."""


def to_json(profile: Profile) -> str:
    """Return a profile as the JSON text that `load` reads."""
    data: dict[str, Any] = {"format": FORMAT}
    for name in Profile.__dataclass_fields__:
        value = getattr(profile, name)
        if isinstance(value, Grid):
            value = {"x": value.x, "y": value.y, "seconds": value.seconds}
        elif name in ("transfers", "provenance"):
            value = {key: _fields(part) for key, part in value.items()}
        elif isinstance(value, PrefillFit):
            value = _fields(value)
        data[name] = value
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items()) + "\n}\n"


def _fields(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in fields(part) if field.init}


def _lines(value: Any) -> str:
    """Give an object a line a field, and a grid a line a row, so that profiles can be read and compared."""
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(part)}" for key, part in value.items()) + "\n}"
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def from_json(text: str, where: str) -> Profile:
    """Build a profile from JSON text; `where` names it in errors.

    Raises:
        ProfileError: It is no JSON, of another format, or a field is missing, unknown or out of range.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"profile {where}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ProfileError(f'profile {where}: not an object with "format": {FORMAT}')
    try:
        values = dict(data)
        values["prefill"] = None if data["prefill"] is None else _grid(data["prefill"])
        values["decode"] = _grid(data["decode"])
        values["prefill_fit"] = PrefillFit(**data["prefill_fit"])
        values["transfers"] = {key: _curve(curve) for key, curve in data["transfers"].items()}
        values["provenance"] = {key: Part(**part) for key, part in data["provenance"].items()}
        return Profile(**values)
    except KeyError as error:
        raise ProfileError(f"profile {where}: field {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"profile {where}: {error}") from None


def _grid(data: dict[str, Any]) -> Grid:
    return Grid(tuple(data["x"]), tuple(data["y"]), tuple(tuple(row) for row in data["seconds"]))


def _curve(data: dict[str, Any]) -> TransferCurve:
    return TransferCurve(
        sizes=tuple(data["sizes"]), bytes_per_s=tuple(data["bytes_per_s"]), latency_s=data.get("latency_s", 0.0)
    )


def load(path: str | Path) -> Profile:
    """Read a profile from a file.

    Raises:
        ProfileError: The file cannot be read or holds no profile.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {path}: {error}") from None
    return from_json(text, str(path))


def available() -> tuple[Profile, ...]:
    """Return the shipped profiles, by name."""
    folder = resources.files("kvsim.profiles").joinpath("data")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return tuple(from_json(file.read_text(encoding="utf-8"), file.name) for file in files)


def lookup(model: str, gpu: str, tensor_parallel: int = 1) -> Profile:
    """Return the shipped profile of a model on a GPU; the names' case does not matter.

    Raises:
        ProfileError: None is shipped; the message lists those that are.
    """
    profiles = available()
    for profile in profiles:
        if (profile.model, profile.gpu, profile.tensor_parallel) == (model.lower(), gpu.lower(), tensor_parallel):
            return profile
    there = "; ".join(f"{p.model} on {p.gpu}, tensor parallel {p.tensor_parallel}" for p in profiles)
    raise ProfileError(
        f"no profile of {model} on {gpu}, tensor parallel {tensor_parallel}; there are: {there}. "
        "`kvsim calibrate` measures another"
    )
