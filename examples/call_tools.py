"""A model that may call a function of yours, until it answers. The embedded model knows drawings alone and never calls;
give a Llama 4 Instruct.

python examples/call_tools.py [MODEL] [QUESTION]
"""

import argparse
import json
from typing import Any

from llama4 import Llama4

CITY = {"type": "string", "description": "Its English name"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, now",
        "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
    },
}


def get_weather(city: str) -> dict[str, Any]:
    return {"city": city, "sky": "clear", "celsius": 21}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", metavar="MODEL", nargs="?", default="tiny")
parser.add_argument("question", metavar="QUESTION", nargs="?", default="Do I need an umbrella in Zürich?")
args = parser.parse_args()

llm = Llama4.from_pretrained(args.model)
messages: list[dict[str, Any]] = [{"role": "user", "content": args.question}]
while (reply := llm.chat(messages, tools=[TOOL], max_new_tokens=200)).tool_calls:
    calls = [call.to_openai() for call in reply.tool_calls]
    messages.append({"role": "assistant", "content": reply.text, "tool_calls": calls})
    for call in reply.tool_calls:
        print(f"{call.name}({call.arguments})")
        result = json.dumps(get_weather(**call.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(reply.text)
