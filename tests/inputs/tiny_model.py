"""A model of two layers and random weights, with a tokenizer of one id a byte."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 258  # the bytes, then what begins and what ends a text
BEGIN, END = 256, 257


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One id a byte, and one that begins a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", model_max_length=4096
    )


def tiny_model(**changes: object) -> transformers.PreTrainedModel:
    """Two layers, four query heads on two KV heads."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.15,  # logits that are not all alike
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        }
        | changes
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> Path:
    """Model and tokenizer as a folder of Hugging Face's."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
