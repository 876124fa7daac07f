"""The server's routes behind Ray Serve: each replica is a whole engine, and Ray starts, restarts and balances them.
Two here, asked once: pip install "ray[serve]", then

python examples/ray_serve.py
"""

import json
import urllib.request
from typing import Any

try:
    import ray
    from ray import serve
except ModuleNotFoundError:
    raise SystemExit('Ray is not installed: pip install "ray[serve]"') from None

from llama4 import Engine, Llama4
from llama4.serve.app import Server, Settings

PORT = 8321


def app() -> Any:
    """Made in every replica."""
    llm = Llama4.from_pretrained("tiny", progress=False)
    return Server(Engine(llm, cache_memory="1GiB", max_waiting=256), Settings("tiny")).app


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(app)
class Llama4Server:
    pass


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Llama4Server.bind())  # type: ignore[attr-defined]
    question = {"model": "tiny", "messages": [{"role": "user", "content": "What can you do?"}]}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/chat/completions", json.dumps(question).encode())
    with urllib.request.urlopen(request) as answer:
        print(json.load(answer)["choices"][0]["message"]["content"])
    serve.shutdown()
    ray.shutdown()
