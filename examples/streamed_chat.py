"""A conversation about one picture, each reply printed as it comes; the second question builds on the first.

python examples/streamed_chat.py
"""

from typing import Any

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

scene = Scene(320, 200, shapes=(Shape("triangle", "green", (80, 100), 80), Shape("circle", "purple", (230, 100), 70)))

llm = Llama4.from_pretrained("tiny")
content: list[dict[str, Any]] = [{"type": "image", "image": draw(scene)}]
messages: list[dict[str, Any]] = []
for question in ("What colour is the triangle?", "And the circle?"):
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
    print(f"> {question}")
    stream = llm.stream(messages, max_new_tokens=40)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": stream.reply.text})
    content = []
