"""What gin files bind, as data: what a function reaches, whether that is complete, and its text.

`configure` fills a `Bindings` while it reads; this module knows the rules of gin (scopes, macros,
references) but not gin itself. A node is a configurable in a scope: `train/Batches` is
`(("train",), "Batches")`, and the macro `%STEPS` is `(("STEPS",), "gin.macro")`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

from t5x_lite.types import InputError

Configurable: TypeAlias = Callable[..., Any]
Node: TypeAlias = tuple[tuple[str, ...], str]

PREFIX: Final = "t5x_lite"  # the module under which names are registered: t5x_lite.Batches
COMMAND_LINE: Final = "command line:"
MACRO: Final = "gin.macro"  # gin's own name for what %NAME calls, in the scope NAME
REQUIRED: Final = "gin.REQUIRED"
LINE_LENGTH: Final = 100


@runtime_checkable
class Reference(Protocol):
    """@scopes/selector, or with `evaluate` @scopes/selector(); gin writes %X as @X/gin.macro()."""

    selector: str
    scopes: Sequence[str]
    evaluate: bool


class Bound(NamedTuple):
    """A value given to a parameter, and where: 'runs/a.gin:3' or the flag."""

    value: Any
    where: str
    key: tuple[str, str, str]  # scope, configurable, parameter


@dataclasses.dataclass
class Bindings:
    """All that was read so far, later values over earlier ones."""

    registered: Mapping[str, Configurable]  # by short name
    bound: dict[tuple[str, str, str], Bound] = dataclasses.field(default_factory=dict)
    macros_used: set[str] = dataclasses.field(default_factory=set)  # by any line, in force or not
    imports: list[str] = dataclasses.field(default_factory=list)

    def add(self, scope: str, name: str, parameter: str, value: Any, where: str) -> None:
        """Binds `scope/name.parameter`."""
        key = (scope, name, parameter)
        self.bound[key] = Bound(value, where, key)
        self.macros_used |= {macro_name(reference) for reference in references(value)} - {""}

    def effective(self, node: Node) -> dict[str, Bound]:
        """What is bound for a node by parameter: the outer scopes' values, inner ones winning."""
        scope, name = node
        outer = ["/".join(scope[:depth]) for depth in range(len(scope) + 1)]
        return {
            parameter: bound
            for prefix in outer
            for (scope_bound, known, parameter), bound in self.bound.items()
            if scope_bound == prefix and known == name
        }

    def check(self, function: str, given: Iterable[str] = ()) -> None:
        """Raises InputError for what would make building `function`'s arguments fail, or mislead.

        That is: a macro of the command line that nothing uses (misspelt, most likely), and among
        what `function` reaches, macros that are required or not defined, missing arguments and
        circles. `given` names arguments of `function` that come from elsewhere.
        """
        for (scope, name, _), bound in self.bound.items():
            # A file may offer macros that another program uses; a command line means its own.
            given_now = bound.where.startswith(COMMAND_LINE)
            if name == MACRO and scope not in self.macros_used and given_now:
                is_name = f" Or set a parameter of it: {scope}.PARAMETER = VALUE."
                raise InputError(
                    f"nothing uses the macro {scope} ({bound.where})."
                    f"{did_you_mean(close_matches(scope, self.macros_used))}"
                    f"{is_name if scope in self.registered else ''} Macros in use: "
                    f"{', '.join(sorted(self.macros_used - {REQUIRED})) or 'none'}"
                )
        _Walk(self, function, frozenset(given))

    def reachable(self, function: str) -> dict[Node, dict[str, Bound]]:
        """Maps each node that calling `function` can call to what is bound there; unchecked."""
        return _Walk(self, function, None).found

    def unused(self, function: str) -> list[Bound]:
        """The bindings that make no difference to `function`."""
        reached = self.reachable(function).values()
        used = {bound.key for bounds in reached for bound in bounds.values()}
        return [bound for key, bound in self.bound.items() if key not in used]

    def text(self, function: str) -> str:
        """One gin file that says it all, defaults included: see `configure.operative_config`."""
        lines = [f"# What {function} was built from; defaults are written out."]
        lines += [f"import {module}" for module in self.imports]
        macros = {s: bound.value for (s, n, _), bound in self.bound.items() if n == MACRO}
        lines += [""] if macros else []
        lines += [_assignment(name, macros[name]) for name in sorted(macros)]
        reached = self.reachable(function)
        for node in sorted(reached, key=lambda node: (node[1] != function, node[1], node[0])):
            if node[1] == MACRO:
                continue
            target = self.registered[node[1]]
            bound_values = {parameter: bound.value for parameter, bound in reached[node].items()}
            values = {**_defaults(target), **bound_values}
            order = dict.fromkeys([*parameters(target), *values])  # **kwargs come last
            lines.append("")
            lines += [_assignment(f"{label(node)}.{p}", values[p]) for p in order if p in values]
        unused = [bound for bound in self.unused(function) if bound.key[1] != MACRO]
        lines += ["", f"# Bound, but not used by {function}:"] if unused else []
        for value, _, (scope, name, parameter) in unused:
            key = f"{scope}/{name}" if scope else name
            lines.append(_assignment(f"{key}.{parameter}", value))
        return "\n".join(lines) + "\n"


class _Walk:
    """From a function through all references; with `given` not None, also checked on the way."""

    def __init__(self, bindings: Bindings, function: str, given: frozenset[str] | None):
        self.bindings, self.function, self.given = bindings, function, given
        self.found: dict[Node, dict[str, Bound]] = {}
        self.built: set[Node] = set()  # nodes that are called with what is bound and nothing else
        self.visit(((), function), (), "the program")

    def visit(self, node: Node, active: tuple[str, ...] | None, user: str) -> None:
        """`active`: the nodes being built around this one; None for a reference without (), which
        Python calls later, in a scope and with arguments unknown here."""
        scope, name = node
        if active is not None:
            if label(node) in active:
                circle = " -> ".join((*active, label(node)))
                raise InputError(f"the configuration goes round in a circle: {circle}")
            active = (*active, label(node))
        if node in self.built or (node in self.found and active is None):
            return
        self.found[node] = bound = self.bindings.effective(node)
        if active is not None:
            self.built.add(node)
            self.check_complete(node, bound, user)
        for parameter, (value, where, _) in bound.items():
            use = label(node) if name == MACRO else f"{label(node)}.{parameter}"
            for reference in references(value):
                macro, scopes = macro_name(reference), tuple(reference.scopes)
                if macro == REQUIRED:
                    self.check_required(use, where, user if name == MACRO else "")
                elif macro:
                    self.visit((scopes, MACRO), active or (), f"{use} ({where})")
                elif reference.evaluate:
                    target = (scopes or scope, short_name(reference.selector))
                    self.visit(target, active or (), f"{use} ({where})")
                else:
                    for seen_from in {scopes or scope, scopes}:
                        self.visit((seen_from, short_name(reference.selector)), None, use)

    def check_required(self, use: str, where: str, user: str) -> None:
        if self.given is not None:
            used = f" and {user} uses it" if user else ""
            raise InputError(
                f"{use} has no value yet: {where} requires one{used}. "
                f"Add --gin.{use.removeprefix('%')}=VALUE"
            )

    def check_complete(self, node: Node, bound: Mapping[str, Bound], user: str) -> None:
        if self.given is None:
            return
        if node[1] == MACRO:
            macro = "/".join(node[0])
            if not bound:
                defined = [s for s, name, _ in self.bindings.bound if name == MACRO]
                raise InputError(
                    f"the macro %{macro}, used by {user}, is never defined."
                    f"{did_you_mean(close_matches(macro, defined))} Add --gin.{macro}=VALUE"
                )
            return
        from_elsewhere = self.given if node[1] == self.function else ()
        missing = [
            name
            for name, parameter in parameters(self.bindings.registered[node[1]]).items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name not in bound
            and name not in from_elsewhere
        ]
        if missing:
            needs = f"{label(node)}, used by {user}," if node[0] or node[1] != self.function else ""
            raise InputError(
                f"{needs or label(node)} needs a value for {', '.join(missing)}: put "
                f"`{label(node)}.{missing[0]} = VALUE` into a gin file (--gin_file), or add "
                f"--gin.{label(node)}.{missing[0]}=VALUE"
            )


def references(value: Any) -> Iterator[Any]:
    """The references in a bound value, however deep."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif isinstance(value, Reference):
        yield value


def macro_name(reference: Any) -> str:
    """'X' for %X, '' for a reference to a configurable."""
    text = repr(reference)
    return text[1:] if text.startswith("%") else ""


def short_name(selector: str) -> str:
    """'Batches' for 't5x_lite.Batches'."""
    return selector.removeprefix(f"{PREFIX}.")


def label(node: Node) -> str:
    """As gin files write it: 'train/Batches', '%STEPS'."""
    scope, name = node
    return f"%{'/'.join(scope)}" if name == MACRO else "/".join((*scope, name))


def parameters(target: Configurable) -> dict[str, inspect.Parameter]:
    """What may be bound for a class or function."""
    found = dict(inspect.signature(target).parameters)
    if "parent" in found and hasattr(target, "apply"):  # a Flax module's own two fields
        del found["parent"], found["name"]
    return found


def close_matches(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that `name` may have been meant for."""
    by_lower = {other.lower(): other for other in known}
    return [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower)]


def did_you_mean(names: Sequence[str]) -> str:
    """A sentence with a leading space, or nothing."""
    return f" Did you mean {' or '.join(names)}?" if names else ""


def literal(value: Any) -> str | None:
    """`value` as gin reads it back, or None if it can't."""
    if isinstance(value, Reference) or value is None or type(value) in (bool, int, str, bytes):
        return repr(value)
    if type(value) is float and not math.isnan(value):
        return repr(value).replace("inf", "1e999")  # gin has no word for infinity
    if type(value) not in (list, tuple, dict):
        return None
    parts = _items(value)
    if parts is None:
        return None
    opening, closing = _BRACKETS[type(value)]
    comma = "," if type(value) is tuple and len(parts) == 1 else ""
    return f"{opening}{', '.join(parts)}{comma}{closing}"


_BRACKETS: Final[dict[Any, tuple[str, str]]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
}


def _items(value: Any) -> list[str] | None:
    keys = [literal(item) for item in value]
    values = [literal(item) for item in value.values()] if isinstance(value, dict) else []
    if None in keys or None in values:
        return None
    pairs = zip(keys, values, strict=True) if values else ()
    return [f"{key}: {item}" for key, item in pairs] or [str(key) for key in keys]


def _assignment(key: str, value: Any) -> str:
    text = literal(value)
    if text is None:
        shown = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address would differ every run
        return f"# {key} = {' '.join(shown.split())}  (a default made in Python)"
    if len(f"{key} = {text}") > LINE_LENGTH and type(value) in _BRACKETS:
        opening, closing = _BRACKETS[type(value)]
        rows = [f"    {item},\n" for item in _items(value) or ()]
        text = f"{opening}\n{''.join(rows)}{closing}"
    return f"{key} = {text}"


def _defaults(target: Configurable) -> dict[str, Any]:
    """Default values by parameter, in order; what a dataclass's default factories make is there."""
    found = {n: p.default for n, p in parameters(target).items() if p.default is not p.empty}
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            if field.name in found and field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
    return found
