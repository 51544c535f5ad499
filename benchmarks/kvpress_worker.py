"""kvpress's LagKVPress in a process of its own, under an interpreter that has kvpress; driven by lines of JSON.

kvpress wants another transformers than lagkv_ext's caches do, so the two seldom share an environment. This file
imports torch and kvpress alone, and nothing of lagkv_ext. Commands on standard input, one answer each:
``{"do": "load", ...}``, ``{"do": "index", "path": ...}``, ``{"do": "run"}``; end of input ends the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import LagKVPress


class Worker:
    """One problem: keys and values read from a file, compressed to ``rows`` rows as kvpress does it."""

    def load(self, path: str, device: str, threads: int, start: int, lag_size: int, rows: int) -> dict:
        if threads:
            torch.set_num_threads(threads)
        data = torch.load(path, map_location=device)
        self.key, self.value = data["key"], data["value"]
        tokens = self.key.shape[2]
        # kvpress counts the share removed and rounds down what is left: aim at the middle of the wanted integer.
        self.press = LagKVPress(
            compression_ratio=1 - (rows + 0.5) / tokens if rows < tokens else 0.0,
            n_sink=start,
            lag_size=lag_size,
        )
        self.module = SimpleNamespace(head_dim=self.key.shape[3])
        versions = {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")}
        return {"versions": versions}

    def compress(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.press.compress(self.module, None, self.key, self.value, None, {})

    def index(self, path: str) -> dict:
        """Writes keys and values as compressed, and the positions kept, in kvpress's order."""
        key, value = self.compress()
        scores = self.press.score(self.module, None, self.key, self.value, None, {})
        torch.save({"index": scores.topk(key.shape[2], dim=-1).indices.cpu(), "key": key.cpu()}, path)
        del value
        return {}

    def run(self) -> dict:
        if self.key.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result: Any = self.compress()
            end.record()
            end.synchronize()
            return {"seconds": begin.elapsed_time(end) * 1e-3}
        begin_s = time.perf_counter()
        result = self.compress()
        seconds = time.perf_counter() - begin_s
        del result
        return {"seconds": seconds}


def main() -> None:
    worker = Worker()
    with torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            action = getattr(worker, command.pop("do"))
            print(json.dumps(action(**command)), flush=True)


if __name__ == "__main__":
    main()
