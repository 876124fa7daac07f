"""/v1/moderations: what `Llama4.moderate` says, in OpenAI's form, where the model is a Llama Guard.

Categories have the guard's own names. It gives one probability for all: that is the score of those that it names, and
the others have 0.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response

from llama4.api import Llama4
from llama4.engine.moderation import Asked, ask, is_guard
from llama4.serve.conversation import MESSAGE, PART, with_media
from llama4.serve.errors import RequestError
from llama4.serve.http import Call, Route, Service, check_taking, unless_gone
from llama4.serve.schema import FLAG, OBJECT, STRING, TEXT, Field, Fields, any_of, array, number, record
from llama4.text.guard import Moderation
from llama4.text.messages import picture_parts

MAX_INPUTS = 32

MODERATION = Fields(
    "ModerationRequest",
    model=Field(STRING),
    input=Field(any_of(TEXT, array(TEXT, 1, MAX_INPUTS), array(PART, 1)), note="texts, or parts of one message"),
    messages=Field(array(MESSAGE, 1), note="a conversation, whose last message is judged, in place of input"),
    categories=Field({**OBJECT, "additionalProperties": TEXT}, note="id -> name, in place of the model's own"),
    excluded=Field(array(STRING), (), note="ids of categories that are not asked for"),
    threshold=Field(number(0, 1), 0.5, note="probability from which a message is flagged"),
)
RESULT = record(("flagged", "categories", "category_scores"), flagged=FLAG, categories=OBJECT, category_scores=OBJECT)
MODERATIONS = record(("id", "model", "results"), id=TEXT, model=STRING, results=array(RESULT, 1))


async def moderate(service: Service, call: Call) -> Response:
    fields = call.fields
    model = service.model(fields["model"])
    if (fields["input"] is None) == (fields["messages"] is None):
        raise RequestError("give input or messages", field="input")
    check_taking(service)
    results = await unless_gone(call.request, _results(service, fields, model.adapter))
    return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": model.name, "results": results})


async def _results(service: Service, fields: Mapping[str, Any], adapter: str | None) -> list[dict[str, Any]]:
    results = []
    for messages in _conversations(fields):
        asked = await service.engine.in_thread(messages, partial(_asked, service, messages, fields))
        judge = partial(Llama4.judge, asked=asked, threshold=fields["threshold"])
        found = await service.engine.compute(judge, adapter)
        results.append(_result(found, next(picture_parts(messages), None) is not None))
    return results


def _asked(service: Service, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> Asked:
    """The prompt, its pictures read: nothing of that is done while the model waits."""
    llm, read = service.engine.llm, with_media(messages, service.settings.media_directory)
    return ask(llm.processor, llm.config, read, fields["categories"], fields["excluded"], None, llm.max_context)


def _conversations(fields: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    given = fields["input"]
    if given is None:
        return [fields["messages"]]
    contents = given if isinstance(given, list) and isinstance(given[0], str) else [given]
    return [[{"role": "user", "content": content}] for content in contents]


def _result(found: Moderation, shows_pictures: bool) -> dict[str, Any]:
    kinds = ["text", "image"] if shows_pictures else ["text"]
    named = {category.name for category in found.categories}
    names = [category.name for category in found.asked]
    return {
        "flagged": not found.safe,
        "categories": {name: name in named for name in names},
        "category_scores": {name: found.probability if name in named else 0.0 for name in names},
        "category_applied_input_types": {name: kinds for name in names},
        "probability": found.probability,
        "violated": [{"id": category.id, "name": category.name} for category in found.categories],
    }


ROUTES = (
    Route(
        "POST",
        "/v1/moderations",
        moderate,
        "Whether messages are safe",
        MODERATION,
        MODERATIONS,
        is_served=lambda service: is_guard(service.engine.llm.processor, service.engine.llm.config),
    ),
)
