"""Tiny random checkpoints with odd shapes, and the bundles exported from them, once a session.

Folders that these fixtures return are shared: a test that changes one copies it first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.decoders import DECODERS

pytest_plugins = ["tests.mock_model", "tests.traces"]

# Two processes run the tests on two cores; libraries that are loaded after this keep to one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Other runtimes are where .ci/run puts them; a test never takes what a user has.
os.environ["STILLGRAPH_ENVIRONMENTS"] = str(Path(__file__).parents[1] / "build" / "environments")

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Window below the prompt, grouped heads, a head size that is no power of two and not hidden / heads.
SMALL: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# The same sizes as a Llama and as a Qwen 2, whose head size is hidden / heads.
LLAMA: dict[str, Any] = SMALL | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "layer_types": None,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 5,
    "hidden_size": 64,
    "head_dim": None,
}
# A tower of 9 patches of 4 x 4 pixels, and a class token. A picture's mark is the tokenizer's last token.
IMAGE = len(SPECIAL) + 256
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {k: v for k, v in QWEN2.items() if v is not None} | {"max_position_embeddings": 128},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "projection_dim": 32,
    },
    "image_token_index": IMAGE,
    "image_seq_length": 10,
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "tie_word_embeddings": True,
}
# A tower of 6 x 6 patches, pooled to 9 tokens: more than the window, fewer than a prefill takes.
GEMMA3_VISION: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": SMALL | {"max_position_embeddings": 128},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 9,
    "image_token_index": IMAGE,
    "boi_token_index": IMAGE + 1,
    "eoi_token_index": IMAGE + 2,
    "tie_word_embeddings": True,
}
PROCESSORS = {
    "llava": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 12},
        "crop_size": {"height": 12, "width": 12},
    },
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 24, "width": 24},
        "do_convert_rgb": True,
    },
}
MARKS = ["<image>", "<start_of_image>", "<end_of_image>"]
FAMILIES = {
    "llava": LLAVA,
    "gemma3_vision": GEMMA3_VISION,
    "gemma3": SMALL,
    "llama": LLAMA,
    "qwen2": QWEN2,
    **DECODERS,
}
PLAIN_INT4: dict[str, Any] = {
    "block_size": 128,
    "asymmetric": False,
    "keep": ["lm_head=int4", "embed_tokens=int4"],
}
Shapes = list[tuple[str, int, int | None]]  # (role, max_len, ctx) of each graph
PAIR: Shapes = [("prefill", 16, 40), ("decode", 1, 40)]

CheckpointFactory = Callable[..., Path]
BundleFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`tiny_checkpoint(seed=0, family="gemma3", **config)`: the folder of a checkpoint.

    A value of None leaves the key out.
    """
    made: dict[str, Path] = {}

    def make(seed: int = 0, family: str = "gemma3", **config: Any) -> Path:
        raw = {name: value for name, value in (FAMILIES[family] | config).items() if value is not None}
        key = json.dumps([seed, raw])
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
            write_checkpoint(folder, raw, seed)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> BundleFactory:
    """`tiny_bundle(shapes=PAIR, precision="fp32", batch=1, target="portable", slack=15, **config)`: a bundle.

    slack: of the onnxruntime target, where the least that a prefill of 16 needs moves the windows most often.
    """
    made: dict[str, Path] = {}

    def make(
        shapes: Shapes = PAIR,
        precision: str = "fp32",
        batch: int = 1,
        target: str = "portable",
        slack: int = 15,
        fast_prefill: bool = False,
        keep: tuple[str, ...] = (),
        **config: Any,
    ) -> Path:
        from stillgraph.exporter.bundle.build import export
        from stillgraph.exporter.config import request
        from stillgraph.spec import GraphShape

        vision = None if config.get("family") in ("llava", "gemma3_vision") else False

        checkpoint = tiny_checkpoint(**config)
        extra = None if target == "portable" else slack
        key = json.dumps([shapes, precision, batch, target, extra, fast_prefill, keep, str(checkpoint)])
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "tiny"
            graphs = [
                GraphShape(role=role, batch=batch, max_len=max_len, ctx=ctx, slack=extra)
                for role, max_len, ctx in shapes
            ]
            values: dict[str, Any] = {"model": str(checkpoint), "target": target, "precision": precision}
            if precision == "int4":  # all of it at four bits, and no text to round it for
                values |= PLAIN_INT4 | {"keep": [*PLAIN_INT4["keep"], *keep]}
            export(
                request(**values, batch=batch, fast_prefill=fast_prefill, out=out),
                graphs,
                replace=False,
                say=lambda line: None,
                vision=vision,
            )
            made[key] = out
        return made[key]

    return make


def write_checkpoint(folder: Path, raw: dict[str, Any], seed: int) -> None:
    """All files of a checkpoint, with `raw` as config.json word for word."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    from stillgraph.exporter.families import families

    folder.mkdir(parents=True)
    family = families()[raw["architectures"][0]]
    model = family.build(family.config(json.loads(json.dumps(raw))))  # it writes into what it is given
    randomize(model, seed, raw.get("initializer_range"))
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    GenerationConfig(bos_token_id=2, eos_token_id=[1, 5], pad_token_id=0).save_pretrained(folder)
    sees = "vision_config" in raw
    write_tokenizer(folder, MARKS if sees else [])
    if sees:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[raw["model_type"]]))


def randomize(model: Any, seed: int, spread: float | None = None) -> None:
    """Seeded weights: matrices large enough for logits that vary, no norm at its initial constant.

    spread: of matrices and biases; norms are then around what they start with.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                constant = 0.0 if spread is None else parameter
                parameter.copy_(constant + torch.rand(parameter.shape, generator=generator) - 0.5)
            else:
                parameter.normal_(0.0, spread or 0.1, generator=generator)


def write_tokenizer(folder: Path, marks: list[str]) -> None:
    """A byte-level BPE without merges: special tokens, one token a byte, and the marks of pictures."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *marks])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([*SPECIAL, *marks])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def refused() -> Callable[..., AbstractContextManager[None]]:
    """`with refused("read checkpoint", "config.json"):` - bad input, one sentence with these words."""

    @contextmanager
    def check(stage: str, *words: str) -> Iterator[None]:
        from stillgraph.errors import StillgraphError

        with pytest.raises(StillgraphError) as caught:
            yield
        said = str(caught.value)
        assert caught.value.exit_code == 2
        assert "\n" not in said
        assert caught.value.problem
        assert caught.value.remedy
        assert said == f"{stage}: {caught.value.problem}; {caught.value.remedy}."
        assert [word for word in words if word not in said] == [], said

    return check
