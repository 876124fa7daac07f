"""Text <-> token ids, by whichever BPE a model's tokenizer is, from any of the files that it is published in.

The text's own characters never become special tokens: `encode` finds none, and `special_tokens` gives their ids to the
code that builds prompts (prompt.py). Added tokens that are not special are text: see added_tokens.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llama4.errors import Llama4Error
from llama4.files import real_path, replace_text, replaced_file, user_path
from llama4.text.added_tokens import AddedToken, AddedTokenSplitter
from llama4.text.byte_level import RankedBytes
from llama4.text.gguf_vocabulary import GGUF_SUFFIX, read_gguf, tokenizer_json
from llama4.text.sentencepiece import SentencePiece, is_sentencepiece, read_sentencepiece, sentencepiece_bytes
from llama4.text.tokenizer_config import CONFIG_FILES, TOKENIZER_CONFIG_FILE, TokenizerConfig
from llama4.text.tokenizer_files import TokenModel, find_file, read_json, read_tiktoken, to_json
from llama4.text.vocabulary import INFILLING, LLAMA3, LLAMA3_RANKS, LLAMA4, SENTENCEPIECE, Vocabulary


class Tokenizer:
    """BPE with special tokens.

    Args:
        path: `tokenizer.model`, tiktoken's (Llama 3 and 4) or SentencePiece's (Llama 1 and 2); Hugging Face's
            `tokenizer.json`; a GGUF file; or a directory with one of the first two (if both are there,
            `tokenizer.json`, which lists its special tokens itself).
        num_special_tokens: how many special tokens follow the ranks of a tiktoken file; by default as many as the
            vocabulary's. Other files say so themselves.
        vocabulary: pattern and special tokens, which a tiktoken file does not say; by default Llama 3's for a file of
            128,000 ranks, else Llama 4's. What files say counts more.

    Raises:
        FileNotFoundError: neither file is there.
        Llama4Error: a file is not what its name says, or the tokenizer is no BPE.

    Attributes:
        model: what merges characters or bytes into tokens.
        adds_bos: whether a text to be continued begins with `bos_id`.
    """

    added_tokens: tuple[AddedToken, ...]
    """All of them, special or not, in order of id."""
    special_tokens: dict[str, int]
    """The special ones: name, such as `<|eot|>`, -> id."""
    vocab_size: int
    """Highest id + 1."""

    def __init__(
        self, path: str | Path, *, num_special_tokens: int | None = None, vocabulary: Vocabulary | None = None
    ) -> None:
        self.path = find_file(user_path(path))
        is_gguf = self.path.suffix.lower() == GGUF_SUFFIX
        self.config = TokenizerConfig() if is_gguf else TokenizerConfig.read(self.path.parent)
        try:
            self._read(num_special_tokens, vocabulary)
        except BaseException as error:
            raise self._refused(error) from None
        added = self.added_tokens
        self.special_tokens = {token.content: token.id for token in added if token.special}
        ids = self.model.ranks.values()
        self.vocab_size = 1 + max(max(ids, default=-1), *(token.id for token in added), 0)
        self._splitter = AddedTokenSplitter(added)
        in_ranks = set(ids)
        self._contents = {
            token.id: token.content.encode() for token in added if token.special or token.id not in in_ranks
        }

    def _read(self, num_special_tokens: int | None, vocabulary: Vocabulary | None) -> None:
        """`model`, `vocabulary`, `added_tokens` and `adds_bos`, from the file."""
        self.model: TokenModel
        if self.path.suffix.lower() == GGUF_SUFFIX:
            self.vocabulary = vocabulary or LLAMA4
            self.model, added, adds_bos, self.config = read_gguf(self.path, self.vocabulary.control_names)
            self.vocabulary = _of_names(self.vocabulary, (token.content for token in added))
        elif self.path.suffix == ".json":
            self.vocabulary = vocabulary or LLAMA4
            self.model, added, adds_bos = read_json(self.path, self.config, self.vocabulary.control_names)
            self.vocabulary = _of_names(self.vocabulary, (token.content for token in added))
        elif is_sentencepiece(self.path):
            self.vocabulary, adds_bos = SENTENCEPIECE, True
            self.model = pieces = read_sentencepiece(self.path, SENTENCEPIECE.control_names)
            added = self.config.apply(pieces.controls(), ())
        else:
            ranks, adds_bos = read_tiktoken(self.path), True
            self.vocabulary = vocabulary or (LLAMA3 if len(ranks) == LLAMA3_RANKS else LLAMA4)
            count = self.vocabulary.num_special_tokens if num_special_tokens is None else num_special_tokens
            if count < 0:
                raise Llama4Error(f"num_special_tokens is {count}; it counts tokens, so at least 0")
            self.model = RankedBytes(self.path.name, ranks, self.vocabulary.pattern)
            names = dict(enumerate(self.vocabulary.special_token_names(count), len(ranks)))
            added = self.config.apply_by_id(names, self.vocabulary.control_names)
        self.added_tokens = tuple(sorted(added, key=lambda token: token.id))
        self.adds_bos = adds_bos if self.config.adds_bos is None else self.config.adds_bos

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """Ordinary token -> id."""
        return self.model.ranks

    @property
    def pattern(self) -> str:
        """The regular expression that splits a text, if one alone does."""
        return self.model.pattern

    def _refused(self, error: BaseException) -> BaseException:
        """What the tokenizer's library makes of a pattern or of ids that it cannot use: a panic, which is no Exception,
        or an error without the file's name. Others are as they are."""
        if isinstance(error, Llama4Error):
            return error
        if type(error).__name__ == "PanicException" or isinstance(error, ValueError | OverflowError):
            return Llama4Error(f"{self.path} has a pattern or ids that cannot be used ({error}); fetch it again")
        return error

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    @cached_property
    def _longest(self) -> int | None:
        """Most bytes of a text, in UTF-8, that become one token; None where some may become none."""
        found = [token for token in self.added_tokens if not token.special]
        if self.model.longest is None or any(token.lstrip or token.rstrip for token in found):
            return None
        return max(self.model.longest, *(len(token.content.encode()) for token in found), 1)

    def fewest(self, text: str) -> int:
        """A number of tokens that a text surely has, known without reading it: its bytes by those of the longest token;
        0 where the tokenizer may leave something out."""
        if self._longest is None:
            return 0
        size = len(text) if text.isascii() else len(text.encode(errors="replace"))
        return -(-size // self._longest)

    def encode(self, text: str, *, blank: bool = True, most: float = math.inf) -> list[int]:
        """Text -> ids; every character is text, `<|eot|>` too. Added tokens that are text are found in it.

        Args:
            blank: whether the vocabularies of Llama 1 and 2 put a blank before it, as they do before a text.
            most: soon after so many ids the rest of the text is left, so that there are more of them than that.

        Raises:
            TypeError: `text` is not a string.
            Llama4Error: `text` holds half of a surrogate pair, which UTF-8 cannot encode.
        """
        if not isinstance(text, str):
            raise TypeError(f"can only encode str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Llama4Error(
                f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate pair; remove it, "
                "or decode the text it came from with errors='replace'"
            ) from None
        ids: list[int] = []
        try:
            for i, piece in enumerate(self._splitter.split(text)):
                if len(ids) > most:
                    break
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids += self.model.encode(piece, blank=blank or i > 0, most=most - len(ids))
        except BaseException as error:
            raise self._refused(error) from None
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> UTF-8 bytes, which may begin or end inside a character; special tokens give their names.

        Raises:
            Llama4Error: an id is not in the vocabulary.
        """
        return b"".join(self._bytes_of(int(i)) for i in ids)

    def _bytes_of(self, i: int) -> bytes:
        try:
            found = self._contents.get(i)
            return self.model.token_bytes(i) if found is None else found
        except LookupError:
            raise Llama4Error(f"{i} is not the id of a token; this vocabulary has {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are no whole character become U+FFFD, special tokens give their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            Llama4Error: this vocabulary has no such token.
        """
        try:
            return self.special_tokens[name]
        except KeyError:
            raise Llama4Error(
                f"{self.path} has no special token {name!r}, which the prompt needs; use the tokenizer that "
                "belongs to the model"
            ) from None

    @property
    def bos(self) -> str:
        """Name of the first token of every prompt."""
        return self.config.names.get("bos_token") or self.vocabulary.bos

    @cached_property
    def bos_id(self) -> int:
        """The first token of every prompt: `bos_token` of tokenizer_config.json, else `<|begin_of_text|>`."""
        return self._role("bos_token", self.vocabulary.bos)

    @cached_property
    def eos_id(self) -> int:
        """The last token of a message: `eos_token` of tokenizer_config.json, else `<|eot|>`."""
        return self._role("eos_token", self.vocabulary.eos)

    @cached_property
    def pad_id(self) -> int:
        """What fills the rows of a batch and is never looked at: `pad_token` of tokenizer_config.json, else
        `<|finetune_right_pad|>`, else the first token of a prompt."""
        names = (self.config.names.get("pad_token"), self.vocabulary.pad)
        found = next((i for name in names if name is not None and (i := self._find(name)) is not None), None)
        return self.bos_id if found is None else found

    def _role(self, role: str, default: str) -> int:
        """Raises:
        Llama4Error: the token that has this role is not there.
        """
        name = self.config.names.get(role)
        if name is None:
            return self.special(default)
        if (found := self._find(name)) is None:
            raise Llama4Error(
                f"{role} in {TOKENIZER_CONFIG_FILE} beside {self.path} is {name!r}, which is no token there; use the "
                "tokenizer that belongs to the model"
            )
        return found

    def _find(self, name: str) -> int | None:
        return self.special_tokens.get(name, self.ranks.get(name.encode()))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply, where a model's configuration names none: `eos_token` of tokenizer_config.json,
        `<|end_of_text|>`, `<|eom|>` and `<|eot|>`."""
        eos = () if "eos_token" not in self.config.names else (self.eos_id,)
        named = (self.special_tokens[name] for name in self.vocabulary.stop if name in self.special_tokens)
        return tuple(dict.fromkeys((*eos, *named)))

    def reply_ends(self, configured: Sequence[int] | None) -> tuple[int, ...]:
        """The tokens that end a reply: those that a model's configuration names, else `stop_ids`; of Code Llama also
        the one that ends what fills a gap."""
        filled = self.special_tokens.get(INFILLING.end)
        return tuple(dict.fromkeys((*(configured or self.stop_ids), *([] if filled is None else [filled]))))

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write the files that this one was read from, and what of `tokenizer.json` and `tokenizer_config.json` is not
        among them, from which transformers builds the same tokenizer. It reads SentencePiece's file itself.

        Args:
            directory: that of the model.
            model_max_length: the model's window in tokens, for a new tokenizer_config.json.
        """
        directory, suffix = Path(directory), self.path.suffix.lower()
        is_json, is_gguf = suffix == ".json", suffix == GGUF_SUFFIX
        is_pieces = isinstance(self.model, SentencePiece)
        beside = [] if is_gguf else [self.path.with_name(name) for name in CONFIG_FILES]
        if not is_gguf:
            _copy(self.path, directory / ("tokenizer.json" if is_json else "tokenizer.model"))
        for path in (*([self.path.with_name("tokenizer.model")] if is_json else []), *beside):
            if path.is_file():
                _copy(path, directory / path.name)
        names = {"bos_token": self.vocabulary.bos, "eos_token": self.vocabulary.eos, "pad_token": self.vocabulary.pad}
        if is_gguf and isinstance(self.model, SentencePiece):
            with replaced_file(directory / "tokenizer.model") as file:
                file.write(sentencepiece_bytes(self.model))
        elif is_gguf:
            content = tokenizer_json(self.path, self.model, self.added_tokens)
            replace_text(directory / "tokenizer.json", json.dumps(content, ensure_ascii=False))
        elif isinstance(self.model, RankedBytes) and not is_json:
            bos = self.config.names.get("bos_token", names["bos_token"])
            content = to_json(self.ranks, self.added_tokens, self.pattern, bos)
            replace_text(directory / "tokenizer.json", json.dumps(content, ensure_ascii=False))
        if not any(path.name == TOKENIZER_CONFIG_FILE and path.is_file() for path in beside):
            config: dict[str, Any] = {
                "tokenizer_class": "LlamaTokenizer" if is_pieces else "PreTrainedTokenizerFast",
                **{role: name for role, name in {**names, **self.config.names}.items() if self._find(name) is not None},
                "clean_up_tokenization_spaces": False,
            }
            if is_gguf:
                config["add_bos_token"] = self.adds_bos
            if model_max_length is not None:
                config["model_max_length"] = model_max_length
            replace_text(directory / TOKENIZER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _of_names(vocabulary: Vocabulary, names: Iterable[str]) -> Vocabulary:
    """That of a family, or of another generation of Llama if a tokenizer.json has its tokens and not the family's."""
    found = set(names)
    others = (each for each in (LLAMA4, LLAMA3, SENTENCEPIECE) if {each.bos, each.eos} <= found)
    return vocabulary if vocabulary.eos in found else next(others, vocabulary)


def _copy(source: Path, target: Path) -> None:
    if real_path(source) != real_path(target):
        with source.open("rb") as content, replaced_file(target) as copy:
            shutil.copyfileobj(content, copy)
