"""Prompts are what transformers would make of them with the same checkpoint."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from moeplan.runtime_min.batch_file import Request
from moeplan.runtime_min.checkpoint import CheckpointError
from moeplan.runtime_min.prompts import ChatTemplate, PromptError, Prompts

from .folders import save_tokenizer

MESSAGES = (
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": 'Say "hi"\n'},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "Zażółć?"},
)
TEMPLATES = {
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'system' %}{{ m.content | trim }}\n"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "blocks and loop controls": (
        "{% set ns = namespace(count=0) %}\n{% for m in messages %}\n    {% if m.role == 'system' %}\n"
        "        {% continue %}\n    {% endif %}\n{% set ns.count = ns.count + 1 %}\n"
        "<|{{ m.role }}|>{{ ns.count }}{{ m | tojson }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if tools %}tools{% endif %}"
    ),
}


def request(prompt: str | tuple[dict[str, str], ...]) -> Request:
    return Request(1, "a", prompt, None, 5, 0.0, 1.0, None, (), None)


def write_template(folder, template: str, place: str) -> None:
    save_tokenizer(folder)
    if place == "file":
        (folder / "chat_template.jinja").write_text(template)
        return
    path = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template if place == "config" else named}))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "config", "named"])
def test_chats_are_rendered_as_transformers_does(tmp_path, name, place):
    write_template(tmp_path, TEMPLATES[name], place)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = list(MESSAGES)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(tmp_path).render(MESSAGES) == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert Prompts(tmp_path, 300).encode(request(MESSAGES)) == ids


def test_completions_begin_with_the_tokenizers_own_start(tmp_path):
    save_tokenizer(tmp_path)
    ids = Prompts(tmp_path, 300).encode(request("Hi é"))
    assert ids[0] == 257
    assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path)("Hi é")["input_ids"]


def test_answers_continue_the_prompt(tmp_path):
    save_tokenizer(tmp_path)
    prompts = Prompts(tmp_path, 300)
    ids = prompts.encode(request("Once upon a time é"))
    assert prompts.decode(ids[:5], ids[5:]) == " upon a time é"
    cut = len(ids) - 1  # between the two bytes of é
    assert prompts.decode(ids[:cut], ids[cut:]) == "\ufffd"
    assert prompts.decode(ids, []) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9]['role'] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ 1 / 0 }}",
        "{% for %}",
        "{{ undefined_name.field }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves(tmp_path, template):
    """An error record for the request, and nothing reaches out of the sandbox."""
    write_template(tmp_path, template, "file")
    with pytest.raises(PromptError):
        Prompts(tmp_path, 300).encode(request(MESSAGES))


def test_no_template(tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(PromptError, match="has no chat template"):
        Prompts(tmp_path, 300).encode(request(MESSAGES))


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Prompts(tmp_path, 300)
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has 259 tokens, the model 258"):
        Prompts(tmp_path, 258)
