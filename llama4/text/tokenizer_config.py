"""What stands beside a tokenizer's file and says more of its tokens: tokenizer_config.json, special_tokens_map.json and
added_tokens.json. Which of them counts is as in transformers (`_from_pretrained` in tokenization_utils_base.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama4.config.fields import FieldTable
from llama4.config.typed import read_value
from llama4.errors import ConfigError
from llama4.reading import read_json
from llama4.text.added_tokens import AddedToken

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
CONFIG_FILES = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)

FIELDS = FieldTable(
    TOKENIZER_CONFIG_FILE,
    used=(
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
        *("added_tokens_decoder", "chat_template", "add_bos_token"),
    ),
    without_effect={
        **dict.fromkeys(("tokenizer_class", "processor_class", "auto_map"), "names of classes; no code is run"),
        **dict.fromkeys(("backend", "is_fast", "use_fast", "trust_remote_code"), "names of classes; no code is run"),
        **dict.fromkeys(("name_or_path", "is_local", "local_files_only", "init_inputs"), "where it comes from"),
        **dict.fromkeys(
            ("files_loaded", "tokenizer_file", "vocab_file", "special_tokens_map_file"), "where it comes from"
        ),
        **dict.fromkeys(("add_eos_token", "post_processor"), "the prompt's format says where they stand"),
        "split_special_tokens": "a text never becomes a special token",
        "chat_control_tokens": "a text never becomes a special token",
        **dict.fromkeys(("model_max_length", "max_len", "max_length", "stride"), "the model's window counts"),
        **dict.fromkeys(("truncation_side", "truncation_strategy", "tokenizer_truncation"), "nothing is cut off"),
        **dict.fromkeys(("padding_side", "pad_to_multiple_of", "pad_token_type_id"), "padding is masked"),
        "tokenizer_padding": "padding is masked",
        **dict.fromkeys(("model_input_names", "verbose", "legacy"), "of input and output"),
        "clean_up_tokenization_spaces": "transformers ignores it for BPE, too",
        "spaces_between_special_tokens": "special tokens are not shown",
        "errors": "bytes that are no text become U+FFFD",
        "add_prefix_space": "tokenizer.json counts",
        "fix_mistral_regex": "of other models",
        **dict.fromkeys(("response_template", "response_schema"), "replies are read in Llama 4's format"),
        **dict.fromkeys(
            ("vocab", "merges", "tokenizer_object", "tokenizer", "unk_id", "gguf_file"), "tokenizer.json counts"
        ),
    },
    fixed={"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,)},
)
"""Of every other name that ends in `_token`, the value is a special token, too."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside a tokenizer say of its tokens.

    Attributes:
        names: role -> token, such as `bos_token` -> `<|begin_of_text|>`.
        added: added tokens, in order of id.
        overrides: whether `added` beats what the tokenizer's own file says of the same tokens.
        adds_bos: whether a text to be continued begins with the first token of a prompt; None where nothing is said.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    overrides: bool = False
    adds_bos: bool | None = None

    @classmethod
    def read(cls, directory: Path) -> TokenizerConfig:
        """Where tokenizer_config.json has `added_tokens_decoder`, that counts; else special_tokens_map.json, then
        tokenizer_config.json for the roles, and added_tokens.json for tokens of which tokenizer.json says nothing.

        Raises:
            ConfigError: a file that is damaged, or a value of the wrong kind.
        """
        path = directory / TOKENIZER_CONFIG_FILE
        content = _read(path)
        FIELDS.check(content)
        adds_bos = None if content.get("add_bos_token") is None else bool(content["add_bos_token"])
        if (decoder := content.get("added_tokens_decoder")) is not None:
            listed = ({**_object(token, path), "id": i} for i, token in _object(decoder, path).items())
            tokens = _sorted(read_added_token(token, path) for token in listed)
            return cls(_names(content, path), tokens, True, adds_bos)
        special = _read(directory / SPECIAL_TOKENS_FILE)
        names = _names(content, path) | _names(special, directory / SPECIAL_TOKENS_FILE)
        controls = {*names.values(), *_listed(content), *_listed(special)}
        path = directory / ADDED_TOKENS_FILE
        found = (read_added_token({"id": i, "content": name}, path) for name, i in _read(path).items())
        is_special = ((token, token.content in controls) for token in found)
        added = _sorted(replace(t, special=special, normalized=not special) for t, special in is_special)
        return cls(names, added, adds_bos=adds_bos)

    def apply(self, added: Iterable[AddedToken], controls: Collection[str]) -> list[AddedToken]:
        """The added tokens of the tokenizer's own file with what is said here. Special is what one of the two calls so,
        what has a role, and the control tokens of the family's prompts."""
        tokens = {token.content: token for token in added}
        for token in self.added:
            known = tokens.get(token.content, token)
            if known is token or self.overrides:
                tokens[token.content] = replace(token, id=known.id, special=token.special or known.special)
        special = {*self.names.values(), *controls}
        return [replace(token, special=token.special or token.content in special) for token in tokens.values()]

    def apply_by_id(self, names: Mapping[int, str], controls: Collection[str]) -> list[AddedToken]:
        """The special tokens of a tokenizer without a file that lists them, by id, with what is said here."""
        declared = {token.id for token in self.added} | {token.content for token in self.added}
        rest = ((i, name) for i, name in names.items() if i not in declared and name not in declared)
        return self.apply((AddedToken(i, name, special=True, normalized=False) for i, name in rest), controls)


def read_added_token(content: Mapping[str, Any], path: Path) -> AddedToken:
    """An added token as the files write it.

    Raises:
        ConfigError: a value of the wrong kind.
    """
    try:
        text = content["content"]
        if not isinstance(text, str):
            raise TypeError("its content is no text")
        flags = {name: content.get(name, False) for name in ("special", "single_word", "lstrip", "rstrip")}
        flags["normalized"] = content.get("normalized", not flags["special"])
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise TypeError("a flag is neither true nor false")
        number = content["id"]
        number = read_value(int, int(number) if isinstance(number, str) else number, "id", str(path))
        return AddedToken(number, text, **flags)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds the added token {str(dict(content))[:200]} ({error!r}), which should have an id, a content "
            "and flags; fetch the file again"
        ) from None


def _names(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Every `..._token` and what names further ones (image_token and so on)."""
    named = {role: value for role, value in content.items() if role.endswith("_token") and not isinstance(value, bool)}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(content.get(group), dict):
            named |= content[group]
    names = {}
    for role, value in named.items():
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            names[role] = name
        elif name is not None:
            raise ConfigError(f'{role} in {path} is {value!r}; it should be a token, such as "<|begin_of_text|>"')
    return names


def _listed(content: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role."""
    tokens: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(content.get(name), list):
            tokens += content[name]
    return [str(token["content"] if isinstance(token, dict) and "content" in token else token) for token in tokens]


def _sorted(tokens: Iterable[AddedToken]) -> tuple[AddedToken, ...]:
    return tuple(sorted(tokens, key=lambda token: token.id))


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {str(value)[:80]!r} where a JSON object should be; fetch the file again")
    return value


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is none."""
    return read_json(path) if path.is_file() else {}
