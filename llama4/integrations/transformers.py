"""`LlamaForTransformers`: this library's model as one of transformers', for its trainers, TRL, PEFT and pipelines.

Shapes: B rows, T columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers import Cache as TransformersCache
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llama4.api import Llama4
from llama4.cache.sequence import SequenceCache
from llama4.errors import ArgumentError
from llama4.families import family_of
from llama4.model.moe import Router

LOADING = ("revision", "subfolder", "token", "quantization", "experts", "memory_map")
"""Arguments of `Llama4.from_pretrained` that `LlamaForTransformers.from_pretrained` takes under the same name."""


class LlamaCache(TransformersCache):
    """This library's keys and values in the place of transformers' own. What transformers calls the length of a cache
    is the number of columns that went through the model, padding included."""

    def __init__(self, cache: SequenceCache) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache = self.cache.fork(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache = self.cache.fork(torch.arange(self.cache.batch_size)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.cache.batch_size).repeat_interleave(repeats)
        self.cache = self.cache.fork(rows.tolist())

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False


class LlamaForTransformers(PreTrainedModel, GenerationMixin):
    """A Llama 4 model of this library that is a `PreTrainedModel`: made by `from_llama4`, or from a name or directory
    by `from_pretrained`.

    Its modules are those of the model that it was made of: what is trained here is trained there. They have the names
    that transformers' own class gives them: adapters that are made of one are those of the other.
    """

    llm: Llama4
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True  # a cache is not cut back: no assisted generation
    main_input_name = "input_ids"

    def __init__(self, llm: Llama4) -> None:
        """See `from_llama4`."""
        config = llm.config
        if family_of(config).names(config).transforms:
            raise ArgumentError(
                f"{config.family} models are read with their rows in another order than transformers has them, and "
                "adapters trained here would not fit there; use transformers' own class, which trains them as well"
            )
        content = config.to_dict()
        super().__init__(CONFIG_MAPPING[content["model_type"]].from_dict(content))
        object.__setattr__(self, "llm", llm)  # not as a submodule: its modules are this one's already
        text = self.config.get_text_config()
        text.num_experts = text.num_local_experts  # what TRL's balance loss reads
        llama = llm.model
        self._router_logits = _RouterLogits(llama)
        if llama.vision_model is None:
            self.model, self.lm_head = llama.language_model.model, llama.language_model.lm_head
        else:
            self.vision_model = llama.vision_model
            self.multi_modal_projector = llama.multi_modal_projector
            self.language_model = llama.language_model
        self.generation_config = TransformersGenerationConfig.from_dict(
            {"eos_token_id": list(llm.stop_ids), **llm.generation_config.to_dict()}
        )
        self.warnings_issued: dict[str, bool] = {}

    @classmethod
    def from_llama4(cls, llm: Llama4) -> LlamaForTransformers:
        """The model of `llm`, not a copy.

        Raises:
            ArgumentError: not a Llama 4 model.
        """
        return cls(llm)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *arguments: object,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LlamaForTransformers:
        """What `Llama4.from_pretrained` loads.

        Args:
            dtype, torch_dtype: of the weights; "auto" or None is the checkpoint's.
            device_map: one device.
            options: those of `LOADING`; others, which are about transformers' own models, have no effect.

        Raises:
            Llama4Error: as `Llama4.from_pretrained`; or a device or quantization in transformers' own words.
        """
        given = {key: value for key, value in options.items() if key in LOADING}
        if options.get("quantization_config") is not None:
            raise ArgumentError("quantization_config is transformers' own; give quantization='int4', 'int8' or 'fp8'")
        if isinstance(device_map, Mapping):
            raise ArgumentError(f"device_map={device_map!r}: this model lives on one device; name that, or 'auto'")
        kind = dtype or torch_dtype or "auto"
        return cls(Llama4.from_pretrained(name, dtype=kind, device=device_map or "auto", **given))

    @classmethod
    def register(cls) -> None:
        """From now on `AutoModelForCausalLM.from_pretrained` and `AutoModelForImageTextToText.from_pretrained` load
        Llama 4 checkpoints with this class in this process: for tools that take only a name."""
        for auto, kind in ((AutoModelForImageTextToText, "llama4"), (AutoModelForCausalLM, "llama4_text")):
            _register(auto, CONFIG_MAPPING[kind], cls)
        _register(AutoModelForCausalLM, CONFIG_MAPPING["llama4"], cls)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
    ) -> None:
        """As `Llama4.save_pretrained`: a checkpoint for this library or for transformers.

        Args:
            is_main_process: of several processes with the same model one writes it.
            options: how transformers would write it, which has no effect.

        Raises:
            ArgumentError: `push_to_hub`.
        """
        if push_to_hub:
            raise ArgumentError("push_to_hub is not done here; call model.llm.push_to_hub(name)")
        if is_main_process:
            self.llm.save_pretrained(save_directory)

    @property
    def base_model(self) -> Any:
        """The model without its head: called like the whole, it gives the last hidden states, [B, T, D]."""
        return self._backbone

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.model.language_model.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.llm.model.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.lm_head if self.llm.model.vision_model is None else self.language_model.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        if self.llm.model.vision_model is None:
            self.lm_head = new_embeddings
        self.llm.model.language_model.lm_head = new_embeddings

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        self.llm.model.checkpoint_activations(True)

    def gradient_checkpointing_disable(self) -> None:
        self.llm.model.checkpoint_activations(False)

    def tie_weights(self, *arguments: object, **options: object) -> None:
        """They are as the checkpoint says."""

    def _init_weights(self, module: nn.Module) -> None:
        """They came with the checkpoint."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As transformers' own class.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], or of the columns in the cache and these; 0 at padding.
            position_ids: those that follow from the mask.
            labels: [B, T], -100 where there is no loss; the loss is the mean over tokens of the cross entropy of the
                next token, or their sum over `num_items_in_batch`.
            pixel_values: the tiles of all rows, [n, 3, A, A].
            logits_to_keep: of the last columns alone; 0 for all.

        Raises:
            ArgumentError: inputs that this model does not take: embeddings, or several sequences in one row.
        """
        out = self._backbone(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, pixel_values, **options
        )
        assert out.last_hidden_state is not None
        hidden_BTD = out.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else out.last_hidden_state
        logits_BTV = self.get_output_embeddings()(hidden_BTD)
        loss, text = None, self.config.get_text_config()
        if labels is not None:
            loss = ForCausalLMLoss(logits_BTV, labels, text.vocab_size, options.get("num_items_in_batch"))
        aux_loss: Tensor | None = None
        if out.router_logits is not None:
            assert input_ids is not None
            mask_BT = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]  # not the cache's
            logits = out.router_logits
            balance = load_balancing_loss_func(logits, text.num_experts, text.num_experts_per_tok, mask_BT)
            aux_loss = torch.as_tensor(balance)
            loss = loss + text.router_aux_loss_coef * aux_loss if loss is not None else None
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            router_logits=out.router_logits,
            logits=logits_BTV,
            past_key_values=out.past_key_values,
            hidden_states=(out.last_hidden_state,) if options.get("output_hidden_states") else None,
        )

    def _backbone(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        **options: Any,
    ) -> MoeModelOutputWithPast:
        if input_ids is None or inputs_embeds is not None:
            raise ArgumentError("this model takes input_ids, not inputs_embeds")
        B, T = input_ids.shape
        mask_BT = None if attention_mask is None else attention_mask[:, -T:]
        if mask_BT is not None and mask_BT.ndim != 2:
            raise ArgumentError(f"attention_mask must be [B, T], not {list(mask_BT.shape)}")
        if position_ids is not None:
            _check_positions(position_ids.expand(B, -1)[:, -T:], mask_BT)
        if past_key_values is None and use_cache and not torch.is_grad_enabled():
            past_key_values = LlamaCache(self.llm.model.new_cache(B, self.llm.cache_dtype, self.llm.cache_device))
        wants_logits = options.get("output_router_logits", self.config.get_text_config().output_router_logits)
        self._router_logits.begin(wants_logits)
        try:
            x_ND, batch = self.llm.model.hidden_states(
                input_ids,
                pixel_values=pixel_values,
                attention_mask=mask_BT,
                cache=past_key_values.cache if past_key_values is not None else None,
            )
        finally:
            router_logits = self._router_logits.end()
        if past_key_values is not None:
            past_key_values.columns += T
        found: Any = tuple(batch.unpack(of_layer_NE).flatten(0, 1) for of_layer_NE in router_logits)
        return MoeModelOutputWithPast(
            last_hidden_state=batch.unpack(x_ND), past_key_values=past_key_values, router_logits=found or None
        )

    def _prepare_cache_for_generation(self, *arguments: Any, **options: Any) -> bool:
        """`forward` makes the cache, when it knows the rows."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: LlamaCache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        logits_to_keep: int | None = None,
        use_cache: bool | None = None,
        **options: object,
    ) -> dict[str, Any]:
        past = past_key_values.columns if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "pixel_values": None if past else pixel_values,
            "logits_to_keep": 1,
            "use_cache": use_cache,
        }


class _RouterLogits:
    """The logits of all routers of a model, of the forward that is asked for them.

    Its hooks stay: where activations are computed again for the gradient, they must find what the forward found.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Tensor] | None = None
        self._in_gradient = False
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: tuple[Tensor], output: object) -> None:
        assert isinstance(router, Router)
        if self._found is None and not (self._in_gradient and torch.is_grad_enabled()):
            return
        logits_NE = router.logits(inputs[0])
        if self._found is not None:
            self._found.append(logits_NE)

    def begin(self, wanted: bool) -> None:
        self._found = [] if wanted else None
        if torch.is_grad_enabled():
            self._in_gradient = wanted

    def end(self) -> list[Tensor]:
        """Of each layer with experts, [N, E]."""
        found, self._found = self._found or [], None
        return found


def _register(auto: Any, config: type, model: type) -> None:
    auto._model_mapping.register(config, model, exist_ok=True)


def _check_positions(positions_BT: Tensor, mask_BT: Tensor | None) -> None:
    """Raises:
    ArgumentError: they do not go on by one from token to token.
    """
    steps = positions_BT.diff(dim=1) == 1
    if mask_BT is not None:
        steps |= (mask_BT[:, 1:] == 0) | (mask_BT[:, :-1] == 0)
    if not bool(steps.all()):
        raise ArgumentError(
            "position_ids begin anew inside a row: several sequences packed into one are not read apart here; turn "
            "packing and padding_free off, or train with llama4.train, which packs"
        )
