"""Show the embedded model two pictures in one message and have it compare them.

python examples/several_pictures.py
"""

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

one = Scene(240, 240, shapes=(Shape("star", "yellow", (70, 70), 60), Shape("cross", "green", (170, 160), 60)))
other = Scene(320, 160, shapes=(Shape("heart", "red", (160, 80), 70),))

llm = Llama4.from_pretrained("tiny")
content = [
    {"type": "image", "image": draw(one)},
    {"type": "image", "image": draw(other)},
    {"type": "text", "text": "Which picture has more shapes?"},
]
print(llm.chat([{"role": "user", "content": content}], max_new_tokens=40))
