"""The stories keep their promises, and the checkpoint that ships has learned them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from stillgraph.exporter.demo import stories as st

CHECKPOINT = Path(st.__file__).parent / "demo_checkpoint"
MEGABYTE = 1_000_000

Draw = Callable[[int], Iterator[st.Story]]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


@cache
def vocabulary() -> frozenset[str]:
    """Every word of enough training stories and chats to have them all."""
    rng = random.Random(0)
    texts = [story.text for story in islice(st.stories(0), 300)]
    texts += [message["content"] for _ in range(300) for message in st.chat(rng, 200)]
    return frozenset(words_of(" ".join([*texts, *st.ENDINGS, "Question Answer"])))


@pytest.mark.parametrize("draw", [st.stories, st.held_out])
def test_a_seed_gives_the_same_stories_and_another_gives_others(draw: Draw) -> None:
    first, again, other = (list(islice(draw(seed), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_training_text_states_a_held_out_fact() -> None:
    asked = {story.answer for story in islice(st.held_out(1), 200)}
    rng = random.Random(1)
    texts = [story.text for story in islice(st.stories(1), 500)]
    texts += [message["content"] for _ in range(500) for message in st.chat(rng, 100)]
    text = "\n".join(texts)
    assert [answer for answer in asked if answer in text] == []
    assert len(asked) > 50


def test_a_tenth_of_all_facts_is_held_out() -> None:
    facts = [st.Fact(n, a, v) for n in st.SHE + st.HE for a in st.ATTRIBUTES for v in a.values]
    assert 0.08 < sum(map(st.is_held_out, facts)) / len(facts) < 0.12


@pytest.mark.parametrize("draw", [st.stories, st.held_out])
def test_the_answer_is_in_the_story_once_and_where_the_fact_says(draw: Draw) -> None:
    for story in islice(draw(5), 100):
        asked = story.asked
        assert story.text.count(story.answer) == 1
        assert story.text[asked.at : asked.at + len(asked.value)] == asked.value
        sentence = story.text.index(story.answer)
        assert sentence < asked.at < sentence + len(story.answer)
        assert [fact for fact in story.facts if fact.question == story.question] == [asked]


def test_words_back_counts_the_words_after_the_value() -> None:
    for story in islice(st.held_out(6), 100):
        words, at = story.prompt.split(), len(story.prompt[: story.asked.at].split())
        assert words[at].rstrip(".") == story.asked.value
        assert story.words_back == len(words[at + 1 :])


def test_a_chat_alternates_and_answers_what_was_said() -> None:
    rng = random.Random(2)
    for _ in range(200):
        messages = st.chat(rng, 60)
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in messages)


def test_the_generator_imports_no_torch() -> None:
    code = "import sys, stillgraph.exporter.demo.stories; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKPOINT.parents[2])


def test_the_checkpoint_is_complete_and_at_most_8_mb() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected | {"chat_template.jinja", "generation_config.json"} == set(files)
    assert sum(files.values()) <= 8 * MEGABYTE


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


TEXTS = [
    "Once upon a time",
    "  two spaces,\n\na tab\t and a trailing space ",
    "na\u00efve caf\u00e9 \u2581 \u65e5\u672c\u8a9e \U0001f98a\u200d\U0001f525",
    "\x00\x7f don't 12345",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_both_libraries_give_the_same_ids_and_any_text_comes_back(tokenizer: Any, text: str) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = tokenizer(text)["input_ids"]
    assert ids == backend.encode(text).ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert backend.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_stand_where_gemma_has_them(tokenizer: Any) -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [0, 1, 2, 3]
    named = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image>"]
    for token in named:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    stops = pytest.importorskip("transformers").GenerationConfig.from_pretrained(CHECKPOINT).eos_token_id
    assert stops == tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])


def test_the_chat_template_is_gemmas(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi! "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<start_of_turn>user\nBe short.\n\nHi!<end_of_turn>\n<start_of_turn>model\n"
    assert text == "<bos>" + turns
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template([*messages, messages[1]], tokenize=False)


def test_greedy_text_is_made_of_the_generators_words(tokenizer: Any, model: Any) -> None:
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=160, do_sample=False)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a ")
    words = words_of(text.rsplit(" ", 1)[0])  # the last word may be cut
    assert words - vocabulary() == set()
    assert len(words) > 20


def test_facts_beyond_the_window_are_recalled_through_the_global_layers(tokenizer: Any, model: Any) -> None:
    from stillgraph.exporter.demo.train_text import Recall, right, sliding_reach

    backend = tokenizer.backend_tokenizer
    told = (Recall.of(story, backend) for story in st.held_out(7, (100, 300)))
    asked = list(islice((recall for recall in told if recall.distance > sliding_reach(model.config)), 20))
    assert sum(right(model, recall) for recall in asked) >= 0.8 * len(asked)
    assert sum(right(model, recall, narrow=True) for recall in asked) <= 0.3 * len(asked)
