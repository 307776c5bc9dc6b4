"""Says in one line what is wrong with a command line or a config file: the key, what was got, the fix."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from sppo_lightning.limits import check_size
from sppo_lightning.types import UserError, first_line


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no text", problem_mark=key.start_mark)
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
        text = path.read_bytes()
        text.decode()
        content = yaml.load(text, _StrictLoader)
        check_size(content)  # and refuses what holds itself
        json.dumps(content, default=str)  # goes through all of it
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: broken YAML, {error.problem}: correct that line") from error
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # of the reader of any kind of value, such as a date
        raise UserError(
            f"{path}: a value cannot be read ({type(error).__name__}: {first_line(error)}): correct it"
        ) from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path}: expected keys such as 'model:' and 'data:', got {got}")
    wrong = next((name for name in content if not isinstance(name, str)), None)
    if wrong is not None:
        raise UserError(f"{path}: expected keys such as 'model:' and 'data:', got {wrong!r}")


def class_paths(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each class path of a config, and the dotted key that it stands at."""
    if isinstance(config, Mapping):
        if isinstance(config.get("class_path"), str):
            yield config["class_path"], key
        for name, value in config.items():
            yield from class_paths(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            yield from class_paths(value, key)


def explain(message: str, keys: Iterable[str], places: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return a parser's error in one line.

    Args:
        message: what jsonargparse says: an outline, the innermost reason indented most.
        keys: known config keys, to propose one where a key is misspelt.
        places: dotted keys of class paths, for a message that names none.
    """
    path: list[str] = []  # the key, from the outside in
    owner = ""  # class path of the component that the reason is about
    types = ""  # that a value may have, where they are several
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := re.match(r'Parser key "([^"]+)":', line):
            path.append(found[1])
        elif found := re.match(r"Problem with given class_path '([^']+)':", line):
            owner = found[1]
        elif found := re.match(r"Subtypes: \[(.+)\]", line):
            types = found[1]
        elif found := re.match(r"Given value: (.+)", line):
            return (
                f"{'.'.join(path) or places.get(owner, 'config')}: expected {_types(types)}, got {found[1]!r}"
            )
        elif reason := _reason(line, ".".join(path) or places.get(owner, owner), owner, list(keys)):
            return reason
    rest = " ".join(message.split())
    return re.sub(r'^Parser key "(?P<key>[^"]+)": ', r"\g<key>: ", rest)


# what the parser says, and the line that a user reads: {key} is the config key, \1 the parser's first group
_PLAIN = {
    r"Import path (\S+) does not correspond to a subclass of (\w+)": (
        r"{key}: \1 is not a \2: give the class path of a \2"
    ),
    r"Expected an instantiatable class, but (\S+) is abstract": (
        r"{key}: \1 is abstract: give a class that derives from it"
    ),
    r"Expected a dot import path string: (.+)": (
        r"{key}: '\1' is no class path: give one such as package.module.Class"
    ),
    r"Type .+ expects a function or a callable class: (.+)\. Got value: (.+)": (
        r"{key}: '\2' is no function (\1): give its dotted path, e.g. my_module.my_function (modules are also found in "
        "the current folder)"
    ),
    r"argument (--\S+): expected one argument": r"\1 lacks its value: write \1 VALUE",
    r'Linked "(.+)" must be given via "(.+)"': r"\1 follows from \2: set that instead",
    r"(model|data|trainer)\.[\w.]+\b.+": r"\g<0>",  # said by a settings class of ours
}


def _reason(line: str, key: str, owner: str, keys: Sequence[str]) -> str | None:
    if package := _missing_package(line, owner):
        return f"{key}: {package}"
    for pattern, plain in _PLAIN.items():
        if found := re.match(pattern, line):
            return found.expand(plain).replace("{key}", key)
    if found := re.match(r"the following arguments are required: (.+)", line):
        return _missing(found[1].split(", "), key)
    if found := re.match(
        r"Option '(.+)' is not accepted|Subcommand '.+' does not accept option '(.+)'", line
    ):
        return _unknown(found[1] or found[2], key, owner, keys)
    if found := re.match(r"unrecognized arguments: (?:-+([^= ]*)|(\S+))", line):
        if found[2]:
            return f"{found[2]!r} is no option: options are written --KEY VALUE"
        return _unknown(found[1], key, owner, keys)
    if found := re.match(
        r"No module named '.+'|module '.+' has no attribute '.+'|cannot import name '.+'", line
    ):
        return f"{key}: there is no class {owner!r} ({found[0]}){_closest_class(owner)}"
    if found := re.match(r"Expected a (.+)\. Got value: (.*)", line):
        return f"{key}: expected {_types(found[1])}, got {found[2]!r}"
    if found := re.match(r'expected "subcommand" to be one of \{(.+)\}', line):
        commands = found[1].replace(",", ", ")
        return f"no command: give one of {commands}, e.g. sppo-lightning fit --config FILE"
    return None


def _missing_package(line: str, owner: str) -> str | None:
    """Return what to say if a class, or a function, lies in a module that needs a package which is not there."""
    if found := re.search(r"Requirement '([^']+)' not met|Module not found: '([^']+)'", line):
        needed = found[1] or found[2]
    elif found := re.search(r"No module named '([^']+)'(?:; .*|\. Got value: (\S+))?$", line):
        owner, needed = found[2] or owner, found[1]
        if f"{owner}.".startswith(f"{needed}."):  # its own module
            return None
    else:
        return None
    return f"{owner} needs {needed}, which is not installed here: install it, or name another"


def _missing(names: Sequence[str], key: str) -> str:
    names = [re.sub(r"^(fit|validate|test|predict|estimate)\.", "", name) for name in names]
    full = [f"{key}.{name}" if key else name for name in names]
    verb, them = ("is", "it") if len(full) == 1 else ("are", "them")
    return (
        f"{', '.join(full)} {verb} missing: set {them} in a config (--config FILE) or on the command line "
        f"(--{full[0]} VALUE)"
    )


def _unknown(name: str, key: str, owner: str, keys: Sequence[str]) -> str:
    if owner:
        taken = _parameters(owner)
        hint = _closest(name, taken) or f"; it takes {', '.join(taken) or 'none'}"
        return f"{key}.{name}: {owner.rpartition('.')[2]} has no such setting{hint}"
    return f"{name}: no such key{_closest(name, keys) or '; `sppo-lightning fit --help` lists them'}"


def _closest_class(class_path: str) -> str:
    module = class_path.rpartition(".")[0]
    try:
        found_there = vars(importlib.import_module(module)).items()
        known = [f"{module}.{other}" for other, value in found_there if inspect.isclass(value)]
    except Exception:
        known = []
    return (
        _closest(class_path, known)
        or "; give its full dotted path (modules are also found in the current folder)"
    )


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
