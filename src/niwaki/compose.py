"""From the command line to a Recipe. With niwaki/train.py the only code that knows Hydra and OmegaConf.

A config may come from anybody, and `_target_` can name anything: here it may name only the classes of `niwaki.allow`,
only at the root and at the root of a group, and with settings of the right types. All of it is checked on the
resolved values before anything is built. Hydra's own part of the config can import and call things too (plugins,
logging, search path): it stays as configs/train.yaml has it, but for a few places.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from beartype import BeartypeConf
from beartype.door import is_bearable
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from niwaki.allow import resolve
from niwaki.callbacks import CallbackSettings
from niwaki.catalogue import config_folder
from niwaki.errors import ConfigError, UserError, nearest
from niwaki.export.export import Export
from niwaki.recipe import AXES, Recipe
from niwaki.stage import Stage

KINDS = (Recipe, Stage, CallbackSettings, Export, pl.Callback, *AXES.values())
GROUPS_OF_MANY = ("compression", "callbacks", "export")
FREE_MAPPINGS = (
    "data.columns",
    "model.overrides",
    "optimizer.lr_by_part",
    "task.descriptions",
    "task.verbalizer",
)  # whose keys no config can know
QUERIES = ("help", "hydra_help", "info", "cfg", "shell_completion")
REPLACING = ("config_path", "config_name", "config_dir", "experimental_rerun")  # another config than the one checked
PLUGINS = ("launcher", "sweeper")
MAY_DIFFER = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
FILLED_BY_HYDRA = ("hydra.runtime.", "hydra.overrides.", "hydra.job.override_dirname")
NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int is a float


@dataclass(frozen=True)
class Command:
    """A command line: its overrides, whether it is a multirun, and whether it only asks Hydra for information."""

    overrides: list[str]
    multirun: bool
    asks: bool


def parse(arguments: list[str]) -> Command:
    """Read a command line as Hydra does. A key of a free mapping needs no `+` to be new.

    Raises:
        ConfigError: an option that would make Hydra run another config than the one that is checked here.
    """
    arguments[:] = [f"++{word}" if word.startswith(FREE_MAPPINGS) else word for word in arguments]
    parsed = get_args_parser().parse_args(arguments)
    for name in REPLACING:
        if getattr(parsed, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option}={getattr(parsed, name)}: is not taken; put the file into configs/experiment")
    asks = any(getattr(parsed, name) for name in QUERIES)
    return Command([] if parsed.shell_completion else parsed.overrides, parsed.multirun, asks)


@dataclass(frozen=True)
class Composed:
    """A config, resolved and plain, and where Hydra would run it."""

    config: dict[str, Any]
    folder: Path
    sweep_folder: Path
    plain_launch: bool  # neither a launcher nor a sweeper was chosen


def compose(overrides: Sequence[str]) -> Composed:
    """The config that these overrides make.

    Raises:
        ConfigError: an unknown option or key (with the nearest that exists), or a value that does not parse.
    """
    with errors_explained():
        whole = checked_whole(overrides)
        hydra = whole.hydra
        choices = hydra.runtime.choices
        plain = all(choices[f"hydra/{plugin}"] == "basic" for plugin in PLUGINS)
        config = {key: value for key, value in to_plain(whole).items() if key != "hydra"}
        safe_name(config, "name")
        safe_name(config, "study")
        return Composed(config, Path(hydra.run.dir), Path(hydra.sweep.dir), plain)


def check_query(overrides: Sequence[str]) -> None:
    """Refuse what would do harm while Hydra answers a question such as `--cfg job`; a value may be missing there.

    Raises:
        ConfigError: as `compose` does.
    """
    with errors_explained():
        checked_whole(overrides)


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a ConfigError of one line."""
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error
    except (AttributeError, AssertionError) as error:  # OmegaConf's own, for a key below a null
        raise ConfigError(f"config: an override does not fit ({first_line(error)})") from error


def checked_whole(overrides: Sequence[str]) -> Any:
    """The config with Hydra's own part, which is checked."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:  # before composing, which imports what a search path names
        if str(override.key_or_group).startswith("hydra.searchpath"):
            raise ConfigError(
                f"{override.input_line}: configs come from one folder; put the file into configs/experiment"
            )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        whole = hydra_compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(whole)  # for references to Hydra's own part, such as the chosen task
    check_hydra(whole.hydra, parsed)
    return whole


def to_plain(whole: Any) -> dict[str, Any]:
    """The config without Hydra's own part, every reference resolved, as dictionaries and lists."""
    own = OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])
    OmegaConf.set_readonly(own, False)
    missing = sorted(OmegaConf.missing_keys(own))
    if missing:
        raise ConfigError(f"{missing[0]}: needs a value; add {missing[0]}=...")
    return typing.cast("dict[str, Any]", OmegaConf.to_container(own, resolve=True))


def check_hydra(hydra: Any, overrides: Sequence[Override]) -> None:
    """Refuse every difference of Hydra's part of a config from our own, but for folders, what Hydra fills in itself,
    and an installed launcher or sweeper with settings from the command line."""
    choices = {key: value for key, value in hydra.runtime.choices.items() if value and plugin_of(key, "/")}
    settings = [str(o.input_line) for o in overrides if is_plugin_setting(o, choices)]
    expected = own_hydra(tuple(f"{key}={value}" for key, value in choices.items()), tuple(settings))
    found = leaves(OmegaConf.to_container(hydra, resolve=False))
    for key in [*found, *expected]:
        free = key in MAY_DIFFER or key.startswith(FILLED_BY_HYDRA)
        if not free and (key not in found or key not in expected or found[key] != expected[key]):
            known = "settings of a launcher or sweeper come from the command line, and only with one that is installed"
            hint = known if plugin_of(key, ".") else f"may be set: {', '.join(MAY_DIFFER)}"
            raise ConfigError(f"{key}={found.get(key)!r}: is Hydra's own and may not be changed ({hint})")


def plugin_of(key: str, separator: str) -> str | None:
    """`hydra/launcher` for a key or a group of the launcher's, the same for the sweeper, else None."""
    parts = key.split(separator)
    return "/".join(parts[:2]) if len(parts) > 1 and parts[0] == "hydra" and parts[1] in PLUGINS else None


def is_plugin_setting(override: Override, choices: Mapping[str, str]) -> bool:
    """Whether an override is a plain setting of a chosen launcher or sweeper: nothing in it can name code."""
    plugin = plugin_of(str(override.key_or_group), ".")
    if plugin is None or choices.get(plugin) == "basic" or "${" in str(override.input_line):
        return False
    keys = [*str(override.key_or_group).split("."), *(key for _, node in nodes(override.value(), "") for key in node)]
    return not any(str(key).startswith("_") for key in keys)


@cache
def own_hydra(choices: tuple[str, ...], settings: tuple[str, ...]) -> dict[str, Any]:
    """The leaves of Hydra's part of configs/train.yaml, with the launcher and the sweeper as installed."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        own = hydra_compose("train", return_hydra_config=True).hydra
    with initialize(None, version_base="1.3"):  # no folder of ours: only what Hydra and installed plugins bring
        installed = hydra_compose(None, [*choices, *settings], return_hydra_config=True).hydra
    tree: Any = OmegaConf.to_container(own, resolve=False)
    return leaves(tree | {name: OmegaConf.to_container(installed[name], resolve=False) for name in PLUGINS})


def leaves(hydra: Any) -> dict[str, Any]:
    """Every value of Hydra's part that is no mapping, by its dotted path; lists are whole."""
    return {
        f"{path}.{key}": value
        for path, node in nodes(hydra, "hydra")
        for key, value in node.items()
        if not isinstance(value, Mapping)
    }


def nodes(tree: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in a tree, with its dotted path."""
    if isinstance(tree, Mapping):
        yield path, dict(tree)
        for key, value in tree.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from nodes(value, f"{path}.{index}")


def safe_name(config: Mapping[str, Any], field: str) -> None:
    """Refuse a name that would lead out of the output root."""
    value = config.get(field)
    if value is None:
        return
    parts = str(value).split("/")
    if not all(part and part not in (".", "..") and "\\" not in part for part in parts):
        raise ConfigError(f"{field}={value!r}: needs a plain name; it may not lead out of the output folder")


def build(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a resolved config.

    Raises:
        ConfigError: a target outside the allowlist, an unknown or missing setting, or a value of a wrong type.
    """
    check_targets(config)
    kinds = dict(roots(config))
    for path, node in kinds.items():
        check_settings(path, node)
    try:
        return instantiate(dict(config), _convert_="all")
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise ConfigError(f"config: {first_line(cause or error)}") from error


def roots(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The places where a `_target_` may stand: the root, and the root of each group or of each of its members."""
    yield "", dict(config)
    for axis in AXES:
        yield axis, required_node(config.get(axis), axis)
    for group in GROUPS_OF_MANY:
        for name, node in (config.get(group) or {}).items():
            yield f"{group}.{name}", required_node(node, f"{group}.{name}")


def required_node(node: Any, path: str) -> dict[str, Any]:
    """The mapping at the root of a group."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{path}: needs an option of its group, not {node!r}")
    return dict(node)


def check_targets(config: Mapping[str, Any]) -> None:
    """Refuse every key of Hydra's instantiate but `_target_`, and that anywhere but at a group's root or outside the
    allowlist."""
    allowed = {path for path, _ in roots(config)}
    for path, node in nodes(config, ""):
        special = [key for key in node if isinstance(key, str) and key.startswith("_") and key.endswith("_")]
        where = f"{path}." if path else ""
        for key in special:
            if key != "_target_":
                raise ConfigError(f"{where}{key}={node[key]!r}: is not allowed in a config")
            if path not in allowed:
                raise ConfigError(f"{where}_target_={node[key]!r}: may only stand at the root of a group")
            resolve(node[key], KINDS, f"{where}_target_")


def check_settings(path: str, node: Mapping[str, Any]) -> None:
    """Refuse settings that the class of `node` does not have, or of another type than it declares."""
    kind = resolve(node["_target_"], KINDS)
    if not dataclasses.is_dataclass(kind):
        return
    hints = typing.get_type_hints(kind)
    declared = {field.name: field for field in dataclasses.fields(kind) if field.init}
    where = f"{path}." if path else ""
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in declared:
            raise ConfigError(f"{where}{name}: no such setting{suggestion(name, declared)}")
        composed_here = isinstance(value, Mapping) and ("_target_" in value or name in GROUPS_OF_MANY)
        if not composed_here and not fits(value, hints[name]):
            which = "" if finite(value) else ", and a finite one"
            which += unquoted(name, value, hints[name])
            raise ConfigError(f"{where}{name}={value!r}: needs {type_in_words(hints[name])}{which}")
    for name, field in declared.items():
        if name not in node and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}: needs a value; add {where}{name}=...")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of the declared type; a bool is no number, and a number is finite."""
    if isinstance(value, bool):
        return hint is bool or bool in typing.get_args(hint)
    return finite(value) and bool(is_bearable(value, hint, conf=NUMBERS))


def unquoted(name: str, value: Any, hint: Any) -> str:
    """What to write where YAML made a number of text: 2:4 is 124 there, two minutes and four seconds."""
    if type(value) is not int or value < 60 or not fits("", hint):
        return ""
    return f"; if it says {value // 60}:{value % 60} in a file, quote it, {name}: '{value // 60}:{value % 60}'"


def finite(value: Any) -> bool:
    """Whether neither infinity nor NaN is in a value, however deep."""
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def type_in_words(hint: Any) -> str:
    """A type for people: `a number or null`."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    origin = str(typing.get_origin(hint))
    if "Sequence" in origin or "list" in origin or "tuple" in origin:
        return f"a list, each {type_in_words(arguments[0])}"
    if "Mapping" in origin or "dict" in origin:
        return "a mapping"
    return " or ".join(map(type_in_words, arguments)) or str(hint)


def points(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """A sweep's points, each the overrides of one run in the order of the grid, and the keys that vary.

    Raises:
        ConfigError: an override that does not parse, or a kind of sweep that needs a sweeper of its own.
    """
    with errors_explained():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    grid: list[list[str]] = [[]]
    varied = []
    for override in parsed:
        if not override.is_sweep_override():
            choices = [override.input_line or ""]
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
            varied.append(key)
        else:
            raise ConfigError(f"{override.input_line}: intervals need a sweeper, such as hydra/sweeper=optuna")
        grid = [[*point, choice] for point in grid for choice in choices]
    return grid, varied


def explain(error: Exception) -> str:
    """Hydra's complaint in one line, with the nearest name that exists."""
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, name = str(missing).partition("/")
        options = options_of(group)
        if name and options:
            return f"{group}={name}: no such option{suggestion(name, options)}"
        return f"{missing}: no such config"
    if isinstance(error, OverrideParseException):
        return unread(error.override.lstrip("+~"))
    text = str(error)
    if "Could not override" in text or "is not in struct" in text:
        key = text.split("'")[1] if "Could not override" in text else str(getattr(error, "full_key", ""))
        return f"{key}: no such setting{owners(key) or suggestion(key, known_keys(), but=key.rpartition('.')[0])}"
    return first_line(error)


def unread(override: str) -> str:
    """What to write in place of an override that Hydra cannot read."""
    key, sign, value = override.partition("=")
    if not sign:
        return f"{override!r}: is no override; needs KEY=VALUE"
    if value.startswith(("[", "{")):
        return f"{key}={value}: cannot be read; brackets have to close, and texts with signs in them need quotes"
    return f"{key}={value}: cannot be read; a text with signs in it needs quotes within quotes: '{key}=\"{value}\"'"


def owners(key: str) -> str:
    """` of the chosen tuning; ...`: the options of a group that have a setting, or the most alike one of them all."""
    group, _, name = key.rpartition(".")
    axis, _, chosen = group.partition(".")
    if axis in GROUPS_OF_MANY and chosen:
        return of_one_of_many(axis, chosen, name)
    folder = config_folder() / group
    if not group or "." in group or not folder.is_dir():
        return ""
    settings = {option: OmegaConf.load(folder / f"{option}.yaml") for option in options_of(group)}
    having = [option for option, found in settings.items() if name in found]
    if having:
        return f" of the chosen {group}; these have it: {', '.join(having)}"
    close = nearest(name, sorted({str(one) for found in settings.values() for one in found}), cutoff=0.5)
    return f"; did you mean {group}.{close}?" if close else ""


def of_one_of_many(axis: str, chosen: str, name: str) -> str:
    """What is said of a setting that `compression.gptq` has not: the one most alike, or that gptq was not chosen."""
    place = next((option for option in options_of(axis) if option.rpartition("/")[2] == chosen), None)
    if place is None:
        return ""
    settings = [str(one) for one in OmegaConf.load(config_folder() / axis / f"{place}.yaml") if one != "_target_"]
    if name in settings:
        return f", as {place} is not chosen; add it: {axis}=[{place}]"
    close = nearest(name, settings, cutoff=0.5)
    return f"; did you mean {axis}.{chosen}.{close}?" if close else f" (there are: {', '.join(settings)})"


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def options_of(group: str) -> list[str]:
    """The options of a config group, from its files."""
    folder = config_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def known_keys() -> list[str]:
    """Every key of the default config, and every group."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        whole = OmegaConf.to_container(hydra_compose("train"), resolve=False)
    return [f"{path}.{key}" if path else key for path, node in nodes(whole, "") for key in node if key != "_target_"]


def suggestion(name: str, known: typing.Iterable[str], but: str = "") -> str:
    """`; did you mean lora? (options: ...)`, as far as there is something to say; never `but`."""
    options = sorted({*known} - {but})
    close = nearest(name, options, cutoff=0.5)
    hint = f"; did you mean {close}?" if close else ""
    return hint + (f" (there are: {', '.join(options)})" if len(options) <= 20 else "")
