"""From flags and gin files to a configured call: the only module that imports gin.

A program ends with `configure.main(loop.train)`. That reads `--gin_file`s (later ones win), then
`--gin_bindings` and `--gin.NAME=VALUE`; checks them; lets gin build the arguments of `loop.train`,
which are frozen dataclasses for the most part; and calls it. Every public name is registered here
under its short name, so gin files need no imports:

    include 'models/t5_1_1_small.gin'      # sought beside this file, here, and in gin_configs/
    train.model = @Transformer()
    train/Batches.seed = 1                 # only in the scope `train`: @train/Batches()
    STEPS = 1000                           # a macro; --gin.STEPS=10 overrides it
    train.total_steps = %STEPS

gin itself finds most mistakes late or never: a misspelt macro is a new macro, a missing argument a
TypeError from within. So statements are read here one at a time, each remembered with its file and
line, and what the main function reaches is walked through before anything is built.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc

# The imports below make hundreds of thousands of objects that stay. To look for garbage among them
# takes 0.2 s on the way, and up to one when the program ends: hence `gc.freeze` in `main`.
_collects = gc.isenabled()
gc.disable()

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
import tokenize
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gin
import jax
from absl import app, flags, logging
from gin import config_parser
from gin.config import ParserDelegate

from t5x_lite import aside, commandline, distributed, programs
from t5x_lite.bindings import (
    COMMAND_LINE,
    MACRO,
    PREFIX,
    Bindings,
    Configurable,
    close_matches,
    did_you_mean,
    parameters,
    references,
    short_name,
)
from t5x_lite.registry import CONFIGURABLES
from t5x_lite.types import InputError

CONFIG_FILE: Final = "config.gin"
GIN_CONFIGS: Final = Path(__file__).resolve().parents[1] / "gin_configs"


@dataclasses.dataclass
class _Unknown:
    """Stands for a reference to a name that isn't registered, until its statement is read."""

    selector: str
    scopes: tuple[str, ...] = ()
    evaluate: bool = False


class _Delegate(ParserDelegate):
    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        name = short_name(scoped_selector.rsplit("/", 1)[-1])
        if name not in _registered:
            return _Unknown(name)
        return super().configurable_reference(scoped_selector, evaluate)


_SINGLETON = inspect.unwrap(gin.get_configurable("gin.singleton"))
_registered: dict[str, Configurable] = {"gin.singleton": _SINGLETON}
_bindings = Bindings(_registered)
_function = ""  # the short name of the one configured last


def register(
    table: Iterable[Configurable | tuple[str, Configurable]] = CONFIGURABLES,
) -> None:
    """Makes classes and functions known to gin files by their short names.

    Registering the same object again does nothing; another object under a name taken is a
    ValueError. gin leaves the objects as they are: only what gin files build goes through it.
    """
    for entry in table:
        name, target = entry if isinstance(entry, tuple) else (entry.__name__, entry)
        if _registered.get(name, target) is not target:
            raise ValueError(
                f"the gin name '{name}' stands for {_registered[name]!r} already; register "
                f'{target!r} as another: ("OtherName", target)'
            )
        if name not in _registered:
            gin.external_configurable(target, name=name, module=PREFIX)
            _registered[name] = target


def reset() -> None:
    """Forgets every binding; registered names stay."""
    global _bindings, _function
    gin.clear_config()
    _bindings, _function = Bindings(_registered), ""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Within the block nothing is bound at first; after it nothing is left bound."""
    reset()
    try:
        yield
    finally:
        reset()


# Reading


def parse(
    files: Sequence[str | os.PathLike[str]] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Reads gin files, then single statements, on top of what was read before.

    A file is sought in the current directory, in `search_paths`, then in gin_configs/; an included
    one beside the including file first. Raises InputError with the place for syntax errors,
    unknown files, configurables and parameters; `arguments` checks the rest.
    """
    register()
    roots = (Path(), *(Path(path).expanduser() for path in search_paths), GIN_CONFIGS)
    for file in files:
        _read_file(os.fspath(file), roots, (), "")
    for text in bindings:
        _read_text(text, f"{COMMAND_LINE} '{text}'", roots, ())


def _read_file(name: str, roots: tuple[Path, ...], within: tuple[Path, ...], where: str) -> None:
    wanted = Path(name).expanduser()
    folders = (*(file.parent for file in within[-1:]), *roots)
    path = next((folder / wanted for folder in folders if (folder / wanted).is_file()), None)
    at = f" ({where})" if where else ""
    if path is None:
        nearby = {p.name for folder in folders for p in (folder / wanted).parent.glob("*.gin")}
        names = {(wanted.parent / file).as_posix() for file in nearby}
        names |= {p.relative_to(GIN_CONFIGS).as_posix() for p in GIN_CONFIGS.rglob("*.gin")}
        # By the file's own name first: paths of one folder are all alike.
        stems = {Path(known).stem: known for known in sorted(names)}
        close = [stems[stem] for stem in close_matches(wanted.stem, stems)]
        close = close or close_matches(name, names)
        raise InputError(
            f"there is no gin file '{name}'{at}.{did_you_mean(close)} Looked in: "
            f"{', '.join(dict.fromkeys(str(folder.resolve()) for folder in folders))}; "
            "--gin_search_paths=FOLDER adds a folder"
        )
    if path.resolve() in within:
        raise InputError(f"gin file {path} includes itself{at}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"gin file {path} is not UTF-8 text at byte {error.start}") from error
    _read_text(text, str(path), roots, (*within, path.resolve()))


def _read_text(text: str, source: str, roots: tuple[Path, ...], within: tuple[Path, ...]) -> None:
    def place(line: int) -> str:
        return f"{source}:{line}" if within else source

    try:
        for statement in config_parser.ConfigParser(text, _Delegate()):
            where = place(statement.location.line_num)
            match statement:
                case config_parser.IncludeStatement(filename=name):
                    _read_file(name, roots, within, where)
                case config_parser.ImportStatement(module=module):
                    _import(module, where)
                case config_parser.BlockDeclaration(selector=selector):
                    _known(short_name(selector), where)
                case config_parser.BindingStatement(scope, selector, parameter, value):
                    _bind(scope, short_name(selector), parameter, value, where)
    except (SyntaxError, tokenize.TokenError) as error:
        if isinstance(error, SyntaxError):
            line, reason = error.lineno or 1, str(error.msg)
        else:
            reason, (line, _) = error.args
        if token := re.search(r"Failed to parse token '(.*)'", reason):
            reason = f"'{token[1]}' is no value: a string needs quotes, a name @, a macro %"
        lines = text.splitlines() or [""]
        shown = lines[min(line, len(lines)) - 1].strip()
        raise InputError(f"{place(line)}: syntax error at `{shown}`: {reason}") from error


def _import(module: str, where: str) -> None:
    """Imports a module of the user's, which may `configure.register` classes of its own."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{where}: can't import '{module}': {error}. The names of {PREFIX} need no import"
        ) from error
    if module not in _bindings.imports:
        _bindings.imports.append(module)


def _bind(scope: str, name: str, parameter: str, value: Any, where: str) -> None:
    if not parameter:  # NAME = value
        scope, name, parameter = f"{scope}/{name}" if scope else name, MACRO, "value"
    else:
        known = parameters(_known(name, where))
        catch_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        if parameter not in known and not catch_all:
            raise InputError(
                f"{name} has no parameter '{parameter}' ({where})."
                f"{did_you_mean(close_matches(parameter, known))} It takes: {', '.join(known)}"
            )
    for reference in references(value):
        if isinstance(reference, _Unknown):
            _known(reference.selector, where)
    gin.bind_parameter((scope, name, parameter), value)
    _bindings.add(scope, name, parameter, value, where)


# Checking and building


def arguments(function: Configurable, given: Iterable[str] = ()) -> dict[str, Any]:
    """The keyword arguments that the gin files read so far give to `function`, built.

    `given` names the arguments that the caller adds himself. Raises InputError, before anything is
    built, for macros that nothing uses or defines, values required but not given, missing arguments
    and circular references.
    """
    global _function
    register([function])
    _function = next(name for name, known in _registered.items() if known is function)
    _bindings.check(_function, given)
    try:
        return gin.get_bindings(_function)
    except InputError as error:
        raise InputError(commandline.message(error)) from error


def operative_config() -> str:
    """The configuration as one gin file, defaults included: enough to launch the program again.

    Holds all that the function configured last can reach, whether called yet or not (gin's own
    operative config has only what was called, and drops infinities), then bindings it doesn't use.
    Defaults that are Python objects appear as comments.
    """
    return _bindings.text(_function)


def save_operative_config(model_dir: str | os.PathLike[str]) -> None:
    """Writes config.gin into the run's folder, atomically, from process 0 alone.

    A config.gin that says something else is kept as config-0001.gin, config-0002.gin, ...
    """
    if jax.process_index() != 0:
        return
    folder, text = Path(model_dir), operative_config()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        older = (folder / f"config-{number:04}.gin" for number in itertools.count(1))
        shutil.copy2(path, next(name for name in older if not name.exists()))
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# Programs


def main(function: Configurable, *, like: Configurable | None = None, **given: Any) -> None:
    """Runs a program: flags, gin files, checks, building, then `function(**arguments)`; exits.

    On several hosts the processes meet before that call: by flags, or on a TPU pod by themselves,
    where `function` takes a `partitioner`.

    What gin files bind for the program `like` goes for `function` too, where it has a parameter of
    that name that is bound to nothing else: so `plan` takes the files of `train`.

    `given` are arguments that the program itself supplies, such as
    `save_config=configure.save_operative_config`. Exit codes: 0; 2 with one line `error: ...` for
    bad input (`--v=1` shows the traceback too); 130 when interrupted; 1 with a traceback for what
    nobody foresaw.
    """

    gc.freeze()

    def body() -> None:
        options = flags.FLAGS
        if not options["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell the world at INFO
        process = distributed.from_flags(
            options.coordinator, options.num_processes, options.process_id
        )
        reset()
        register([function])
        parse(options.gin_file, options.gin_bindings, options.gin_search_paths)
        if like is not None:
            _borrow(function, like)
        everything = {**arguments(function, given), **given}
        for bound in _bindings.unused(_function):
            if bound.where.startswith(COMMAND_LINE):
                print(f"warning: {_function} doesn't use {bound.where}", file=sys.stderr)
        if not options.dry_run:
            # On a pod, programs without a mesh (of data, say) are for one worker alone.
            if process is None and "partitioner" in parameters(function):
                process = distributed.on_pod()
            agreed = hashlib.sha256(operative_config().encode()).hexdigest()
            distributed.start(process, options.process_timeout, agreed)
            programs.keep()
            function(**everything)
            return
        print(operative_config())
        print(f"# Dry run, nothing was compiled. Next would come {_function} with:")
        for name, value in everything.items():
            print(f"#   {name} = {textwrap.shorten(repr(value), 90)}")

    def run(rest: Sequence[str]) -> int:
        if rest[1:]:
            print(f"error: unexpected '{rest[1]}': gin files go after --gin_file=", file=sys.stderr)
            return 2
        try:
            code = commandline.exit_code(body)
        except Exception:
            if distributed.started() is not None or aside.under_way():
                traceback.print_exc()
                distributed.leave(1)
                aside.leave(1)
            raise
        if code:
            distributed.leave(code)
            aside.leave(code)
        else:
            distributed.finish()
        return code

    def help_text(everything: bool) -> str:
        register()
        return commandline.help_text(function, _registered if everything else {})

    app.run(
        run, flags_parser=lambda argv: commandline.parse_flags(argv, function, is_value, help_text)
    )


def _borrow(function: Configurable, like: Configurable) -> None:
    """Binds for `function` what is bound for `like`."""
    own, theirs = function.__name__, like.__name__
    for (scope, name, parameter), bound in list(_bindings.bound.items()):
        new = (scope, own, parameter)
        if name == theirs and parameter in parameters(function) and new not in _bindings.bound:
            _bind(*new, bound.value, bound.where)


def is_value(text: str) -> bool:
    """Whether gin reads the whole of `text` as one value."""
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        parser.parse_value()
    except (SyntaxError, tokenize.TokenError):
        return False
    return parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)


def _known(name: str, where: str) -> Configurable:
    if name in _registered:
        return _registered[name]
    # The last part of T5X's longer names is often ours: train_script.train
    close = close_matches(name, _registered) or close_matches(name.rsplit(".", 1)[-1], _registered)
    raise InputError(
        f"nothing that can be configured is called '{name}' ({where}).{did_you_mean(close)} "
        "--helpfull lists the names"
    )


if _collects:
    gc.freeze()
    gc.unfreeze()  # now they count as old, or the next object would start a search of them
    gc.enable()
