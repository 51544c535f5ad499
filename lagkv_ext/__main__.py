"""``python -m lagkv_ext info``: what was built and what runs here. Needs torch alone; the rest is ``lagkv``."""

from __future__ import annotations

import json
import sys
from typing import Any

from lagkv_ext import info


def main(arguments: list[str]) -> int:
    if arguments == ["info"]:
        print("\n".join(lines(info())))
        return 0
    if arguments == ["info", "--json"]:
        print(json.dumps(info(), indent=2))
        return 0
    print(
        "usage: python -m lagkv_ext info [--json]\n(other commands: lagkv --help, with lagkv_ext[demo])",
        file=sys.stderr,
    )
    return 2


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """One ``name: value`` line per fact, nested facts indented."""
    out = []
    for name, value in facts.items():
        if isinstance(value, dict):
            out.append(f"{indent}{name}:")
            out.extend(lines(value, indent + "  "))
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.append(f"{indent}{name}: {'none' if text in (None, '') else text}")
    return out


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
