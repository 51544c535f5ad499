"""The metrics of a server: scraped over HTTP while a request is in flight, and after it has ended."""

import urllib.request

import torch
from prometheus_client import start_http_server
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache
from lagkv_ext.serving.monitor import CacheMonitor

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2)).eval()
server, monitor = start_http_server(0, "127.0.0.1")[0], CacheMonitor(labels={"model": "tiny"})
cache, address = LagKVCache(model.config, lag_size=16), f"http://127.0.0.1:{server.server_port}"
with monitor.request(cache):
    model.generate(torch.randint(3, 64, (1, 500)), cache=cache, max_new_tokens=50)
    in_flight = urllib.request.urlopen(address).read().decode()
for text in (in_flight, urllib.request.urlopen(address).read().decode()):
    print(*(x for x in text.splitlines() if x.startswith(("lagkv_cache_bytes", "lagkv_tokens"))), sep="\n")
server.shutdown()
