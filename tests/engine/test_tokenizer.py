import json
import random

import pytest

from mii_hpc.config import ModelConfig
from mii_hpc.engine.tokenizer import Tokenizer
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import Chat
from tests.models import VOCABULARY, replace_tokenizer_by_sentencepiece, save_tokenizer

pytestmark = pytest.mark.engine

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)
TALK = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(params=["byte level", "sentencepiece"])
def folder(request, tmp_path):
    save_tokenizer(tmp_path)
    if request.param == "sentencepiece":
        replace_tokenizer_by_sentencepiece(tmp_path)
    return tmp_path


def tokenizer(folder, **fields):
    return Tokenizer(ModelConfig(model_name_or_path=str(folder), **fields), VOCABULARY, ())


def test_the_bytes_of_all_tokens_are_the_text(folder):
    codec = tokenizer(folder)
    for text in ("The quick  brown fox", "für €5 🙂🚀 naïve", "\n\n a", "x" * 50):
        seen = codec.tokenize(text, plain=True)
        assert b"".join(seen.tokens).decode().strip() == text.strip()
        assert seen.text.strip() == text.strip()
        assert codec.tokenize(seen.token_ids).tokens == seen.tokens


@pytest.mark.parametrize("skips", [False, True])
def test_the_pieces_of_any_tokens_join_to_the_tokenizers_own_text(folder, skips):
    draw, whole = random.Random(3), tokenizer(folder)
    special = whole.pretrained.all_special_ids
    for _ in range(100):
        ids = [draw.choice(special) if draw.random() < 0.1 else draw.randrange(VOCABULARY) for _ in range(20)]
        source = whole.detokenizer(skip_special_tokens=skips)
        assert "".join(map(source.push, ids)) + source.flush() == whole.decode(ids, skips)


def test_a_copy_encodes_on_its_own_and_has_what_is_kept_of_tokens_in_common(folder):
    whole = tokenizer(folder)
    other = whole.copy()
    assert other.pretrained is not whole.pretrained
    assert other.encode("The quick brown fox") == whole.encode("The quick brown fox")
    # A thread that decodes adds to it at any time, which a deep copy does not survive.
    assert other._alone is whole._alone
    assert other._token_bytes is whole._token_bytes


def test_a_conversation_is_rendered_by_the_template_with_one_beginning(folder):
    codec = tokenizer(folder, chat_template=TEMPLATE)
    bos = codec.pretrained.bos_token
    assert codec.tokenize(Chat(TALK)).text == f"{bos}[user]Hello there[assistant]"
    assert codec.tokenize(Chat(TALK, arguments={"mood": "!"})).text == f"{bos}[user]Hello there[assistant]!"
    answer = {"role": "assistant", "content": "Oh"}
    assert codec.tokenize(Chat([*TALK, answer], continues=True)).text == f"{bos}[user]Hello there[assistant]Oh"
    assert codec.encode(Chat(TALK)).count(codec.pretrained.bos_token_id) == 1


def test_the_tokenizers_own_template_counts_where_none_is_given(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    assert tokenizer(folder).tokenize(Chat(TALK)).text.endswith("[user]Hello there[assistant]")
    assert tokenizer(folder, chat_template="{{ messages[0].content }}").tokenize(Chat(TALK)).text == "Hello there"


def test_a_template_may_be_a_file(folder):
    (folder / "chat.jinja").write_text("{{ messages[0].content }}")
    assert tokenizer(folder, chat_template=folder / "chat.jinja").tokenize(Chat(TALK)).text == "Hello there"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses them"),
        ("{{ ''.__class__.__mro__ }}", "refuses them"),
    ],
)
def test_what_a_template_refuses_is_the_requests_fault(folder, template, said):
    with pytest.raises(InvalidRequestError, match=said):
        tokenizer(folder, chat_template=template).encode(Chat(TALK))


def test_token_ids_are_taken_as_they_are(folder):
    codec = tokenizer(folder)
    assert codec.encode((5, 6)) == [5, 6]
    with pytest.raises(InvalidRequestError, match=f"does not know the prompt's token {VOCABULARY}"):
        codec.encode((5, VOCABULARY))


def test_what_the_makers_recommend(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    described = tokenizer(folder, max_length=100).describe()
    assert (described.defaults, described.max_length) == ({"temperature": 0.6, "top_k": 20}, 100)
    assert described.tokenizer["eos_token"] == "</s>"


def test_what_cannot_fit_is_refused_by_its_bytes(folder, monkeypatch):
    codec = tokenizer(folder, max_length=8)
    longest = max(len(token.encode()) for token in codec.pretrained.get_vocab())
    assert len(codec.encode("x" * 8 * longest, room=8)) >= 8
    monkeypatch.setattr(codec, "pretrained", None)  # it is not asked
    for refuse in (lambda prompt: codec.encode(prompt, room=8), codec.tokenize):
        with pytest.raises(InvalidRequestError, match=rf"^the prompt has {8 * longest + 1} bytes, and 8 tokens, of at"):
            refuse("x" * (8 * longest + 1))
