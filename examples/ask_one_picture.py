"""Ask the embedded model about one picture: a file of yours, or one drawn here.

python examples/ask_one_picture.py [PICTURE] [QUESTION]
"""

import sys

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

DRAWING = Scene(300, 200, shapes=(Shape("circle", "red", (80, 100), 70), Shape("square", "blue", (210, 100), 60)))

picture = sys.argv[1] if len(sys.argv) > 1 else draw(DRAWING)
question = sys.argv[2] if len(sys.argv) > 2 else "What colour is the circle?"

llm = Llama4.from_pretrained("tiny")
content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
reply = llm.chat([{"role": "user", "content": content}], max_new_tokens=40)

print(question)
print(reply.text)
print(f"({reply.usage.prompt_tokens} tokens in, {reply.usage.completion_tokens} out, {reply.finish_reason})")
