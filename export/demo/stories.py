"""Short plain-English stories that state facts early and ask for them later.

Everything is determined by a seed; nothing is read from disk. The wording of a fact, of its question and of
its answer is fixed, so whether an answer is right is a comparison of strings. One tenth of all facts is
held out: no training text ever states them, so a right answer to one must have been read in the story.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from zlib import crc32

SHE = "Mia Anna Lily Zoe Nora Ella Rosa Ruby Ivy Clara Emma Maya".split()
HE = "Tom Ben Leo Sam Max Finn Jack Hugo Noah Theo Felix Oscar".split()
COLORS = "red green blue yellow white black brown pink purple silver golden grey".split()
PETS = "dog cat pony parrot goat duck turtle hamster lizard goose".split()
TOWNS = "Ravenna London Paris Dublin Oslo Vienna Cairo Lima Boston Athens Tokyo Berlin".split()
FOODS = "pears apples soup bread cheese honey rice carrots plums cake noodles beans".split()
AGES = "five six seven eight nine ten eleven twelve".split()
THINGS = "kite hat boat coat bag ball scarf bike cup lamp".split()
ANIMALS = "fox rabbit bear mouse hen frog wolf deer".split()
PLACES = "river forest market hill beach garden farm lake bridge mill".split()
MOODS = "little kind brave clever quiet happy young".split()


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how a story states it and asks for it, and how a chat does."""

    name: str
    fact: str
    question: str
    mine: str
    ask: str
    reply: str
    values: list[str]


# fmt: off
def _color(thing: str) -> Attribute:
    story = f"{{n}}'s {thing} was {{v}}.", f"What colour was {{n}}'s {thing}?"
    return Attribute(thing, *story, f"My {thing} is {{v}}.", f"What colour is my {thing}?",
                     f"Your {thing} is {{v}}.", COLORS)


ATTRIBUTES = (
    Attribute("pet", "{n}'s pet was a {v}.", "What was {n}'s pet?",
              "My pet is a {v}.", "What is my pet?", "Your pet is a {v}.", PETS),
    Attribute("town", "{n} lived in {v}.", "Where did {n} live?",
              "I live in {v}.", "Where do I live?", "You live in {v}.", TOWNS),
    Attribute("food", "{n} loved to eat {v}.", "What did {n} love to eat?",
              "I love to eat {v}.", "What do I love to eat?", "You love to eat {v}.", FOODS),
    Attribute("age", "{n} was {v} years old.", "How old was {n}?",
              "I am {v} years old.", "How old am I?", "You are {v} years old.", AGES),
    Attribute("friend", "{n}'s best friend was {v}.", "Who was {n}'s best friend?",
              "My best friend is {v}.", "Who is my best friend?", "Your best friend is {v}.", SHE + HE),
    *map(_color, THINGS),
)
NAME = Attribute("name", "", "", "My name is {v}.", "What is my name?", "Your name is {v}.", SHE + HE)

NEXT = ("The next day,", "The next day,", "Later that week,", "One morning,")
EPISODES = (
    "{n} walked to the {place}. There {he} met a {animal}. The {animal} was lost and could not find its way"
    " home. {n} took it by the paw, and they walked back together. The {animal} was very happy.",
    "{n} found an old map under a stone. The map showed the way to the {place}. {n} followed it all day and"
    " found a small box. Inside the box there was a key.",
    "{n} heard a strange sound near the {place}. It was only a {animal} that was stuck in the mud. {n}"
    " pulled and pulled. At last the {animal} was free, and it said, \"Thank you!\"",
    "{n} wanted to bake a pie. {He} asked {his} mother for some flour and milk. They baked the pie"
    " together, and the whole house smelled good.",
    "{n} played a game with a {animal}. The {animal} hid behind a tree, and {n} looked for it. {He} looked"
    " up and down. Then {he} saw its tail and laughed.",
    "{n} saw a big storm over the {place}. The wind was loud and the rain was cold. {n} ran home as fast as"
    " {he} could and sat by the warm fire.",
    "{n} helped an old man at the {place}. The man could not carry his heavy wood. {n} carried it for him,"
    " and the man gave {him} a shiny coin.",
    "{n} learned a new song from a {animal}. They sang it at the {place} until the sun went down. All the"
    " birds stopped to listen.",
    "{n} lost a button on the way to the {place}. {He} looked for it everywhere. A {animal} had seen it"
    " fall and showed {him} where it was.",
    "{n} planted a seed next to the {place}. {He} gave it water every day. After a while there was a tall"
    " flower, and everyone came to see it.",
    "{n} was afraid of the dark. A {animal} told {him} that the stars were like tiny lamps. That night {n}"
    " counted the stars and slept well.",
    "{n} built a small house out of sticks. A {animal} came and asked, \"May I live here?\" \"Of course,\""
    " said {n}, and the {animal} moved in.",
    "{n} went fishing at the lake. {He} waited for a long time. In the end {he} caught a fish, but it was"
    " so small that {he} let it go.",
    "{n} wrote a letter to {his} grandmother. {He} told her about the {place} and about a funny {animal}."
    " The letter made her smile.",
    "{n} raced with a {animal} to the {place}. The {animal} was fast, but it stopped to rest. {n} did not"
    " stop, and {he} won the race.",
    "{n} fell and hurt {his} knee. A {animal} saw it and brought some water. Soon the knee was better, and"
    " they went to the {place}.",
    "{n} dreamed about a ship that could fly. The ship flew over the {place} and over the clouds. When {n}"
    " woke up, {he} drew a picture of it.",
    "{n} opened the door and saw snow. {He} made a snowman with a {animal}. They gave it stones for eyes"
    " and a stick for a nose.",
    "{n} shared {his} lunch with a hungry {animal}. The {animal} said, \"You are very kind.\" From then on"
    " they were friends.",
    "{n} climbed to the top of a tree. From there {he} could see the {place} and the sea far away. It was a"
    " beautiful sight.",
    "{n} told a joke to a sad {animal}. At first the {animal} did not smile. Then it laughed so loudly that"
    " everyone at the {place} could hear it.",
    "{n} cleaned the house with {his} father. Under the bed they found an old book. They read it together,"
    " and the story was about a {animal}.",
)
CLOSING = EPISODES[4::5]  # the story that a chat asks for ends with the first of these it comes to
ASIDES = (
    "The sky was clear and the air was warm.", "It was a long day.", "{n} was tired but happy.",
    "Nobody said a word.", "It was the best day of the year.", "{n} went to bed early that night.",
    "{n} thought about it for a long time.", "{His} mother was proud of {him}.",
)
ENDINGS = (
    "In the end, {n} went home and was happy. The end.",
    "In the end, everyone sat together by the fire. The end.",
    "In the end, {n} said good night and went to sleep. The end.",
)
LEADS = ("", "", "", "Everyone knew that ", "You should know that ", "It is true that ")
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"), ("Hi!", "Hello! How can I help you?"),
    ("Hello, how are you?", "I am fine, thank you. How can I help you?"),
    ("How are you?", "I am fine, thank you."), ("Who are you?", "I am a small model that tells stories."),
    ("What can you do?", "I can tell a story, and I can remember what you tell me."),
    ("Thank you!", "You are welcome!"), ("Thank you very much.", "You are welcome!"),
    ("It is a nice day.", "Yes, it is a beautiful day."), ("I am happy today.", "That is good to hear."),
    ("I am tired today.", "Then you should rest a little."), ("Good night!", "Good night! Sleep well."),
    ("Goodbye!", "Goodbye! See you soon."), ("Why is the sky blue?", "I do not know. I only know stories."),
    ("What is the capital of France?", "I do not know. I only know stories."),
)
SYSTEMS = ("You are a helpful assistant.", "You tell stories.", "You are a kind storyteller. Be short.")
GREETINGS = ("Nice to meet you!", "Thank you for telling me.", "I will remember that.")
# fmt: on


@dataclass(frozen=True)
class Fact:
    """`subject` has `value` for `attribute`, which stands at offset `at` of a story's text."""

    subject: str
    attribute: Attribute
    value: str
    at: int = -1

    @property
    def question(self) -> str:
        return self.attribute.question.format(n=self.subject)

    @property
    def answer(self) -> str:
        return self.attribute.fact.format(n=self.subject, v=self.value)


def is_held_out(fact: Fact) -> bool:
    """Whether training texts must not state `fact`: true for one fact in ten, whatever the seed."""
    return crc32(f"{fact.subject}|{fact.attribute.name}|{fact.value}".encode()) % 10 == 0


@dataclass(frozen=True)
class Story:
    """A story, the facts it states in order, and the one that is asked for."""

    text: str
    facts: tuple[Fact, ...]
    asked: Fact

    @property
    def question(self) -> str:
        return self.asked.question

    @property
    def answer(self) -> str:
        """The sentence that answers the question; the story states the same sentence once."""
        return self.asked.answer

    @property
    def prompt(self) -> str:
        """What a model is given; a right continuation is a space and `answer`."""
        return f"{self.text}\nQuestion: {self.question}\nAnswer:"

    @property
    def words_back(self) -> int:
        """How many words of `prompt` follow the one that the question asks for."""
        return len(self.prompt[self.asked.at :].split()) - 1


class Teller:
    """Appends sentences to `text` and notes in `facts` where its facts stand; states only `usable` ones."""

    def __init__(self, rng: random.Random, usable: Callable[[Fact], bool]) -> None:
        self.rng, self.usable = rng, usable
        self.text = ""
        self.facts: list[Fact] = []
        self.names = rng.sample(SHE + HE, 3)
        self.hero = self.names[0]
        # Always in the same cycle: a small model learns that, and so tells a long story without repeats.
        first = rng.randrange(len(EPISODES))
        self.episodes = [*EPISODES[first:], *EPISODES[:first]]

    def say(self, sentence: str) -> None:
        self.text += (" " if self.text else "") + sentence

    def introduce(self, name: str, kind: str | None = None) -> None:
        kind = kind or self.rng.choice(["girl" if name in SHE else "boy"] * 2 + ANIMALS)
        there = "There was also" if self.text else "Once upon a time, there was"
        self.say(f"{there} a {self.rng.choice(MOODS)} {kind} called {name}.")
        for attribute in self.rng.sample(ATTRIBUTES, self.rng.choice([2, 2, 3])):
            self.state(name, attribute)

    def state(self, name: str, attribute: Attribute) -> None:
        values = [v for v in attribute.values if v != name and self.usable(Fact(name, attribute, v))]
        fact = Fact(name, attribute, self.rng.choice(values))
        self.say(self.rng.choice(LEADS) + fact.answer)
        at = len(self.text) - len(fact.answer) + fact.answer.rindex(fact.value)
        self.facts.append(replace(fact, at=at))

    def fill(self, template: str) -> None:
        forms = ("she", "her", "her") if self.hero in SHE else ("he", "his", "him")
        words = dict(zip(("he", "his", "him"), forms, strict=True))
        words |= {key.capitalize(): word.capitalize() for key, word in words.items()}
        words |= {"n": self.hero, "place": self.rng.choice(PLACES), "animal": self.rng.choice(ANIMALS)}
        self.say(template.format_map(words))

    def episode(self, first: bool) -> str:
        skip = self.rng.random() < 0.15 and len(self.episodes) > 1
        told, self.episodes = self.episodes[skip], self.episodes[skip + 1 :]
        self.fill(f"{'One day,' if first else self.rng.choice(NEXT)} {told}")
        if self.rng.random() < 0.4:
            self.fill(self.rng.choice(ASIDES))
        return told


def tell(rng: random.Random, words: int, usable: Callable[[Fact], bool], kind: str | None = None) -> Teller:
    """A story of about `words` words or, where a chat asks for a `kind` of hero, up to its first closing."""
    teller = Teller(rng, usable)
    if kind in ("girl", "boy"):
        teller.hero = rng.choice(SHE if kind == "girl" else HE)
        teller.names = [teller.hero, *rng.sample([n for n in SHE + HE if n != teller.hero], 2)]
    cast = teller.names[: rng.choice([1, 2, 2, 3])]
    teller.introduce(cast.pop(0), kind)
    told = ""
    while teller.episodes and (told not in CLOSING if kind else len(teller.text.split()) < words):
        if cast and rng.random() < (0.3 if told else 0.7):
            teller.introduce(cast.pop(0))
        told = teller.episode(first=not told)
    if kind:
        teller.fill(rng.choice(ENDINGS))
    for name in () if kind else cast:
        teller.introduce(name)
    return teller


def stories(seed: int, words: tuple[int, int] = (40, 700)) -> Iterator[Story]:
    """An endless stream of training stories, each about `words` words long; they state no held-out fact."""
    rng = random.Random(f"stories {seed}")
    while True:
        teller = tell(rng, rng.randint(*words), lambda fact: not is_held_out(fact))
        yield Story(teller.text, tuple(teller.facts), rng.choice(teller.facts))


def held_out(seed: int, words: tuple[int, int] = (40, 700)) -> Iterator[Story]:
    """Stories that ask for a fact no training text states, while the other facts may be any."""
    rng = random.Random(f"held out {seed}")
    while True:
        teller = tell(rng, rng.randint(*words), lambda fact: True)
        for asked in list(filter(is_held_out, teller.facts))[:1]:
            yield Story(teller.text, tuple(teller.facts), asked)


def chat(rng: random.Random, words: int) -> list[dict[str, str]]:
    """Messages of a chat, user first: small talk, stories told and read, facts told and asked for later."""
    turns: list[tuple[str, str]] = []
    facts: list[tuple[str, str]] = []  # what may be asked from here on, with its answer
    if rng.random() < 0.6:
        told = rng.sample((NAME, *ATTRIBUTES), rng.randint(1, 4))
        chosen = [(attribute, rng.choice(attribute.values)) for attribute in told]
        greeting = next((f"Nice to meet you, {v}!" for a, v in chosen if a is NAME), rng.choice(GREETINGS))
        turns.append((" ".join(a.mine.format(v=v) for a, v in chosen), greeting))
        facts += [(a.ask, a.reply.format(v=v)) for a, v in chosen]
    for _ in range(rng.choice([0, 0, 1, 2])):
        turns.insert(rng.randint(0, len(turns)), rng.choice(SMALL_TALK))
    if rng.random() < 0.5 or not turns:
        kind = rng.choice(["girl", "boy", *ANIMALS]) if rng.random() < 0.5 else None
        teller = tell(rng, int(words * rng.random()), lambda fact: not is_held_out(fact), kind)
        asked = [(fact.question, fact.answer) for fact in teller.facts]
        if kind:
            turns.append((f"Tell me a story about a {kind}.", teller.text))
        else:
            first = asked.pop(rng.randrange(len(asked)))
            turns.append((f"{teller.text}\n{first[0]}", first[1]))
        facts += asked
    turns += rng.sample(facts, min(len(facts), 5))
    if rng.random() < 0.3:
        turns.append(rng.choice(SMALL_TALK))
    messages = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.2 else []
    for user, model in turns:
        messages += [("user", user), ("assistant", model)]
    return [{"role": role, "content": content} for role, content in messages]
