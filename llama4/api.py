"""`Llama4`: a model with its tokenizer and processor, put together from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch

from llama4.adapters.loaded import Adapters
from llama4.cache.formats import resolve_format
from llama4.cache.sequence import SequenceCache
from llama4.config import GENERATION_FILE, GenerationConfig, Llama4Config
from llama4.config.generation import is_integer, is_number
from llama4.engine.fused_cpu import check_batch_invariant
from llama4.engine.generate import generate, stop_strings
from llama4.engine.moderation import Asked, ask, judge, limit_of
from llama4.engine.offload import check_offload
from llama4.engine.placement import Placement, build_and_load
from llama4.engine.prefix_cache import PromptCache, identities
from llama4.engine.replies import Reply, Stream
from llama4.engine.runner import ModelRunner
from llama4.engine.tokens import Event
from llama4.errors import ArgumentError, Llama4Error
from llama4.families import family_of
from llama4.forks import notice_fork, survive_forks
from llama4.inputs import Inputs, Processor
from llama4.model.device import DTYPES, resolve_device
from llama4.model.multimodal import Llama4Model
from llama4.options import (
    MAX_NEW_TOKENS,
    Options,
    Prepared,
    Prompt,
    choice_of,
    conversation,
    conversation_rows,
    options_checked,
)
from llama4.quantization.schemes import check_names
from llama4.text.guard import Moderation
from llama4.text.messages import Message
from llama4.text.prompt_limit import PromptLimit
from llama4.text.tokenizer import Tokenizer
from llama4.units import count_text
from llama4.weights import hub, memory
from llama4.weights.checkpoint import open_checkpoint, read_config, read_side_files
from llama4.weights.directory import scratch_directory
from llama4.weights.ignored import note_ignored
from llama4.weights.model_source import ModelSource
from llama4.weights.quantizing import quantized
from llama4.weights.save import save
from llama4.weights.side_files import SideFiles

logger = logging.getLogger(__name__)


class Llama4:
    """A Llama 4 model that chats about text and images.

    Make one with `from_pretrained`. Its parts can be used alone: `model` (a torch module), `config`, `tokenizer` and
    `processor`.

    On Linux, unless the environment sets malloc up (`MALLOC_...`), malloc is told to keep up to 512 MiB of freed memory
    for this process, which makes reading prompts faster.

    Attributes:
        cache: keys and values of the last conversation. Of a prompt with the same beginning (the next turn, another
            question on the same document, the same images) only what differs is read. Keep it and put it back to
            continue from there; set it to None to free its memory.
        adapters: those that are loaded beside the model, by name; `adapters.add(name, directory)` loads one more.
        side_files: what stood beside the weights, which `save_pretrained` writes again.
        generation_config: what the checkpoint says of generation: the tokens that end a reply, and how tokens are
            chosen. Set it to change these.
    """

    def __init__(
        self,
        model: Llama4Model,
        tokenizer: Tokenizer | None,
        *,
        side_files: SideFiles | None = None,
        max_context: int | None = None,
        cache_dtype: str | torch.dtype = "auto",
        cache_device: str | torch.device | None = None,
        progress: bool = True,
        generation_config: GenerationConfig | None = None,
        chat_format: str | None = None,
    ) -> None:
        """Put a loaded model together with its tokenizer.

        Args:
            model: on its device and in its dtype, with weights.
            tokenizer: the model's; None for a model that only computes logits.
            side_files: what stood beside the weights.
            max_context, cache_dtype, cache_device, progress, chat_format: see `from_pretrained`.
            generation_config: which tokens end a reply, and how tokens are chosen; by default greedily.

        Raises:
            Llama4Error: `max_context` beyond the window; a `cache_dtype` or `cache_device` that is not known.
        """
        window = model.config.text.max_position_embeddings
        if max_context is not None and (not is_integer(max_context) or not 1 < max_context <= window):
            wanted = f"between 2 and this model's window, {window}, and a whole number"
            raise ArgumentError(f"max_context is {max_context!r:.80}; it must be {wanted}")
        self.model = model
        self._runner: ModelRunner | None = None
        resolve_format(cache_dtype, model.dtype)
        self.max_context = max_context
        self.cache_dtype = cache_dtype
        self.cache_device = resolve_device(cache_device) if cache_device is not None else None
        self.cache: PromptCache | None = None
        self.progress = progress
        self.side_files = side_files or SideFiles()
        self.adapters = Adapters(model, self.side_files)
        self.generation_config = generation_config or GenerationConfig()
        self._stored_dtype: str | None = None
        self._tokenizer = tokenizer
        self._processor = None
        if tokenizer is not None:
            templates = self.side_files.chat_templates
            self._processor = Processor.from_config(tokenizer, model.config, templates, chat_format)
        memory.reuse_freed()
        survive_forks()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        mmproj: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        activations: str = "auto",
        batch_invariant: bool = False,
        experts: str = "auto",
        experts_device: str | torch.device | None = None,
        experts_memory: int | str | None = None,
        max_context: int | None = None,
        cache_dtype: str | torch.dtype = "auto",
        cache_device: str | torch.device | None = None,
        memory_map: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
        chat_format: str | None = None,
        adapter: str | Path | Mapping[str, str | Path] | None = None,
        progress: bool = True,
    ) -> Llama4:
        """Load a model.

        Args:
            name: an embedded model ("tiny"), a local directory in Hugging Face's or Meta's layout, a GGUF file, or a
                Hub id such as "meta-llama/Llama-4-Scout-17B-16E-Instruct", which a GGUF file there may follow after a
                slash.
            revision: branch, tag or commit on the Hub.
            subfolder: of the repository or directory, where the model is.
            token: access token for the Hub; by default the one you logged in with.
            mmproj: of a model in GGUF the file with the vision tower; by default the one beside it, if there is one.
            device: "auto" is CUDA if there is one, else the CPU.
            dtype: "auto" is the checkpoint's, except that models below 100M parameters are float32 on a CPU.
            quantization: "int4", "int8", "fp8", or Meta's mixes "int4_mixed" and "fp8_mixed": quantize the weights
                while loading, one at a time. None takes them as they are, quantized or not.
            activations: what int4, int8 and blocks of GGUF are multiplied with on a CPU: "float"; "int8", rounded to
                int8 with a scale for each group, which is faster, and refused where no weight has such products; "auto"
                rounds in bfloat16, where the weights are rounded much more.
            batch_invariant: on a CPU, compute prompts and replies so that a token's logits are the same bits alone and
                beside any others, in whatever pieces its prompt is read; docs/batch-invariance.md says what that costs.
                Refused where steps are not compiled code for AVX-512.
            experts: how routed experts are computed: "loop", "grouped", "megablocks" (CUDA; see docs/gpu.md), or
                "auto" for the faster of the first two on that device.
            experts_device: where the weights of routed experts stay. "cpu" runs a model on a GPU that has less memory
                than the model takes; the GPU gets copies of the experts that tokens are routed to.
            experts_memory: bytes of the device for such copies, or "8GiB"; by default what two tokens use.
            max_context: most tokens of prompt and reply together, if less than the model's window.
            cache_dtype: of keys and values in layers that see the whole context: "fp8", "int8" or "int4" with a scale
                per head and token, or a dtype; "auto" is the model's.
            cache_device: where these are stored; "cpu" keeps a long context out of a GPU's memory.
            memory_map: on a CPU, map weights other than the head from the file: their pages are read at first use, and
                the system can drop them when memory is short. Of a quantized model only embeddings and vision tower
                are mapped, and the routed experts of one that is larger than memory, whose other weights are copied
                when they are first used. False copies all weights into memory, in huge pages where the system has them:
                loading takes longer, decoding may be faster.
            adapter: a directory as PEFT writes it, or several by name, of which the first is used until `set_adapter`
                says otherwise. A single one has the name "default".
            rope_scaling: another scaling of RoPE than the checkpoint's, for longer contexts, as config.json has it:
                {"rope_type": "dynamic", "factor": 4.0}, or "linear", "yarn" and others. The window grows with it.
            chat_format: how prompts are written, where the checkpoint has no chat template or another than this:
                "llama4", "llama3" or "llama2".
            progress: show progress bars, on a terminal or in a notebook, of all that takes longer than half a second:
                downloading, loading, reading long prompts, saving.

        Raises:
            Llama4Error: no such model, a bad argument; or its subclasses `ConfigError` and `CheckpointError` for files
                that are at fault.
        """
        check_names(quantization, activations)
        check_offload(experts_device, experts_memory)
        directory = hub.resolve(name, revision=revision, subfolder=subfolder, token=token, progress=progress)
        placement = Placement.resolve(
            read_config(directory),
            device,
            dtype,
            experts_device=experts_device,
            experts_memory=experts_memory,
            memory_map=memory_map,
        )
        config, source = open_checkpoint(directory, dtype=placement.dtype, mmproj=mmproj, room=placement.room)
        if rope_scaling is not None:
            config = config.scaled(rope_scaling)
        for note in source.notes:
            logger.warning("%s: %s", name, note)
        family = family_of(config)
        if quantization is not None:
            source = quantized(source, quantization, parts=family.quantizable)
        tokenizer = family.load_tokenizer(directory, config)
        side_files = read_side_files(directory)
        note_ignored(str(name), side_files)
        generation_config = side_files.generation_config
        if generation_config.refused:
            logger.warning("%s will not answer: %s", name, generation_config.why_refused())
        model = build_and_load(
            config,
            source,
            placement,
            experts=experts,
            activations=activations,
            batch_invariant=batch_invariant,
            progress=progress,
        )
        check_batch_invariant(model, cache_dtype)
        logger.info("%s: %s on %s", name, placement.dtype, placement.device)
        llm = cls(
            model,
            tokenizer,
            side_files=side_files,
            max_context=max_context,
            cache_dtype=cache_dtype,
            cache_device=cache_device,
            progress=progress,
            generation_config=generation_config,
            chat_format=chat_format,
        )
        llm._stored_dtype = config.dtype
        if adapter is not None:
            named = adapter if isinstance(adapter, Mapping) else {"default": adapter}
            for each, place in named.items():
                llm.adapters.add(each, place)
            llm.set_adapter(next(iter(named), None))
        return llm

    @property
    def runner(self) -> ModelRunner:
        """The fast way to decode: steps of `model`, by compiled code where that computes the same."""
        runner = self._runner
        if runner is None or runner.model is not self.model:
            self._runner = runner = ModelRunner(self.model)
        return runner

    def set_adapter(self, name: str | None) -> None:
        """Compute with a loaded adapter, or with none. `save_pretrained` writes the model without it in either case. A
        reply that is being written meanwhile ends with an error.

        Raises:
            ArgumentError: none of that name is loaded.
        """
        self.adapters.activate(name)
        self.cache = None  # what another adapter made of a prompt

    def merge_adapter(self) -> None:
        """Add the adapter in use to the weights, for good; `save_pretrained` then writes a model that needs none. Other
        adapters that are loaded are then ones of another model, and go. A reply that is being written meanwhile ends
        with an error.

        Raises:
            Llama4Error: none is in use, or a matrix is in a format that is only read, or is two: that of embeddings and
                of the head; the adapter is in use then as before.
        """
        adapters = self.adapters
        if (name := adapters.active) is None:
            raise ArgumentError("no adapter is in use; choose one with set_adapter")
        self.adapters = adapters.merge(name, progress=self.progress)
        self.cache = None

    @property
    def config(self) -> Llama4Config:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> token ids.

        Raises:
            Llama4Error: the model came without one.
        """
        if self._tokenizer is None:
            raise Llama4Error(
                "this model came without a tokenizer; put its tokenizer.json or tokenizer.model beside the weights"
            )
        return self._tokenizer

    @property
    def processor(self) -> Processor:
        """Messages and pictures -> `Inputs`.

        Raises:
            Llama4Error: the model came without a tokenizer.
        """
        if self._processor is None:
            return Processor.from_config(self.tokenizer, self.config)  # raises: there is no tokenizer
        return self._processor

    @property
    def prompt_limit(self) -> PromptLimit:
        """How many tokens a prompt may have: a longer one is refused, if possible before it is read."""
        return PromptLimit.of_window(self.config.text.max_position_embeddings, self.max_context)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: those that generation_config.json names, else config.json, else the tokenizer's.
        What is outside of the vocabulary is no token.

        Raises:
            Llama4Error: the first two name none, and the model came without a tokenizer.
        """
        named = self.generation_config.eos_token_id or self.config.text.eos_token_id or ()
        vocabulary = range(self.config.text.vocab_size)
        configured = tuple(id_ for id_ in named if id_ in vocabulary)
        if self._tokenizer is None and configured:
            return configured
        return tuple(id_ for id_ in self.tokenizer.reply_ends(configured) if id_ in vocabulary)

    @options_checked
    def chat(
        self,
        messages: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        response_format: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int | None = None,
        ignore_eos: bool = False,
        top_logprobs: int = 0,
        n: int = 1,
    ) -> Reply:
        """Answer a conversation.

        An option from temperature to stop that is None takes its value from `generation_config`. Where that does not
        say `do_sample`, the most likely token is taken, unless a temperature is given.

        Args:
            messages: in the form of Hugging Face and OpenAI; a string is one question. An image is a path, a URL,
                bytes, a base64 data URL, a PIL image or an array. The prompt is written by the checkpoint's own chat
                template, if it has one. A last message of the assistant is continued: the reply is what follows it.
            max_new_tokens: most tokens of the reply.
            temperature: 0 always takes the most likely token, whatever top_p, top_k and min_p; higher is more varied.
            top_p: sample from the fewest most likely tokens whose probabilities sum to this; 1 for all.
            top_k: sample from this many most likely tokens.
            min_p: sample from tokens at least this many times as likely as the most likely one; 0 for all.
            repetition_penalty: above 1, tokens that prompt or reply already hold become less likely; 1 for none.
            seed: makes sampling repeatable.
            stop: strings that end the reply and are not part of it.
            tools: functions the model may call, as JSON schemas in OpenAI's form.
            continue_final_message: whether the last message is continued; None does so if it is the assistant's and
                calls no tools.
            chat_template_kwargs: further variables of the prompt's format, such as `tools_in_user_message=False`, which
                announces tools in the system message, or those that the checkpoint's own template reads.
            response_format: a JSON schema or a pydantic class: the reply is JSON of that, and `reply.parsed` what it
                says. {"type": "json_object"} is any object. OpenAI's {"type": "json_schema", ...} is taken, too. With
                tools that the model may call, the reply is that or a call.
            regex: what the whole reply matches, instead of a schema.
            choices: texts, one of which the reply is.
            grammar: what the reply follows, in Lark's syntax.
            tool_choice: "auto" (or None) lets the model choose, "none" hides the tools from it, "required" makes it
                call one, and {"type": "function", "function": {"name": ...}} that one.
            presence_penalty: above 0, up to 2, tokens that the reply already holds become less likely; below 0 more.
            frequency_penalty: the same, the more the more often it holds them.
            logit_bias: ids of tokens -> what is added to their logits, from -100 (hardly ever) to 100 (nearly always).
            min_tokens: tokens before which the reply does not end by itself; a stop string still ends it.
            ignore_eos: whether the reply goes on to its limit, whatever the model says.
            top_logprobs: of how many of the most likely tokens each of `reply.logprobs` tells the probability, too.
            n: replies; those after the first are in its `others`. Each draws for itself, with `seed`, `seed + 1`, ...

        Raises:
            Llama4Error: a malformed message or argument, or its subclasses: `ImageError` for an image that cannot be
                read, `ContextLengthError` for a prompt beyond the window, `ChatTemplateError` where the checkpoint's
                template fails or refuses the messages.
            TypeError: an option that there is not, with the nearest of those that there are.
        """
        if not is_integer(n) or n < 1:
            raise ArgumentError(f"n is {n!r:.80}; it must be a whole number, 1 or more")
        options = Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            tools=tools,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            response_format=response_format,
            regex=regex,
            choices=choices,
            grammar=grammar,
            tool_choice=tool_choice,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            top_logprobs=top_logprobs,
        )
        first = self._reply(messages, options)
        if n == 1:
            return first
        seeds = [seed + i if seed is not None else None for i in range(1, n)]
        return replace(first, others=tuple(self._reply(messages, {**options, "seed": each}) for each in seeds))

    def _reply(self, messages: Prompt, options: Options) -> Reply:
        stream = self.stream(messages, **options)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, messages: Prompt, **options: Unpack[Options]) -> Stream:
        """Answer a conversation piece by piece: of its text, or with `.events()` of text and tool calls. Arguments, but
        for `n`, and errors are those of `chat`; errors come at once."""
        prompt = messages if isinstance(messages, Inputs) else conversation(messages)
        prepared = self.prepare(prompt, **options)
        builder = prepared.builder(self.tokenizer)
        return Stream(self._start(prepared), builder)

    def chat_batch(
        self, conversations: Sequence[str | Sequence[Message]] | Inputs, **options: Unpack[Options]
    ) -> list[Reply]:
        """Answer several conversations at once; each reply is what `chat` gives for that conversation alone."""
        if isinstance(conversations, Inputs):
            prepared = self.prepare(conversations, **options)
        elif rows := conversation_rows(conversations):
            prepared = self.prepare(rows, **options)
        else:
            choice_of(options, self.generation_config, self.config.text.vocab_size)  # raises, as with rows
            return []
        builders = prepared.builders(self.tokenizer)
        for event in self._start(prepared):
            builders[event.row].add(event)
        return [builder.reply() for builder in builders]

    def complete(self, text: str, *, special_tokens: bool = False, **options: Unpack[Options]) -> Reply:
        """Continue a raw text, without the format of a chat.

        Args:
            special_tokens: the text is a prompt rendered already: names of special tokens in it are these tokens.
            options: as of `chat`.
        """
        inputs = self.processor.complete(text, special_tokens=special_tokens, limit=self.prompt_limit)
        return self.chat(inputs, **options)

    def infill(self, prefix: str, suffix: str, **options: Unpack[Options]) -> Reply:
        """What belongs between two pieces of code or text, of a model that was trained for that: Code Llama 7B and 13B.

        Args:
            options: as of `chat`.

        Raises:
            Llama4Error: a model whose tokenizer has no tokens for that.
        """
        return self.chat(self.processor.infill(prefix, suffix, limit=self.prompt_limit), **options)

    def moderate(
        self,
        messages: str | Sequence[Message],
        *,
        categories: Mapping[str, str] | None = None,
        excluded: Collection[str] = (),
        threshold: float = 0.5,
        guard: str | None = None,
    ) -> Moderation:
        """Whether the last message of a conversation is safe, by a Llama Guard: a user's prompt or an assistant's
        response. The prompt is written by the checkpoint's own chat template, if it has one.

        Args:
            messages: of a user and an assistant in turn; a string is one prompt.
            categories: what is unsafe, in place of the model's own categories: {"S1": "Spoilers"}, or with lines that
                describe it: {"S1": "Spoilers.\nAI models should not tell how a story ends."}.
            excluded: ids of categories that are not asked for: ["S6"].
            threshold: probability from which a message is unsafe.
            guard: which Llama Guard this is, where its chat template does not say: "llama-guard-1", "llama-guard-2",
                "llama-guard-3-1b", "llama-guard-3-8b", "llama-guard-3-11b-vision" or "llama-guard-4".

        Raises:
            Llama4Error: a model that is no Llama Guard, malformed messages or categories, or its subclasses as in
                `chat`.
        """
        if not is_number(threshold) or not 0 <= threshold <= 1:
            raise ArgumentError(f"threshold is {threshold!r:.80}; it must be between 0 and 1")
        asked = ask(self.processor, self.config, conversation(messages), categories, excluded, guard, self.max_context)
        return self.judge(asked, threshold)

    def judge(self, asked: Asked, threshold: float = 0.5) -> Moderation:
        """What `moderate` says of a prompt that is prepared already.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
        """
        rows = identities(asked.inputs, self.model)
        limit_of(self.config, self.max_context).check(len(rows[0]))
        notice_fork()
        state = self.adapters.state
        cache = self._cache_of(rows, state)
        judged = judge(self.runner, self.tokenizer, asked, cache, threshold, self.stop_ids)
        self.cache = PromptCache(self.model, cache, rows[0], self.progress, state)
        return judged

    def _cache_of(self, rows: Sequence[torch.Tensor], state: object) -> SequenceCache:
        """A cache with what the last one has of these prompts, or empty."""
        kept = self.cache  # which another thread may set meanwhile
        cache = kept.beginning(rows) if kept is not None and kept.state is state else None
        return cache or self.model.new_cache(len(rows), self.cache_dtype, self.cache_device)

    def _start(self, prepared: Prepared) -> Iterator[Event]:
        rows = identities(prepared.inputs, self.model)
        adapters = self.adapters  # others, after a merge in another thread
        changes, state = adapters.changes, adapters.state
        cache = self._cache_of(rows, state)
        events = generate(
            self.runner,
            self.tokenizer,
            prepared.inputs,
            sampler=prepared.sampler,
            matchers=[prepared.matcher(self.tokenizer, self.config.text.vocab_size) for _ in rows],
            max_new_tokens=prepared.max_new_tokens,
            top_logprobs=prepared.top_logprobs,
            stop_ids=prepared.stop_ids,
            stop=prepared.stop,
            max_context=self.max_context,
            tokens=rows,
            cache=cache,
            progress=self.progress,
        )
        events = adapters.unchanged(events, changes)
        if len(rows) == 1:
            self.cache = kept = PromptCache(self.model, cache, rows[0], self.progress, state)
            events = kept.recorded(events)
        return events

    def prepare(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | Inputs,
        *,
        limit: PromptLimit | None = None,
        **options: Unpack[Options],
    ) -> Prepared:
        """What is computed for these arguments of `chat`: the prompt's tokens and pictures, and how the reply is
        chosen, the checkpoint's defaults included. Nothing is computed yet.

        Args:
            limit: how many tokens a prompt may have; by default that of the window.

        Raises:
            Llama4Error: as `chat`.
        """
        defaults, inputs = self.generation_config, messages
        sampler, tools, form = choice_of(options, defaults, self.config.text.vocab_size)
        if not isinstance(inputs, Inputs):
            inputs = self.processor(
                inputs,
                tools=tools or None,
                continue_final_message=options.get("continue_final_message"),
                chat_template_kwargs=options.get("chat_template_kwargs"),
                limit=limit or self.prompt_limit,
            )
        notice_fork()
        stop = options.get("stop")
        return Prepared(
            inputs,
            sampler,
            options.get("max_new_tokens", MAX_NEW_TOKENS),
            stop_strings(defaults.stop_strings if stop is None else stop),
            () if options.get("ignore_eos") else self.stop_ids,
            tools,
            form,
            options.get("top_logprobs", 0),
        )

    def __repr__(self) -> str:
        size, window = count_text(self.config.num_parameters()), self.config.text.max_position_embeddings
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"Llama4({size} parameters, {dtype} on {self.model.device}, up to {self.max_context or window:,} tokens)"

    def load_cache(self, path: str | Path) -> None:
        """Put what `llm.cache.save(path)` wrote into `llm.cache`.

        Raises:
            Llama4Error: no such file, a damaged one, or the cache of another model, adapter or cache_dtype.
        """
        state = self.adapters.state
        self.cache = PromptCache.load(path, self.model, self.cache_dtype, self.cache_device, self.progress, state)

    def save_pretrained(self, directory: str | Path, *, must_be_free: bool = False) -> None:
        """Write the model with its tokenizer and a model card in Hugging Face's layout, for this library or
        transformers to read. A card that is there already stays. Weights that were upcast to float32 are written in the
        dtype that they came in, if they are still what they were.

        Args:
            must_be_free: refuse a directory that holds something; by default a model that is there is replaced.

        Raises:
            Llama4Error: the directory cannot be written.
        """
        self._save(directory, must_be_free=must_be_free)

    def _save(self, directory: str | Path, name: str | None = None, *, must_be_free: bool = False) -> None:
        self.adapters.check_whole()
        side_files, generation = self.side_files, self.generation_config.to_dict()
        if generation != self.generation_config.content:
            side_files = side_files.with_json(GENERATION_FILE, generation)
        source = ModelSource(self.model, DTYPES.get(self._stored_dtype or ""))
        save(
            source,
            self.config,
            directory,
            tokenizer=self._tokenizer,
            side_files=side_files,
            name=name,
            progress=self.progress,
            must_be_free=must_be_free,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub, as one commit. A model card that is there
        stays; weights of an older model go.

        Args:
            repo_id: "user/name" or "organisation/name"; it is created if it does not exist.
            token: access token for the Hub; by default the one you logged in with.
            private: nobody else may read the repository. One that is there and public is refused.
            revision: a branch, created if it does not exist, or an open pull request's "refs/pr/N"; by default "main".
            create_pr: propose the commit as a new pull request.
            commit_message: by default "Upload model".

        Returns:
            The address of the commit, or of the pull request that was made.

        Raises:
            Llama4Error: the model cannot be written, no permission, or the Hub cannot be reached.
        """
        if create_pr and revision is not None:
            raise ArgumentError(
                f"create_pr opens a pull request of its own; leave out revision={revision!r}, or create_pr"
            )
        with scratch_directory(f"push-{repo_id.replace('/', '--')}") as directory:
            self._save(directory / "model", name=repo_id)
            return hub.push(
                directory / "model",
                repo_id,
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
