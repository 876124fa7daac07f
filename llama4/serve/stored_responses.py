"""Responses that are kept: asked for again, deleted, and stopped where they are answered in the background."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse, Response

from llama4.serve.errors import RequestError
from llama4.serve.http import Call, Route, Service
from llama4.serve.responses import RESPONSE, ResponseAnswer
from llama4.serve.schema import FLAG, OBJECT, STRING, Field, Fields, array, integer, one_of, record, refused
from llama4.serve.store import Stored

ITEMS = record(("object", "data", "has_more"), object=one_of("list"), data=array(OBJECT), has_more=FLAG)
DELETED = record(("id", "object", "deleted"), id=STRING, deleted=FLAG)
AGAIN = Fields("Again", stream=refused("false", remedy="leave it out, and ask until the status is another"))
PAGE = Fields("Page", limit=Field(integer(1, 100), 20), order=Field(one_of("asc", "desc"), "desc"), after=Field(STRING))


def _stored(service: Service, identity: str) -> Stored:
    stored = service.store.get(identity)
    if stored is None:
        raise RequestError(f"there is no response {identity!r:.80}", field="response_id", status=404)
    return stored


async def retrieve(service: Service, call: Call) -> Response:
    stored = await asyncio.to_thread(_stored, service, call.request.path_params["response_id"])
    return JSONResponse(stored.response)


async def delete(service: Service, call: Call) -> Response:
    identity = call.request.path_params["response_id"]
    if (running := service.background.get(identity)) is not None:
        await _stop(*running)
    if not await asyncio.to_thread(service.store.delete, identity):
        raise RequestError(f"there is no response {identity!r:.80}", field="response_id", status=404)
    return JSONResponse({"id": identity, "object": "response", "deleted": True})


async def cancel(service: Service, call: Call) -> Response:
    identity = call.request.path_params["response_id"]
    stored = await asyncio.to_thread(_stored, service, identity)
    if not stored.response["background"]:
        raise RequestError("only a response in the background can be cancelled; hang up, to stop another")
    if (running := service.background.get(identity)) is not None:
        await _stop(*running)
        await running[1].save_if_possible()
        stored = await asyncio.to_thread(_stored, service, identity)
    return JSONResponse(stored.response)


async def _stop(task: asyncio.Task[None], answer: ResponseAnswer) -> None:
    task.cancel()
    await asyncio.wait((task,))
    answer.stop()


async def input_items(service: Service, call: Call) -> Response:
    stored = await asyncio.to_thread(_stored, service, call.request.path_params["response_id"])
    query = call.query
    items = stored.input if query["order"] == "asc" else stored.input[::-1]
    if (after := query["after"]) is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise RequestError(f"after is {after!r:.80}, which is no item of this response", field="after")
        items = items[places[0] + 1 :]
    shown = items[: query["limit"]]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, **ends, "has_more": len(shown) < len(items)})


ONE = "/v1/responses/{response_id}"
ROUTES = (
    Route("GET", ONE, retrieve, "A response again", answer=RESPONSE, query=AGAIN),
    Route("DELETE", ONE, delete, "Forget a response", answer=DELETED),
    Route("POST", f"{ONE}/cancel", cancel, "Stop a response in the background", answer=RESPONSE),
    Route("GET", f"{ONE}/input_items", input_items, "What a response answers", answer=ITEMS, query=PAGE),
)
