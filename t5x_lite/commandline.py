"""The command line of every program: flags, `--gin.NAME=VALUE`, help, exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from t5x_lite.bindings import Configurable, parameters
from t5x_lite.types import InputError

flags.DEFINE_multi_string("gin_file", [], "A gin file; may be repeated, later ones win.")
flags.DEFINE_multi_string(
    "gin_bindings", [], "A gin statement, read after the files; may be repeated."
)
flags.DEFINE_list("gin_search_paths", [], "More folders to look for gin files in: A,B.")
flags.DEFINE_boolean("dry_run", False, "Only reads, checks, builds and prints the configuration.")
flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several processes of one run meet."
)
flags.DEFINE_integer("num_processes", None, "How many they are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
flags.DEFINE_float(
    "process_timeout", 300.0, "Seconds to wait for all of them, here and on a pod.", lower_bound=1
)
OWN = (
    *("gin_file", "gin_bindings", "gin_search_paths", "dry_run"),
    *("coordinator", "num_processes", "process_id", "process_timeout"),
)


def parse_flags(
    argv: Sequence[str],
    function: Configurable,
    is_value: Callable[[str], bool],
    help_text: Callable[[bool], str],
) -> list[str]:
    """Parses absl flags; returns what is left. Prints help, or one line on a mistake, and exits.

    `function` is the program's: `--NAME=VALUE` sets its parameter NAME. `is_value` says whether a
    text is a value in gin's syntax; `help_text` takes whether all is wanted (--helpfull).
    """
    asked = {argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")}
    if asked & {"help", "h", "?", "helpshort", "helpfull"}:
        print(help_text("helpfull" in asked))
        sys.exit(0)
    try:
        return flags.FLAGS(rewrite_bindings(lengthen(argv, function), is_value))
    except (InputError, flags.Error) as error:
        print(f"error: {error} (--help shows the flags)", file=sys.stderr)
        sys.exit(2)


def lengthen(argv: Sequence[str], function: Configurable) -> list[str]:
    """Turns `--NAME=VALUE` into `--gin.FUNCTION.NAME=VALUE` where the function takes NAME."""
    own = set(parameters(function)) - set(flags.FLAGS)
    return [
        f"--gin.{function.__name__}.{match[1]}={match[2]}"
        if (match := re.fullmatch(r"--?(\w+)=(.*)", argument, re.S)) and match[1] in own
        else argument
        for argument in argv
    ]


def rewrite_bindings(argv: Sequence[str], is_value: Callable[[str], bool]) -> list[str]:
    """Turns `--gin.NAME=VALUE` into `--gin_bindings=NAME = VALUE`; VALUE may be a bare string.

    So `--gin.train.steps=10` binds 10 and `--gin.MODEL_DIR=/tmp/x` binds '/tmp/x'. What starts like
    a reference, a string or a container is left for gin, to complain about if need be.
    """
    rewritten = []
    for argument in argv:
        if not re.match(r"--?gin\.", argument):
            rewritten.append(argument)
            continue
        name, equals, value = argument.partition("gin.")[2].partition("=")
        bare = value.strip()
        if not (name.strip() and equals):
            raise InputError(f"'{argument}': expected --gin.NAME=VALUE")
        if bare.lower() in ("true", "false", "none") and bare != bare.capitalize():
            raise InputError(f"'{argument}': write {bare.capitalize()}, or quote the string")
        if not (bare[:1] in set("@%'\"([{") or is_value(bare)):
            value = repr(value)
        rewritten.append(f"--gin_bindings={name} = {value}")
    return rewritten


def help_text(function: Configurable, names: Mapping[str, Configurable]) -> str:
    """The program's docstring, an example, the flags, what `function` takes, and `names`.

    What its docstring says of a parameter under "Args:" stands below it.

    absl's own text would list the flags of every library imported, and none of gin's names.
    """
    name = function.__name__
    example = f"python {sys.argv[0]} --gin_file=runs/mine.gin --NAME=VALUE --dry_run"
    lines = [
        (sys.modules["__main__"].__doc__ or inspect.getdoc(function) or "").strip(),
        *("", "Example:", f"  {example}", "", "Flags:"),
        "  --gin.NAME=VALUE    Sets a macro, or a parameter: --gin.CONFIGURABLE.PARAMETER=VALUE.",
    ]
    for flag in OWN:  # absl adds a second line to the help of repeatable flags
        lines.append(f"  --{flag:18}{flags.FLAGS[flag].help.splitlines()[0].rstrip(';')}")
    lines += ["  --v=1               Shows tracebacks, and more of the log.", ""]
    lines += [
        f"What {name} takes (--NAME=VALUE, or {name}.NAME = VALUE in a gin file; --helpfull lists "
        "all other names):"
    ]
    told = descriptions(inspect.getdoc(function) or "")
    for parameter in parameters(function).values():
        lines.append(f"  {_shown(parameter)}")
        lines += textwrap.wrap(
            told.get(parameter.name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    for known, target in sorted(names.items()):
        lines.append(f"  {known:28}{(inspect.getdoc(target) or '').partition(chr(10))[0]}")
    return "\n".join(lines)


def _shown(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    typed = (
        parameter.name if parameter.annotation is parameter.empty else f"{parameter.name}: {kind}"
    )
    default = parameter.default
    if default is parameter.empty:
        return f"{typed} (required)"
    if dataclasses.is_dataclass(default) and repr(default) == repr(_bare(type(default))):
        return f"{typed} = {type(default).__name__}()"
    return f"{typed} = {default!r}"


def _bare(kind: type) -> object:
    """One with every default, or None where something is required."""
    try:
        return kind()
    except TypeError:
        return None


def descriptions(docstring: str) -> dict[str, str]:
    """What a docstring's section "Args:" says of each parameter, on one line."""
    _, _, section = docstring.partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    found: dict[str, str] = {}
    for entry in re.split(r"^  (?=\S)", section, flags=re.M)[1:]:
        names, _, text = entry.partition(":")
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def exit_code(body: Callable[[], None]) -> int:
    """Runs a program's body and says in one line what stopped it, if that was foreseen.

    0; 2 for bad input, whose traceback `--v=1` shows; 130 when interrupted. Other exceptions pass.
    """
    try:
        body()
    except InputError as error:
        if flags.FLAGS.verbosity >= 1:
            traceback.print_exc()
        print(f"error: {message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv])
        print(
            f"interrupted; the same command resumes from the last checkpoint: {command}",
            file=sys.stderr,
        )
        return 130
    return 0


def message(error: InputError) -> str:
    """The error's message; gin's "In call to configurable" lines become one short remark."""
    pattern = r"\n\s*In call to configurable '([^']+)' \(.*?\)(?: in scope '([^']+)')?(?=\n|$)"
    calls = [
        f"%{scope}" if name == "macro" else f"@{scope}/{name}()" if scope else f"@{name}()"
        for name, scope in re.findall(pattern, str(error))
    ]
    text = re.sub(pattern, "", str(error))
    return f"{text} [in {', in '.join(calls)}]" if calls else text
