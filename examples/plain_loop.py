"""Train an adapter in a plain loop: data, loss, gradients, optimizer, and nothing in between.

    python examples/plain_loop.py OUT_DIR

Writes OUT_DIR/colours.jsonl and OUT_DIR/adapter.
"""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", metavar="OUT_DIR", type=Path)
output = parser.parse_args().output  # before the imports, which take seconds

import torch

from llama4 import Llama4
from llama4.adapters.files import save_adapter
from llama4.adapters.lora import Adapter
from llama4.train import LoraConfig
from llama4.train.data import Batches, load_dataset
from llama4.train.objectives import batch_loss

output.mkdir(parents=True, exist_ok=True)
with open(output / "colours.jsonl", "w", encoding="utf-8") as file:
    for thing, colour in {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}.items():
        file.write(json.dumps({"prompt": f"Which colour has {thing}?", "completion": f"It is {colour}."}) + "\n")

llm = Llama4.from_pretrained("tiny", dtype="float32", progress=False)
llm.model.requires_grad_(False)
data = load_dataset(output / "colours.jsonl", llm.processor, max_length=512, progress=False)
batches = Batches(data.examples, llm.processor, tokens=64)  # shuffled anew in each epoch

adapter = Adapter.create(llm.model, LoraConfig(rank=8))
adapter.attach(llm.model)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
for step in range(batches.steps_of(epochs=10)):
    loss = batch_loss(llm.model, batches[step]) / batches[step].num_learnt
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.3f}:", llm.chat("Which colour has snow?").text)
save_adapter(adapter, llm.model, output / "adapter", base="tiny")
