"""Tokens that stand for no text: those that end an answer, and those around a prompt."""

import pytest

pytest.importorskip("torch")

from mii_hpc.config import GenerateParamsConfig, ModelConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.engine.tokenizer import Tokenizer
from mii_hpc.errors import InvalidRequestError
from tests.engine.collect import make, running, submit
from tests.models import VOCABULARY, save_tokenizer, tiny_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    with running(make(model_name_or_path=str(folder))) as engine:
        yield engine


@pytest.fixture
def tokenizer(tmp_path):
    """One that puts its token of the beginning before every prompt."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    pretrained = AutoTokenizer.from_pretrained(tmp_path)
    pretrained.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(ModelConfig(tokenizer=pretrained), VOCABULARY, (1,))


GREEDY = {"do_sample": False, "max_new_tokens": 8, "ignore_eos": True}


def test_an_answer_ends_at_a_token_that_was_named(engine):
    whole = submit(engine, "Hello there", **GREEDY).wait().token_ids()
    third = whole[2]
    first = whole.index(third) + 1
    stopped = submit(engine, "Hello there", stop_token_ids=third, **GREEDY).wait()
    assert stopped.token_ids() == whole[:first]
    assert stopped.finish_reason() is GenerationFinishReason.STOP
    assert stopped.text() == engine.tokenizer.decode(whole[: first - 1])


def test_an_answer_does_not_end_there_before_its_minimum(engine):
    first = submit(engine, "Hello there", **GREEDY).wait().token_ids()[0]
    answer = submit(engine, "Hello there", stop_token_ids=[first], min_new_tokens=4, **GREEDY).wait().token_ids()
    assert len(answer) >= 4
    assert first not in answer[:4]


def test_a_token_that_the_model_does_not_know_is_refused(engine):
    with pytest.raises(InvalidRequestError, match=f"stop_token_ids={VOCABULARY}: the model knows {VOCABULARY} tokens"):
        submit(engine, "Hello there", stop_token_ids=[VOCABULARY]).wait()


def test_a_stop_string_may_be_a_special_token(tokenizer):
    assert tokenizer.ends(GenerateParamsConfig(stop="</s>", ignore_eos=True)) == {1}
    assert tokenizer.ends(GenerateParamsConfig(stop="text", stop_token_ids=7)) == {1, 7}


def test_special_tokens_are_in_the_text_where_asked_for(tokenizer):
    text = [*tokenizer.encode("hello", plain=True), 0]
    assert "".join(map(tokenizer.detokenizer().push, text)) == "hello"
    assert "".join(map(tokenizer.detokenizer(skip_special_tokens=False).push, text)) == "hello<s>"


def test_a_prompt_begins_with_its_special_token_once(tokenizer):
    plain = tokenizer.encode("hello", plain=True)
    assert tokenizer.encode("hello") == [0, *plain]
    assert tokenizer.encode("<s>hello") == [0, *plain]
    assert tokenizer.encode("<s><s>hello") == [0, 0, 0, *plain]
