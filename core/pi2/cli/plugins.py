"""``pi2 plugins``: every implementation, and why it can or cannot run here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pi2.cli import options as o
from pi2.cli.output import print_json, print_table

if TYPE_CHECKING:
    from pi2.plugins import Plugins


def command(json: o.Json = False) -> None:
    """List what can run here, and why not.

    ok can run here, -- cannot, !! is broken.
    """
    found = describe(o.installed_plugins())
    if json:
        print_json(found)
        return
    rows = [["", "kind", "name", "score", "reason"]]
    for item in found["implementations"]:
        mark = "ok" if item["ok"] else "--"
        rows.append([mark, item["kind"].replace("_", " "), item["name"], str(item["score"]), item["reason"]])
    rows += [["ok", "model", name, "", path] for name, path in found["models"].items()]
    rows += [["!!", "plugin", name, "", reason] for name, reason in found["broken"].items()]
    print_table(rows)
    print()
    plugins = [[name, p["version"], ", ".join(p["hooks"])] for name, p in found["plugins"].items()]
    print_table([["plugin", "version", "hooks"], *plugins])


def describe(plugins: Plugins) -> dict[str, Any]:
    """Everything that ``--json`` prints: implementations, models, plugins, broken plugins."""
    import pi2
    from pi2.plugins import KINDS, probe

    implementations = []
    for kind in KINDS:
        for name, cls in plugins.of(kind).items():
            verdict = probe(cls)
            item = {"kind": kind, "name": name, "ok": bool(verdict), "score": verdict.score}
            implementations.append({**item, "reason": verdict.reason, "class": _path(cls)})
    accepted = {
        name: {
            "version": plugins.versions.get(name, f"pi2 {pi2.__version__}"),
            "hooks": plugins.hooks_of(name),
        }
        for name in plugins.names
    }
    return {
        "implementations": implementations,
        "models": {name: str(path) for name, path in plugins.models.items()},
        "plugins": accepted,
        "broken": dict(plugins.broken),
    }


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
