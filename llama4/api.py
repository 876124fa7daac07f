"""`Llama4`: a model with its tokenizer and processor, put together from a checkpoint."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import torch

from llama4.cache.formats import resolve_format
from llama4.config import Llama4Config
from llama4.engine.generate import Event, generate
from llama4.engine.offload import offload_experts
from llama4.engine.prefix_cache import PromptCache, identities
from llama4.engine.replies import Reply, ReplyBuilder, Stream
from llama4.engine.sampling import Sampler
from llama4.inputs import Inputs, Processor
from llama4.model.device import resolve_device, resolve_dtype
from llama4.model.experts import resolve_experts
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import swap_modules
from llama4.quantization.schemes import SCHEMES
from llama4.text.messages import Message
from llama4.text.tokenizer import Tokenizer, load_tokenizer
from llama4.units import parse_bytes
from llama4.weights import hub, memory
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.load import load
from llama4.weights.quantizing import quantized
from llama4.weights.save import save

logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[Message] | Inputs
"""A question, a conversation, or what the processor made of one (for instance `processor.complete(text)`)."""


class Options(TypedDict, total=False):
    """Keyword arguments of `Llama4.chat`, where they are explained."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    tools: Sequence[Mapping[str, Any]] | None


class Llama4:
    """A Llama 4 model that chats about text and images.

    Use `from_pretrained`. The parts are there to be used alone: `model` (a torch module), `config`, `tokenizer` and
    `processor`.

    On Linux one tells malloc to keep up to 512 MiB of what this process frees, where the environment does not set it up
    otherwise (`MALLOC_...`): prompts are read faster for it.

    Attributes:
        cache: what was read and said in the last conversation. A prompt that begins alike, the next turn or another
            question on the same document, is read from where it differs, images included. Keep it and put it back to go
            on from there; set it to None to free its memory.
    """

    def __init__(
        self,
        model: Llama4Model,
        tokenizer: Tokenizer | None,
        *,
        max_context: int | None = None,
        cache_dtype: str | torch.dtype = "auto",
        cache_device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        window = model.config.text.max_position_embeddings
        if max_context is not None and not 1 < max_context <= window:
            raise ValueError(f"max_context is {max_context}; it must be between 2 and this model's window, {window}")
        self.model = model
        resolve_format(cache_dtype, model.dtype)
        self.max_context = max_context
        self.cache_dtype = cache_dtype
        self.cache_device = resolve_device(cache_device) if cache_device is not None else None
        self.cache: PromptCache | None = None
        self.progress = progress
        self._tokenizer = tokenizer
        self._processor = Processor.from_config(tokenizer, model.config) if tokenizer is not None else None
        memory.reuse_freed()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        experts: str = "auto",
        experts_device: str | torch.device | None = None,
        experts_memory: int | str | None = None,
        max_context: int | None = None,
        cache_dtype: str | torch.dtype = "auto",
        cache_device: str | torch.device | None = None,
        memory_map: bool = True,
        progress: bool = True,
    ) -> Llama4:
        """Load a model.

        Args:
            name: an embedded model ("tiny"), a local directory in Hugging Face's or Meta's layout, or a Hub id
                "meta-llama/Llama-4-Scout-17B-16E-Instruct".
            revision: branch, tag or commit on the Hub.
            token: for the Hub, where a model wants one; by default the one you logged in with.
            device: "auto" is CUDA if there is one, else the CPU.
            dtype: "auto" is the checkpoint's, except that a CPU computes models below 100M parameters in float32.
            quantization: "int4", "int8", "fp8", or Meta's mixes "int4_mixed" and "fp8_mixed": quantise the weights
                while loading, one at a time. None takes them as they are, quantised or not.
            experts: how routed experts are computed: "loop", "grouped", "megablocks" (CUDA; see docs/gpu.md), or
                "auto" for the faster of the first two on that device.
            experts_device: where routed experts stay; "cpu" runs a model on a GPU with less memory than it takes, which
                then gets copies of the experts that tokens choose.
            experts_memory: bytes of the device for such copies, or "8GiB"; by default what two tokens use.
            max_context: most tokens of prompt and reply together, where less than the model's window is wanted.
            cache_dtype: how layers that see the whole context hold keys and values: "fp8", "int8" or "int4" with a
                scale per head and token, or a dtype; "auto" is the model's.
            cache_device: where they hold them; "cpu" keeps a long context out of a GPU's memory.
            memory_map: on a CPU, leave weights but the head in the file, whose pages are read when they are used and
                can be dropped when memory is short; of a quantised model that is little more than embeddings and
                images. False reads all of them into memory of their own, in large pages where the system has such:
                loading takes longer, and decoding less where it keeps files in small ones.
            progress: show bars on a terminal while downloading, loading and reading long prompts.

        Raises:
            ValueError: no such model, a bad argument; or one of its classes `ConfigError` and `CheckpointError`, where
                the files are at fault.
        """
        if quantization is not None and quantization not in SCHEMES:
            raise ValueError(f"quantization={quantization!r} is not known; choose one of {', '.join(SCHEMES)}, or None")
        if experts_memory is not None and experts_device is None:
            raise ValueError(
                f"experts_memory={experts_memory!r} is for copies of experts that stay on another device; name "
                "experts_device, too"
            )
        directory = hub.resolve(name, revision=revision, token=token, progress=progress)
        config, weights = open_checkpoint(directory)
        if quantization is not None:
            weights = quantized(weights, quantization)
        resolved_device = resolve_device(device)
        resolved_dtype = resolve_dtype(dtype, config, resolved_device)
        tokenizer = load_tokenizer(directory, config)
        backend = resolve_experts(experts, resolved_device, resolved_dtype)
        room = parse_bytes(experts_memory) if isinstance(experts_memory, str) else experts_memory
        resting = resolve_device(experts_device) if experts_device is not None else resolved_device
        with torch.device("meta"):
            model = Llama4Model(replace(config, dtype=str(resolved_dtype).removeprefix("torch.")), backend)
        swap_modules(model, weights.plan)
        load(
            model,
            weights,
            dtype=resolved_dtype,
            device=resolved_device,
            experts_device=resting,
            memory_map=memory_map,
            progress=progress,
        )
        if resting != resolved_device:
            offload_experts(model, resolved_device, room)
        logger.info("%s: %s on %s", name, resolved_dtype, resolved_device)
        return cls(
            model.eval(),
            tokenizer,
            max_context=max_context,
            cache_dtype=cache_dtype,
            cache_device=cache_device,
            progress=progress,
        )

    @property
    def config(self) -> Llama4Config:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "this model came without a tokenizer; put its tokenizer.json or tokenizer.model beside the weights"
            )
        return self._tokenizer

    @property
    def processor(self) -> Processor:
        if self._processor is None:
            return Processor.from_config(self.tokenizer, self.config)  # which says what is missing
        return self._processor

    def chat(
        self,
        messages: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: in the form of Hugging Face and OpenAI; a string is one question. An image is a path, a URL,
                bytes, a base64 data URL or a PIL image.
            max_new_tokens: most tokens of the reply.
            temperature: 0 always takes the most likely token; higher is more varied.
            top_p: draw from the fewest most likely tokens whose probabilities sum to this.
            top_k: draw from this many most likely tokens.
            seed: makes a reply with a temperature repeatable.
            stop: strings that end the reply and are not part of it.
            tools: functions the model may call, as JSON schemas in OpenAI's form.

        Raises:
            ValueError: a malformed message or argument, or one of its classes: `ImageError` for an image that cannot be
                read, `ContextLengthError` for a prompt beyond the window.
        """
        stream = self.stream(
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            tools=tools,
        )
        for _ in stream:
            pass
        return stream.reply

    def stream(self, messages: Prompt, **options: Unpack[Options]) -> Stream:
        """Answer a conversation piece by piece; arguments and errors are those of `chat`, and come at once."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, Inputs):
            messages = self.processor(messages, tools=options.get("tools"))
        if len(messages.input_ids) != 1:
            raise ValueError(f"these are {len(messages.input_ids)} conversations; use chat_batch for more than one")
        events, drafts = self._start(messages, **options)
        return Stream(events, drafts[0])

    def chat_batch(
        self, conversations: Sequence[str | Sequence[Message]] | Inputs, **options: Unpack[Options]
    ) -> list[Reply]:
        """Answer several conversations at once; each reply is what `chat` gives for that conversation alone."""
        if not isinstance(conversations, Inputs):
            rows = [[{"role": "user", "content": row}] if isinstance(row, str) else list(row) for row in conversations]
            if not rows:
                return []
            conversations = self.processor(rows, tools=options.get("tools"))
        events, drafts = self._start(conversations, **options)
        for event in events:
            drafts[event.row].add(event)
        return [draft.reply() for draft in drafts]

    def complete(self, text: str, **options: Unpack[Options]) -> Reply:
        """Continue a raw text, without the format of a chat; the arguments are those of `chat`."""
        return self.chat(self.processor.complete(text), **options)

    def _start(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Iterator[Event], list[ReplyBuilder]]:
        tokenizer = self.tokenizer
        rows = identities(inputs, self.model)
        cache = self.cache.beginning(rows) if self.cache is not None else None
        if cache is None:
            cache = self.model.new_cache(len(rows), self.cache_dtype, self.cache_device)
        events = generate(
            self.model,
            tokenizer,
            inputs,
            sampler=Sampler(temperature, top_p, top_k, seed),
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids or self.config.text.eos_token_id,
            stop=stop,
            max_context=self.max_context,
            cache=cache,
            progress=self.progress,
        )
        if len(rows) == 1:
            self.cache = PromptCache(self.model, cache, rows[0])
            events = self.cache.recorded(events)
        call_id = tokenizer.special_tokens.get("<|python_start|>")
        return events, [ReplyBuilder(length, tools, call_id) for length in inputs.attention_mask.sum(dim=1).tolist()]

    def load_cache(self, path: str | Path) -> None:
        """Put what `llm.cache.save(path)` wrote into `llm.cache`.

        Raises:
            ValueError: no such file, a damaged one, or the cache of another model or cache_dtype.
        """
        self.cache = PromptCache.load(path, self.model, self.cache_dtype, self.cache_device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model in Hugging Face's layout, tokenizer included, for this library or transformers to read.

        Raises:
            ValueError: the directory cannot be written.
        """
        save(
            self.model,
            self.config,
            directory,
            write_extra=self._tokenizer.save if self._tokenizer is not None else None,
        )

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the model to the Hugging Face Hub, as `save_pretrained` writes it; returns its address."""
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(Path(directory) / "model")
            return hub.push(Path(directory) / "model", repo_id, token=token, private=private)
