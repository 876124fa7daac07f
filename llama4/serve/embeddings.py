"""OpenAI's embeddings: of each text the mean of the last hidden states, behind the last norm, not scaled."""

from __future__ import annotations

import asyncio
import base64

from starlette.responses import JSONResponse, Response
from torch import Tensor

from llama4.engine.observers import MeanHidden
from llama4.serve.answer import named, read_all
from llama4.serve.completions import PROMPT, inputs_of_all, names_of, prompts_of
from llama4.serve.http import Call, Route, Service, check_taking, unless_gone
from llama4.serve.options import MAX_LENGTH
from llama4.serve.schema import (
    STRING,
    Field,
    Fields,
    any_of,
    array,
    ignored,
    integer,
    one_of,
    record,
    refused,
    required,
)

EMBED = Fields(
    "EmbeddingRequest",
    input=required(PROMPT),
    model=Field(STRING),
    encoding_format=Field(one_of("float", "base64"), "float"),
    dimensions=refused(),
    user=ignored(STRING),
)
NUMBERS = any_of(array({"type": "number"}), STRING)
EMBEDDINGS = record(
    ("object", "data", "model", "usage"),
    object=one_of("list"),
    data=array(record(("object", "index", "embedding"), index=integer(0, MAX_LENGTH), embedding=NUMBERS)),
    usage=record(("prompt_tokens", "total_tokens")),
)


async def embed(service: Service, call: Call) -> Response:
    fields = call.fields
    model = service.model(fields["model"])
    prompts = await asyncio.to_thread(prompts_of, fields["input"])
    check_taking(service, len(prompts))
    names = names_of(prompts, "input", fields["input"])
    inputs = await unless_gone(call.request, inputs_of_all(service, prompts, names))
    means = [MeanHidden() for _ in inputs]
    streams = [
        service.engine.observe(row, mean, max_new_tokens=1, adapter=model.adapter)
        for row, mean in zip(inputs, means, strict=True)
    ]
    try:
        replies = [named(stream.async_events(), each) for stream, each in zip(streams, names, strict=True)]
        await unless_gone(call.request, read_all(replies))
    finally:
        for stream in streams:
            stream.cancel()
    count = sum(row.input_ids.shape[1] for row in inputs)
    data = [
        {"object": "embedding", "index": i, "embedding": _told(mean.mean_D, fields["encoding_format"])}
        for i, mean in enumerate(means)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


def _told(mean_D: Tensor, form: str) -> list[float] | str:
    """Numbers, or the base64 of their float32, the lowest byte first."""
    if form == "float":
        numbers: list[float] = mean_D.tolist()
        return numbers
    return base64.b64encode(mean_D.numpy().astype("<f4").tobytes()).decode()


ROUTES = (Route("POST", "/v1/embeddings", embed, "The mean of a text's last hidden states", EMBED, EMBEDDINGS),)
