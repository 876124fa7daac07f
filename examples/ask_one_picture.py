"""Ask the embedded model about one picture: a file of yours, or one drawn here.

python examples/ask_one_picture.py [PICTURE] [QUESTION]
"""

import argparse

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

DRAWING = Scene(300, 200, shapes=(Shape("circle", "red", (80, 100), 70), Shape("square", "blue", (210, 100), 60)))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", metavar="PICTURE", nargs="?", default=draw(DRAWING))
parser.add_argument("question", metavar="QUESTION", nargs="?", default="What colour is the circle?")
args = parser.parse_args()

llm = Llama4.from_pretrained("tiny")
content = [{"type": "image", "image": args.picture}, {"type": "text", "text": args.question}]
reply = llm.chat([{"role": "user", "content": content}], max_new_tokens=40)

print(args.question)
print(reply.text)
print(f"({reply.usage.prompt_tokens} tokens in, {reply.usage.completion_tokens} out, {reply.finish_reason})")
