"""Answer several conversations at once: with a picture, with two, with none. Each gets what it would get alone.

python examples/batch.py
"""

from typing import Any

from PIL.Image import Image

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

stars = draw(Scene(200, 200, shapes=tuple(Shape("star", "orange", (50 + 50 * i, 100), 40) for i in range(3))))
heart = draw(Scene(120, 90, shapes=(Shape("heart", "red", (60, 45), 50),)))


def ask(question: str, *pictures: Image) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


conversations = [
    ask("How many stars are there?", stars),
    ask("Which picture has more shapes?", stars, heart),
    ask("What shape is red?", heart),
    ask("Who are you?"),
]

llm = Llama4.from_pretrained("tiny")
replies = llm.chat_batch(conversations, max_new_tokens=40)
for conversation, reply in zip(conversations, replies, strict=True):
    print(f"{conversation[0]['content'][-1]['text']} -> {reply.text}")
    assert reply.text == llm.chat(conversation, max_new_tokens=40).text
