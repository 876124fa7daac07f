"""A prompt and its options, before the engine has them."""

from __future__ import annotations

import threading
from dataclasses import replace

from llama4.api import Llama4
from llama4.inputs import Inputs
from llama4.options import Options, Prepared, Prompt, conversation, has_form
from llama4.text.prompt_limit import PromptLimit


class Preparation:
    """Done once for all replies to a prompt, by whoever asks first; they differ by their seeds.

    Attributes:
        messages: the prompt; once it is prepared, what it became.
        has_form: whether a form of the reply is to be read.
    """

    def __init__(self, llm: Llama4, messages: Prompt, options: Options, limit: PromptLimit) -> None:
        self.messages, self.has_form = messages, has_form(options)
        self._llm, self._options, self._limit = llm, options, limit
        self._preparing = threading.Lock()
        self._prepared: Prepared | None = None

    def with_seed(self, seed: int | None) -> Prepared:
        """Raises:
        Llama4Error: as `Llama4.chat`.
        """
        with self._preparing:
            if self._prepared is None:
                prompt = self.messages if isinstance(self.messages, Inputs) else conversation(self.messages)
                self._prepared = self._llm.prepare(prompt, limit=self._limit, **self._options)
                self.messages = self._prepared.inputs
        return replace(self._prepared, sampler=replace(self._prepared.sampler, seed=seed))
