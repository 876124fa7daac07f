"""The model, its tokenizer and its prompt format, as vLLM's and llama.cpp's servers show them; health and metrics."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response

from llama4.api import Llama4
from llama4.serve.errors import Names, RequestError
from llama4.serve.http import Call, Route, Served, Service, check_taking
from llama4.serve.openai_chat import FORMAT, continues_last, prompt_of
from llama4.serve.options import MAX_LENGTH
from llama4.serve.schema import (
    FLAG,
    MAX_ID,
    STRING,
    Field,
    Fields,
    any_of,
    array,
    integer,
    one_of,
    record,
    required,
)
from llama4.text.messages import Message
from llama4.text.prompt import Piece, encode
from llama4.version import __version__

CARD = record(("id", "object", "created", "owned_by"), id=STRING, object=one_of("model"), owned_by=STRING)
CARDS = record(("object", "data"), object=one_of("list"), data=array(CARD))
IDS = array(integer(0, MAX_ID))
PIECE = record(("id", "piece"), id=integer(0, MAX_ID), piece=any_of(STRING, array(integer(0, 255))))
TOKENS = record(("tokens", "count"), tokens=any_of(IDS, array(PIECE)), count=integer(0, MAX_LENGTH))
PROMPT = record(("prompt",), prompt=STRING)
STATUS = record(("status",), status=STRING)

TOKENIZE = Fields(
    "TokenizeRequest",
    model=Field(STRING),
    prompt=Field(STRING, note="as vLLM's"),
    content=Field(STRING, note="as llama.cpp's"),
    add_special_tokens=Field(FLAG, note="begin with <|begin_of_text|>; prompt does, content does not"),
    add_special=Field(FLAG, note="the same, as llama.cpp's"),
    with_pieces=Field(FLAG, False, note="as llama.cpp's: tokens are ids with their texts, or bytes of half characters"),
    return_token_strs=Field(FLAG, False, note="as vLLM's: texts beside the ids"),
    **{name: field for name, field in FORMAT.items() if name not in ("messages", "model")},
    messages=Field(FORMAT["messages"].schema),
)
DETOKENIZE = Fields("DetokenizeRequest", model=Field(STRING), tokens=required(IDS))
APPLY = Fields("ApplyTemplateRequest", **FORMAT)


def _card(service: Service, served: Served) -> dict[str, Any]:
    base = service.settings.name
    card = {"id": served.name, "object": "model", "created": service.created, "owned_by": "llama4", "root": base}
    card["parent"] = base if served.adapter is not None else None
    return card | {"max_model_len": service.engine.scheduler.window}


async def models(service: Service, call: Call) -> Response:
    return JSONResponse({"object": "list", "data": [_card(service, each) for each in service.models]})


async def model(service: Service, call: Call) -> Response:
    return JSONResponse(_card(service, service.model(call.request.path_params["name"])))


async def tokenize(service: Service, call: Call) -> Response:
    llm, fields = service.engine.llm, call.fields
    service.model(fields["model"])
    if fields["messages"] is not None:
        messages, options = await prompt_of(service, fields)
        del options["tool_choice"]
        read = partial(llm.processor, messages, limit=service.counted, **options)
        inputs = await service.engine.in_thread(messages, read)
        ids: list[int] = inputs.input_ids[0].tolist()
    else:
        content, prompt = fields["content"], fields["prompt"]
        text = content if content is not None else prompt
        if text is None:
            raise RequestError("give prompt, content or messages", field="prompt")
        adds_bos = fields["add_special"] if fields["add_special_tokens"] is None else fields["add_special_tokens"]
        adds_bos = content is None if adds_bos is None else adds_bos
        pieces = [Piece(llm.tokenizer.bos, special=True)] * adds_bos + [Piece(text)]
        with Names("prompt" if content is None else "content").told():
            ids = (await asyncio.to_thread(encode, pieces, llm.tokenizer, limit=service.counted)).ids
    texts: list[bytes] = []
    if fields["with_pieces"] or fields["return_token_strs"]:
        texts = await asyncio.to_thread(lambda: [llm.tokenizer.decode_bytes([id_]) for id_ in ids])
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": service.engine.scheduler.window,
            "tokens": await asyncio.to_thread(_with_pieces, ids, texts) if fields["with_pieces"] else ids,
            "token_strs": [data.decode(errors="replace") for data in texts] if fields["return_token_strs"] else None,
        }
    )


def _with_pieces(ids: list[int], pieces: list[bytes]) -> list[dict[str, Any]]:
    return [{"id": id_, "piece": _piece(data)} for id_, data in zip(ids, pieces, strict=True)]


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(service: Service, call: Call) -> Response:
    service.model(call.fields["model"])
    text = await asyncio.to_thread(_detokenized, service.engine.llm, call.fields["tokens"])
    return JSONResponse({"prompt": text, "content": text})


def _detokenized(llm: Llama4, tokens: Sequence[float]) -> str:
    ids, size = list(map(int, tokens)), llm.config.text.vocab_size
    if any(id_ >= size for id_ in ids):
        raise RequestError(f"tokens has {max(ids)}; ids are from 0 to {size - 1}", field="tokens")
    return llm.tokenizer.decode(ids)


async def apply_template(service: Service, call: Call) -> Response:
    service.model(call.fields["model"])
    messages, options = await prompt_of(service, call.fields)
    variables = options["chat_template_kwargs"] or {}
    own = inspect.signature(service.engine.llm.processor.apply_chat_template).parameters
    if reserved := sorted(variables.keys() & {"self", *own}):
        message = f"chat_template_kwargs holds {', '.join(reserved)}, which is no variable of the prompt's format"
        raise RequestError(message, field="chat_template_kwargs")
    text = await asyncio.to_thread(_rendered, service.engine.llm, messages, options, variables)
    return JSONResponse({"prompt": text})


def _rendered(
    llm: Llama4, messages: Sequence[Message], options: Mapping[str, Any], variables: Mapping[str, Any]
) -> str:
    continues = continues_last(messages, options["continue_final_message"])
    text: str = llm.processor.apply_chat_template(
        messages,
        tools=options["tools"],
        add_generation_prompt=not continues,
        continue_final_message=continues,
        **variables,
    )
    return text


async def health(service: Service, call: Call) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(service: Service, call: Call) -> Response:
    check_taking(service)
    return JSONResponse({"status": "ok"})


async def version(service: Service, call: Call) -> Response:
    return JSONResponse({"version": __version__})


async def props(service: Service, call: Call) -> Response:
    """What llama.cpp's clients ask."""
    llm, scheduler = service.engine.llm, service.engine.scheduler
    template = llm.side_files.chat_templates.get("default", "") if llm.side_files.chat_templates else ""
    special = {number: name for name, number in llm.tokenizer.special_tokens.items()}
    defaults = {**llm.generation_config.sampling(), "n_ctx": scheduler.window}
    return JSONResponse(
        {
            "default_generation_settings": {**defaults, "params": llm.generation_config.sampling()},
            "total_slots": scheduler.max_batch,
            "model_path": service.settings.name,
            "model_alias": service.settings.name,
            "chat_template": template,
            "bos_token": special.get(llm.tokenizer.bos_id, ""),
            "eos_token": special.get(next(iter(llm.stop_ids), -1), ""),
            "modalities": {"vision": llm.config.vision is not None, "audio": False},
            "build_info": f"llama4 {__version__}",
        }
    )


async def metrics(service: Service, call: Call) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


ROUTES = (
    Route("GET", "/v1/models", models, "The model and its adapters", answer=CARDS),
    Route("GET", "/v1/models/{name:path}", model, "One of them", answer=CARD),
    Route("POST", "/tokenize", tokenize, "Text or messages -> token ids", TOKENIZE, TOKENS),
    Route("POST", "/detokenize", detokenize, "Token ids -> text", DETOKENIZE, PROMPT),
    Route("POST", "/apply-template", apply_template, "Messages -> the prompt's text", APPLY, PROMPT),
    Route("GET", "/health", health, "Whether the server runs", answer=STATUS, is_open=True),
    Route("GET", "/ready", ready, "Whether it takes requests", answer=STATUS, is_open=True),
    Route("GET", "/version", version, "Of llama4", answer=record(("version",), version=STRING), is_open=True),
    Route("GET", "/props", props, "What llama.cpp's clients ask", answer=record(("total_slots",))),
    Route("GET", "/metrics", metrics, "For Prometheus", answer=None, is_open=True),
)
