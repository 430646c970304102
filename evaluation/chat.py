"""A prompt as one turn of a conversation, as text, for the models of the published tables."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {prompt} ASSISTANT:"
)
# As the original writes it: with blanks and line ends of its own, and with the token that begins a
# text, before which the tokenizer puts a second one.
LLAMA_3_1 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|> {prompt} <|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>"
)


def own_template(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """By the template that comes with the model."""
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


CHATS: dict[str, Callable[[str, PreTrainedTokenizerBase], str]] = {
    "none": lambda prompt, _: prompt,
    "vicuna": lambda prompt, _: VICUNA.replace("{prompt}", prompt),
    "llama-3.1": lambda prompt, _: LLAMA_3_1.replace("{prompt}", prompt),
    "model": own_template,
}


def chat_for(model_name: str) -> str:
    """The chat that the original takes for a model of this name."""
    name = model_name.lower()
    if "longchat" in name or "vicuna" in name:
        return "vicuna"
    return "llama-3.1" if "llama-3.1" in name else "none"
