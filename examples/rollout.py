"""Half of the requests get a compressed cache and are checked against the full one, until the guard trips."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext.serving.rollout import Guard, Policy, Rollout, Store, Variant

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, eos_token_id=None)
store = Store(tempfile.mkdtemp() + "/lagkv-rollout.json")  # on the command line: lagkv rollout init
variants = {"lagkv": Variant(share=0.5, settings={"lag_size": 16, "keep_ratio": 0.125})}
store.write(lambda old: Policy(1, True, variants, guard=Guard(check_share=1.0, min_agreement=0.9)))
rollout, model = Rollout(store.path, config), LlamaForCausalLM(config).eval()
for i in range(12):
    prompt = torch.randint(3, 64, (1, 200))
    decision = rollout.cache(request_id=f"user-{i}", prompt_tokens=200)
    output = model.generate(prompt, cache=decision.cache, max_new_tokens=20)
    print(decision.reason, rollout.check(model, prompt, output[:, 200:]) if decision.wants_check else "")
