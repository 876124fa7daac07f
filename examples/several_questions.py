"""Ask the embedded model several things about one picture, which is read once; keep what was read for another day.

python examples/several_questions.py
"""

import tempfile
import time
from pathlib import Path

from llama4 import Llama4
from llama4.tiny.shapes_dataset import Scene, Shape, draw

picture = Scene(900, 600, shapes=(Shape("star", "yellow", (200, 300), 150), Shape("cross", "green", (600, 250), 120)))
image = {"type": "image", "image": draw(picture)}
llm = Llama4.from_pretrained("tiny")

for question in ("What colour is the star?", "How many shapes are there?", "Where is the cross relative to the star?"):
    begin = time.perf_counter()
    reply = llm.chat([{"role": "user", "content": [image, {"type": "text", "text": question}]}])
    print(f"{question} {reply} ({time.perf_counter() - begin:.2f} s, a prompt of {reply.usage.prompt_tokens} tokens)")

with tempfile.TemporaryDirectory() as directory:
    path, kept = Path(directory) / "picture.cache", llm.cache
    assert kept is not None
    kept.save(path)
    llm.load_cache(path)
    print(f"{len(kept)} tokens, {path.stat().st_size:,} bytes saved and loaded")
