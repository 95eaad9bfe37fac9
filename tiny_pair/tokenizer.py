"""The tokenizer of the embedded pair: Qwen3's manners over a vocabulary of about three hundred tokens.

Byte-level BPE (any text can be encoded), digits one by one, Qwen3's ChatML tokens and a chat template that acts as
Qwen3's does: `enable_thinking=False` writes an empty think block for the model, anything else leaves it to the model.
Knows the names of the tokens; knows no task beyond the few words that it keeps whole, and no model.
"""

import json
from pathlib import Path

WHOLE_WORDS = ("user", "assistant", "system", "Calculate", "Largest", "Smallest", "Reverse", "\n\n")
"""What the BPE merges keep as one token each."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
"""One token each, yet kept when special tokens are skipped in decoding, as in Qwen3."""
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
NO_THINKING = "<think>\n\n</think>\n\n"
"""What the template puts before a non-thinking answer."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen3's own: words, single digits, runs of punctuation, line breaks."""

CHAT_TEMPLATE = """\
{%- set turns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set turns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'assistant' -%}
        {%- set reasoning = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > turns.last_user and (loop.last or reasoning) -%}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
        {%- else -%}
            {{- content -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [character[byte] for byte in range(256)]


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 256 bytes, then each whole word's prefixes, with the merges that build a word from its left end."""
    characters = byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    merges = []
    for word in WHOLE_WORDS:
        letters = [characters[byte] for byte in word.encode()]
        for end in range(1, len(letters)):
            left, right = "".join(letters[:end]), letters[end]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    return vocabulary, merges


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = vocabulary_and_merges()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def render_prompt(content: str, *, thinking: bool) -> str:
    """One user turn as the chat template renders it for generation, without the cost of the template."""
    prompt = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    return prompt if thinking else prompt + NO_THINKING


def render_completion(reasoning: str, answer: str, *, thinking: bool) -> str:
    """What an assistant writes after `render_prompt`, up to and with the end of its turn."""
    block = f"<think>\n{reasoning}\n</think>\n\n" if thinking else ""
    return f"{block}{answer}{END_OF_TURN}"
