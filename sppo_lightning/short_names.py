"""Short names of classes on the command line, written out as the class paths that the parser takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sppo_lightning.types import UserError


def with_class_paths(
    args: Sequence[str], flag: str, names: Mapping[str, str], *, what: str, key: str | None = None
) -> list[str]:
    """Return a command line with a flag's short name replaced by its class path.

    Args:
        args: of the command.
        flag: that takes a class, e.g. ``--format``; its arguments follow as ``--format.NAME VALUE``.
        names: class paths by short name.
        what: such a class is, for errors, e.g. ``format``.
        key: the flag's name for the parser, where it has another.

    Raises:
        UserError: if a name is neither a short one nor a class path.
    """
    key = key or flag
    found: list[str] = []
    for arg in args:
        given, joined, value = arg.partition("=")
        if given == flag and joined:
            found += [key, _class_path(flag, value, names, what)]
        elif arg == flag:
            found.append(key)
        elif found[-1:] == [key]:
            found.append(_class_path(flag, arg, names, what))
        elif arg.startswith(f"{flag}."):
            found.append(key + arg.removeprefix(flag))
        else:
            found.append(arg)
    return found


def _class_path(flag: str, name: str, names: Mapping[str, str], what: str) -> str:
    if name not in names and "." not in name:
        raise UserError(
            f"{flag} {name}: there is no such {what}; give {', '.join(names)}, or the class path of one of your own, "
            f"e.g. my_module.Mine"
        )
    return names.get(name, name)
