def test_one_answer_comes_as_text(run, chat):
    assert run("generate", "chat", "to be or not").output == "to be or not \n"
    assert run("generate", "chat", "-", "--max-new-tokens", 3, input="to be").output == "to be to \n"


def test_several_answers_and_all_that_is_known_of_them(run, chat):
    assert run("generate", "chat", "a", "b").output == "a \nb \n"
    answers = run("generate", "chat", "a b", "--num-return-sequences", 2, "--logprobs", "--json").data
    assert [answer["generated_text"] for answer in answers] == ["a b ", "a b "]
    assert answers[0]["finish_reason"] == "stop"
    assert answers[0]["logprobs"] == [0.0, 0.0]


def test_a_stop_string_may_be_given_twice(run, chat):
    assert run("generate", "chat", "a b c d", "--stop", "x", "--stop", "c").output == "a b \n"
