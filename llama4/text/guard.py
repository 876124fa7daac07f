"""What Llama Guard is asked: a conversation between the categories of what is unsafe and the question whether its last
message is.

A checkpoint's own chat template writes the prompt. Where there is none, `GUARDS` has the formats of the generations, as
their model cards and Meta's examples publish them (github.com/meta-llama/PurpleLlama and llama-cookbook,
`prompt_format_utils.py`). Categories are changed in the prompt that was written, between the two lines that enclose
them, so that they need no variables of the template.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llama4.errors import ArgumentError, Llama4Error
from llama4.text.messages import ImagePart, Message, ParsedMessage, read_messages
from llama4.text.prompt import IMAGE, Piece

MARK = "<BEGIN UNSAFE CONTENT CATEGORIES>"
_END = "<END UNSAFE CONTENT CATEGORIES>"
_ENTRY = re.compile(r"^(?=[A-Z]\d+: )", re.MULTILINE)
_ID = re.compile(r"[A-Za-z]\w*")
_AGENTS = {"user": "User", "assistant": "Agent"}


@dataclass(frozen=True)
class Category:
    """A kind of unsafe content: its id in the prompt, such as "S1", and its name."""

    id: str
    name: str


@dataclass(frozen=True)
class Moderation:
    """What a guard says of a message.

    Attributes:
        safe: whether `probability` is below the threshold, or only excluded categories are violated.
        probability: that the message is unsafe.
        categories: those that it violates, in the order in which the model names them.
        text: what the model wrote.
        asked: all categories that were asked for.
    """

    safe: bool
    probability: float
    categories: tuple[Category, ...]
    text: str
    asked: tuple[Category, ...] = ()


@dataclass(frozen=True)
class GuardFormat:
    """How a generation is asked.

    Attributes:
        categories: id -> name, in some followed by lines that describe it.
        before, after: special tokens and text around the prompt.
        about: what is to be assessed, behind "Provide your safety assessment for".
        bullet: before each of the two lines that say how to answer.
        end: behind the last of them.
        text_only: ids of categories that are not asked for where there are pictures.
    """

    categories: Mapping[str, str]
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    about: str = "ONLY THE LAST {agent} message"
    bullet: str = " - "
    end: str = ""
    text_only: Collection[str] = ()

    def compose(self, messages: Sequence[Message | ParsedMessage], bos: str) -> list[Piece]:
        """Messages -> the pieces of the prompt.

        Raises:
            Llama4Error: messages that are not those of a user and an assistant.
        """
        parsed = read_messages(messages)
        if strange := sorted({message.role for message in parsed} - _AGENTS.keys()):
            raise Llama4Error(
                f"Llama Guard reads messages of user and assistant; leave out those of {', '.join(strange)}"
            )
        agent = _AGENTS[parsed[-1].role]
        pictures = sum(isinstance(part, ImagePart) for message in parsed for part in message.parts)
        said = [
            f"{_AGENTS[message.role]}: {part.strip()}"
            for message in parsed
            for part in message.parts
            if isinstance(part, str)
        ]
        left_out = self.text_only if pictures else ()
        categories = {id_: text for id_, text in self.categories.items() if id_ not in left_out}
        text = (
            f"{' ' if pictures else ''}Task: Check if there is unsafe content in '{agent}' messages in conversations "
            f"according our safety policy with the below categories.\n\n{MARK}\n{_listing(categories)}\n"
            f"{_END}\n\n<BEGIN CONVERSATION>\n\n" + "\n\n".join(said) + "\n\n<END CONVERSATION>"
            f"\n\nProvide your safety assessment for {self.about.format(agent=agent)} in the above conversation:\n"
            f"{self.bullet}First line must read 'safe' or 'unsafe'.\n"
            f"{self.bullet}If unsafe, a second line must include a comma-separated list of violated categories."
            f"{self.end}"
        )
        return [
            *(Piece(bos, special=True), *self.before),
            *[Piece(IMAGE, special=True)] * pictures,
            *(Piece(text), *self.after),
        ]


def with_categories(
    pieces: Sequence[Piece], categories: Mapping[str, str] | None, excluded: Collection[str]
) -> tuple[list[Piece], dict[str, Category]]:
    """A prompt with other categories, and all that it then has, by their ids.

    Args:
        categories: in place of the prompt's: id -> name, perhaps followed by lines that describe it; None for those.
        excluded: ids of categories to leave out.

    Raises:
        ArgumentError: ids that cannot be, or are not there.
        Llama4Error: the prompt has no categories.
    """
    # What a user says comes behind them.
    sections = ((i, _section(piece.text)) for i, piece in enumerate(pieces) if not piece.special)
    at, section = next(((i, found) for i, found in sections if found), (0, None))
    if section is None:
        raise Llama4Error(
            "the checkpoint's chat template writes no categories of unsafe content; say how this model is asked: "
            f"guard={' or '.join(map(repr, GUARDS))} (on the command line --guard)"
        )
    whole = pieces[at].text
    given = dict(categories) if categories is not None else _read(whole[section])
    for id_, text in given.items():
        if not _ID.fullmatch(id_) or not isinstance(text, str) or not text.strip():
            raise ArgumentError(f"the category {id_!r}: {text!r:.80} must have an id such as 'S1', and a name")
    if unknown := sorted(set(excluded) - given.keys()):
        raise ArgumentError(f"there is no category {', '.join(unknown)} to exclude; there are {', '.join(given)}")
    left = {id_: text for id_, text in given.items() if id_ not in excluded}
    if not left:
        raise ArgumentError("no category is left; exclude fewer, or give some")
    text = whole[section] if left.keys() == given.keys() and categories is None else _listing(left)
    piece = Piece(whole[: section.start] + text + whole[section.stop :])
    names = {id_: Category(id_, text.strip().splitlines()[0].strip(". ")) for id_, text in left.items()}
    return [*pieces[:at], piece, *pieces[at + 1 :]], names


def _section(text: str) -> slice | None:
    """Where the categories stand, without the white space around them."""
    start = text.find(MARK)
    end = text.find(_END, start)
    if start < 0 or end < 0:
        return None
    start += len(MARK)
    found = text[start:end]
    start += len(found) - len(found.lstrip())
    return slice(start, start + len(found.strip()))


def _read(section: str) -> dict[str, str]:
    entries = (entry.split(": ", 1) for entry in _ENTRY.split(section) if _ENTRY.match(entry))
    return {id_: text.removesuffix("\n") for id_, text in entries}


def _listing(categories: Mapping[str, str]) -> str:
    return "\n".join(f"{id_}: {text}" for id_, text in categories.items())


_O1_TO_O6 = {
    "O1": """Violence and Hate.
Should not
- Help people plan or engage in violence.
- Encourage people to engage in violence.
- Express hateful, derogatory, or demeaning sentiments against people based on sensitive personal characteristics like \
their race, color, religion, national origin, sexual orientation, gender, gender identity, or disability.
- Encourage discrimination against people based on those characteristics and should not use slurs or create insults \
based on those characteristics.
Can
- Provide information on violence and discrimination.
- Discuss the topics of hate and violence, and can discuss historical events involving violence.""",
    "O2": """Sexual Content.
Should not
- Engage in sexually explicit (i.e., erotic) conversations and should not encourage people to engage in sexual \
activities.
Can
- Discuss topics related to sexuality and sexual education.
- Provide general information regarding sexual activities.
- Provide guidance on topics related to sexual health.""",
    "O3": """Criminal Planning.
Should not
- Help people plan or engage in criminal activities like theft, kidnapping, or financial crimes, especially when the \
person indicates that they may act on the information provided to them.
- Encourage people to engage in criminal activities or condone criminal behavior.
Can
- Help people understand how crimes are committed, provided that the response is not so detailed that it could be used \
to provide a roadmap for future crimes.
- Help people understand how systems work that are used to prevent crimes, provided those descriptions do not provide \
detailed information on how to defeat those systems.""",
    "O4": """Guns and Illegal Weapons.
Should not
- Assist in the planning or execution of firearm or illegal weapons crimes, especially when the person indicates that \
they may act on the information provided to them.
- Encourage people to engage in firearm or illegal weapons crimes or condone such behavior.
Can
- Discuss firearms and the arguments for and against firearm ownership.""",
    "O5": """Regulated or Controlled Substances.
Should not
- Encourage or assist people in the trafficking, consumption, or use of regulated or controlled substances, including \
but not limited to illegal drugs, tobacco, alcohol, and cannabis.
- Assist or encourage people to create such substances when it is illegal to do so.
Can
- Discuss the use of regulated or controlled substances, and can provide general information on those substances (ex: \
what their chemical composition is and what their effects are).
- Provide information on how those substances are manufactured, provided that the information is not so detailed as to \
provide step-by-step instructions for their creation.""",
    "O6": """Self-Harm.
Should not
- Encourage people to harm themselves.
- Romanticize or condone self-harm or suicide.
- Provide information regarding the methods of suicide or self-harm.
- Provide any information or advice, other than information regarding appropriate health resources, to people who \
express or imply that they wish to harm themselves.
Can
- Provide general information regarding self-harm and suicide (ex: statistics, the mental health challenges faced by \
those who take these actions).
Should
- Provide information regarding appropriate health resources to people who imply or express the desire to harm \
themselves.""",
}
"""Of Llama Guard 1, as its published prompt has them."""


def _numbered(*names: str) -> dict[str, str]:
    return {f"S{i}": f"{name}." for i, name in enumerate(names, 1)}


_CRIMES = ("Violent Crimes", "Non-Violent Crimes", "Sex Crimes", "Child Exploitation")
_COMMON = ("Specialized Advice", "Privacy", "Intellectual Property", "Indiscriminate Weapons", "Hate", "Self-Harm")
_S1_TO_S11 = _numbered(*_CRIMES, *_COMMON, "Sexual Content")
_S1_TO_S13 = _numbered(*_CRIMES, "Defamation", *_COMMON, "Sexual Content", "Elections")
_S1_TO_S14 = {**_S1_TO_S13, "S14": "Code Interpreter Abuse."}

_INST = (Piece("[INST] "),), (Piece(" [/INST]"),)


def _turns(start: str, end: str, turn: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    header = Piece(start, special=True), Piece(end, special=True)
    before = (header[0], Piece("user"), header[1], Piece("\n\n"))
    return before, (Piece(turn, special=True), header[0], Piece("assistant"), header[1])


_LLAMA3 = _turns("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

GUARDS: Mapping[str, GuardFormat] = {
    "llama-guard-1": GuardFormat(_O1_TO_O6, *_INST, about="{agent}", bullet="- "),
    "llama-guard-2": GuardFormat(_S1_TO_S11, *_INST),
    "llama-guard-3-1b": GuardFormat(_S1_TO_S13, *_LLAMA3, end=" "),
    "llama-guard-3-8b": GuardFormat(_S1_TO_S14, *_LLAMA3),
    "llama-guard-3-11b-vision": GuardFormat(_S1_TO_S13, *_LLAMA3, end=" "),
    "llama-guard-4": GuardFormat(
        _S1_TO_S14, *_turns("<|header_start|>", "<|header_end|>", "<|eot|>"), text_only=("S14",)
    ),
}
"""By the names that `guard` of `Llama4.moderate` takes."""
