"""Says in one line what is wrong with a command line or a config file: the key, what was got, the fix."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.types import UserError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def check_config_files(args: Sequence[str]) -> None:
    """Check that each ``--config`` file is there and is a mapping.

    Raises:
        UserError: naming the file and line.
    """
    joined = [arg.partition("=")[2] for arg in args if re.match(r"(--config|-c)=", arg)]
    separate = [value for flag, value in pairwise(args) if flag in ("--config", "-c")]
    for name in joined + separate:
        if not name.lstrip().startswith("{"):  # else the config itself, in JSON
            _check_config_file(Path(name))


def _check_config_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file; check the path (it is relative to {Path.cwd()})")
    try:
        content = yaml.load(path.read_bytes(), _StrictLoader)
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: broken YAML, {error.problem}: correct that line") from error
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path}: expected keys such as 'model:' and 'data:', got {got}")


def explain(message: str, keys: Iterable[str]) -> str:
    """Return a parser's error in one line.

    Args:
        message: what jsonargparse says: an outline, the innermost reason indented most.
        keys: known config keys, to propose one where a key is misspelt.
    """
    path: list[str] = []  # the key, from the outside in
    owner = subtypes = (
        ""  # class path of the component that the reason is about; its types, where it has several
    )
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := re.match(r'Parser key "([^"]+)":', line):
            path.append(found[1])
        elif found := re.match(r"Problem with given class_path '([^']+)':", line):
            owner = found[1]
        elif found := re.match(r"Subtypes: \[(.+)\]", line):
            subtypes = found[1]
        elif found := re.match(r"Given value: (.+)", line):
            return f"{'.'.join(path)}: expected {_types(subtypes)}, got {found[1]!r}"
        elif reason := _reason(line, path, owner, list(keys)):
            return reason
    rest = " ".join(message.split())
    return re.sub(r'^Parser key "(?P<key>[^"]+)": ', r"\g<key>: ", rest)


def _reason(line: str, path: Sequence[str], owner: str, keys: Sequence[str]) -> str | None:
    key = ".".join(path)
    for pattern, render in _REASONS:
        if found := re.match(pattern, line):
            return render(found, key, owner, keys)
    return None


def _missing(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    names = [re.sub(r"^(fit|validate|test|predict|estimate)\.", "", name) for name in found[1].split(", ")]
    full = [f"{key}.{name}" if key else name for name in names]
    verb, them = ("is", "it") if len(full) == 1 else ("are", "them")
    return (
        f"{', '.join(full)} {verb} missing: set {them} in a config (--config FILE) or on the command line "
        f"(--{full[0]} VALUE)"
    )


def _unknown(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    name = found[1]
    if owner:
        taken = _parameters(owner)
        hint = _closest(name, taken) or f"; it takes {', '.join(taken) or 'none'}"
        return f"{key}.{name}: {owner.rpartition('.')[2]} has no such setting{hint}"
    return f"{name}: no such key{_closest(name, keys) or '; `sppo-lightning fit --help` lists them'}"


def _unknown_flag(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    if not found[1].startswith("-"):
        return f"{found[1].split()[0]!r} is no option: options are written --KEY VALUE"
    name = re.match(r"-+([^= ]*)", found[1])
    assert name is not None
    return _unknown(name, key, owner, keys)


def _not_importable(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    module = owner.rpartition(".")[0]
    try:
        found_there = vars(importlib.import_module(module)).items()
        known = [f"{module}.{other}" for other, value in found_there if inspect.isclass(value)]
    except Exception:
        known = []
    hint = (
        _closest(owner, known) or "; give its full dotted path (modules are also found in the current folder)"
    )
    return f"{key}: there is no class {owner!r} ({found[0]}){hint}"


def _wrong_kind(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{key}: {found[1]} is not a {found[2]}: give the class path of a {found[2]}"


def _abstract(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{key}: {found[1]} is abstract: give a class that derives from it"


def _no_class_path(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{key}: {found[1]!r} is no class path: give one such as package.module.Class"


def _no_function(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return (
        f"{key}: {found[2]!r} is no function ({found[1]}): give its dotted path, e.g. my_module.my_function "
        "(modules are also found in the current folder)"
    )


def _wrong_type(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{key}: expected {_types(found[1])}, got {found[2]!r}"


def _no_value(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{found[1]} lacks its value: write {found[1]} VALUE"


def _no_command(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"no command: give one of {found[1].replace(',', ', ')}, e.g. sppo-lightning fit --config FILE"


def _own(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return found[0]


def _linked(found: re.Match[str], key: str, owner: str, keys: Sequence[str]) -> str:
    return f"{found[1]} follows from {found[2]}: set that instead"


_REASONS: list[tuple[str, Callable[[re.Match[str], str, str, Sequence[str]], str]]] = [
    (r"the following arguments are required: (.+)", _missing),
    (r"Option '(.+)' is not accepted", _unknown),
    (r"Subcommand '.+' does not accept option '(.+)'", _unknown),
    (r"unrecognized arguments: (.+)", _unknown_flag),
    (r"No module named '.+'|module '.+' has no attribute '.+'|cannot import name '.+'", _not_importable),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_kind),
    (r"Expected an instantiatable class, but (\S+) is abstract", _abstract),
    (r"Expected a dot import path string: (.+)", _no_class_path),
    (r"Type .+ expects a function or a callable class: (.+)\. Got value: (.+)", _no_function),
    (r"Expected a (.+)\. Got value: (.*)", _wrong_type),
    (r"argument (--\S+): expected one argument", _no_value),
    (r'expected "subcommand" to be one of \{(.+)\}', _no_command),
    (r'Linked "(.+)" must be given via "(.+)"', _linked),
    (r"(model|data|trainer)\.[\w.]+\b.+", _own),  # said by a settings class of ours
]


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except Exception:
        return []


def _closest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {found[0]}?" if found else ""


def _types(text: str) -> str:
    """Turn ``<class 'float'>, list[float]`` into ``float or list[float]``."""
    text = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", text)
    return text if "one of" in text else text.replace(", ", " or ")
