"""Parameters by path: {"bert/layer_0/attention/query/kernel": array}, the form that renaming works on."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters as one dict from path to leaf."""
    return dict(traverse_util.flatten_dict(dict(params), sep="/"))  # pyright: ignore[reportArgumentType, reportCallIssue]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def moved(flat: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Parameters by path, those of some modules at other places: "bert/layer_1" to "bert/layer_0", say."""
    found = {}
    for path, leaf in flat.items():
        names = path.split("/")
        module = "/".join(names[:2])
        found["/".join([places.get(module, module), *names[2:]])] = leaf
    return found
