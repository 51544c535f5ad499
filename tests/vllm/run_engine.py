"""One engine in a process of its own, told by a JSON argument; prints what it generated, or why it did not start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.vllm import engine


def main() -> None:
    engine.prepare()
    told = json.loads(sys.argv[1])
    if told["before"]:
        exec(told["before"], {})
    try:
        with engine.engine(Path(told["model"]), told["lagkv"], **told["arguments"]) as one:
            found: dict[str, Any] = {
                "tokens": one.generate(told["prompts"], told["new"]),
                "plugins": _plugins(),
            }
            if told["inside"]:  # the scheduler is in this process
                config = one.scheduler.kv_cache_manager.kv_cache_config
                found["blocks"] = config.num_blocks
                found["groups"] = [
                    [group.layer_names, type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size]
                    for group in config.kv_cache_groups
                ]
                found["managers"] = [type(manager).__name__ for manager in one.managers]
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print("FOUND " + json.dumps(found), flush=True)


def _plugins() -> bool:
    return "lagkv_ext.vllm.manager" in sys.modules


if __name__ == "__main__":
    main()
