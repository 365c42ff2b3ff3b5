"""Chat templates: Jinja programs that come with a model, so strangers' code, run in a sandbox with limits.

Semantics are those of Hugging Face transformers: blocks trimmed, ``raise_exception``, ``strftime_now``,
``tojson`` without HTML escapes, loop controls, and ``{% generation %}`` as a mere scope.

Jinja's sandbox keeps a template from the machine, but not from running for ever or filling the memory.
So the syntax tree is changed before it is compiled: every turn of a loop, call of a macro, made list and
joined text is paid for out of a budget, and no single value may outgrow a limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pi2.errors import FormatError

_SOURCE_LIMIT = 1 << 20  # characters of a template; the longest known have 2^16
_VALUE_LIMIT = 1 << 22  # weight of one value beyond what the conversation itself explains
_BUDGET = 16  # total weight, in units of the limit of one value
_TURN = 64  # weight of one turn of a loop: a million empty turns take a second
_CALL = 512  # weight of one call: a hundred thousand take a second
_DETAIL = 16  # largest width or separator that a formatting option may ask for
_UNSAFE_FILTERS = ("center", "format", "pprint", "urlize", "wordwrap", "xmlattr")  # grow without bounds
_UNSAFE_METHODS = ("to_bytes", "translate", "maketrans")
_PADDING_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs")


class _Refusal(TemplateError):
    """The template itself called raise_exception."""


class _TooMuch(Exception):
    """The template used up its budget."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **extra: Any,
) -> str:
    """The prompt for a conversation, control tokens spelt out; encode it with ``bos=False``.

    ``messages`` have a "role" and a "content".  ``extra`` reaches the template as it is (tools,
    enable_thinking).  Raises FormatError if the template is damaged, refuses the conversation, or
    takes more time or memory than a chat template has any use for.
    """
    variables: dict[str, Any] = {"tools": None, "documents": None, **extra}
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables |= {name: text for name, text in tokens.items() if text is not None}
    if len(template) > _SOURCE_LIMIT:
        raise FormatError(f"the chat template has {len(template)} characters, which no honest one has")
    try:
        sandbox = _Sandbox(_VALUE_LIMIT + 8 * _weight(list(variables.values()), 1 << 40))
        return sandbox.run(template, variables)
    except _Refusal as e:
        raise FormatError(
            f"the model's chat template refuses this conversation: {_line(e)}",
            hint="roles usually alternate between user and assistant; --raw uses no template",
        ) from None
    except _TooMuch:
        raise FormatError(
            "the model's chat template takes too much time or memory", hint="--raw uses no template"
        ) from None
    except Exception as e:  # whatever a stranger's program can raise
        raise FormatError(
            f"the model's chat template fails: {type(e).__name__}: {_line(e)}", hint="--raw uses no template"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _weight(value: Any, limit: int) -> int:
    """About how many characters ``value`` prints as; shared parts count each time.  Stops at ``limit``."""
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += 1
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, Mapping):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
    return total


class _Namespace(Namespace):
    """Jinja's namespace, but it prints short: namespaces within namespaces could print for ever."""

    def __repr__(self) -> str:
        return "<namespace>"


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meters(NodeTransformer):
    """Puts the meters into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  Jinja names visitors after nodes
        if node.test is not None:  # turns that the condition skips cost too
            node.test = nodes.And(self._toll(node), node.test, lineno=node.lineno)
        return self._with_toll(node)

    def _with_toll(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._toll(node), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = _with_toll  # noqa: N815

    def _toll(self, node: nodes.Node) -> nodes.Expr:
        static = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        return _filter(nodes.Const(_TURN + static, lineno=node.lineno), "_toll")

    def _weighed(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        stored = getattr(node, "ctx", "load") != "load"  # the (a, b) of {% for a, b in ... %}
        return node if constant or stored else _filter(node, "_weighed")

    visit_List = visit_Tuple = visit_Dict = visit_Concat = _weighed  # noqa: N815


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering: the environment and what is left of its budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, limit: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=pass_context(lambda context, value: self.pay(value)),
        )
        self._limit = limit
        self._left = _BUDGET * limit
        self.filters = {
            name: self._bounded(name, f) for name, f in self.filters.items() if name not in _UNSAFE_FILTERS
        }
        self.filters["tojson"] = self._bounded("tojson", _tojson)
        self.filters["_toll"] = pass_context(lambda context, weight: self._take(weight))
        self.filters["_weighed"] = pass_context(lambda context, value: self.pay(value))
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    def run(self, source: str, variables: Mapping[str, Any]) -> str:
        """Compile with meters, and render."""
        tree = _Meters().visit(self.parse(source))
        template = Template.from_code(self, self.compile(tree), self.make_globals(None))
        pieces: list[str] = []
        size = 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > self._limit:
                raise _TooMuch
            pieces.append(piece)
        return "".join(pieces)

    def pay(self, value: Any) -> Any:
        """Return ``value`` after taking its weight from the budget."""
        weight = _weight(value, self._limit)
        self._expect(weight)
        self._take(weight)
        return value

    def _take(self, weight: int) -> bool:
        self._left -= weight
        if self._left < 0:
            raise _TooMuch
        return True

    def _expect(self, weight: int) -> None:
        """Refuse a value of this weight before it is made."""
        if weight > self._limit:
            raise _TooMuch

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            raise TemplateError("formatting with % is not part of chat templates")
        if operator == "**":
            self._expect(_weight(left, self._limit) * abs(int(right)))
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    self._expect(_weight(value, self._limit) * max(times, 0))
        return self.pay(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._take(_CALL)
        name = getattr(__obj, "__name__", "")
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # Jinja wraps str.format
        if isinstance(owner, (str, bytes, int)):
            __self._check_method(str(name), owner, [*args, *kwargs.values()])
        return __self.pay(super().call(__context, __obj, *args, **kwargs))

    def _check_method(self, name: str, owner: Any, args: Sequence[Any]) -> None:
        """Refuse the methods of texts and numbers whose result may be far larger than their arguments."""
        if name in _UNSAFE_METHODS or (name in ("format", "format_map") and ":" in owner):
            raise TemplateError(f"the method {name} is not part of chat templates")
        if name in _PADDING_METHODS:
            self._expect(len(owner) * max([1, *(a for a in args if isinstance(a, int))]))
        if name in ("format", "format_map"):
            self._expect(len(owner) + owner.count("{") * _weight(args, self._limit))
        if name == "replace" and len(args) > 1:
            self._expect(len(owner) + owner.count(args[0]) * len(args[1]))
        if name == "join" and args:
            self._expect_joined(owner, args[0])

    def _expect_joined(self, separator: Any, items: Any) -> None:
        if isinstance(items, (list, tuple, str)):
            self._expect(_weight(items, self._limit) + len(items) * len(str(separator)))
        else:
            raise TemplateError("only lists can be joined")

    def _bounded(self, name: str, function: Any) -> Any:
        """A filter that pays for its result, and refuses what would make that far larger than its input."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, options = args[first], [*args[first + 1 :], *kwargs.values()]
            if name == "replace":
                self._check_method(name, str(value), [str(o) for o in options[:2]])
            elif name == "join":
                value = list(value)
                self._expect_joined(options[0] if options else "", value)
                args = (*args[:first], value, *args[first + 1 :])
            elif name in ("indent", "tojson", "batch", "slice", "round", "truncate"):
                _check_details(name, options)
            return self.pay(function(*args, **kwargs))

        return bounded


def _check_details(name: str, options: Sequence[Any]) -> None:
    for option in options:
        parts = option if isinstance(option, (list, tuple)) else [option]
        widths = [len(p) if isinstance(p, str) else p for p in parts if isinstance(p, (str, int))]
        if name != "truncate" and any(w > _DETAIL for w in widths):
            raise TemplateError(f"the filter {name} takes options up to {_DETAIL}")


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
