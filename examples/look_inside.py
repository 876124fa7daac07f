"""Which expert took which token? Writes experts.png: a row per layer, a column per token, a colour per expert.

The long stretch of image tokens is easy to tell from the text around it.

python examples/look_inside.py [OUTPUT.png]
"""

import argparse
import colorsys

import torch
from PIL import Image

from llama4 import Llama4
from llama4.model.moe import Router
from llama4.tiny.shapes_dataset import Scene, Shape, draw

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", metavar="OUTPUT.png", nargs="?", default="experts.png")
args = parser.parse_args()

llm = Llama4.from_pretrained("tiny")
picture = draw(Scene(220, 160, shapes=(Shape("circle", "blue", (60, 80), 60), Shape("star", "red", (160, 80), 60))))
content = [{"type": "image", "image": picture}, {"type": "text", "text": "Where is the star relative to the circle?"}]
inputs = llm.processor([{"role": "user", "content": content}])

chosen = []  # per layer, the first choice of every token
for module in llm.model.modules():
    if isinstance(module, Router):
        module.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[1][:, 0]))
with torch.inference_mode():
    llm.model(inputs.input_ids, pixel_values=inputs.pixel_values)

experts = llm.config.text.num_local_experts
palette = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / experts, 0.7, 0.95)) for i in range(experts)]
image = Image.new("RGB", (len(chosen[0]), len(chosen)))
image.putdata([palette[expert] for layer in chosen for expert in layer.tolist()])
image.resize((4 * image.width, 24 * image.height), Image.Resampling.NEAREST).save(args.output)

for i, layer in enumerate(chosen):
    shares = torch.bincount(layer, minlength=experts) / len(layer)
    print(f"layer {i}: " + "  ".join(f"{expert}: {share:4.0%}" for expert, share in enumerate(shares.tolist())))
print(f"wrote {args.output}")
